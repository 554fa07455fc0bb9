"""Starts at the solution, zeros, and other places where a derivative is easily lost."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel as bl
from tests.marks import others_slow

MATRIX = jnp.array([[3.0, 1.0], [1.0, 3.0]])
LINEAR = bl.LinearSystem(MATRIX, lambda theta: theta)
ZERO, ONE = jnp.zeros(2), jnp.ones(2)
ITERATIONS = {
    "Jacobi": bl.Jacobi(),
    "Richardson": bl.Richardson(0.2),
    "Chebyshev": bl.Chebyshev(),
}
KRYLOV = {
    "ConjugateGradient": bl.ConjugateGradient(),
    "MINRES": bl.MINRES(),
    "BiCGStab": bl.BiCGStab(),
    "GMRES": bl.GMRES(),
    "SteepestDescent": bl.SteepestDescent(),
}


def unrolled(problem: Any, theta: Any, x0: Any, solver: Any, **budget: Any) -> Any:
    return bl.hypergradient(
        lambda x, theta: jnp.sum(x),
        problem,
        theta,
        x0,
        solver=solver,
        estimator=bl.Unrolled(),
        budget=bl.Budget(**budget),
    )


@pytest.mark.parametrize("name", others_slow(ITERATIONS, "Richardson"))
def test_a_start_at_the_solution_has_no_zero_derivative(name: str):
    for theta, x0 in ((ZERO, ZERO), (ONE, jnp.full(2, 0.25) + 1e-9)):
        result = unrolled(LINEAR, theta, x0, ITERATIONS[name], iterations=50, rtol=1e-6)
        assert int(result.primal.iterations) == 1
        # One step of the iteration: right within its contraction, and the estimate says so.
        error = float(jnp.linalg.norm(result.gradient - 0.25))
        assert 0 < error < 0.2
        np.testing.assert_allclose(result.error.total, error, rtol=0.2)


@pytest.mark.parametrize("name", others_slow(KRYLOV, "ConjugateGradient"))
def test_a_krylov_method_at_the_solution_has_no_derivative_and_says_so(name: str):
    exactly = unrolled(LINEAR, ZERO, ZERO, KRYLOV[name], iterations=50, rtol=1e-6)
    assert np.all(np.isnan(exactly.gradient))
    nearly = unrolled(LINEAR, ONE, jnp.full(2, 0.25) + 1e-9, KRYLOV[name], iterations=9, rtol=1e-6)
    np.testing.assert_allclose(nearly.gradient, 0.25, rtol=1e-6)


@pytest.mark.parametrize("solver", [bl.LBFGS(), bl.ArmijoGradientDescent()], ids=repr)
def test_a_line_search_at_the_solution_knows_the_units(solver: Any):
    """The first step is 1 over the curvature, which a zero gradient gives no direction for."""
    problem = bl.Minimization(lambda x, theta: jnp.sum(theta[1] * (x - theta[0]) ** 2))

    def value(theta: Any, factor: Any) -> Any:
        options: dict[str, Any] = {"solver": solver, "estimator": bl.Unrolled()}
        return jnp.sum(bl.solve(problem, (theta, factor), jnp.ones(2), **options).value)

    factors = jnp.array([1e-4, 1.0, 1e4])
    got = jax.vmap(jax.grad(value), in_axes=(None, 0))(jnp.ones(2), factors)
    np.testing.assert_allclose(got, 1.0, rtol=1e-12)


def test_zeros_differentiate():
    problem = bl.FixedPoint(lambda x, theta: 0.5 * x + theta)
    solver = bl.FixedPointIteration()

    def of_start(x0: Any) -> Any:
        budget = bl.Budget(iterations=3)
        options: dict[str, Any] = {"solver": solver, "estimator": bl.Unrolled(), "budget": budget}
        return jnp.sum(bl.solve(problem, ONE, x0, **options).value)

    np.testing.assert_allclose(jax.grad(of_start)(ZERO), 0.125)
    result = unrolled(LINEAR, ZERO, ONE, bl.Jacobi(), iterations=200)
    np.testing.assert_allclose(result.gradient, 0.25, rtol=1e-12)


@pytest.mark.slow
def test_one_step_of_newton_at_its_own_solution():
    matrix = jnp.array([[3.0, 1.0], [0.0, 3.0]])
    problem = bl.RootFinding(lambda x, theta: matrix @ x + 0.1 * x**3 - theta)
    solution = bl.solve(problem, ONE, ZERO, solver=bl.Newton()).value
    gradients = [
        bl.hypergradient(
            lambda x, theta: jnp.sum(x),
            problem,
            ONE,
            solution,
            solver=bl.Newton(),
            estimator=estimator,
            budget=bl.Budget(3),
        ).gradient
        for estimator in (bl.OneStep(), bl.Implicit())
    ]
    np.testing.assert_allclose(*gradients, rtol=1e-6)


@pytest.mark.parametrize(
    "linear",
    [
        None,
        pytest.param(bl.MINRES(), marks=pytest.mark.slow),
        pytest.param(bl.ConjugateGradient(), marks=pytest.mark.slow),
    ],
)
def test_newton_where_the_hessian_is_indefinite(linear: Any):
    well = bl.Minimization(lambda x, theta: jnp.sum(x**4 / 4 - theta * x**2 / 2))
    solver = bl.Newton(linear=linear)
    solution = bl.solve(well, 1.0, jnp.array([0.3]), solver=solver)
    assert solution.status == bl.Status.CONVERGED
    np.testing.assert_allclose(solution.value, 1.0, rtol=1e-8)
    assert bl.solve(well, 1.0, jnp.array([0.3])).status == bl.Status.CONVERGED


def test_an_error_nobody_could_estimate_is_not_small():
    well = bl.Minimization(lambda x, theta: jnp.sum(x**4 / 4 - theta * x**2 / 2))
    hopeless = unrolled(well, 1.0, jnp.array([0.1]), bl.GradientDescent(0.1), iterations=1)
    assert np.isinf(hopeless.error.total)
    without_solution = bl.hypergradient(
        lambda x, theta: jnp.sum(x),
        bl.FixedPoint(lambda x, theta: x + theta),
        1.0,
        jnp.zeros(1),
        solver=bl.FixedPointIteration(),
        estimator=bl.Neumann(),
        budget=bl.Budget(5),
        adjoint_budget=bl.Budget(5),
    )
    assert np.isinf(without_solution.error.total)


def test_a_tolerance_that_is_no_number():
    def status(rtol: Any) -> Any:
        budget = bl.Budget(10, rtol=rtol)
        return bl.solve(LINEAR, ONE, ZERO, solver=bl.Jacobi(), budget=budget).status

    assert jax.jit(status)(jnp.nan) == bl.Status.NONFINITE


def test_an_absolute_tolerance_stays_with_the_primal():
    ladder = bl.Ladder.tolerances(1e-2, 0.1, 1e-4, iterations=100, absolute=True)
    adjoint = ladder.fidelity(1).adjoint_budget
    assert adjoint is not None
    assert (float(adjoint.atol), float(adjoint.rtol), int(adjoint.iterations)) == (0.0, 0.0, 100)
    assert bl.Ladder.tolerances(1e-2, 0.1, 1e-4, absolute=True).adjoint is None
    controller = bl.FixedFidelity(bl.Budget(atol=1e-3))
    assert controller.fidelity(controller.init()).adjoint_budget is None
    controller = bl.FixedFidelity(bl.Budget(7, rtol=1e-3, atol=1e-3))
    adjoint = controller.fidelity(controller.init()).adjoint_budget
    assert (float(adjoint.atol), float(adjoint.rtol), int(adjoint.iterations)) == (0.0, 1e-3, 7)


def test_single_precision_matrices_are_looked_at_in_single_precision():
    vectors = np.linalg.qr(np.random.default_rng(0).standard_normal((20, 20)))[0]
    matrix = jnp.asarray((vectors * np.linspace(1, 5, 20)) @ vectors.T, jnp.float32)
    rounded = matrix + 1e-7 * jnp.triu(matrix)
    assert bl.LinearSystem(rounded, jnp.ones(20, jnp.float32)).symmetric
    assert not bl.LinearSystem(matrix + 1e-3 * jnp.triu(matrix), matrix[0]).symmetric
