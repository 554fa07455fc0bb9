"""One ℓ₂ penalty for every feature of a logistic regression, on few samples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel as bl
from tests.examples.loading import example
from tests.marks import others_slow

TIGHT = bl.Budget(iterations=20_000, rtol=1e-12)


@pytest.fixture(scope="module")
def penalties():
    with example("logistic_penalties") as module:
        yield module


def newton(rows, theta):
    """The exact fit and its Hessian, in NumPy."""
    w = np.zeros(rows.shape[1])
    for _ in range(50):
        odds = 1 / (1 + np.exp(rows @ w))
        gradient = -rows.T @ odds / len(rows) + np.exp(theta) * w
        hessian = rows.T @ (rows * (odds * (1 - odds))[:, None]) / len(rows)
        hessian += np.diag(np.exp(theta))
        w = w - np.linalg.solve(hessian, gradient)
    return w, hessian


@pytest.mark.parametrize("solver", others_slow(["descent", "nesterov"], "descent"))
def test_the_gradient_is_the_analytic_one(penalties, solver):
    """dL/dθⱼ = -exp(θⱼ) wⱼ (H⁻¹ ∇f)ⱼ; the derivative of the scaling by √D must cancel."""
    task = penalties.task(60, 6, 2, solver=solver)
    regression = penalties.Regression(60, 6, 2, 0, solver)
    theta = np.linspace(-5.0, 1.0, 6)
    w, hessian = newton(np.asarray(regression.parts["train"]), theta)
    unseen = np.asarray(regression.parts["validation"])
    slope = -unseen.T @ (1 / (1 + np.exp(unseen @ w))) / len(unseen)
    expected = -np.exp(theta) * w * np.linalg.solve(hessian, slope)
    tight = bl.Fidelity(TIGHT, TIGHT)
    value, gradient = jax.value_and_grad(lambda t: task.loss(t, None, tight))(jnp.asarray(theta))
    assert np.isclose(value, np.mean(np.log1p(np.exp(-unseen @ w))), rtol=1e-10)
    np.testing.assert_allclose(gradient, expected, rtol=1e-7, atol=1e-12)


def test_it_converges_whatever_the_penalties(penalties):
    """A step for θ = 0 would diverge where one penalty is e²⁰."""
    regression = penalties.Regression(60, 6, 2, 0, "descent")
    theta = jnp.array([20.0, 5.0, 0.0, 0.0, -1.0, -1.0])
    solution = bl.solve(
        regression.problem,
        theta,
        jnp.zeros(6),
        solver=regression.solver,
        budget=bl.Budget(iterations=2000, rtol=1e-8),
    )
    assert solution.status == bl.Status.CONVERGED
    w, _ = newton(np.asarray(regression.parts["train"]), np.asarray(theta))
    np.testing.assert_allclose(regression.weights(solution.value, theta), w, atol=1e-6)


@pytest.mark.parametrize("policy", others_slow(["full", "auto"], "full"))
def test_penalties_of_features_without_meaning_grow(penalties, policy, capsys):
    from bilevel.outer.assignment import controller_for
    from bilevel.outer.policy import parse_policy

    with jax.enable_x64(False):
        task = penalties.task(300, 20, 4, epochs=40)
        controller = controller_for(parse_policy(policy), task)
        run = bl.optimize(task, controller=controller, progress=False)
        task.report([run], None)
    theta = np.asarray(run.theta)
    matter = penalties.Regression(300, 20, 4, 0, "descent").relevant
    assert matter.sum() == 4
    # A sign error in the hypergradient would penalise just those that matter.
    assert np.median(theta[matter]) < np.median(theta[~matter]) - 1
    # The trivial baseline is where training starts: one small penalty for all.
    assert run.summary.final_metric < 0.97 * run.summary.first_metric
    assert run.summary.compilations == 1
    assert run.summary.failures == 0
    assert f"{np.median(theta[matter]):.2f} of features that matter" in capsys.readouterr().out


def test_more_relevant_features_than_there_are_is_refused(penalties):
    with pytest.raises(ValueError, match="relevant is above 0 and below features, 6, got 6"):
        penalties.task(60, 6, 6)
