"""Inner problems in all their forms: pytrees, complex numbers, precisions, operators, mistakes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel as bl
from bilevel.testing import ConformanceError, check_inner_problem
from tests.core.cases import (
    EXAMPLES,
    N,
    definite_matrix,
    general_matrix,
    loss,
    mapping,
    rhs,
    root_residual,
)
from tests.core.compiling import jitted
from tests.marks import others_slow

THETA = EXAMPLES["ridge"].theta


@pytest.mark.parametrize(
    "name", others_slow(EXAMPLES, "convex", "indefinite", "general", "mapping", "root")
)
def test_the_table_s_problems_conform(name: str):
    example = EXAMPLES[name]
    off = example.x0 + jnp.linspace(0.3, 0.9, N)  # where nothing vanishes by accident
    checked = check_inner_problem(example.problem, example.theta, off)
    assert {"residual like x", "same under vmap", "derivative in x"} <= set(checked)


# ---------------------------------------------------------------------------------- pytrees


def tree_objective(x: Any, theta: Any) -> Any:
    """Coupled, so that the leaves are not solved one by one."""
    a, (b, c) = x["a"], x["rest"]
    coupling = jnp.sum(a) * c + jnp.sum(b[0] * a)
    squares = jnp.sum((a - theta["a"]) ** 2) + jnp.sum((b - theta["b"]) ** 2) + 2 * c**2
    return squares + 0.3 * coupling


TREE_THETA = {"a": jnp.array([1.0, -2.0]), "b": jnp.ones((3, 2))}
TREE_X0 = {"a": jnp.zeros(2), "rest": (jnp.zeros((3, 2)), jnp.zeros(()))}


def flat_solution(theta: Any) -> Any:
    flat, unravel = jax.flatten_util.ravel_pytree(TREE_X0)
    gradient = jax.grad(lambda v: tree_objective(unravel(v), theta))
    return unravel(-jnp.linalg.solve(jax.jacobian(gradient)(flat), gradient(flat)))


def tree_loss(x: Any) -> Any:
    return sum(jnp.sum(jnp.sin(leaf + 0.1)) for leaf in jax.tree.leaves(x))


TREE_SOLVERS: dict[str, Any] = {
    "default": lambda: None,
    "GradientDescent": lambda: bl.GradientDescent(0.3),
    "HeavyBall": lambda: bl.HeavyBall(0.3, 0.3),
    "Nesterov": lambda: bl.Nesterov(0.3, momentum=0.3),
    "LBFGS": bl.LBFGS,
    "ConjugateGradient": bl.ConjugateGradient,
    "MINRES": bl.MINRES,
    "GMRES": bl.GMRES,
    "BiCGStab": bl.BiCGStab,
    "Chebyshev": bl.Chebyshev,
}


@pytest.mark.parametrize("name", others_slow(TREE_SOLVERS, "GradientDescent", "GMRES", "LBFGS"))
def test_pytrees_of_any_shape_are_solved_and_differentiated(name: str):
    problem = bl.Minimization(tree_objective)

    def value(theta: Any) -> Any:
        solution = bl.solve(
            problem, theta, TREE_X0, solver=TREE_SOLVERS[name](), budget=bl.Budget(200, rtol=1e-11)
        )
        return tree_loss(solution.value), solution.value

    gradient, x = jitted(jax.grad(value, has_aux=True))(TREE_THETA)
    expected = jax.grad(lambda theta: tree_loss(flat_solution(theta)))(TREE_THETA)
    for got, want in (x, flat_solution(TREE_THETA)), (gradient, expected):
        assert jax.tree.structure(got) == jax.tree.structure(want)
        jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-7, atol=1e-9), got, want)


# ---------------------------------------------------------------------------------- complex

HERMITIAN = np.array([[2.0, 0.5 - 0.5j, 0], [0.5 + 0.5j, 3.0, 0.2j], [0, -0.2j, 1.5]])
GENERAL = HERMITIAN + np.array([[0, 0.3j, 0], [0, 0, 0.2], [0.1j, 0, 0]])
COMPLEX_RHS = np.array([1.0 + 1j, -2.0, 0.5j])


def complex_loss(x: Any) -> Any:
    return jnp.sum(jnp.abs(x - (0.2 + 0.1j)) ** 2)


@pytest.mark.parametrize(
    "name",
    others_slow(
        ["ConjugateGradient", "MINRES", "BiCGStab", "GMRES", "Direct", "SteepestDescent"],
        "BiCGStab",
        "Direct",
    ),
)
@pytest.mark.parametrize("estimator", ["Implicit", "Unrolled"])
def test_complex_linear_systems_differentiate_in_complex_theta(name: str, estimator: str):
    hermitian = name in {"ConjugateGradient", "MINRES", "SteepestDescent"}
    matrix = HERMITIAN if hermitian else GENERAL
    problem = bl.LinearSystem(matrix, lambda theta: COMPLEX_RHS * theta)
    theta = jnp.array([1.0 + 0.5j, 0.3 - 1j, 2.0])

    def value(theta: Any) -> Any:
        solution = bl.solve(
            problem,
            theta,
            jnp.zeros(3, complex),
            solver=getattr(bl, name)(),
            estimator=getattr(bl, estimator)(),
            budget=bl.Budget(60, rtol=1e-12),
        )
        return complex_loss(solution.value)

    got = jitted(jax.grad(value))(theta)
    expected = jax.grad(lambda t: complex_loss(jnp.linalg.solve(matrix, COMPLEX_RHS * t)))(theta)
    np.testing.assert_allclose(got, expected, rtol=1e-8)


def test_forward_mode_differentiates_in_complex_theta_as_reverse_mode_does():
    problem = bl.LinearSystem(HERMITIAN, lambda theta: COMPLEX_RHS * theta["rhs"] * theta["scale"])
    theta = {"rhs": jnp.array([1.0 + 0.5j, 0.3 - 1j, 2.0]), "scale": jnp.asarray(1.3)}

    def gradient(mode: str) -> Any:
        return bl.hypergradient(
            # Not a function of |theta| alone: the sign of the imaginary part counts.
            lambda x, theta: complex_loss(x) + jnp.sum(theta["rhs"] ** 2).imag,
            problem,
            theta,
            jnp.zeros(3, complex),
            solver=bl.Richardson(0.3),
            estimator=bl.Unrolled(mode=mode),
            budget=bl.Budget(5),
            error=False,
        ).gradient

    forward, reverse = gradient("forward"), gradient("reverse")
    for name, leaf in reverse.items():
        assert forward[name].dtype == leaf.dtype
        np.testing.assert_allclose(forward[name], leaf, rtol=1e-12)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_is_refused_by_name(dtype: Any):
    problem = bl.Minimization(lambda x, theta: jnp.sum((x - theta) ** 2))
    with pytest.raises(TypeError, match=r"x0 is b?float16, .* x0.astype\(jnp.float32\)"):
        bl.solve(problem, jnp.ones(2, dtype), jnp.zeros(2, dtype))


def test_a_real_parameter_of_a_complex_operator_differentiates():
    problem = bl.LinearSystem(lambda theta: GENERAL + theta * 1j * np.eye(3), COMPLEX_RHS)

    def value(theta: Any) -> Any:
        return complex_loss(bl.solve(problem, theta, jnp.zeros(3, complex)).value)

    def exact(theta: Any) -> Any:
        return complex_loss(jnp.linalg.solve(GENERAL + theta * 1j * jnp.eye(3), COMPLEX_RHS))

    np.testing.assert_allclose(jitted(jax.grad(value))(0.4), jax.grad(exact)(0.4), rtol=1e-9)


@pytest.mark.parametrize(
    "name", others_slow(["default", "GradientDescent", "LBFGS"], "GradientDescent", "LBFGS")
)
def test_complex_unknowns_of_a_minimisation(name: str):
    """Not holomorphic: the Hessian is linear over the reals only."""

    def objective(x: Any, theta: Any) -> Any:
        square = x.real**2 + x.imag**2
        return jnp.sum(square + 0.4 * (x**2).real - 2 * (jnp.conj(theta) * x).real)

    theta = jnp.array([1.0 + 2j, -0.5j])

    def value(theta: Any) -> Any:
        x0 = jnp.zeros(2, complex)
        solution = bl.solve(bl.Minimization(objective), theta, x0, solver=TREE_SOLVERS[name]())
        return complex_loss(solution.value)

    def exact(theta: Any) -> Any:  # (1 + 0.4) Re x = Re θ, (1 - 0.4) Im x = Im θ
        return complex_loss(theta.real / 1.4 + 1j * theta.imag / 0.6)

    np.testing.assert_allclose(jitted(jax.grad(value))(theta), jax.grad(exact)(theta), rtol=1e-8)


# ------------------------------------------------------------------------- single precision


def narrow(function: Any) -> Any:
    """The table's data are NumPy arrays of double precision."""
    return lambda *arguments: function(*arguments).astype(jnp.float32)


IN_SINGLE: dict[str, Any] = {
    "ridge": EXAMPLES["ridge"].problem,
    "convex": EXAMPLES["convex"].problem,
    "definite": bl.LinearSystem(narrow(definite_matrix), narrow(rhs), positive_definite=True),
    "mapping": bl.FixedPoint(narrow(mapping)),
    "root": bl.RootFinding(narrow(root_residual)),
    "lasso": EXAMPLES["lasso"].problem,
}


@pytest.mark.parametrize("name", others_slow(IN_SINGLE, "ridge", "mapping", "root"))
def test_single_precision_stays_single_precision(name: str):
    """With double precision enabled, as it is here: nothing widens on the way."""
    example = EXAMPLES[name]
    theta, x0 = example.theta.astype(jnp.float32), example.x0.astype(jnp.float32)
    problem = IN_SINGLE[name]

    def value(theta: Any) -> Any:
        solution = bl.solve(problem, theta, x0)
        return loss(solution.value, theta).astype(jnp.float32), solution

    gradient, solution = jitted(jax.grad(value, has_aux=True))(theta)
    floats = [leaf for leaf in jax.tree.leaves(solution) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    assert {leaf.dtype.name for leaf in floats} == {"float32"}
    assert gradient.dtype == jnp.float32
    assert int(solution.status) in (bl.Status.CONVERGED, bl.Status.ROUNDING)
    np.testing.assert_allclose(gradient, example.hypergradient, rtol=2e-2, atol=2e-3)


# ---------------------------------------------------------------------------- operator forms


class Tridiagonal:
    """An operator object of nobody's class."""

    def __init__(self, theta: Any):
        self.matrix = general_matrix(theta)

    def matvec(self, v: Any) -> Any:
        return self.matrix @ v

    def rmatvec(self, v: Any) -> Any:
        return self.matrix.T @ v

    def diagonal(self) -> Any:
        return jnp.diagonal(self.matrix)


FORMS: dict[str, Any] = {
    "matrix": general_matrix,
    "matvec": lambda theta: lambda v: general_matrix(theta) @ v,
    "pair": lambda theta: (
        lambda v: general_matrix(theta) @ v,
        lambda v: general_matrix(theta).T @ v,
    ),
    "object": Tridiagonal,
    "LinearOperator": lambda theta: bl.LinearOperator(lambda v: general_matrix(theta) @ v),
}


@pytest.mark.parametrize("form", FORMS)
def test_operators_in_every_form_give_the_same_hypergradient(form: str):
    problem = bl.LinearSystem(FORMS[form], rhs)

    def value(theta: Any) -> Any:
        return loss(bl.solve(problem, theta, jnp.zeros(N)).value, theta)

    got = jitted(jax.grad(value))(THETA)
    np.testing.assert_allclose(got, EXAMPLES["general"].hypergradient, rtol=1e-8)


def test_a_matvec_is_never_made_dense():
    """The default solver of a system of 50,000 unknowns allocates vectors, no matrix."""
    size = 50_000
    problem = bl.LinearSystem(
        lambda theta: lambda v: (2 + theta) * v - 0.5 * jnp.roll(v, 1) - 0.5 * jnp.roll(v, -1),
        jnp.ones(size),
        positive_definite=True,
    )

    def value(theta: Any) -> Any:
        return jnp.sum(bl.solve(problem, theta, jnp.zeros(size)).value)

    compiled = jitted(jax.grad(value)).lower(1.0).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 100 * 8 * size


def test_an_operator_of_scipy_is_refused_with_the_way_out():
    scipy_sparse = pytest.importorskip("scipy.sparse")
    with pytest.raises(TypeError, match=r"bilevel_pde.from_scipy.*toarray\(\)"):
        bl.LinearSystem(scipy_sparse.identity(3, format="csr"), np.ones(3))


# ------------------------------------------------------------------------ problems of one's own


class Cube(bl.InnerProblem):
    coefficient: Any

    def residual(self, x: Any, theta: Any) -> Any:
        return self.coefficient * x**3 - theta


class Structural:
    symmetric = True

    def residual(self, x: Any, theta: Any) -> Any:
        return 2 * x**3 - theta


@pytest.mark.parametrize(
    "problem",
    [pytest.param(Cube(2.0), marks=pytest.mark.slow), Structural()],
    ids=["subclass", "structural"],
)
def test_problems_of_one_s_own_are_solved_and_differentiated(problem: Any):
    def value(theta: Any) -> Any:
        return jnp.sum(bl.solve(problem, theta, jnp.ones(2)).value)

    theta = jnp.array([2.0, 16.0])
    np.testing.assert_allclose(jitted(value)(theta), 3.0, rtol=1e-9)
    expected = (theta / 2) ** (-2 / 3) / 6
    np.testing.assert_allclose(jitted(jax.grad(value))(theta), expected, rtol=1e-9)
    assert "derivative in x" in check_inner_problem(problem, theta, jnp.array([0.5, 1.5]))


def test_fields_of_a_subclass_differentiate():
    def value(coefficient: Any) -> Any:
        return bl.solve(Cube(coefficient), 16.0, 1.0).value

    np.testing.assert_allclose(jitted(jax.grad(value))(2.0), -2.0 / 6.0, rtol=1e-8)


# ---------------------------------------------------------------------------------- mistakes


def one(x: Any, theta: Any) -> Any:
    return x - theta


def wrong(problem: Any, theta: Any = 1.0, x0: Any = None, **options: Any) -> Any:
    return lambda: bl.solve(problem, theta, jnp.zeros(3) if x0 is None else x0, **options)


MISTAKES: dict[str, tuple[Any, type[Exception], str]] = {
    "a function for a problem": (wrong(one), TypeError, "Wrap a function in Minimization"),
    "a class for a problem": (wrong(Structural), TypeError, r"Write Structural\(\.\.\.\)"),
    "a class for a solver": (wrong(Structural(), solver=bl.Newton), TypeError, r"solver=Newton\("),
    "a number for a budget": (
        wrong(Structural(), budget=10),
        TypeError,
        r"Write budget=Budget\(iterations=10\)",
    ),
    "an objective with a shape": (
        wrong(bl.Minimization(one)),
        TypeError,
        r"must return a real scalar, got shape \(3,\)",
    ),
    "a complex objective": (
        wrong(bl.Minimization(lambda x, theta: 1j * jnp.sum(x))),
        TypeError,
        "real scalar",
    ),
    "a residual of another shape": (
        wrong(bl.RootFinding(lambda x, theta: x[:2])),
        TypeError,
        r"shape \(2,\), expected \(3,\)",
    ),
    "a residual of another structure": (
        wrong(bl.RootFinding(lambda x, theta: (x, x))),
        TypeError,
        "structure of x0",
    ),
    "a residual of another dtype": (
        wrong(bl.RootFinding(one), 1.0 + 0j),
        TypeError,
        "complex128, but x0 is float64",
    ),
    "integers for a start": (
        wrong(Structural(), x0=jnp.zeros(3, int)),
        TypeError,
        "x0 must be a float or complex array, got int64",
    ),
    "words for a start": (wrong(Structural(), x0="zero"), TypeError, "x0 must be a float"),
    "nothing for a start": (wrong(Structural(), x0=()), TypeError, "at least one array"),
    "a matrix that is not square": (
        wrong(bl.LinearSystem(np.ones((3, 2)), np.ones(3))),
        ValueError,
        r"must be square, got shape \(3, 2\)",
    ),
    "a right-hand side of another size": (
        wrong(bl.LinearSystem(np.eye(3), np.ones(2))),
        TypeError,
        "shape|incompatible|size",
    ),
    "a number for an operator": (
        lambda: bl.LinearSystem(3.0, np.ones(3)),
        TypeError,
        "operator must be a function of theta",
    ),
    "a string from an operator": (
        wrong(bl.LinearSystem(lambda theta: "matrix", np.ones(3))),
        TypeError,
        "square matrix, a matvec function",
    ),
    "fidelity and budget at once": (
        wrong(Structural(), fidelity=bl.Fidelity(bl.Budget(3)), budget=bl.Budget(3)),
        TypeError,
        "fidelity already holds budget",
    ),
    "a guess of another structure": (
        lambda: jax.grad(
            lambda theta: jnp.sum(
                bl.solve(
                    EXAMPLES["definite"].problem,
                    theta,
                    jnp.zeros(N),
                    adjoint_guess=(jnp.zeros(N), jnp.zeros(N)),
                ).value
            )
        )(THETA),
        (TypeError, ValueError),  # pyright: ignore[reportAssignmentType]
        "adjoint_guess",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named_with_the_way_out(mistake: str):
    make, error, words = MISTAKES[mistake]
    with pytest.raises(error, match=words):
        make()


def test_the_default_solver_suits_the_kind_and_size_of_the_problem():
    """Small ones are solved by factorisation: at most a few iterations to rounding."""
    for name in ("ridge", "definite", "indefinite", "general"):
        example = EXAMPLES[name]
        solution = bl.solve(example.problem, example.theta, example.x0)
        assert int(solution.iterations) <= 2
        np.testing.assert_allclose(solution.value, example.solution(example.theta), rtol=1e-9)


def test_declarations_that_are_not_true_are_found_by_the_kit():
    problem = bl.LinearSystem(general_matrix, rhs, symmetric=True)
    with pytest.raises(ConformanceError, match="symmetric"):
        check_inner_problem(problem, THETA, jnp.zeros(N))
    shifted = bl.LinearSystem(
        lambda theta: definite_matrix(theta) - 3 * jnp.eye(N), rhs, positive_definite=True
    )
    with pytest.raises(ConformanceError, match="positive definite"):
        check_inner_problem(shifted, THETA, jnp.zeros(N))


@pytest.mark.parametrize(
    "solver",
    [
        bl.GradientDescent(0.9),
        bl.Richardson(0.9),
        bl.Jacobi(),
        pytest.param(bl.SteepestDescent(), marks=pytest.mark.slow),
        pytest.param(bl.Chebyshev(0.01, 2.01), marks=pytest.mark.slow),
    ],
    ids=lambda solver: type(solver).__name__,
)
def test_the_default_budget_is_enough_for_few_ill_conditioned_unknowns(solver: Any):
    # A condition number of 201 in two unknowns: it is that which takes steps, not the size.
    matrix = np.array([[1.01, 1.0], [1.0, 1.01]])
    rhs = np.array([1.0, -0.5])
    problem: Any = bl.LinearSystem(matrix, rhs)
    if isinstance(solver, bl.GradientDescent):
        problem = bl.Minimization(lambda x, _: 0.5 * jnp.vdot(x, matrix @ x) - jnp.vdot(rhs, x))
    solution = bl.solve(problem, None, jnp.zeros(2), solver=solver)
    assert int(solution.status) == bl.Status.CONVERGED
    np.testing.assert_allclose(solution.value, np.linalg.solve(matrix, rhs), rtol=1e-7)
