"""Learnt priors of image patches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel as bl
from bilevel.testing import taylor_test
from tests.examples.loading import example

FULL = bl.Fidelity(bl.Budget(3000, rtol=1e-11), bl.Budget(1000, rtol=1e-11))


@pytest.fixture(scope="module")
def denoising():
    with example("denoising") as module:
        yield module


@pytest.fixture(scope="module")
def clean(denoising):
    return denoising.patches(9, 0)[0][:2].astype(float)


def test_filters_start_as_the_cosine_transform_without_its_constant(denoising):
    waves = denoising.basis(3)
    np.testing.assert_allclose(waves @ waves.T, np.eye(8), atol=1e-12)
    np.testing.assert_allclose(waves.sum(1), 0, atol=1e-12)
    # The coarsest two are differences across the stencil.
    np.testing.assert_allclose(
        np.abs(waves[0].reshape(3, 3)[0]), [1 / np.sqrt(6), 0, 1 / np.sqrt(6)], atol=1e-12
    )


def test_the_energy_is_that_of_all_responses(denoising):
    """Correlations by SciPy, at every place where the filter fits."""
    from scipy.signal import correlate2d

    experts = denoising.Experts(3)
    prior = jax.tree.map(lambda leaf: leaf.astype(float), experts.start())
    prior = prior._replace(weight=prior.weight + jnp.arange(8) / 8)
    u = np.random.default_rng(0).normal(size=(7, 6))
    total = sum(
        np.exp(weight) * np.sum(np.sqrt(correlate2d(u, h, "valid") ** 2 + 0.02**2) - 0.02)
        for weight, h in zip(
            np.asarray(prior.weight), denoising.basis(3).reshape(8, 3, 3), strict=True
        )
    )
    assert float(experts.energy(jnp.asarray(u), prior)) == pytest.approx(total, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("regulariser", ["experts", "variation"])
def test_the_curvature_is_bounded_and_the_bound_not_far(denoising, regulariser):
    """At a constant image, where all potentials are steepest, on a patch of 12 by 12."""
    if regulariser == "experts":
        energy = denoising.Experts(3)
        prior = jax.tree.map(lambda leaf: leaf.astype(float), energy.start())
    else:
        energy, prior = denoising.TotalVariation(), jnp.log(0.1)
    hessian = jax.hessian(energy.energy)(jnp.zeros((12, 12)), prior).reshape(144, 144)
    largest = float(jnp.linalg.eigvalsh(hessian)[-1])
    assert 0.8 * energy.steepness(prior) < largest <= float(energy.steepness(prior))


def test_the_gradient_is_that_of_the_error(denoising, clean):
    """The step depends on the prior, too, and must not come into it."""
    experts = denoising.Experts(3)
    denoiser = denoising.Denoiser(experts)
    noisy = denoising.with_noise(jax.random.key(0), clean)
    prior = jax.tree.map(lambda leaf: leaf.astype(float), experts.start())
    result = taylor_test(lambda prior: denoiser.error(prior, clean, noisy, FULL), prior)
    assert result.slope >= 1.95


def test_patches_have_a_count_each(denoising, clean):
    experts = denoising.Experts(3)
    noisy = denoising.with_noise(jax.random.key(0), clean).at[0].set(0.5)
    fidelity = bl.Fidelity(bl.Budget(500, rtol=1e-6), bl.Budget(1))
    prior = jax.tree.map(lambda leaf: leaf.astype(float), experts.start())
    solution = denoising.Denoiser(experts).denoised(prior, noisy, fidelity)
    assert int(solution.iterations[0]) == 0
    assert int(solution.iterations[1]) > 10
    np.testing.assert_allclose(solution.value[0], 0.5, atol=1e-12)


def test_training_and_validation_patches_are_from_different_strips(denoising):
    """Train: strips 0, 2, 4, 6; no training patch of a strip's width is a validation patch."""
    train, unseen, test = (np.asarray(part) for part in denoising.patches(20, 0))
    assert train.shape == (128, 20, 20)
    assert unseen.shape == test.shape == (64, 20, 20)
    np.testing.assert_array_equal(test, denoising.patches(20, 1)[2])
    assert 0 <= train.min() < train.max() <= 1
    with pytest.raises(ValueError, match="side is between 8 and 39 pixels, got 40"):
        denoising.patches(40, 0)


@pytest.mark.slow
def test_training_makes_patches_better(denoising, capsys):
    with jax.enable_x64(False):
        task = denoising.task(side=10, epochs=3)
        run = bl.optimize(task, controller=bl.AutomaticRefinement(task.ladder), progress=False)
        lines = task.report([run], None)
    assert run.summary.failures == 0
    assert run.summary.compilations == 1
    assert run.summary.final_metric < 0.5 * run.history[0].metric
    # A standard deviation of 25 of 255 is 20.2 dB.
    assert lines["noisy"] == pytest.approx(-20 * np.log10(25 / 255), abs=0.1)
    (variation,) = (value for name, value in lines.items() if name.startswith("total variation"))
    assert variation > lines["noisy"] + 3
    assert lines[run.summary.policy] > lines["field of experts before training"] + 1
    assert "PSNR" in capsys.readouterr().out
