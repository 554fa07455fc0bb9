"""What goes wrong inside somebody else's code shows: errors, statuses, and gradients of NaN."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import lineax
import numpy as np
import optimistix
import pytest
from scipy.sparse.linalg import LinearOperator
from sklearn.linear_model import Lasso

import bilevel as bl
import bilevel_solvers as bs
from tests.libraries.cases import FEATURES, PROBLEMS, TARGETS, THETA, X0, coefficients, jaxopt

ROOT = PROBLEMS["root"][0]
MINIMUM = PROBLEMS["minimum"][0]
NAMES = [name for name in bs.__all__ if name not in {"BlackBox", "Run"} and name[0] != "_"]


def solved(problem, solver, theta=THETA, x0=X0, **budget):
    """The solution, and the gradient of its sum."""

    def total(theta):
        solution = bl.solve(problem, theta, x0, solver=solver, **budget)
        return jnp.sum(solution.value), solution

    gradient, solution = jax.grad(total, has_aux=True)(theta)
    return solution, gradient


def test_a_host_function_that_raises_is_heard():
    def broken(problem, x0, iterations, rtol):
        msg = "the licence server is asleep"
        raise ConnectionError(msg)

    with pytest.raises(jax.errors.JaxRuntimeError, match="the licence server is asleep"):
        bl.solve(ROOT, THETA, X0, solver=bs.host(broken)).value.block_until_ready()


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (np.zeros(2), r"must return x like x0.*\(3,\).*\(2,\)"),
        ({"x": np.zeros(3)}, "must return x like x0"),
        (np.zeros(3, complex), "complex128"),
        (np.array(["a", "b", "c"]), "<U1"),
        (None, "must return x like x0"),
    ],
)
def test_a_host_function_that_returns_something_else_is_told(answer, said):
    def other(problem, x0, iterations, rtol):
        return answer

    with pytest.raises(jax.errors.JaxRuntimeError, match=said):
        bl.solve(ROOT, THETA, X0, solver=bs.host(other)).value.block_until_ready()


@pytest.mark.parametrize(
    ("answer", "status"),
    [(np.nan, bl.Status.NONFINITE), (7.0, bl.Status.STOPPED), (1e30, bl.Status.DIVERGED)],
)
def test_a_host_function_that_lies_is_caught(answer, status):
    def liar(problem, x0, iterations, rtol):
        return np.full(3, answer), 1

    solution, gradient = solved(ROOT, bs.host(liar))
    assert int(solution.status) == status
    assert np.isnan(gradient).all()


def test_linear_algebra_that_fails_on_the_host_is_a_status():
    def singular(problem, x0, iterations, rtol):
        return np.linalg.solve(np.zeros((3, 3)), x0)

    solution, gradient = solved(ROOT, bs.host(singular))
    assert int(solution.status) == bl.Status.NONFINITE
    assert np.isnan(gradient).all()


def test_what_a_host_function_gets_is_what_was_asked_for():
    seen = {}

    def watching(problem, x0, iterations, rtol):
        seen.update(theta=problem.theta, x0=x0, iterations=iterations, rtol=rtol)
        seen.update(residual=problem.residual(x0), tolerance=problem.tolerance)
        seen.update(objective=problem.objective(x0))
        return x0

    budget = bl.Budget(iterations=17, rtol=1e-3)
    x0 = {"a": jnp.ones(2), "b": jnp.array(2.0)}
    problem = bl.Minimization(lambda x, t: 0.5 * jnp.sum((x["a"] - t) ** 2) + x["b"] ** 2)
    solution = bl.solve(problem, jnp.array(3.0), x0, solver=bs.host(watching), budget=budget)
    solution.value["a"].block_until_ready()
    assert seen["theta"] == 3.0
    assert isinstance(seen["theta"], np.ndarray)
    assert seen["iterations"] == 17
    assert seen["rtol"] == pytest.approx(1e-3)
    assert seen["tolerance"] == pytest.approx(1e-3 * float(solution.scale))
    np.testing.assert_allclose(seen["residual"]["a"], [-2.0, -2.0])
    np.testing.assert_allclose(seen["residual"]["b"], 4.0)
    assert seen["objective"] == pytest.approx(8.0)


def test_nan_in_the_operator_is_no_success_of_lineax():
    problem = bl.LinearSystem(lambda t: t * jnp.eye(3), jnp.ones(3), symmetric=True)
    solver = bs.lineax(lineax.CG(rtol=1e-6, atol=1e-6))
    solution, gradient = solved(problem, solver, jnp.array(jnp.nan))
    assert int(solution.status) == bl.Status.NONFINITE
    assert np.isnan(gradient)


@pytest.mark.parametrize("make", [lambda: bs.scipy_sparse("splu"), lambda: bs.scipy_sparse("cg")])
def test_a_singular_matrix_is_a_failure(make):
    ones = jnp.ones((3, 3))
    problem = bl.LinearSystem(lambda t: t * ones, jnp.arange(3.0), symmetric=True)
    solution, gradient = solved(problem, make(), jnp.array(1.0))
    assert bl.Status(int(solution.status)).failed
    assert np.isnan(gradient)


@pytest.mark.slow
def test_another_objective_than_the_estimators_is_found_out():
    """Lasso's objective has the mean of squares: with the sum, the penalty is another one."""

    def objective(w, theta):
        return 0.5 * jnp.sum((FEATURES @ w - TARGETS) ** 2)

    problem = bl.CompositeMinimization(objective, bl.L1(lambda theta: theta))
    wrong, right = (
        bs.sklearn(
            Lasso(fit_intercept=False),
            FEATURES,
            TARGETS,
            parameters=lambda theta, n=factor: {"alpha": float(theta) / n},
            solution=coefficients,
        )
        for factor in (1, len(TARGETS))
    )
    solution, gradient = solved(problem, wrong, jnp.array(2.0))
    assert int(solution.status) == bl.Status.STOPPED
    assert np.isnan(gradient)
    solution, gradient = solved(problem, right, jnp.array(2.0), budget=bl.Budget(rtol=1e-8))
    assert int(solution.status) == bl.Status.CONVERGED
    expected = solved(problem, None, jnp.array(2.0))[1]
    np.testing.assert_allclose(gradient, expected, rtol=1e-6)


def test_a_cap_is_kept_in_the_librarys_own_iterations():
    rows = 40
    matrix = np.diag(np.linspace(1.0, 100.0, rows)) + np.diag(np.ones(rows - 1), 1)
    problem = bl.LinearSystem(jnp.asarray(matrix + matrix.T), jnp.ones(rows))
    calls = []

    def preconditioner(matrix):
        calls.append(matrix.shape)
        return LinearOperator(matrix.shape, matvec=np.ravel, dtype=float)

    solver = bs.scipy_sparse("gmres", preconditioner=preconditioner, restart=5)
    solve = jax.jit(
        lambda cap: bl.solve(
            problem, None, jnp.zeros(rows), solver=solver, budget=bl.Budget(iterations=cap)
        )
    )
    norms = [float(solve(cap).residual_norm) for cap in (1, 4, 7, 12)]
    counts = [int(solve(cap).iterations) for cap in (1, 4, 7, 12)]
    assert counts == [1, 4, 7, 12]
    assert norms == sorted(norms, reverse=True)
    assert norms[3] < 0.9 * norms[0]
    assert solve._cache_size() == 1
    assert set(calls) == {(rows, rows)}


def test_the_rate_of_a_run_is_its_mean_one():
    rows = 30
    problem = bl.LinearSystem(jnp.diag(jnp.linspace(1.0, 50.0, rows)), jnp.ones(rows))
    budget = bl.Budget(iterations=10)
    solver = bs.scipy_sparse("cg")
    solution = bl.solve(problem, None, jnp.zeros(rows), solver=solver, budget=budget)
    mean = (float(solution.residual_norm) / float(solution.scale)) ** (1 / 10)
    assert int(solution.iterations) == 10
    assert float(solution.rate) == pytest.approx(mean, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ProjectedGradient", "LBFGSB"])
def test_a_penalty_is_not_taken_for_a_constraint(name):
    solver = bs.jaxopt(getattr(jaxopt, name))
    problem, theta, x0 = PROBLEMS["sparse"]
    solution = bl.solve(problem, theta, x0, solver=solver, budget=bl.Budget(iterations=5))
    assert int(solution.status) == bl.Status.BREAKDOWN


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda: bs.jaxopt(jaxopt.Bisection, lower=-4.0, upper=4.0), "one root"),
        (
            lambda: bs.optimistix(optimistix.Bisection(1e-9, 1e-9), lower=-4, upper=4),
            "one root",
        ),
        (lambda: bs.optimistix(optimistix.NelderMead(1e-9, 1e-9)), "minimum"),
    ],
)
def test_iterates_that_move_by_comparisons_have_no_derivative_rather_than_zero(make, kind):
    unrolled = {"estimator": bl.Unrolled(max_iterations=8), "budget": bl.Budget(iterations=3)}
    problem, theta, x0 = PROBLEMS[kind]
    _, gradient = solved(problem, make(), theta, x0, **unrolled)
    assert np.isnan(gradient).all()


@pytest.mark.slow
def test_a_solver_that_reverse_mode_does_not_go_through_says_so():
    problem, theta, x0 = PROBLEMS["box"]
    unrolled = {"estimator": bl.Unrolled(max_iterations=8), "budget": bl.Budget(iterations=3)}
    with pytest.raises(TypeError, match=r"LBFGSB.*Use Implicit"):
        solved(problem, bs.jaxopt(jaxopt.LBFGSB), theta, x0, **unrolled)
    for search in ("hager-zhang", "zoom"):
        searched = bs.jaxopt(jaxopt.LBFGS, linesearch=search)
        with pytest.raises(TypeError, match=rf"{search}.*Use Implicit"):
            solved(*PROBLEMS["minimum"][:1], searched, **unrolled)


def test_an_adjoint_that_fails_does_not_make_the_error_estimate_run_for_ever():
    # Its norm is infinite in single precision, and no run comes any closer.
    values = jnp.linspace(-1.0, 1.0, 20, dtype=jnp.float32)
    problem = bl.LinearSystem(
        lambda t: jnp.diag(values) + 0 * t,
        lambda t: jnp.ones(20, jnp.float32) * (1 + t),
        symmetric=True,
    )
    budget = bl.Budget(iterations=5, rtol=1e-5)
    result = bl.hypergradient(
        lambda x, _: jnp.sum(x**2),
        problem,
        jnp.float32(0.3),
        jnp.zeros(20, jnp.float32),
        solver=bs.lineax(lineax.CG(1e-6, 1e-6)),
        budget=budget,
        adjoint_budget=budget,
    )
    assert int(result.adjoint.status) >= bl.Status.DIVERGED
    assert np.isnan(result.gradient)


@pytest.mark.parametrize("weight", [1e-3, 5.0])
def test_penalties_of_any_weight_are_no_constraints(weight):
    curvature = jnp.array([1.0, 3.0])
    problem = bl.CompositeMinimization(
        lambda x, t: 0.5 * jnp.sum(curvature * (x - 10 * t) ** 2), bl.L1(weight)
    )
    solver = bs.jaxopt(jaxopt.ProjectedGradient)
    solution = bl.solve(problem, jnp.ones(2), jnp.zeros(2), solver=solver)
    assert int(solution.status) == bl.Status.BREAKDOWN


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: bs.scipy_minimize("L-BFGS-B", foo=1e-3), "foo is not among the options"),
        (lambda: bs.scipy_minimize("Newton-CG", bounds=((0, 1),)), "bounds is not among"),
        (lambda: bs.scipy_root("krylov", foo=1e-3), "foo is not among the options"),
        (lambda: bs.scipy_sparse("cg", foo=1), "foo is not among the options"),
        (lambda: bs.scipy_sparse("splu", foo=1), "foo is not among the options"),
        (lambda: bs.pyamg(foo=1), "foo is not among the options"),
        (lambda: bs.pyamg(cycle="Q"), "cycle must be one of V, W, F, AMLI, got 'Q'"),
        (lambda: bs.pyamg(accel="zzz"), "accel must be a method of pyamg.krylov"),
        (lambda: bs.optimistix(optimistix.Bisection(1e-3, 1e-3), lowr=1), "did you mean lower"),
        (lambda: bs.optimistix(optimistix.Bisection(1e-3, 1e-3)), "needs lower and upper"),
    ],
)
def test_misspelt_options_are_refused_at_once(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_what_a_host_function_raises_is_shown_whatever_it_is():
    def divide(problem, x, iterations, rtol):
        del problem, iterations, rtol
        return x * (1 // 0)

    problem = bl.RootFinding(lambda x, theta: x - theta)
    with pytest.raises(jax.errors.JaxRuntimeError, match="ZeroDivisionError"):
        jax.block_until_ready(bl.solve(problem, 1.0, 2.0, solver=bs.host(divide)).value)


@pytest.mark.parametrize("count", [3.0, np.int32(3), np.array(3), 10**6])
def test_counts_of_any_kind_are_read_and_kept_below_the_cap(count):
    problem = bl.RootFinding(lambda x, theta: x - theta)
    solver = bs.host(lambda problem, x, iterations, rtol: (problem.theta, count))
    solution = bl.solve(problem, 1.0, 2.0, solver=solver, budget=bl.Budget(iterations=5))
    assert int(solution.iterations) == min(int(count), 5)


def test_an_unknown_theta_is_asked_for():
    class Own(bl.InnerProblem):
        def residual(self, x, theta):
            return x - theta

        def at(self, theta):
            bound = bl.RootFinding(lambda x, t: x - t).at(theta)
            return dataclasses.replace(bound, theta=None)

    solver = bs.sklearn(Lasso(), FEATURES, TARGETS, solution=coefficients)
    with pytest.raises(bl.IncompatibleError, match="theta=theta"):
        bl.solve(Own(), THETA, X0, solver=solver)


@pytest.mark.parametrize(
    ("make", "problem", "said"),
    [
        (lambda: bs.jaxopt(jaxopt.LBFGS), ROOT, "jaxopt.LBFGS cannot solve this RootFinding"),
        (
            lambda: bs.jaxopt(jaxopt.ProximalGradient),
            MINIMUM,
            "jaxopt.ProximalGradient cannot solve this Minimization.*CompositeMinimization",
        ),
        (lambda: bs.optimistix(optimistix.BFGS(1e-6, 1e-6)), ROOT, r"optimistix\.BFGS cannot"),
        (lambda: bs.scipy_minimize("BFGS"), ROOT, r"scipy_minimize\('BFGS'\) cannot"),
        (lambda: bs.lineax(lineax.LU()), ROOT, r"lineax\.LU cannot"),
        (bs.pyamg, MINIMUM, "pyamg.* cannot"),
    ],
)
def test_a_wrong_pairing_is_refused_under_the_librarys_name(make, problem, said):
    with pytest.raises(bl.IncompatibleError, match=said):
        bl.solve(problem, THETA, X0, solver=make())


@pytest.mark.parametrize(
    ("make", "error", "said"),
    [
        (lambda: bs.jaxopt(3), TypeError, "a solver of jaxopt"),
        (lambda: bs.jaxopt(jaxopt.LBFGS, histry=3), TypeError, "histry.*history_size"),
        (lambda: bs.jaxopt(jaxopt.LBFGS(None), maxls=3), TypeError, "settings.*go with a class"),
        (lambda: bs.jaxopt(jaxopt.ScipyMinimize), bl.IncompatibleError, "scipy_minimize"),
        (lambda: bs.jaxopt(jaxopt.BoxOSQP), bl.IncompatibleError, "quadratic program"),
        (lambda: bs.optimistix(optimistix.BFGS), TypeError, r"Write optimistix\.BFGS\("),
        (lambda: bs.optimistix(jaxopt.LBFGS), TypeError, "iterative solver of optimistix"),
        (lambda: bs.lineax(lineax.CG), TypeError, r"Write lineax\.CG"),
        (lambda: bs.optax(3), TypeError, "GradientTransformation"),
        (lambda: bs.scipy_minimize("NEWTON"), ValueError, "must be one of BFGS"),
        (lambda: bs.scipy_minimize(maxiter=3), ValueError, "the budget decides"),
        (lambda: bs.scipy_root("newton"), ValueError, "must be one of hybr"),
        (lambda: bs.scipy_sparse("lu"), ValueError, "must be one of cg"),
        (lambda: bs.scipy_sparse("splu", preconditioner=lambda matrix: 0), ValueError, "direct"),
        (lambda: bs.pyamg("multigrid"), ValueError, "must be one of ruge_stuben_solver"),
        (lambda: bs.pyamg(3), TypeError, "name of a builder"),
        (lambda: bs.sklearn(Lasso, 0, 0, solution=coefficients), TypeError, r"Write Lasso\(\)"),
        (lambda: bs.sklearn(Lasso(), 0, 0, solution=lambda x: x), TypeError, r"\(fitted, theta\)"),
        (lambda: bs.host(3), TypeError, "function of"),
        (lambda: bs.host(lambda x: x), TypeError, "iterations"),
    ],
)
def test_bad_arguments_are_named(make, error, said):
    with pytest.raises(error, match=said):
        make()


@pytest.mark.parametrize(
    ("library", "install", "call"),
    [
        ("jaxopt", "jaxopt", lambda: bs.jaxopt(3)),
        ("optimistix", "optimistix", lambda: bs.optimistix(3)),
        ("lineax", "lineax", lambda: bs.lineax(3)),
        ("pyamg", "pyamg", bs.pyamg),
        ("sklearn", "scikit-learn", lambda: bs.sklearn(3, 0, 0, solution=coefficients)),
    ],
)
def test_a_missing_library_is_a_line_that_says_what_to_install(library, install, call, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ModuleNotFoundError) as caught:
        call()
    said = str(caught.value)
    assert "pip install 'bilevel[solvers]'" in said
    assert install in said
    assert "\n" not in said


def test_names_are_functions_whatever_was_imported_before():
    for name in NAMES:
        assert callable(getattr(bs, name))
