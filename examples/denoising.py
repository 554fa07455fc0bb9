"""Learn what natural images look like, by how well it denoises them.

    bilevel compare examples/denoising.py --policies full,prdp,auto
    bilevel run examples/denoising.py --set width=5

Each noisy patch f is denoised by the minimiser of a variational energy,

    u*(θ) = argmin over u of ½ ‖u - f‖² + Σₖ exp(αₖ) Σ φ(hₖ * u),    φ(t) = √(t² + ε²) - ε,

a field of experts with the convex potential of smoothed total variation.  Its weights αₖ and its
filters hₖ, 3 by 3 pixels and of zero mean, are learnt: the outer loss is the mean squared
distance of u* from the clean patch (Roth and Black, IJCV 2009; Samuel and Tappen, CVPR 2009;
Chen, Ranftl and Pock, IEEE Transactions on Image Processing 2014, who found that solving the
inner problem accurately is what makes such training work).

Patches are from scikit-learn's two photographs, at half their resolution and in grey, trained on,
validated and tested with in different parts of them; the noise is normal with a standard
deviation of 25 of 255, drawn anew for every batch.  Inside, Nesterov's method starts from the
noisy patch, every patch with a count of its own; its step is 1/L, with L from the filters' Fourier
transforms.  The report sets the peak signal-to-noise ratio against that of total variation whose
one weight was chosen by a search over the training patches.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray
from sklearn.datasets import load_sample_images

import bilevel as bl

NOISE = 25 / 255
"""Standard deviation, of intensities from 0 to 1."""

ROUNDING = 0.02
"""ε of the potential."""

TRAIN, VALIDATION, BATCH = 128, 64, 8

START = 0.03
"""Weights of all filters together before training."""

STRIP = 40
"""Width of a strip of a photograph, in pixels."""

TOLERANCE, CAP = 1e-5, 300
"""Of the full solves: relative residual, and the most iterations.  They take about 90."""

EXACT = bl.Fidelity(bl.Budget(iterations=3000, rtol=1e-5))


class Prior(NamedTuple):
    """What is learnt.

    - `weight`: αₖ, logarithms.
    - `coefficients`: of each filter, in the basis that `basis` returns.
    """

    weight: Float[Array, " filters"]
    coefficients: Float[Array, "filters waves"]


def basis(width: int) -> Float[np.ndarray, "width**2-1 width**2"]:
    """The two-dimensional discrete cosine transform without its constant, coarse to fine."""
    k, x = np.mgrid[:width, :width]
    cosines = np.cos(np.pi * k * (2 * x + 1) / (2 * width))
    cosines /= np.linalg.norm(cosines, axis=1, keepdims=True)
    waves = np.einsum("ax,by->abxy", cosines, cosines).reshape(width**2, width**2)
    return waves[np.argsort(np.add.outer(k[:, 0], k[:, 0]).ravel(), kind="stable")][1:]


def potential(t: Array) -> Array:
    """φ, whose second derivative is at most 1/ε."""
    return jnp.sqrt(t**2 + ROUNDING**2) - ROUNDING


class Experts:
    """The field of experts: its energy, and how steep that is.

    **Arguments:**

    - `width`: of the filters, in pixels.
    """

    def __init__(self, width: int):
        self._width = width
        self._basis = jnp.asarray(basis(width), jnp.float32)

    def start(self) -> Prior:
        """As many filters as the basis has, which they are, all of one small weight."""
        count = len(self._basis)
        return Prior(jnp.full(count, jnp.log(START / count)), jnp.eye(count))

    def filters(self, prior: Prior) -> Float[Array, "filters pixels"]:
        """As stencils, row by row."""
        return prior.coefficients @ self._basis

    def energy(self, u: Float[Array, "rows columns"], prior: Prior) -> Float[Array, ""]:
        """Of an image, without the distance from the noisy one."""
        rows, columns = (length - self._width + 1 for length in u.shape)
        # A product with shifted images: XLA's convolutions are far slower on a CPU.
        offsets = range(self._width)
        shifted = jnp.stack([u[i : i + rows, j : j + columns] for i in offsets for j in offsets])
        responses = jnp.einsum("kp,pij->kij", self.filters(prior), shifted)
        return jnp.sum(jnp.exp(prior.weight) * jnp.sum(potential(responses), (1, 2)))

    def steepness(self, prior: Prior) -> Float[Array, ""]:
        """The largest curvature that the energy can have: a maximum over frequencies."""
        stencils = self.filters(prior).reshape(-1, self._width, self._width)
        spectrum = jnp.abs(jnp.fft.fft2(stencils, (32, 32))) ** 2
        return jnp.max(jnp.tensordot(jnp.exp(prior.weight), spectrum, 1)) / ROUNDING


class TotalVariation:
    """Isotropic total variation, smoothed by the same ε, with the logarithm of its weight."""

    def energy(self, u: Float[Array, "rows columns"], weight: Array) -> Float[Array, ""]:
        """Of an image, without the distance from the noisy one."""
        down, right = jnp.diff(u, axis=0)[:, :-1], jnp.diff(u, axis=1)[:-1]
        return jnp.exp(weight) * jnp.sum(jnp.sqrt(down**2 + right**2 + ROUNDING**2))

    def steepness(self, weight: Array) -> Float[Array, ""]:
        """The largest curvature that the energy can have."""
        return 8 * jnp.exp(weight) / ROUNDING


class Denoiser:
    """Minimises the energy of a regulariser and the distance from a noisy image.

    **Arguments:**

    - `regulariser`: with `energy(u, prior)` and `steepness(prior)`.
    """

    def __init__(self, regulariser: Experts | TotalVariation):
        self._regulariser: Any = regulariser
        self._estimator = bl.Implicit(bl.ConjugateGradient())
        self.problem = bl.Minimization(self._objective)

    def _objective(self, u: Array, given: tuple[Any, Array]) -> Array:
        prior, noisy = given
        return 0.5 * jnp.sum((u - noisy) ** 2) + self._regulariser.energy(u, prior)

    def denoised(self, prior: Any, noisy: Array, fidelity: bl.Fidelity) -> bl.Solution:
        """Solutions for patches of shape (count, rows, columns), as far as the fidelity goes."""
        steepness = self._regulariser.steepness(jax.lax.stop_gradient(prior))
        solver = bl.Nesterov(1 / (1 + steepness), strong_convexity=1.0)

        def one(noisy: Array) -> bl.Solution:
            return bl.solve(
                self.problem,
                (prior, noisy),
                noisy,
                solver=solver,
                estimator=self._estimator,
                fidelity=fidelity,
            )

        return jax.vmap(one)(noisy)

    def error(self, prior: Any, clean: Array, noisy: Array, fidelity: bl.Fidelity) -> Array:
        """Mean squared error of the intensities."""
        return jnp.mean((self.denoised(prior, noisy, fidelity).value - clean) ** 2)


def patches(side: int, seed: int) -> tuple[Array, Array, Array]:
    """Clean patches to train on, to validate with, and to test with.

    The photographs are cut into eight strips, which go to the three in turn, so that each has
    sky, walls and leaves in it.  The test patches are the same for every seed, so that runs of
    all seeds can be tested with them.

    **Raises:** `ValueError` for a side that is no part of a strip.
    """
    if not 8 <= side < STRIP:
        msg = f"side is between 8 and {STRIP - 1} pixels, got {side}."
        raise ValueError(msg)
    sample: Any = load_sample_images()
    grey = np.stack(sample.images).astype(np.float32).mean(-1)[:, :426, :640] / 255
    grey = grey.reshape(2, 213, 2, 320, 2).mean((2, 4))

    def cut(strips: tuple[int, ...], count: int, random: np.random.Generator) -> Array:
        photograph = random.integers(2, size=count)
        row = random.integers(213 - side, size=count)
        column = STRIP * random.choice(strips, count) + random.integers(STRIP - side, size=count)
        return jnp.asarray(
            np.stack(
                [
                    grey[p, i : i + side, j : j + side]
                    for p, i, j in zip(photograph, row, column, strict=True)
                ]
            )
        )

    random = np.random.default_rng(seed)
    train, unseen = cut((0, 2, 4, 6), TRAIN, random), cut((1, 5), VALIDATION, random)
    return train, unseen, cut((3, 7), VALIDATION, np.random.default_rng(1_000))


def with_noise(key: PRNGKeyArray, clean: Array) -> Array:
    """The patches as a bad camera sees them."""
    return clean + NOISE * jax.random.normal(key, clean.shape, clean.dtype)


def task(width: int = 3, side: int = 20, epochs: int = 15, seed: int = 0) -> bl.Task:
    """The learning of the prior.

    Args:
        width: of the filters, in pixels; there are width² - 1 of them.
        side: of a patch, in pixels.
        epochs: passes over the training patches, of sixteen updates each.
        seed: of the patches, and of the noise validated with.

    """
    train, unseen, test = patches(side, seed)
    experts = Experts(width)
    denoiser = Denoiser(experts)
    noisy = with_noise(jax.random.key(seed), unseen)

    def loss(prior: Prior, batch: tuple[Array, Array], fidelity: bl.Fidelity) -> Array:
        return denoiser.error(prior, *batch, fidelity)

    def validate(prior: Prior) -> Array:
        return denoiser.error(prior, unseen, noisy, EXACT)

    def batches(epoch: int, key: PRNGKeyArray) -> Iterator[tuple[Array, Array]]:
        del epoch
        order_key, noise_key = jax.random.split(key)
        clean = train[jax.random.permutation(order_key, TRAIN)]
        spoilt = with_noise(noise_key, clean)
        for first in range(0, TRAIN, BATCH):
            chosen = slice(first, first + BATCH)
            yield clean[chosen], spoilt[chosen]

    updates = epochs * (TRAIN // BATCH)
    ladder = bl.Ladder.geometric(start=12, factor=1.4, stop=CAP)
    return bl.Task(
        experts.start(),
        loss,
        batches,
        validate,
        name="denoising",
        metric_name="mean squared error",
        optimizer=optax.adam(optax.cosine_decay_schedule(0.05, updates, alpha=0.02)),
        epochs=epochs,
        ladder=ladder.with_tolerances(bl.Budget(rtol=TOLERANCE)),
        report=lambda runs, directory: report(experts, train, test, runs, directory),
    )


def report(
    experts: Experts, train: Array, test: Array, runs: Sequence[Any], directory: Path | None
) -> dict[str, float]:
    """Print the peak signal-to-noise ratios on the test patches, in decibels.

    **Returns:** them by name.
    """
    del directory
    noisy = with_noise(jax.random.key(1_000), test)
    variation, learnt = Denoiser(TotalVariation()), Denoiser(experts)
    known = train, with_noise(jax.random.key(2_000), train)

    @jax.jit
    def of_variation(weight: Array, clean: Array, noisy: Array) -> Array:
        return variation.error(weight, clean, noisy, EXACT)

    @jax.jit
    def of_experts(prior: Prior) -> Array:
        return learnt.error(prior, test, noisy, EXACT)

    weights = jnp.log(jnp.geomspace(0.01, 0.3, 25))
    best = min(weights, key=lambda weight: float(of_variation(weight, *known)))
    lines = {
        "noisy": float(jnp.mean((noisy - test) ** 2)),
        f"total variation, weight {float(jnp.exp(best)):.3f}": float(
            of_variation(best, test, noisy)
        ),
        "field of experts before training": float(of_experts(experts.start())),
    }
    lines |= {run.summary.policy: float(of_experts(run.theta)) for run in runs}
    decibels = {name: -10 * float(np.log10(error)) for name, error in lines.items()}
    print(f"\n{'test patches':36} PSNR, dB")
    for name, ratio in decibels.items():
        print(f"{name:36} {ratio:8.2f}")
    return decibels


if __name__ == "__main__":
    import sys

    from bilevel.cli import main

    sys.exit(main(["compare", __file__, "--overwrite", *sys.argv[1:]]))
