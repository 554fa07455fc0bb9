"""Stabilised biconjugate gradients."""

from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Inexact, Int, PyTree

from bilevel import vector
from bilevel.bound import BoundProblem
from bilevel.solver.base import InnerSolver
from bilevel.solver.preconditioning import Preconditioner, precondition, prepare_preconditioner
from bilevel.status import Status

NEGLIGIBLE = 16.0
"""A cosine, or an image relative to the largest, of so many units of rounding is zero."""


class BiCGStabState(eqx.Module):
    """Iterate, recursive residual, direction and shadow residual.

    `rho` is the inner product of shadow and residual, `norm` and `shadow_norm` are their
    norms, `scale` is the largest ‖A v‖/‖v‖ met, which estimates the norm of the operator
    from below.  `fresh` says that shadow and direction are the residual itself, as at the
    start.
    """

    x: PyTree
    residual: PyTree
    direction: PyTree
    shadow: PyTree
    rho: Inexact[Array, ""]
    norm: Float[Array, ""]
    shadow_norm: Float[Array, ""]
    scale: Float[Array, ""]
    fresh: Bool[Array, ""]
    status: Int[Array, ""]


class BiCGStab(InnerSolver):
    """BiCGStab for any linear system, preconditioned from the right.

    Van der Vorst 1992.  Two applications of the operator an iteration, and no stored basis:
    cheaper than GMRES in memory, less even on the way.  Where the residual turned orthogonal
    to the shadow residual the recurrence is started anew from where it is; where that is no
    help, or the operator is skew along the residual or singular, it stops with `BREAKDOWN`.
    The recursive residual is confirmed on the true one.

    **Arguments:**

    - `preconditioner`: v -> M⁻¹v, linear, close to A⁻¹ (to its transpose in the solve of an
        adjoint); or an object with `at(problem, x)` that returns such a function.

    >>> import jax.numpy as jnp, bilevel as bl
    >>> problem = bl.LinearSystem(jnp.array([[2.0, 1.0], [-1.0, 1.0]]), jnp.array([3.0, 0.0]))
    >>> solution = bl.solve(problem, None, jnp.zeros(2), solver=bl.BiCGStab())
    >>> [round(float(v), 4) for v in solution.value]
    [1.0, 1.0]
    """

    requires: ClassVar[frozenset[str]] = frozenset({"operator"})
    recursive: ClassVar[bool] = True
    linear_adjoint: ClassVar[bool] = True
    divides_by_residual: ClassVar[bool] = True

    preconditioner: Preconditioner | None = None

    def prepare(self, problem: BoundProblem, x: PyTree) -> BoundProblem:
        """Set the preconditioner up."""
        return prepare_preconditioner(problem, self.preconditioner, x)

    def init(self, problem: BoundProblem, x: PyTree) -> BiCGStabState:
        """Shadow and direction start as the residual."""
        residual = problem.residual(x)
        norm = _norm(residual)
        return BiCGStabState(
            x=x,
            residual=residual,
            direction=residual,
            shadow=residual,
            rho=problem.inner_product(residual, residual),
            norm=norm,
            shadow_norm=norm,
            scale=jnp.zeros_like(norm),
            fresh=jnp.asarray(True),
            status=jnp.int32(Status.CONVERGED),
        )

    def step(self, problem: BoundProblem, state: BiCGStabState, residual: PyTree) -> BiCGStabState:
        """A step along the direction, and one that makes the residual smallest."""
        assert problem.operator is not None
        inner, matvec = problem.inner_product, problem.operator.matvec
        level = NEGLIGIBLE * vector.epsilon(residual)
        preconditioned = precondition(problem, state.direction)
        image = matvec(preconditioned)
        image_norm = _norm(image)
        stretch = _quotient(image_norm, _norm(preconditioned))
        sigma = inner(state.shadow, image)
        singular = stretch <= level * state.scale
        stuck = singular | _within(sigma, level * state.shadow_norm * image_norm)
        alpha = jnp.where(stuck, 0.0, state.rho / jnp.where(stuck, 1.0, sigma))
        x = vector.add_scaled(state.x, alpha, preconditioned)
        half = vector.add_scaled(residual, -alpha, image)

        preconditioned = precondition(problem, half)
        second_image = matvec(preconditioned)
        square = vector.dot(second_image, second_image)
        product = inner(second_image, half)
        omega = _quotient(product, square)
        x = vector.add_scaled(x, omega, preconditioned)
        after = vector.add_scaled(half, -omega, second_image)
        after_square = vector.dot(after, after)
        norm = jnp.sqrt(jax.lax.stop_gradient(after_square))
        # Pythagoras: ‖half‖² is what is left of it and what the step took off.
        taken = jax.lax.stop_gradient(jnp.abs(product) * _quotient(1.0, jnp.sqrt(square)))
        half_norm = jnp.hypot(norm, taken)
        skew = taken <= level * half_norm

        rho = inner(state.shadow, after)
        restarts = stuck | skew | _within(rho, level * state.shadow_norm * norm)
        growth = rho / jnp.where(restarts, 1.0, state.rho)
        beta = jnp.where(restarts, 0.0, growth * alpha / jnp.where(restarts, 1.0, omega))
        direction = vector.add_scaled(state.direction, -omega, image)
        broken = singular | (stuck & state.fresh) | (skew & (half_norm > level * state.norm))
        return BiCGStabState(
            x=x,
            residual=after,
            direction=vector.add_scaled(after, beta, direction),
            shadow=vector.where(restarts, after, state.shadow),
            rho=jnp.where(restarts, after_square.astype(rho.dtype), rho),
            norm=norm,
            shadow_norm=jnp.where(restarts, norm, state.shadow_norm),
            scale=jnp.maximum(state.scale, stretch),
            fresh=restarts,
            status=jnp.where(broken, jnp.int32(Status.BREAKDOWN), jnp.int32(Status.CONVERGED)),
        )

    def residual(self, problem: BoundProblem, state: BiCGStabState) -> PyTree:
        """The recursive residual."""
        del problem
        return state.residual

    def failure(self, state: BiCGStabState) -> Int[Array, ""]:
        """`BREAKDOWN` once there was no way on."""
        return state.status

    def applications(self, state: BiCGStabState, iterations: Int[Array, ""]) -> Int[Array, ""]:
        """Two an iteration, and the first residual."""
        del state
        return 2 * iterations + 1


def _norm(v: PyTree) -> Float[Array, ""]:
    """The norm, for decisions: without a derivative, which it has none of at zero."""
    return vector.norm(jax.lax.stop_gradient(v))


def _within(product: Array, level: Array) -> Bool[Array, ""]:
    """Whether an inner product is zero as far as rounding lets one tell; not if it is NaN."""
    return jnp.abs(jax.lax.stop_gradient(product)) <= level


def _quotient(number: Array | float, divisor: Array) -> Array:
    """Their quotient, or zero if the divisor is."""
    zero = divisor == 0
    return jnp.where(zero, 0.0, number) / jnp.where(zero, 1.0, divisor)
