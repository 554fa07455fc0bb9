"""The linear least-squares example of Ehrhardt and Roberts (2023), on which bounds are compared.

min over w of ‖A x(w) - b‖² with x(w) = argmin ‖C w + D x - e‖², at w = 1.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel as bl


class Quadratic(NamedTuple):
    """The data, and what direct solves make of them."""

    outer_matrix: np.ndarray
    outer_target: np.ndarray
    parameter_matrix: np.ndarray
    unknown_matrix: np.ndarray
    inner_target: np.ndarray
    hessian: np.ndarray
    cross: np.ndarray
    gradient: np.ndarray

    def inner_objective(self, x: Any, w: Any) -> Any:
        misfit = self.parameter_matrix @ w + self.unknown_matrix @ x - self.inner_target
        return misfit @ misfit

    def outer_loss(self, x: Any, w: Any) -> Any:
        del w
        misfit = self.outer_matrix @ x - self.outer_target
        return misfit @ misfit


@pytest.fixture(scope="module")
def quadratic():
    random = np.random.RandomState(0)
    samples, unknowns = 1000, 10
    A = random.rand(samples, unknowns)
    b = A @ random.rand(unknowns) + 0.01 * random.randn(samples)
    C = random.rand(samples, unknowns)
    D = random.rand(samples, unknowns)
    # In this order: the weights of C, those of D, the noise.
    e = C @ random.rand(unknowns) + D @ random.rand(unknowns)
    e = e + 0.01 * random.randn(samples)
    hessian, cross = 2 * D.T @ D, 2 * D.T @ C
    x = np.linalg.solve(hessian, -2 * D.T @ (C @ np.ones(unknowns) - e))
    gradient = -cross.T @ np.linalg.solve(hessian, 2 * A.T @ (A @ x - b))
    return Quadratic(A, b, C, D, e, hessian, cross, gradient)


@pytest.fixture(scope="module")
def cases(quadratic: Quadratic):
    """True error, estimate and certified bound at every pair of budgets."""
    values = np.linalg.eigvalsh(quadratic.hessian)
    least, largest = np.sqrt(values[0]), np.sqrt(values[-1])
    solver = bl.HeavyBall(
        step_size=float(4 / (largest + least) ** 2),
        momentum=float(((largest - least) / (largest + least)) ** 2),
    )
    certified = bl.CertifiedBound(
        strong_convexity=float(values[0]),
        outer_lipschitz=2 * float(np.linalg.norm(quadratic.outer_matrix, 2)) ** 2,
        cross_norm=float(np.linalg.norm(quadratic.cross, 2)),
    )

    def judged(error: bl.ErrorEstimator | bool) -> Any:
        @jax.jit
        def evaluate(inner: Any, adjoint: Any) -> tuple[Any, Any]:
            result = bl.hypergradient(
                quadratic.outer_loss,
                bl.Minimization(quadratic.inner_objective),
                jnp.ones(10),
                jnp.zeros(10),
                solver=solver,
                estimator=bl.Implicit(solver=bl.ConjugateGradient()),
                budget=bl.Budget(iterations=inner),
                adjoint_budget=bl.Budget(iterations=adjoint),
                error=error,
            )
            assert result.error is not None
            return result.gradient, result.error.total

        return evaluate

    estimate, bound = judged(error=True), judged(certified)
    found = []
    for inner in range(10, 201, 10):
        for adjoint in range(2, 11):
            gradient, guess = estimate(inner, adjoint)
            true = np.linalg.norm(np.asarray(gradient) - quadratic.gradient)
            found.append((true, float(guess), float(bound(inner, adjoint)[1])))
    return np.array(found)


def test_norm_is_the_published_one(quadratic: Quadratic):
    assert np.linalg.norm(quadratic.gradient) == pytest.approx(5322.447, abs=5e-4)


def test_default_settings_give_the_exact_gradient(quadratic: Quadratic):
    problem = bl.Minimization(quadratic.inner_objective)
    result = bl.hypergradient(quadratic.outer_loss, problem, jnp.ones(10), jnp.zeros(10))
    np.testing.assert_allclose(result.gradient, quadratic.gradient, rtol=1e-10)


def test_errors_span_many_orders(cases: np.ndarray):
    """Else the two tests below would say little."""
    assert cases[:, 0].max() > 500
    assert cases[:, 0].min() < 1e-10


def test_certified_bound_never_fails(cases: np.ndarray):
    true, _, certified = cases.T
    assert np.all(certified >= true)


def test_estimate_is_within_a_factor_of_ten(cases: np.ndarray):
    true, estimated, _ = cases.T
    ratio = estimated / true
    assert np.mean((ratio >= 0.1) & (ratio <= 10)) >= 0.95


def test_estimate_is_tighter_than_the_certified_bound(cases: np.ndarray):
    true, estimated, certified = cases.T
    assert np.median(estimated / true) < 1.2
    assert np.median(certified / true) > 100
