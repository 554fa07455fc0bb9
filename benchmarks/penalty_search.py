"""Penalty search: a published logistic regression tuned by truncated back-propagation."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel as bl

FLOOR = 1e-8
"""The penalties are kept above this."""


@dataclass(frozen=True)
class PenaltySearch:
    """Per-feature penalties of a logistic regression by truncated back-propagation.

    Inner: mean of log(1 + exp(z)) − y z over 500 samples, z = Xw, labels 0 and 1, plus
    ½ wᵀ diag(λ) w with the penalties themselves as λ; 100 steps of gradient descent of
    size 0.1 from zero, differentiated through the last 10.  Outer: the same mean, without
    the penalty, over 500 validation samples; momentum in the form b ← 0.9 b + g,
    λ ← max(λ − b, 1e-8), which leaves b alone.  All in float64.
    """

    design: np.ndarray
    labels: np.ndarray
    validation_design: np.ndarray
    validation_labels: np.ndarray

    @classmethod
    def create(cls) -> "PenaltySearch":
        """The data of the published run, from NumPy's legacy generator.

        The split is what `sklearn.model_selection.train_test_split(test_size=0.5)` draws
        from the same generator: a permutation whose first half is the validation set.
        """
        random = np.random.RandomState(1)
        weights = random.randn(20)
        design = random.randn(1000, 20)
        labels = (design @ weights + 0.1 * random.randn(1000) > 0).astype(float)
        order = random.permutation(1000)
        validation, train = order[:500], order[500:]
        return cls(design[train], labels[train], design[validation], labels[validation])

    def losses_by_hand(self, outer_steps: int) -> np.ndarray:
        """Validation loss before each outer step, derivatives written out in NumPy."""
        penalties, momentum = np.ones(20), np.zeros(20)
        losses = []
        for _ in range(outer_steps + 1):
            iterates = [np.zeros(20)]
            for _ in range(100):
                w = iterates[-1]
                misfit = _sigmoid(self.design @ w) - self.labels
                iterates.append(w - 0.1 * (misfit @ self.design / 500 + penalties * w))
            scores = self.validation_design @ iterates[-1]
            losses.append(np.mean(np.logaddexp(0.0, scores) - self.validation_labels * scores))
            cotangent = (_sigmoid(scores) - self.validation_labels) @ self.validation_design / 500
            gradient = np.zeros(20)
            for w in reversed(iterates[90:100]):
                probability = _sigmoid(self.design @ w)
                curvature = probability * (1 - probability)
                gradient -= 0.1 * w * cotangent
                product = (curvature * (self.design @ cotangent)) @ self.design / 500
                cotangent = cotangent - 0.1 * (product + penalties * cotangent)
            momentum = 0.9 * momentum + gradient
            penalties = np.maximum(penalties - momentum, FLOOR)
        return np.array(losses)

    def losses(self, outer_steps: int) -> np.ndarray:
        """Validation loss before each outer step, by the library."""
        design, labels = jnp.asarray(self.design), jnp.asarray(self.labels)
        validation, validation_labels = (
            jnp.asarray(self.validation_design),
            jnp.asarray(self.validation_labels),
        )

        def objective(w: jax.Array, penalties: jax.Array) -> jax.Array:
            return _mean_logistic(design @ w, labels) + 0.5 * jnp.sum(penalties * w**2)

        def validation_loss(penalties: jax.Array) -> jax.Array:
            solution = bl.solve(
                bl.Minimization(objective),
                penalties,
                jnp.zeros(20),
                solver=bl.GradientDescent(step_size=0.1),
                estimator=bl.Unrolled(last=10),
                budget=bl.Budget(iterations=100),
            )
            return _mean_logistic(validation @ solution.value, validation_labels)

        optimizer = optax.sgd(1.0, momentum=0.9)

        @jax.jit
        def update(penalties: jax.Array, state: optax.OptState) -> Any:
            loss, gradient = jax.value_and_grad(validation_loss)(penalties)
            updates, state = optimizer.update(gradient, state)
            moved: Any = optax.apply_updates(penalties, updates)
            return jnp.maximum(moved, FLOOR), state, loss

        penalties = jnp.ones(20)
        state = optimizer.init(penalties)
        losses = []
        for _ in range(outer_steps + 1):
            penalties, state, loss = update(penalties, state)
            losses.append(float(loss))
        return np.array(losses)


def _mean_logistic(scores: jax.Array, labels: jax.Array) -> jax.Array:
    return jnp.mean(jax.nn.softplus(scores) - labels * scores)


def _sigmoid(scores: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-scores))
