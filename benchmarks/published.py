"""Published figures: per-feature logistic regression, and a bound's tightness on a quadratic."""

from dataclasses import dataclass
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel as bl
from benchmarks.harness import Report

OUTER_STEPS = (0, 10, 20, 30, 50, 100)
PUBLISHED_LOSSES = (0.574399, 0.533768, 0.361522, 0.322504, 0.294467, 0.285354)
"""Validation losses before these outer steps, of a per-feature logistic regression."""

PUBLISHED_NORM = 5322.447
"""Norm of the exact hypergradient of the quadratic."""

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
        random = np.random.RandomState(1)  # noqa: NPY002
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
        def update(penalties: jax.Array, state: optax.OptState) -> tuple[jax.Array, ...]:
            loss, gradient = jax.value_and_grad(validation_loss)(penalties)
            updates, state = optimizer.update(gradient, state)
            return jnp.maximum(optax.apply_updates(penalties, updates), FLOOR), state, loss

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


@dataclass(frozen=True)
class BoundedQuadratic:
    """The linear least-squares example of Ehrhardt & Roberts (2023), section 5.1.

    min over w of ‖A x(w) − b‖² with x(w) = argmin ‖C w + D x − e‖², m = 1000 residuals,
    n = 10 unknowns, at w = 1.
    """

    outer_matrix: np.ndarray
    outer_target: np.ndarray
    parameter_matrix: np.ndarray
    unknown_matrix: np.ndarray
    inner_target: np.ndarray

    @classmethod
    def create(cls, samples: int = 1000, unknowns: int = 10) -> "BoundedQuadratic":
        """The data of the published run: A, b, C, D, e in this order, C's weights first."""
        random = np.random.RandomState(0)  # noqa: NPY002
        outer = random.rand(samples, unknowns)
        target = outer @ random.rand(unknowns) + 0.01 * random.randn(samples)
        parameter = random.rand(samples, unknowns)
        unknown = random.rand(samples, unknowns)
        inner_target = parameter @ random.rand(unknowns) + unknown @ random.rand(unknowns)
        inner_target = inner_target + 0.01 * random.randn(samples)
        return cls(outer, target, parameter, unknown, inner_target)

    @property
    def parameters(self) -> np.ndarray:
        """W, where everything is measured."""
        return np.ones(self.parameter_matrix.shape[1])

    @cached_property
    def hessian(self) -> np.ndarray:
        """Of the inner objective: 2 DᵀD."""
        return 2.0 * self.unknown_matrix.T @ self.unknown_matrix

    @cached_property
    def cross(self) -> np.ndarray:
        """∂ of the inner gradient by w: 2 DᵀC."""
        return 2.0 * self.unknown_matrix.T @ self.parameter_matrix

    @cached_property
    def spectrum(self) -> tuple[float, float]:
        """Least and largest eigenvalue of the Hessian: μ and L."""
        values = np.linalg.eigvalsh(self.hessian)
        return float(values[0]), float(values[-1])

    @property
    def outer_lipschitz(self) -> float:
        """Of the outer gradient: 2‖A‖²."""
        return 2.0 * float(np.linalg.norm(self.outer_matrix, 2)) ** 2

    @property
    def heavy_ball(self) -> tuple[float, float]:
        """The best step size and momentum for μ and L (Polyak 1964)."""
        least, largest = np.sqrt(self.spectrum)
        return 4.0 / (largest + least) ** 2, ((largest - least) / (largest + least)) ** 2

    def exact_gradient(self) -> np.ndarray:
        """The hypergradient at the parameters, by direct solves."""
        offset = self.parameter_matrix @ self.parameters - self.inner_target
        x = np.linalg.solve(self.hessian, -2.0 * offset @ self.unknown_matrix)
        return self.gradient_at(x, np.linalg.solve(self.hessian, self.outer_gradient(x)))

    def outer_gradient(self, x: np.ndarray) -> np.ndarray:
        """Of ‖A x − b‖²."""
        return 2.0 * (self.outer_matrix @ x - self.outer_target) @ self.outer_matrix

    def gradient_at(self, x: np.ndarray, adjoint: np.ndarray) -> np.ndarray:
        """The hypergradient that an unknown and its adjoint make; here x plays no part."""
        del x
        return -adjoint @ self.cross

    def inner_objective(self, x: jax.Array, w: jax.Array) -> jax.Array:
        """‖C w + D x − e‖²."""
        misfit = self.parameter_matrix @ w + self.unknown_matrix @ x - self.inner_target
        return misfit @ misfit

    def outer_loss(self, x: jax.Array, w: jax.Array) -> jax.Array:
        """‖A x − b‖²."""
        del w
        misfit = self.outer_matrix @ x - self.outer_target
        return misfit @ misfit
