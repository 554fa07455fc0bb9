"""Distil a data set: ten images to train on in place of a thousand.

    bilevel compare examples/distillation.py --policies full,prdp,auto
    bilevel run examples/distillation.py --set per_class=2

The synthetic images are the parameters, `per_class` of each digit.  The inner problem trains a
classifier on them alone, a softmax regression with a ridge penalty on its weights:

    W*(θ) = argmin over W of mean cross-entropy of (θ, labels) + λ/2 ‖W‖².

The outer loss is the cross-entropy of W* on batches of the real training images (data set
distillation, Wang, Zhu, Torralba and Efros, 2018, with the training to convergence that implicit
differentiation permits; Lorraine, Vicol and Duvenaud, AISTATS 2020).  Pixels stay between 0 and 1.
The real images are scikit-learn's digits, 8 by 8.

Inside, Nesterov's method starts from zero weights; its step is 1/L with the Lipschitz constant of
the images of the moment.  The metric is the cross-entropy on real images that no loss has seen,
after training to a residual of 1e-5.  The report sets the accuracy on 397 others against that of
as many random real images, and of all those trained on.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int
from sklearn.datasets import load_digits

import bilevel as bl

CLASSES, PIXELS = 10, 64
TRAIN, VALIDATION, BATCH = 1000, 400, 200

TOLERANCE, CAP = 1e-5, 400
"""Of the full solves: relative residual, and the most iterations.  They take about 160."""

EXACT = bl.Budget(iterations=5000, rtol=1e-5)


class Images(NamedTuple):
    """Images with intensities from 0 to 1, and which digits they are."""

    pixels: Float[Array, "count pixels"]
    labels: Int[Array, " count"]


def digits(seed: int) -> tuple[Images, Images, Images]:
    """Real images to train on, to validate with, and to test with.

    The last are the same for every seed, so that runs of all seeds can be tested with them.
    """
    data: Any = load_digits()
    pixels, labels = np.asarray(data.data, np.float32) / 16, np.asarray(data.target, np.int32)
    order = np.random.default_rng(0).permutation(len(labels))
    test, rest = np.split(order, [len(labels) - TRAIN - VALIDATION])
    rest = np.random.default_rng(seed).permutation(rest)

    def part(chosen: np.ndarray) -> Images:
        return Images(jnp.asarray(pixels[chosen]), jnp.asarray(labels[chosen]))

    return part(rest[:TRAIN]), part(rest[TRAIN:]), part(test)


def of_each_class(images: Images, count: int, random: np.random.Generator) -> Images:
    """So many random images of every digit, in the order of the digits."""
    labels = np.asarray(images.labels)
    chosen = np.concatenate(
        [random.choice(np.flatnonzero(labels == k), count, replace=False) for k in range(CLASSES)]
    )
    return Images(images.pixels[chosen], images.labels[chosen])


def features(pixels: Array) -> Array:
    """The pixels and a constant, which is penalised like them."""
    return jnp.concatenate([pixels, jnp.ones((len(pixels), 1), pixels.dtype)], 1)


def cross_entropy(weights: Array, images: Images) -> Array:
    """The mean over images, in nats."""
    logits = features(images.pixels) @ weights
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, images.labels))


def accuracy(weights: Array, images: Images) -> Array:
    """Which part of the images is taken for what it is."""
    return jnp.mean(jnp.argmax(features(images.pixels) @ weights, 1) == images.labels)


class Classifier:
    """Softmax regression with a ridge penalty.

    **Arguments:**

    - `penalty`: λ.
    """

    def __init__(self, penalty: float):
        self.penalty = penalty
        self.problem = bl.Minimization(self._objective)
        self.estimator = bl.Implicit(bl.ConjugateGradient())

    def _objective(self, weights: Array, images: Images) -> Array:
        return cross_entropy(weights, images) + 0.5 * self.penalty * jnp.sum(weights**2)

    def solver(self, images: Images) -> bl.Nesterov:
        """Nesterov's method with the longest step that is safe for these images."""
        # The Hessian of the cross-entropy in the logits is at most 1/2.
        gram = features(jax.lax.stop_gradient(images.pixels))
        largest = jnp.linalg.eigvalsh(gram @ gram.T / len(gram))[-1]
        step = 1 / (0.5 * largest + self.penalty)
        return bl.Nesterov(step, strong_convexity=self.penalty)

    def trained(self, images: Images, fidelity: bl.Fidelity) -> bl.Solution:
        """The weights trained on some images, as far as the fidelity goes."""
        return bl.solve(
            self.problem,
            images,
            jnp.zeros((PIXELS + 1, CLASSES), images.pixels.dtype),
            solver=self.solver(images),
            estimator=self.estimator,
            fidelity=fidelity,
        )


def task(per_class: int = 1, penalty: float = 0.03, epochs: int = 60, seed: int = 0) -> bl.Task:
    """The distillation.

    Args:
        per_class: synthetic images of each digit.
        penalty: λ of the classifier.
        epochs: passes over the real training images, of five updates each.
        seed: of the split into training and validation, and of the real images to start from.

    """
    train, unseen, test = digits(seed)
    classifier = Classifier(penalty)
    start = of_each_class(train, per_class, np.random.default_rng(seed))

    def weights(pixels: Array, fidelity: bl.Fidelity) -> Array:
        return classifier.trained(Images(pixels, start.labels), fidelity).value

    def loss(pixels: Array, batch: Images, fidelity: bl.Fidelity) -> Array:
        return cross_entropy(weights(pixels, fidelity), batch)

    def validate(pixels: Array) -> Array:
        return cross_entropy(weights(pixels, bl.Fidelity(EXACT)), unseen)

    def batches(epoch: int, key: Array) -> Iterator[Images]:
        del epoch
        order = jax.random.permutation(key, TRAIN)
        for first in range(0, TRAIN, BATCH):
            chosen = order[first : first + BATCH]
            yield Images(train.pixels[chosen], train.labels[chosen])

    updates = epochs * (TRAIN // BATCH)
    ladder = bl.Ladder.geometric(start=4, factor=1.5, stop=CAP)
    return bl.Task(
        start.pixels,
        loss,
        batches,
        validate,
        name="distillation",
        metric_name="cross-entropy",
        optimizer=optax.adam(optax.cosine_decay_schedule(0.03, updates, alpha=0.02)),
        epochs=epochs,
        ladder=ladder.with_tolerances(bl.Budget(rtol=TOLERANCE)),
        projection=lambda pixels: jnp.clip(pixels, 0.0, 1.0),
        # Each level brings little of what is left, and the rule would stop at the second.
        refinement={"stopping_threshold": 1.0},
        report=lambda runs, directory: report(classifier, train, test, runs, directory),
    )


def report(
    classifier: Classifier,
    train: Images,
    test: Images,
    runs: Sequence[Any],
    directory: Path | None,
    draws: int = 20,
) -> dict[str, float]:
    """Print the test accuracy that the images give, beside that of real ones.

    **Returns:** the accuracies by name.
    """
    del directory

    @jax.jit
    def tested(images: Images) -> Array:
        return accuracy(classifier.trained(images, bl.Fidelity(EXACT)).value, test)

    count = len(runs[0].theta) // CLASSES
    random = np.random.default_rng(0)
    drawn = [float(tested(of_each_class(train, count, random))) for _ in range(draws)]
    labels = jnp.repeat(jnp.arange(CLASSES, dtype=jnp.int32), count)
    lines = {
        f"{count * CLASSES} random real images, mean of {draws} draws": float(np.mean(drawn)),
        f"{count * CLASSES} random real images, best of {draws} draws": max(drawn),
        f"all {TRAIN} real images": float(tested(train)),
    }
    lines |= {run.summary.policy: float(tested(Images(run.theta, labels))) for run in runs}
    print(f"\n{'trained on':50} test accuracy")
    for name, value in lines.items():
        print(f"{name:50} {value:13.3f}")
    return lines


if __name__ == "__main__":
    import sys

    from bilevel.cli import main

    sys.exit(main(["compare", __file__, "--overwrite", *sys.argv[1:]]))
