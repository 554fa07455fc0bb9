"""Single precision near the ends of its range: squares vanish or overflow, statuses hold."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import bilevel as bl
from bilevel import vector
from tests.core.compiling import jitted
from tests.marks import others_slow

MATRIX = np.array([[3, 1, 0], [1, 2, 0.5], [0, 0.5, 4]], np.float32)
RHS = np.array([1, -2, 0.5], np.float32)
STEP = 0.2 * MATRIX
SYSTEM = bl.LinearSystem(MATRIX, lambda theta: theta * RHS)
CASES: dict[str, tuple[Any, Any, Any]] = {
    "Jacobi": (SYSTEM, bl.Jacobi(), MATRIX),
    "ConjugateGradient": (SYSTEM, bl.ConjugateGradient(), MATRIX),
    "MINRES": (SYSTEM, bl.MINRES(), MATRIX),
    "GMRES": (SYSTEM, bl.GMRES(), MATRIX),
    "BiCGStab": (SYSTEM, bl.BiCGStab(), MATRIX),
    "FixedPointIteration": (
        bl.FixedPoint(lambda x, theta: STEP @ x + theta * RHS),
        bl.FixedPointIteration(),
        np.eye(3) - STEP,
    ),
    "Richardson": (
        bl.RootFinding(lambda x, theta: MATRIX @ x - theta * RHS),
        bl.Richardson(0.3),
        MATRIX,
    ),
}


@pytest.mark.parametrize("name", others_slow(CASES, *(name for name in CASES if name != "MINRES")))
def test_solutions_and_gradients_at_the_ends_of_the_range(name: str):
    problem, solver, matrix = CASES[name]

    @jitted
    def evaluate(theta: Any, weight: Any) -> Any:
        result = bl.hypergradient(
            lambda x, _: weight * jnp.sum(x),
            problem,
            theta,
            jnp.zeros(3, jnp.float32),
            solver=solver,
            error=False,
        )
        primal, adjoint = result.primal, result.adjoint
        return primal.value, result.gradient, primal.status, adjoint.status, primal.residual_norm

    direct = np.linalg.solve(matrix.astype(np.float64), RHS)
    for theta, weight in ((1e-25, 1e25), (1e25, 1e-25), (1e-25, 1.0), (1e25, 1.0)):
        x, gradient, primal, adjoint, left = evaluate(jnp.float32(theta), jnp.float32(weight))
        assert int(primal) == int(adjoint) == bl.Status.CONVERGED
        np.testing.assert_allclose(x / np.float32(theta), direct, rtol=1e-3)
        np.testing.assert_allclose(gradient / np.float32(weight), direct.sum(), rtol=1e-3)
        assert left <= 1e-3 * theta


@pytest.mark.parametrize("size", [1e-30, 1e-25, 1.0, 1e25, 1e37])
def test_robust_norms(size: float):
    x = {"a": jnp.float32(size) * jnp.array([3.0, 0.0], jnp.float32), "b": jnp.float32(4 * size)}
    np.testing.assert_allclose(vector.robust_norm(x), np.float32(5 * size), rtol=1e-6)
    assert float(vector.robust_norm(vector.zeros_like(x))) == 0.0
    one = float(vector.unit(jnp.float32(size)))
    assert 0.4 * size < one <= size
    assert np.log2(one) == np.round(np.log2(one))


class Expanding(bl.InnerSolver):
    """A user's iteration that declares nothing."""

    factor: float = 1.0

    def init(self, problem: Any, x: Any) -> Any:
        return x

    def step(self, problem: Any, state: Any, residual: Any) -> Any:
        return state + self.factor * residual


@pytest.mark.parametrize(("factor", "status"), [(3.0, "DIVERGED"), (0.5, "BUDGET")])
def test_an_undeclared_iteration_that_diverges_is_said_to(factor: float, status: str):
    """Twelve steps double the residual each: far from a blow-up of 1e8."""
    problem = bl.RootFinding(lambda x, theta: x - theta)
    solution = bl.solve(
        problem, 1.0, jnp.zeros(2), solver=Expanding(factor), budget=bl.Budget(iterations=12)
    )
    assert bl.Status(int(solution.status)).name == status
