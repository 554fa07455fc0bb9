"""Label noise on digits, on few of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.datasets import load_digits

import bilevel as bl
from tests.examples.loading import example
from tests.marks import others_slow


@pytest.fixture(scope="module")
def cleaning():
    with example("hyper_cleaning") as module:
        yield module


@pytest.fixture(scope="module")
def small(cleaning):
    return cleaning.Cleaning(40, 40, 0.3, 5, "nesterov")


def test_three_tenths_of_the_labels_are_wrong_and_no_others(small):
    wrong = np.asarray(small.labels) != np.asarray(small.truth[:40])
    # A corruption that may draw the true class again leaves fewer than twelve.
    assert wrong.sum() == 12
    np.testing.assert_array_equal(wrong, small.corrupted)
    _, digits = load_digits(return_X_y=True)
    np.testing.assert_array_equal(
        np.bincount(np.asarray(small.truth), minlength=10), np.bincount(digits)
    )


def test_what_is_found_is_counted_among_the_smallest_weights(small):
    perfect = np.where(small.corrupted, -1.0, 1.0)
    assert small.found(perfect) == 1.0
    assert small.found(-perfect) == 0.0
    # Three of the twelve hidden behind good ones.
    hidden = perfect.copy()
    hidden[np.flatnonzero(small.corrupted)[:3]] = 2.0
    hidden[np.flatnonzero(~small.corrupted)[:3]] = -0.5
    assert small.found(hidden) == 0.75


def test_the_gradient_is_the_analytic_one(cleaning, small):
    """dL/dθᵢ = -σ′(θᵢ)/n ⟨∇cᵢ(w), H⁻¹ ∇f⟩, with a dense Hessian."""
    tight = bl.Budget(iterations=20_000, rtol=1e-12)
    task = cleaning.task(40, 40, seed=5)
    theta = jnp.linspace(-2.0, 2.0, 40)
    gradient = jax.grad(lambda t: task.loss(t, None, bl.Fidelity(tight, tight)))(theta)
    w = small.fit(theta, bl.Fidelity(tight))
    rows, weight = np.asarray(small.inputs[:40]), np.asarray(jax.nn.sigmoid(theta))
    chances = np.asarray(jax.nn.softmax(rows @ w))
    # Of each sample: x xᵀ for features, diag(p) - p pᵀ for classes.
    classes = chances[:, :, None] * (np.eye(10) - chances[:, None, :])
    hessian = np.einsum("s,sa,sb,scd->acbd", weight / 40, rows, rows, classes, optimize=True)
    hessian = hessian.reshape(w.size, w.size) + cleaning.RIDGE * np.eye(w.size)
    unseen, truth = np.asarray(small.inputs[40:80]), np.asarray(small.truth[40:80])
    slope = unseen.T @ (np.asarray(jax.nn.softmax(unseen @ w)) - np.eye(10)[truth]) / 40
    adjoint = np.linalg.solve(hessian, slope.ravel()).reshape(w.shape)
    along = np.sum((chances - np.eye(10)[np.asarray(small.labels)]) * (rows @ adjoint), axis=1)
    np.testing.assert_allclose(gradient, -weight * (1 - weight) * along / 40, rtol=1e-6, atol=1e-13)
    # The steps of both solvers rest on this bound.
    steepest = np.linalg.eigvalsh(hessian)
    assert steepest[0] >= cleaning.RIDGE * (1 - 1e-9)
    assert steepest[-1] <= 1 / float(small.solver.step_size)


@pytest.mark.slow
@pytest.mark.parametrize("policy", others_slow(["full", "auto", "error"], "full"))
def test_it_finds_wrong_labels(cleaning, policy, capsys):
    from bilevel.outer.assignment import controller_for
    from bilevel.outer.policy import parse_policy

    with jax.enable_x64(False):
        task = cleaning.task(200, 200, epochs=30, seed=1)
        controller = controller_for(parse_policy(policy), task)
        run = bl.optimize(task, controller=controller, progress=False, seed=1)
        task.report([run], None)
        found = cleaning.Cleaning(200, 200, 0.3, 1, "nesterov").found(run.theta)
    # Weights drawn by chance find three tenths.
    assert found >= 0.8
    assert run.summary.final_metric < 0.7 * run.summary.first_metric
    assert run.summary.compilations == 1
    assert f"{found:.1%} of 60 corrupted labels" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_nine_tenths_are_found_at_full_size(cleaning, seed):
    from bilevel.outer.assignment import controller_for
    from bilevel.outer.policy import parse_policy

    with jax.enable_x64(False):
        task = cleaning.task(seed=seed)
        controller = controller_for(parse_policy("auto"), task)
        run = bl.optimize(task, controller=controller, progress=False, seed=seed)
        assert cleaning.Cleaning(900, 400, 0.3, seed, "nesterov").found(run.theta) >= 0.9


def test_a_split_that_leaves_nothing_to_test_with_is_refused(cleaning):
    with pytest.raises(ValueError, match="leave some of the 1797 digits for testing"):
        cleaning.task(1500, 297)
