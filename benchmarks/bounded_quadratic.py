"""Bounded quadratic: a published problem on which error bounds of hypergradients are compared."""

from dataclasses import dataclass
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np


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
        random = np.random.RandomState(0)
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
        return -np.linalg.solve(self.hessian, self.outer_gradient(x)) @ self.cross

    def outer_gradient(self, x: np.ndarray) -> np.ndarray:
        """Of ‖A x − b‖²."""
        return 2.0 * (self.outer_matrix @ x - self.outer_target) @ self.outer_matrix

    def inner_objective(self, x: jax.Array, w: jax.Array) -> jax.Array:
        """‖C w + D x − e‖²."""
        C, D, e = map(jnp.asarray, (self.parameter_matrix, self.unknown_matrix, self.inner_target))
        misfit = C @ w + D @ x - e
        return misfit @ misfit

    def outer_loss(self, x: jax.Array, w: jax.Array) -> jax.Array:
        """‖A x − b‖²."""
        del w
        misfit = jnp.asarray(self.outer_matrix) @ x - jnp.asarray(self.outer_target)
        return misfit @ misfit
