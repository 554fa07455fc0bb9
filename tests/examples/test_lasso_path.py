"""An elastic net with one ℓ₁ penalty for each group of features."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel as bl
from tests.examples.loading import example

TIGHT = bl.Budget(iterations=50_000, rtol=1e-12)


@pytest.fixture(scope="module")
def lasso():
    with example("lasso_path") as module:
        yield module


@pytest.fixture(scope="module")
def regression(lasso):
    return lasso.Regression(0, "restart")


@pytest.fixture(scope="module")
def theta(lasso, regression):
    start = regression.penalties(0.15)
    return lasso.Penalties(start.absolute + jnp.array([-0.5, 0.2, 0.1]), jnp.array(-3.0))


def test_its_groups_are_features_squares_and_products(regression):
    # One of the ten features has two values, and its square says nothing new.
    assert np.bincount(regression.groups).tolist() == [10, 9, 45]
    assert regression.inputs.shape == (331, 64)
    np.testing.assert_allclose(np.std(regression.inputs, axis=0), 1.0, rtol=1e-9)
    squares = np.asarray(regression.inputs[:, regression.groups == 1])
    first = np.asarray(regression.inputs[:, 0])
    assert max(abs(np.corrcoef(first**2, squares.T)[0, 1:])) > 0.9
    # Every sample is left out once.
    np.testing.assert_array_equal(regression.left_out.sum(0), 1)


def test_the_gradient_is_that_on_the_support(lasso, regression, theta):
    """On the support S of a fold, (X_SᵀX_S/n + q) w_S = X_Sᵀy/n - λ sign(w_S): differentiate it."""
    w = np.asarray(regression.fit(theta, bl.Fidelity(TIGHT)))
    inputs, targets = np.asarray(regression.inputs), np.asarray(regression.targets)
    absolute, quadratic = np.exp(theta.absolute), float(np.exp(theta.quadratic))
    by_group, by_quadratic = np.zeros(3), 0.0
    for fold, left_out in zip(w, regression.left_out, strict=True):
        support = fold != 0
        kept, signs = inputs[~left_out][:, support], np.sign(fold[support])
        groups = regression.groups[support]
        hessian = kept.T @ kept / len(kept) + quadratic * np.eye(support.sum())
        pulled = kept.T @ targets[~left_out] / len(kept) - absolute[groups] * signs
        np.testing.assert_allclose(hessian @ fold[support], pulled, atol=1e-9)
        # What is out would have to be pulled by more than its penalty to come in.
        missing = targets[~left_out] - inputs[~left_out] @ fold
        pull = np.abs(inputs[~left_out].T @ missing) / (~left_out).sum()
        assert np.all(pull[~support] <= absolute[regression.groups[~support]] + 1e-9)
        rest = inputs[left_out][:, support] @ fold[support] - targets[left_out]
        slope = 2 * inputs[left_out][:, support].T @ rest / len(inputs)
        adjoint = np.linalg.solve(hessian, slope)
        for group in range(3):
            chosen = groups == group
            by_group[group] -= absolute[group] * adjoint[chosen] @ signs[chosen]
        by_quadratic -= quadratic * adjoint @ fold[support]
    # Something of every group is in, and something is out: else this would test less.
    assert np.all(np.abs(by_group) > 1e-4)
    assert 0 < np.count_nonzero(w) < w.size
    task = lasso.task()
    gradient = jax.grad(lambda t: task.loss(t, None, bl.Fidelity(TIGHT, TIGHT)))(theta)
    np.testing.assert_allclose(gradient.absolute, by_group, rtol=1e-6)
    np.testing.assert_allclose(gradient.quadratic, by_quadratic, rtol=1e-6)


def test_above_the_smallest_penalty_without_features_there_are_none(regression):
    fits = [regression.fit(regression.penalties(below), bl.Fidelity(TIGHT)) for below in (1.3, 0.8)]
    # The largest correlation of a fold is not that of all samples, but close to it.
    assert np.count_nonzero(fits[0]) == 0
    assert np.count_nonzero(fits[1]) > 0


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["full", "auto"])
def test_it_beats_the_best_of_one_penalty(lasso, regression, policy, capsys):
    from bilevel.outer.assignment import controller_for
    from bilevel.outer.policy import parse_policy

    with jax.enable_x64(False):
        task = lasso.task(epochs=50)
        controller = controller_for(parse_policy(policy), task)
        run = bl.optimize(task, controller=controller, progress=False)
        task.report([run], None)
    best, _ = regression.path(12)
    assert run.summary.final_metric < 0.98 * best
    assert run.summary.compilations == 1
    assert run.summary.failures == 0
    printed = capsys.readouterr().out
    assert f"cross-validation error {run.summary.final_metric:.4f}" in printed


def test_a_start_without_any_feature_is_refused(lasso):
    with pytest.raises(ValueError, match=r"start is above 0 and below 1, .* got 1.0"):
        lasso.task(1.0)
