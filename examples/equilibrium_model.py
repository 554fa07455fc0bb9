"""A deep equilibrium network on digits: its one layer is applied until nothing changes.

    bilevel run examples/equilibrium_model.py
    bilevel compare examples/equilibrium_model.py --policies full,auto,error --seeds 0,1,2

The features of an image x are the fixed point of a layer,

    z = tanh(W z + U x + b),

and a linear map of them gives the logits (Bai, Kolter and Koltun, Deep equilibrium models,
NeurIPS 2019).  The loss is the mean cross-entropy of a minibatch of scikit-learn's digits, plus
weight decay; the metric is the cross-entropy on validation images, solved to a residual of 1e-6.

A layer whose W has a spectral norm below one is a contraction, for tanh is steep by at most one.
After every update the singular values of W are cut at 0.95, which is the projection onto such
matrices; so there is one fixed point, whatever training does, and plain iteration finds it.  The
adjoint, (I - T′)ᵀ λ = c, is solved by Richardson's iteration, which is the same one for
the transposed derivative.  All images of a batch are one system: an iteration is one of all.
To the relative residual of 1e-5 that `full` stops at they take some 35 and some 45 iterations; the
policy `error` moves their budgets apart.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray
from sklearn.datasets import load_digits

import bilevel as bl

CLASSES, PIXELS = 10, 64
TRAIN, VALIDATION, BATCH = 1000, 400, 100
STEEPEST = 0.95
"""Largest singular value of W."""

WEIGHT_DECAY = 1e-3

CAP, TOLERANCE = 200, 1e-5
"""Most iterations of a solve, and the relative residual at which it stops before."""

EXACT = bl.Budget(iterations=2000, rtol=1e-6)


class EquilibriumNetwork(eqx.Module):
    """z = tanh(W z + U x + b), and logits V z + c.

    **Arguments:**

    - `key`: of the random weights.
    - `width`: of z.
    """

    recurrent: Float[Array, "width width"]
    inputs: eqx.nn.Linear
    outputs: eqx.nn.Linear

    def __init__(self, key: PRNGKeyArray, width: int):
        first, second, third = jax.random.split(key, 3)
        # Its spectral norm is close to 2 × 0.4.
        self.recurrent = 0.4 * jax.random.normal(first, (width, width)) / width**0.5
        self.inputs = eqx.nn.Linear(PIXELS, width, key=second)
        self.outputs = eqx.nn.Linear(width, CLASSES, key=third)

    def equilibrium(self, images: Array, fidelity: bl.Fidelity) -> Array:
        """z of each image, of shape (images, width), as far as the fidelity goes."""
        return bl.solve(
            bl.FixedPoint(_layer),
            (self.recurrent, jax.vmap(self.inputs)(images)),
            jnp.zeros((len(images), len(self.recurrent))),
            solver=bl.FixedPointIteration(),
            estimator=bl.Implicit(bl.Richardson(step_size=1.0)),
            fidelity=fidelity,
        ).value

    def logits(self, images: Array, fidelity: bl.Fidelity) -> Array:
        """Of shape (images, classes)."""
        return jax.vmap(self.outputs)(self.equilibrium(images, fidelity))


def _layer(z: Array, theta: tuple[Array, Array]) -> Array:
    recurrent, driven = theta
    return jnp.tanh(z @ recurrent.T + driven)


def contracting(network: EquilibriumNetwork) -> EquilibriumNetwork:
    """The network with the nearest W of a spectral norm below one, in the Frobenius norm."""
    left, values, right = jnp.linalg.svd(network.recurrent, full_matrices=False)
    projected = (left * jnp.minimum(values, STEEPEST)) @ right
    return eqx.tree_at(lambda network: network.recurrent, network, projected)


class Digits:
    """Images with pixels in [0, 1] and their labels, split at random."""

    def __init__(self, seed: int):
        pixels, digits = load_digits(return_X_y=True)
        order = np.random.default_rng(seed).permutation(len(pixels))
        images, labels = jnp.asarray(pixels[order] / 16, float), jnp.asarray(digits[order], "int32")
        last = TRAIN + VALIDATION
        self.train = images[:TRAIN], labels[:TRAIN]
        self.validation = images[TRAIN:last], labels[TRAIN:last]
        self.test = images[last:], labels[last:]


def task(width: int = 64, epochs: int = 40, seed: int = 0) -> bl.Task:
    """The network's task.

    Args:
        width: of the equilibrium.
        epochs: passes over the training images.
        seed: of the split and of the network.

    """
    digits = Digits(seed)

    def loss(
        network: EquilibriumNetwork, batch: tuple[Array, Array], fidelity: bl.Fidelity
    ) -> Array:
        images, labels = batch
        return jnp.mean(cross_entropies(network.logits(images, fidelity), labels))

    def validate(network: EquilibriumNetwork) -> Array:
        images, labels = digits.validation
        return jnp.mean(cross_entropies(network.logits(images, bl.Fidelity(EXACT)), labels))

    def batches(epoch: int, key: PRNGKeyArray) -> Iterator[tuple[Array, Array]]:
        del epoch
        images, labels = digits.train
        order = jax.random.permutation(key, TRAIN)
        for first in range(0, TRAIN, BATCH):
            chosen = order[first : first + BATCH]
            yield images[chosen], labels[chosen]

    def report(runs: Sequence[Any], directory: Path | None) -> None:
        del directory
        for run in runs:
            network: EquilibriumNetwork = run.theta
            images, labels = Digits(run.summary.seed).test
            found = jnp.argmax(network.logits(images, bl.Fidelity(EXACT)), axis=1)
            norm = float(jnp.linalg.norm(network.recurrent, 2))
            print(
                f"{run.summary.policy}: test accuracy {float(jnp.mean(found == labels)):.1%}, "
                f"spectral norm of W {norm:.2f}"
            )

    updates = epochs * (TRAIN // BATCH)
    return bl.Task(
        EquilibriumNetwork(jax.random.key(seed), width),
        loss,
        batches,
        validate,
        name="equilibrium model",
        metric_name="validation cross-entropy",
        optimizer=optax.adamw(
            optax.cosine_decay_schedule(3e-3, updates), weight_decay=WEIGHT_DECAY
        ),
        epochs=epochs,
        ladder=bl.Ladder.iterations(1, 1, CAP).with_tolerances(bl.Budget(rtol=TOLERANCE)),
        projection=contracting,
        policies=("full", "prdp", "auto", "error"),
        report=report,
    )


def cross_entropies(logits: Array, labels: Array) -> Array:
    """Of each row of logits."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


if __name__ == "__main__":
    import sys

    from bilevel.cli import main

    sys.exit(main(["compare", __file__, "--overwrite", *sys.argv[1:]]))
