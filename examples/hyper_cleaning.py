"""Find wrong labels: learn one weight for every training sample from a clean validation set.

    bilevel run examples/hyper_cleaning.py
    bilevel compare examples/hyper_cleaning.py --policies full,prdp,auto --seeds 0,1,2

Three tenths of the labels of scikit-learn's digits are replaced by another class, drawn at random.
The inner problem fits a multinomial logistic regression (softmax regression) to the training
samples, each with its weight σ(θᵢ):

    g(w, θ) = 1/n Σᵢ σ(θᵢ) c(w; xᵢ, ỹᵢ) + μ/2 ‖w‖²,

c the cross-entropy, and the outer loss is the cross-entropy of the fit on validation samples with
true labels.  Samples that pull the fit away from those lose their weight: data hyper-cleaning
(Franceschi, Donini, Frasconi and Pontil, Forward and reverse gradient-based hyperparameter
optimization, ICML 2017).  How many of the corrupted samples are among those of smallest weight is
printed after the runs.

The Hessian lies between μ and μ + L, with L half the largest eigenvalue of XᵀX/n (Böhning,
Multinomial logistic regression algorithm, 1992), whatever θ is, for a weight is at most one: so
both the step of the accelerated descent and its momentum are known, and it converges for
every θ.  `--set solver=descent` takes plain descent with the same step, and seven times as many
iterations.  `full` solves to a relative residual of 1e-5, forward and backward.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array
from sklearn.datasets import load_digits

import bilevel as bl

CLASSES = 10
RIDGE = 5e-3
"""μ, in units of the mean cross-entropy over those of squared weights."""

CAP, TOLERANCE = 2000, 1e-5
"""Most iterations of a solve, and the relative residual at which it stops before."""

EXACT = bl.Budget(iterations=5000, rtol=1e-6)


class Cleaning:
    """Digits with corrupted labels, and the regression that is fitted to them.

    **Arguments:**

    - `train`, `validation`: how many samples of each; the rest are for testing.
    - `noise`: the part of training labels that are wrong.
    - `seed`: of the split and of the corruption.
    - `solver`: "nesterov" or "descent".
    """

    def __init__(self, train: int, validation: int, noise: float, seed: int, solver: str):
        random = np.random.default_rng(seed)
        pixels, digits = (np.asarray(part) for part in load_digits(return_X_y=True))
        if not 0 < train + validation < len(pixels):
            msg = (
                f"train and validation together leave some of the {len(pixels)} digits for "
                f"testing, got {train} and {validation}."
            )
            raise ValueError(msg)
        order = random.permutation(len(pixels))
        pixels, digits = pixels[order] / 16, digits[order]
        # Pixels that are always dark have no spread to be divided by, so none is divided.
        centred = pixels - pixels[:train].mean(0)
        inputs = np.concatenate([centred, np.ones((len(pixels), 1))], axis=1)
        self.inputs, self.truth = jnp.asarray(inputs, float), jnp.asarray(digits, "int32")
        self.count = train
        self.parts = {
            "train": slice(0, train),
            "validation": slice(train, train + validation),
            "test": slice(train + validation, None),
        }
        wrong = random.permutation(train)[: round(noise * train)]
        labels = digits[:train].copy()
        labels[wrong] = (labels[wrong] + random.integers(1, CLASSES, len(wrong))) % CLASSES
        self.labels = jnp.asarray(labels, "int32")
        self.corrupted = np.isin(np.arange(train), wrong)
        covariance = inputs[:train].T @ inputs[:train] / train
        smoothness = RIDGE + 0.5 * float(np.linalg.eigvalsh(covariance)[-1])
        self.solver = {
            "nesterov": bl.Nesterov(1 / smoothness, strong_convexity=RIDGE),
            "descent": bl.GradientDescent(1 / smoothness),
        }[solver]
        self.problem = bl.Minimization(self._objective)

    def _objective(self, w: Array, theta: Array) -> Array:
        losses = cross_entropies(self.inputs[self.parts["train"]] @ w, self.labels)
        return jnp.mean(jax.nn.sigmoid(theta) * losses) + 0.5 * RIDGE * jnp.sum(w**2)

    def fit(self, theta: Array, fidelity: bl.Fidelity) -> Array:
        """The regression's weights, of shape (65, 10), as far as the fidelity goes."""
        return bl.solve(
            self.problem,
            theta,
            jnp.zeros((self.inputs.shape[1], CLASSES)),
            solver=self.solver,
            estimator=bl.Implicit(bl.ConjugateGradient()),
            fidelity=fidelity,
        ).value

    def loss(self, w: Array, part: str = "validation") -> Array:
        """The mean cross-entropy on the true labels of a part."""
        chosen = self.parts[part]
        return jnp.mean(cross_entropies(self.inputs[chosen] @ w, self.truth[chosen]))

    def accuracy(self, w: Array, part: str = "test") -> float:
        """The part of samples that are classified right."""
        chosen = self.parts[part]
        found = jnp.argmax(self.inputs[chosen] @ w, axis=1)
        return float(jnp.mean(found == self.truth[chosen]))

    def found(self, theta: Array) -> float:
        """Corrupted samples among as many of the smallest weight, as a part of all corrupted.

        As many are called corrupted as there are, so that this is both precision and recall.
        """
        most = int(self.corrupted.sum())
        smallest = np.argsort(np.asarray(theta), kind="stable")[:most]
        return float(self.corrupted[smallest].mean())


def cross_entropies(logits: Array, labels: Array) -> Array:
    """Of each row of logits."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def task(
    train: int = 900,
    validation: int = 400,
    noise: float = 0.3,
    epochs: int = 100,
    seed: int = 0,
    solver: Literal["nesterov", "descent"] = "nesterov",
) -> bl.Task:
    """The cleaning task.

    Args:
        train: samples with corrupted labels.
        validation: samples with true ones.
        noise: part of the training labels that are wrong.
        epochs: outer steps.
        seed: of the split and of the corruption.
        solver: accelerated gradient descent, or the plain one.

    """
    cleaning = Cleaning(train, validation, noise, seed, solver)

    def loss(theta: Array, batch: None, fidelity: bl.Fidelity) -> Array:
        del batch
        return cleaning.loss(cleaning.fit(theta, fidelity))

    def validate(theta: Array) -> Array:
        return cleaning.loss(cleaning.fit(theta, bl.Fidelity(EXACT)))

    def report(runs: Sequence[Any], directory: Path | None) -> None:
        del directory
        for run in runs:
            of_run = Cleaning(train, validation, noise, run.summary.seed, solver)
            start, end = jnp.zeros(train), jnp.asarray(run.theta)
            before, after = (
                of_run.accuracy(of_run.fit(theta, bl.Fidelity(EXACT))) for theta in (start, end)
            )
            print(
                f"{run.summary.policy}: {of_run.found(end):.1%} of {of_run.corrupted.sum()} "
                f"corrupted labels are among as many of the smallest weight; test accuracy "
                f"{before:.1%} without weights, {after:.1%} with them"
            )

    return bl.Task(
        jnp.zeros(train),
        loss,
        validate=validate,
        name="hyper-cleaning",
        metric_name="validation cross-entropy",
        optimizer=optax.adam(0.3),
        epochs=epochs,
        ladder=bl.Ladder.iterations(1, 1, CAP).with_tolerances(bl.Budget(rtol=TOLERANCE)),
        policies=("full", "prdp", "auto"),
        report=report,
    )


if __name__ == "__main__":
    import sys

    from bilevel.cli import main

    sys.exit(main(["compare", __file__, "--overwrite", *sys.argv[1:]]))
