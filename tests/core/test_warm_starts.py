"""A start near the solution costs less than one far away, and never ends for want of budget."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel as bl
from tests.core.compiling import jitted
from tests.marks import others_slow

DRAW = np.random.default_rng(0)
FEATURES, NOISE = DRAW.normal(size=(80, 10)), DRAW.normal(size=80)
LABELS, TARGETS = np.sign(FEATURES[:, 0] + NOISE), FEATURES @ np.arange(10.0) + 0.1 * NOISE
MIXING = DRAW.normal(size=(10, 10))
MIXING = 0.8 * MIXING / np.max(np.abs(np.linalg.eigvals(MIXING)))
DIRECTION = DRAW.normal(size=10)


def cast(data: Any, x: Any) -> Any:
    return jnp.asarray(data, x.dtype)


def logistic(x: Any, theta: Any) -> Any:
    margins = cast(LABELS, x) * (cast(FEATURES, x) @ x)
    return jnp.mean(jnp.logaddexp(0, -margins)) + 0.5 * theta * jnp.sum(x**2)


def ridge(x: Any, theta: Any) -> Any:
    misfit = cast(FEATURES, x) @ x - cast(TARGETS, x)
    return 0.5 * jnp.mean(misfit**2) + 0.5 * theta * jnp.sum(x**2)


def mapping(x: Any, theta: Any) -> Any:
    return cast(MIXING, x) @ jnp.tanh(x) + theta * jnp.arange(10, dtype=x.dtype)


CASES = {
    "GradientDescent, logistic": (bl.Minimization(logistic), bl.GradientDescent(1.0)),
    "LBFGS, logistic": (bl.Minimization(logistic), bl.LBFGS()),
    "Newton, logistic": (bl.Minimization(logistic), bl.Newton()),
    "GradientDescent, ridge": (bl.Minimization(ridge), bl.GradientDescent(0.5)),
    "Nesterov, ridge": (bl.Minimization(ridge), bl.Nesterov(0.5)),
    "FixedPointIteration": (bl.FixedPoint(mapping), bl.FixedPointIteration()),
    "Anderson": (bl.FixedPoint(mapping), bl.Anderson()),
}


@pytest.mark.parametrize("dtype", others_slow([jnp.float64, jnp.float32], jnp.float64))
@pytest.mark.parametrize("name", CASES)
def test_the_nearer_the_start_the_fewer_iterations(name: str, dtype: Any):
    problem, solver = CASES[name]
    theta = jnp.asarray(0.2, dtype)

    @jitted
    def solve(x0: Any) -> Any:
        solution = bl.solve(problem, theta, x0, solver=solver)
        return solution.value, solution.iterations, solution.status

    value, cold, status = solve(jnp.zeros(10, dtype))
    assert int(status) == bl.Status.CONVERGED
    counts = [int(cold)]
    # As near as the cold solve came, it is done, or but for a step of Newton's.
    for distance in (1e-2, 1e-4, 1e-6, 1e-8, 1e-10, 1e-13, 0.0):
        _, count, status = solve(value + cast(distance * DIRECTION, value))
        assert int(status) == bl.Status.CONVERGED, distance
        counts.append(int(count))
    assert all(later <= sooner for sooner, later in itertools.pairwise(counts)), counts
    assert counts[-1] == 0


@pytest.mark.parametrize("shift", others_slow([0.0, 1e-6, 1.0], 1e-6))
def test_the_scale_is_that_of_the_linear_system_that_the_problem_is(shift: float):
    matrix, rhs = np.array([[3.0, 1.0], [1.0, 2.0]]), np.array([5.0, 5.0])
    x0 = jnp.asarray(np.linalg.solve(matrix, rhs) + shift)
    for problem in (
        bl.Minimization(lambda x, _: 0.5 * x @ (matrix @ x) - rhs @ x),
        bl.RootFinding(lambda x, _: matrix @ x - rhs),
        bl.FixedPoint(lambda x, _: x + rhs - matrix @ x),
    ):
        solver = bl.Newton() if isinstance(problem, bl.RootFinding) else None
        solution = bl.solve(problem, 0.0, x0, solver=solver, budget=bl.Budget(9, rtol=1e-3))
        np.testing.assert_allclose(solution.scale, np.linalg.norm(rhs), rtol=1e-6)


def test_a_residual_that_is_not_defined_beside_the_start_has_the_first_one_as_scale():
    problem = bl.FixedPoint(lambda x, theta: jnp.where(x > 1, jnp.nan, 0.5 * x))
    solution = bl.solve(problem, 0.0, jnp.ones(1), solver=bl.FixedPointIteration())
    assert int(solution.status) == bl.Status.CONVERGED
    assert float(solution.scale) == 0.5


def test_only_for_a_nonlinear_residual_does_the_scale_belong_to_the_start():
    """What `Solution.scale` says: a restart at a solution is not held to the cold start's scale."""
    problem, solver = bl.Minimization(logistic), bl.LBFGS()
    cold = bl.solve(problem, 0.2, jnp.zeros(10), solver=solver)
    warm = bl.solve(problem, 0.2, cold.value, solver=solver)
    curvature = jax.hessian(logistic)(cold.value, 0.2)
    np.testing.assert_allclose(warm.scale, np.linalg.norm(curvature @ cold.value), rtol=1e-3)
    assert float(warm.scale) < 0.9 * float(cold.scale)
    absolute = bl.solve(
        problem, 0.2, cold.value, solver=solver, budget=bl.Budget(atol=float(cold.tolerance))
    )
    assert int(absolute.iterations) == 0
