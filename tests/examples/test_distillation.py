"""Data set distillation of scikit-learn's digits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize

import bilevel as bl
from bilevel.testing import taylor_test
from tests.examples.loading import example

FULL = bl.Fidelity(bl.Budget(5000, rtol=1e-11), bl.Budget(1000, rtol=1e-11))


@pytest.fixture(scope="module")
def distillation():
    with example("distillation") as module:
        yield module


@pytest.fixture(scope="module")
def images(distillation):
    """Five of the real ones, in double precision."""
    train, _, _ = distillation.digits(0)
    return distillation.Images(train.pixels[:5].astype(float), train.labels[:5])


def test_the_three_parts_share_no_image_and_all_seeds_have_one_test_set(distillation):
    first, second = distillation.digits(0), distillation.digits(1)
    assert [len(part.labels) for part in first] == [1000, 400, 397]
    np.testing.assert_array_equal(first[2].pixels, second[2].pixels)
    assert not np.array_equal(first[0].pixels, second[0].pixels)
    rows = [{tuple(row) for row in np.asarray(part.pixels)} for part in first]
    assert not rows[0] & rows[1]
    assert not rows[1] & rows[2]


def test_the_classifier_is_the_minimiser(distillation, images):
    """That of SciPy, of an objective written in NumPy."""
    classifier = distillation.Classifier(0.1)
    weights = classifier.trained(images, FULL).value
    x = np.c_[np.asarray(images.pixels), np.ones(5)]
    y = np.eye(10)[np.asarray(images.labels)]

    def objective(flat):
        w = flat.reshape(65, 10)
        logits = x @ w
        norms = np.log(np.exp(logits).sum(1))
        gradient = x.T @ (np.exp(logits - norms[:, None]) - y) / 5 + 0.1 * w
        return np.mean(norms - (logits * y).sum(1)) + 0.05 * np.sum(w**2), gradient.ravel()

    best = minimize(
        objective,
        np.zeros(650),
        jac=True,
        method="L-BFGS-B",
        options={"gtol": 1e-9, "ftol": 0.0, "maxiter": 2000},
    )
    np.testing.assert_allclose(np.ravel(weights), best.x, atol=1e-6)


@pytest.mark.slow
def test_the_step_is_safe_and_not_much_shorter(distillation, images):
    """1/step is above the Hessian's norm at zero, where it is largest, and below 6 times it."""
    classifier = distillation.Classifier(0.1)
    zero = jnp.zeros((65, 10))
    hessian = jax.hessian(classifier.problem.objective)(zero, images).reshape(650, 650)
    largest = float(jnp.linalg.eigvalsh(hessian)[-1])
    assert largest < 1 / float(classifier.solver(images).step_size) < 6 * largest


def test_the_gradient_is_that_of_the_loss(distillation, images):
    """The step depends on the images, too, and must not come into it."""
    classifier = distillation.Classifier(0.1)
    other = distillation.Images(images.pixels[::-1], images.labels)

    def loss(pixels):
        trained = classifier.trained(distillation.Images(pixels, images.labels), FULL)
        return distillation.cross_entropy(trained.value, other)

    assert taylor_test(loss, images.pixels).slope >= 1.95


@pytest.mark.slow
def test_distilled_images_teach_more_than_real_ones(distillation, capsys):
    with jax.enable_x64(False):
        task = distillation.task(epochs=10)
        run = bl.optimize(task, controller=bl.AutomaticRefinement(task.ladder), progress=False)
        lines = task.report([run], None)
    assert run.summary.failures == 0
    assert run.summary.compilations == 1
    assert run.summary.final_metric < 0.7 * run.history[0].metric
    pixels = np.asarray(run.theta)
    assert pixels.min() >= 0
    assert pixels.max() <= 1
    random, best = (
        lines[f"10 random real images, {kind} of 20 draws"] for kind in ("mean", "best")
    )
    assert 0.4 < random < best < lines[run.summary.policy]
    assert lines["all 1000 real images"] > 0.9
    assert "test accuracy" in capsys.readouterr().out
