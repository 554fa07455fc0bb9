"""Inner problems on any arrays: statuses, pytrees, precisions, autograd, and what is refused."""

import importlib.util

import array_api_strict
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
import scipy.sparse.linalg

import bilevel as bl
import bilevel_arrays as ba

SINGULAR = np.array([[1.0, 1.0], [1.0, 1.0]])
INDEFINITE = np.diag([1.0, -1.0])
TURN = np.array([[0.0, 1.0], [-1.0, 0.0]])
DEFINITE = {"symmetric": True, "positive_definite": True}
HILBERT = np.array([[1 / (i + j + 1) for j in range(8)] for i in range(8)])


def system(matrix, rhs, **options):
    return (
        lambda package: package.LinearSystem(matrix, np.asarray(rhs), **options),
        np.zeros(len(rhs)),
    )


def descent(slope):
    """Of ½ slope x², and its gradient."""

    def make(package):
        if package is bl:
            return bl.Minimization(lambda x, theta: 0.5 * slope * jnp.sum((x - 1) ** 2))
        return ba.Minimization(gradient=lambda x, theta: slope * (x - 1))

    return make, np.zeros(2)


ENDS = {
    "converged": (
        *system(np.diag([1.0, 2.0]), [1.0, 1.0]),
        bl.ConjugateGradient(),
        {},
        "CONVERGED",
    ),
    "budget": (*descent(1.0), bl.GradientDescent(0.1), {"budget": bl.Budget(3)}, "BUDGET"),
    "no iterations": (*descent(1.0), bl.GradientDescent(0.1), {"budget": bl.Budget(0)}, "BUDGET"),
    "diverged": (*descent(1.0), bl.GradientDescent(2.5), {"budget": bl.Budget(30)}, "DIVERGED"),
    "blown up": (*descent(9.0), bl.GradientDescent(2.5), {"budget": bl.Budget(99)}, "DIVERGED"),
    "indefinite": (*system(INDEFINITE, [1.0, 1.0]), bl.ConjugateGradient(), {}, "BREAKDOWN"),
    "not symmetric": (
        *system(TURN + np.eye(2), [1.0, 2.0], symmetric=None),
        bl.GMRES(),
        {},
        "CONVERGED",
    ),
    "skew": (*system(TURN, [1.0, 2.0]), bl.BiCGStab(), {}, "BREAKDOWN"),
    "singular": (*system(SINGULAR, [1.0, 0.0]), bl.GMRES(), {}, "BREAKDOWN"),
    "rounding": (
        *system(HILBERT, np.ones(8)),
        bl.Jacobi(weight=0.1),
        {"budget": bl.Budget(50)},
        "BUDGET",
    ),
    "recursive": (
        *system(HILBERT, np.ones(8)),
        bl.ConjugateGradient(),
        {"budget": bl.Budget(300, rtol=1e-14)},
        None,
    ),
    "not finite": (*system(np.diag([1.0, np.nan]), [1.0, 1.0]), bl.GMRES(), {}, "NONFINITE"),
    "zero": (*system(np.eye(2), [0.0, 0.0]), bl.GMRES(), {}, "CONVERGED"),
    "zero diagonal": (
        *system(np.array([[0.0, 1.0], [1.0, 0.0]]), [1.0, 1.0]),
        bl.ConjugateGradient(),
        {},
        None,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ENDS)
def test_a_solve_ends_as_it_does_in_jax(name):
    make, start, solver, settings, status = ENDS[name]
    expected = bl.solve(make(bl), None, jnp.asarray(start), solver=solver, **settings)
    found = ba.solve(make(ba), None, start, solver=solver, **settings)
    if status is not None:
        assert bl.Status(int(found.status)).name == status
    assert bl.Status(int(found.status)) == bl.Status(int(expected.status))
    if name != "recursive":  # of rounding it is made
        assert int(found.iterations) == int(expected.iterations)
        assert int(found.applications) == int(expected.applications)
        np.testing.assert_allclose(found.rate, expected.rate, rtol=1e-6)


def test_an_operator_that_nobody_called_symmetric_is_tried():
    pair = (lambda v: (TURN + np.eye(2)) @ v, lambda v: (TURN.T + np.eye(2)) @ v)
    solution = ba.solve(
        ba.LinearSystem(pair, np.ones(2)), None, np.zeros(2), solver=bl.ConjugateGradient()
    )
    assert bl.Status(int(solution.status)) == bl.Status.NOT_SYMMETRIC
    with pytest.raises(bl.IncompatibleError, match="its operator must be symmetric"):
        ba.solve(
            ba.LinearSystem(TURN, np.ones(2)), None, np.zeros(2), solver=bl.ConjugateGradient()
        )


def test_a_failed_solve_has_a_gradient_of_nan():
    def gradient_of(matrix, **budgets):
        problem = ba.LinearSystem(matrix, lambda t: t, vjp=lambda x, t, v: v)
        return ba.hypergradient(
            lambda x, t: x.sum(),
            problem,
            np.array([1.0, 0.0]),
            np.zeros(2),
            outer_gradient=lambda x, t: (np.ones(2), np.zeros(2)),
            **budgets,
        )

    failed = gradient_of(SINGULAR)
    assert bl.Status(int(failed.primal.status)).failed
    assert np.all(np.isnan(failed.gradient))
    idle = gradient_of(np.diag([1.0, 2.0]), adjoint_budget=bl.Budget(0))
    assert bl.Status(int(idle.adjoint.status)) == bl.Status.NOT_STARTED
    assert np.all(np.isnan(idle.gradient))
    assert "must not be used: the adjoint solve failed" in idle.diagnosis
    fine = gradient_of(np.diag([1.0, 2.0]))
    assert "was not estimated" in fine.diagnosis
    assert int(fine.cost.adjoint_iterations) == int(fine.adjoint.iterations) > 0


@pytest.mark.parametrize("solver", [bl.Anderson(), bl.FixedPointIteration(), bl.GMRES(restart=3)])
def test_unknowns_may_be_pytrees(solver):
    """x = ½ roll(x) + θ over two leaves, and the same as a linear system."""

    def mapped(x, theta):
        return {"a": 0.5 * x["b"].sum(0) + theta, "b": 0.25 * np.stack([x["a"], -x["a"]])}

    start = {"a": np.zeros(2), "b": np.zeros((2, 2))}
    if isinstance(solver, bl.GMRES):
        still = mapped(start, 1.0)

        def matvec(v):
            image = mapped(v, 0.0)
            return {name: v[name] - image[name] for name in v}

        problem = ba.LinearSystem((matvec, matvec), still)
    else:
        problem = ba.FixedPoint(mapped)
    solution = ba.solve(problem, 1.0, start, solver=solver)
    assert solution.diagnosis.startswith("CONVERGED")
    np.testing.assert_allclose(solution.value["a"], [1.0, 1.0], rtol=1e-9)
    np.testing.assert_allclose(solution.value["b"], [[0.25] * 2, [-0.25] * 2], rtol=1e-9)


@pytest.mark.parametrize("solver", [bl.Anderson(), bl.FixedPointIteration()])
def test_an_unknown_may_be_a_number(solver):
    evaluated = []

    def mapping(x, theta):
        evaluated.append(x)
        return theta * np.cos(x)

    problem = ba.FixedPoint(mapping)
    solution = ba.solve(problem, np.array(1.0), np.array(0.5), solver=solver)
    assert float(solution.value) == pytest.approx(0.7390851332, rel=1e-9)
    assert len(evaluated) == int(solution.applications)


@pytest.mark.parametrize("unit", [1.0, 1e-25, 1e25])
def test_single_precision_is_kept_whatever_the_units(unit):
    matrix = np.diag([1.0, 2.0, 4.0]).astype(np.float32)
    rhs = np.full(3, unit, np.float32)
    for solver in (bl.ConjugateGradient(), bl.GMRES(), bl.BiCGStab()):
        solution = ba.solve(
            ba.LinearSystem(matrix, rhs), None, np.zeros(3, np.float32), solver=solver
        )
        assert solution.diagnosis.startswith("CONVERGED")
        assert solution.value.dtype == np.float32
        np.testing.assert_allclose(solution.value, unit / np.diagonal(matrix), rtol=1e-4)
        assert float(solution.scale) == pytest.approx(3**0.5 * unit, rel=1e-6)


def test_histories_and_warm_starts():
    problem = ba.FixedPoint(lambda x, theta: 0.5 * x + theta, vjp=lambda x, t, v: (0.5 * v, v))
    settings = {"solver": bl.FixedPointIteration(), "budget": bl.Budget(3), "history": 5}
    solution = ba.solve(problem, 1.0, np.zeros(1), **settings)
    np.testing.assert_array_equal(solution.history, [1.0, 0.5, 0.25, 0.125, np.nan])
    result = ba.hypergradient(
        lambda x, t: x[0],
        problem,
        np.ones(1),
        np.zeros(1),
        outer_gradient=lambda x, t: (np.ones(1), np.zeros(1)),
        adjoint_guess=np.full(1, 2.0),  # the solution
        **settings,
    )
    assert (int(result.adjoint.iterations), result.gradient[0]) == (0, 2.0)


def test_operators_of_scipy_and_objects():
    matrix = scipy.sparse.csr_matrix(np.diag([2.0, 4.0]))
    for operator in (
        matrix,
        scipy.sparse.coo_array(matrix),
        scipy.sparse.linalg.aslinearoperator(matrix),
    ):
        problem = ba.LinearSystem(operator, np.ones(2))
        np.testing.assert_allclose(ba.solve(problem, None, np.zeros(2)).value, [0.5, 0.25])
    several = ba.solve(ba.LinearSystem(matrix, np.ones((2, 3))), None, np.zeros((2, 3)))
    np.testing.assert_allclose(several.value, [[0.5] * 3, [0.25] * 3])
    by_function = bl.ConjugateGradient(preconditioner=lambda v: v / np.array([2.0, 4.0]))
    solution = ba.solve(ba.LinearSystem(matrix, np.ones(2)), None, np.zeros(2), solver=by_function)
    assert int(solution.iterations) == 1


def overwritten(xp):
    def mapping(x, theta):
        x[0] = 0.0
        return 0.5 * x

    return lambda: ba.solve(ba.FixedPoint(mapping), None, xp.asarray([1.0, 2.0]))


def linear(operator, rhs=None, x0=None, **settings):
    rhs = np.ones(2) if rhs is None else rhs
    x0 = np.zeros(2) if x0 is None else x0
    return lambda: ba.solve(ba.LinearSystem(operator, rhs), None, x0, **settings)


def mapped(mapping=lambda x, theta: 0.5 * x, theta=None, x0=None, vjp=None, **settings):
    x0 = np.zeros(2) if x0 is None else x0
    return lambda: ba.solve(ba.FixedPoint(mapping, vjp=vjp), theta, x0, **settings)


def graded(problem, theta=1.0, **settings):
    settings = {"outer_gradient": lambda x, t: (np.ones(2), 0.0)} | settings
    return lambda: ba.hypergradient(lambda x, t: x.sum(), problem, theta, np.zeros(2), **settings)


HALF = ba.FixedPoint(lambda x, theta: 0.5 * x + theta)
MISUSES = {
    "written, NumPy": (overwritten(np), ValueError, r"FixedPoint: mapping\(x, theta\) writes into"),
    "written, strict": (overwritten(array_api_strict), ValueError, "writes into its argument"),
    "a problem of JAX": (
        lambda: ba.solve(bl.FixedPoint(lambda x, t: x), None, np.zeros(2)),
        TypeError,
        "problem must be one of bilevel_arrays",
    ),
    "arrays of JAX": (mapped(x0=jnp.zeros(2)), TypeError, "x0 is an array of JAX. Use bl.solve"),
    "no array": (mapped(x0=[1.0, 2.0]), TypeError, r"x0\[0\] must be an array of PyTorch"),
    "nothing": (mapped(x0={}), TypeError, "x0 must hold at least one array"),
    "integers": (
        mapped(x0=np.zeros(2, int)),
        TypeError,
        "must be of float32 or float64, got int64",
    ),
    "complex": (mapped(x0=np.zeros(2, complex)), TypeError, "Complex unknowns are for bl.solve"),
    "half": (mapped(x0=np.zeros(2, np.float16)), TypeError, "half precision holds no tolerance"),
    "two dtypes": (
        mapped(x0={"a": np.zeros(2), "b": np.zeros(2, np.float32)}),
        TypeError,
        r"the dtype of x0\['a'\] is float64 and that of x0\['b'\] float32",
    ),
    "two libraries": (
        mapped(x0=[np.zeros(2), array_api_strict.zeros(2)]),
        TypeError,
        r"the library of x0\[0\]",
    ),
    "theta of another library": (
        mapped(theta=[array_api_strict.zeros(2)]),
        TypeError,
        r"theta\[0\] is an array of array_api_strict and x0 of array_api_compat.numpy",
    ),
    "theta of another dtype": (
        mapped(theta={"k": np.zeros(2, np.float32)}),
        TypeError,
        r"theta\['k'\] is of float32 and x0 of float64",
    ),
    "shape": (
        mapped(lambda x, t: x[:1]),
        TypeError,
        r"mapping\(x, theta\) at x is float64\[1\], expected float64\[2\]",
    ),
    "structure": (mapped(lambda x, t: (x, x)), TypeError, "must have the structure of x0"),
    "another dtype": (
        linear(np.eye(2), np.ones(2, np.float32)),
        TypeError,
        r"the right-hand side at x is float32\[2\], expected float64\[2\]",
    ),
    "not square": (linear(np.ones((2, 3))), ValueError, r"must be square, got shape \(2, 3\)"),
    "another size": (linear(np.eye(3)), TypeError, "acts on one array of 3 entries"),
    "matrix of another library": (
        linear(
            scipy.sparse.eye_array(2).tocsr(), array_api_strict.ones(2), array_api_strict.zeros(2)
        ),
        TypeError,
        "give both in one library, on one device",
    ),
    "matrix of another dtype": (
        linear(np.eye(2, dtype=np.float32)),
        TypeError,
        "the matrix is of float32 and the unknown of float64",
    ),
    "no operator": (
        linear("A"),
        TypeError,
        "the operator must be a square matrix, dense or sparse",
    ),
    "solver of JAX": (
        linear(np.eye(2), solver=bl.Direct()),
        bl.IncompatibleError,
        "JAX's arrays alone",
    ),
    "unsuited": (mapped(solver=bl.Jacobi()), bl.IncompatibleError, "it needs a linear system"),
    "class": (mapped(solver=bl.Anderson), TypeError, r"solver must be of bilevel, such as bl\."),
    "a number": (mapped(budget=5), TypeError, r"budget must be of bilevel, such as bl.Budget"),
    "estimator": (
        mapped(estimator=bl.Unrolled()),
        bl.IncompatibleError,
        "Unrolled runs on JAX's arrays alone. Use bl.Implicit or bl.Neumann",
    ),
    "no estimator": (mapped(estimator="implicit"), TypeError, "estimator must be bl.Implicit"),
    "no step size": (
        linear(np.eye(2), estimator=bl.Neumann()),
        TypeError,
        r"Give bl.Neumann\(step_size=...\)",
    ),
    "no default": (
        lambda: ba.solve(ba.Minimization(gradient=lambda x, t: x), None, np.zeros(2)),
        TypeError,
        r"give solver=bl.GradientDescent\(step_size=...\)",
    ),
    "guess": (mapped(adjoint_guess=np.zeros(3)), TypeError, "adjoint_guess at x is"),
    "no gradient": (
        lambda: ba.solve(ba.Minimization(lambda x, t: x.sum()), None, np.zeros(2)),
        TypeError,
        "Give gradient=",
    ),
    "two": (
        lambda: ba.Minimization(lambda x, t: 0, gradient=lambda x, t: x),
        TypeError,
        r"give either objective\(x, theta\)",
    ),
    "signature": (lambda: ba.RootFinding(lambda x: x), TypeError, "function should take"),
    "no vjp": (graded(HALF), TypeError, r"have no automatic derivatives. Give vjp="),
    "no outer gradient": (
        graded(ba.FixedPoint(lambda x, t: x, vjp=lambda x, t, v: (v, 0.0)), outer_gradient=None),
        TypeError,
        r"outer_loss: .* Give outer_gradient=",
    ),
    "vjp of one part": (
        graded(ba.FixedPoint(lambda x, t: 0.5 * x + t, vjp=lambda x, t, v: v)),
        TypeError,
        r"vjp\(x, theta, v\) must return a pair",
    ),
    "vjp of another shape": (
        graded(ba.FixedPoint(lambda x, t: 0.5 * x + t, vjp=lambda x, t, v: (v[:1], 0.0))),
        TypeError,
        r"the first part of vjp\(x, theta, v\) at x is",
    ),
    "vjp of another structure": (
        graded(ba.FixedPoint(lambda x, t: 0.5 * x + t, vjp=lambda x, t, v: (0.5 * v, (0.0, 0.0)))),
        TypeError,
        "must have the structure of theta",
    ),
    "vjp of a linear system": (
        graded(
            ba.LinearSystem(np.eye(2), lambda t: t, vjp=lambda x, t, v: v.sum()),
            np.ones(2),
            outer_gradient=lambda x, t: (np.ones(2), np.zeros(2)),
        ),
        TypeError,
        r"LinearSystem: vjp\(x, theta, v\) at theta has shape \(\), expected \(2,\)",
    ),
    "outer gradient of another shape": (
        graded(
            ba.FixedPoint(lambda x, t: 0.5 * x + t, vjp=lambda x, t, v: (0.5 * v, v.sum())),
            outer_gradient=lambda x, t: (np.ones(2), np.ones(2)),
        ),
        TypeError,
        r"outer_gradient\(x, theta\) at theta has shape \(2,\), expected \(\)",
    ),
    "no transpose": (
        graded(ba.LinearSystem(lambda t: lambda v: 2 * v, np.ones(2), vjp=lambda x, t, v: 0.0)),
        TypeError,
        "the adjoint needs the transpose of the operator",
    ),
    "no scalar": (
        lambda: ba.hypergradient(lambda x, t: x, HALF, 1.0, np.zeros(2)),
        TypeError,
        r"outer_loss\(x, theta\) must return a real scalar, got shape \(2,\)",
    ),
    "no diagonal": (
        linear(
            (lambda v: 2 * v, lambda v: 2 * v),
            solver=bl.ConjugateGradient(preconditioner=bl.JacobiPreconditioner()),
        ),
        bl.IncompatibleError,
        "its operator has no diagonal",
    ),
    "preconditioner": (
        linear(np.eye(2), solver=bl.ConjugateGradient(preconditioner=lambda v: v[:1])),
        TypeError,
        r"preconditioner\(v\) at x is",
    ),
}


@pytest.mark.parametrize("name", MISUSES)
def test_misuse_is_refused_in_words(name):
    call, kind, message = MISUSES[name]
    with pytest.raises(kind, match=message):
        call()


@pytest.mark.skipif(importlib.util.find_spec("cupy") is None, reason="CuPy is not installed")
@pytest.mark.gpu
def test_devices_are_not_mixed():
    import cupy

    with pytest.raises(TypeError, match="theta is an array of"):
        mapped(theta=cupy.ones(2))()
