"""The error-estimator protocol."""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array, Float, Int, PyTree

from bilevel import vector
from bilevel.description import described
from bilevel.problem import InnerProblem
from bilevel.solution import Solution


class TruncationError(eqx.Module):
    """What stopping early cost a hypergradient, in its own units (norms over all of θ).

    - `primal`: because x is not x*(θ).
    - `adjoint`: because the adjoint solve, or the unrolled iteration, stopped early.
    - `total`: of both together; at most their sum, less where they cancel.
    - `applications`: int32, operator applications that finding this out took.

    >>> import jax.numpy as jnp, bilevel as bl
    >>> problem = bl.LinearSystem(jnp.eye(2), lambda theta: theta * jnp.ones(2))
    >>> result = bl.hypergradient(lambda x, theta: jnp.sum(x), problem, 1.0, jnp.zeros(2))
    >>> float(result.error.total)
    0.0
    """

    primal: Float[Array, ""]
    adjoint: Float[Array, ""]
    total: Float[Array, ""]
    applications: Int[Array, ""]

    def __repr__(self) -> str:
        """The numbers in a line."""
        return described(self)


@dataclasses.dataclass(frozen=True)
class Situation:
    """A hypergradient as it was computed, for those who judge it.

    - `outer_loss`, `problem`, `theta`: what was differentiated; `theta` holds only the
        differentiable leaves, and `with_theta` completes it.
    - `x`: the final iterate; `gradient`: like `theta`.
    - `primal`, `adjoint`: the solves. The adjoint's status is `NOT_RUN` where the
        estimator differentiates the iteration.
    - `adjoint_value`: λ, or `None` where there is none.
    - `adjoint_residual`: what is left of the adjoint equation, ∂ₓf - Nᵀλ; `None` where none
        was solved.
    - `linear_solver`: the adjoint's solver, where the user chose one.
    """

    outer_loss: Callable[[Any, Any], Array]
    problem: InnerProblem
    theta: PyTree
    with_theta: Callable[[PyTree], PyTree]
    x: PyTree
    gradient: PyTree
    primal: Solution
    adjoint: Solution
    adjoint_value: PyTree | None
    adjoint_residual: PyTree | None
    linear_solver: Any | None

    def residual(self, x: PyTree, theta: PyTree) -> PyTree:
        """The downhill residual r(x, θ)."""
        return self.problem.at(self.with_theta(theta)).residual(x)

    def loss(self, x: PyTree, theta: PyTree) -> Array:
        """The outer loss f(x, θ)."""
        return self.outer_loss(x, self.with_theta(theta))

    def pull_theta(self, multiplier: PyTree, x: PyTree | None = None) -> PyTree:
        """(∂_θ r)ᵀ λ, like θ, at the final iterate or another x."""
        at = self.x if x is None else x
        _, pull = jax.vjp(lambda theta: self.residual(at, theta), self.theta)
        return pull(multiplier)[0]


class ErrorEstimator(eqx.Module):
    """A way to tell how far a computed hypergradient is from the exact one; subclass it.

    >>> import jax.numpy as jnp, bilevel as bl
    >>> class Unknown(bl.ErrorEstimator):
    ...     def estimate(self, situation):
    ...         infinite = jnp.float32(jnp.inf)
    ...         return bl.TruncationError(infinite, infinite, infinite, jnp.int32(0))
    >>> problem = bl.LinearSystem(jnp.eye(1), lambda theta: theta * jnp.ones(1))
    >>> result = bl.hypergradient(
    ...     lambda x, theta: jnp.sum(x), problem, 1.0, jnp.zeros(1), error=Unknown()
    ... )
    >>> float(result.error.total)
    inf
    """

    @abc.abstractmethod
    def estimate(self, situation: Situation) -> TruncationError:
        """The truncation error against the exact hypergradient dL/dθ at x*(θ)."""


def pairing(multiplier: PyTree, residual: PyTree) -> Array:
    """λᵀr without conjugation, the real part of it: JAX's pairing of cotangent and tangent."""
    return vector.dot(vector.conjugate(multiplier), residual)
