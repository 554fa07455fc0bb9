"""Stabilised biconjugate gradients."""

from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Inexact, Int, PyTree

from bilevel import vector
from bilevel.bound import BoundProblem
from bilevel.solution import Status
from bilevel.solver.base import InnerSolver
from bilevel.solver.preconditioning import Preconditioner, precondition, prepare_preconditioner

NEGLIGIBLE = 16.0
"""A cosine, or an image relative to the largest, of so many units of rounding is zero."""


class BiCGStabState(eqx.Module):
    """Iterate, recursive residual, direction, shadow residual, and their inner product.

    `fresh` says that shadow and direction are the residual itself, as at the start; `scale`
    is the largest ‖A v‖/‖v‖ met, which estimates the norm of the operator from below.
    """

    x: PyTree
    residual: PyTree
    direction: PyTree
    shadow: PyTree
    rho: Inexact[Array, ""]
    fresh: Bool[Array, ""]
    scale: Float[Array, ""]
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
    instead: ClassVar[str] = "Newton(linear=BiCGStab())"
    recursive: ClassVar[bool] = True
    linear_adjoint: ClassVar[bool] = True

    preconditioner: Preconditioner | None = None

    def prepare(self, problem: BoundProblem, x: PyTree) -> BoundProblem:
        """Set the preconditioner up."""
        return prepare_preconditioner(problem, self.preconditioner, x)

    def init(self, problem: BoundProblem, x: PyTree) -> BiCGStabState:
        """Shadow and direction start as the residual."""
        residual = problem.residual(x)
        return BiCGStabState(
            x=x,
            residual=residual,
            direction=residual,
            shadow=residual,
            rho=problem.inner_product(residual, residual),
            fresh=jnp.asarray(True),
            scale=jnp.zeros((), vector.real_dtype(residual)),
            status=jnp.int32(Status.CONVERGED),
        )

    def step(self, problem: BoundProblem, state: BiCGStabState, residual: PyTree) -> BiCGStabState:
        """A step along the direction, and one that makes the residual smallest."""
        assert problem.operator is not None
        inner, matvec = problem.inner_product, problem.operator.matvec
        preconditioned = precondition(problem, state.direction)
        image = matvec(preconditioned)
        sigma = inner(state.shadow, image)
        stretch = _ratio(image, preconditioned)
        singular = stretch <= NEGLIGIBLE * vector.epsilon(residual) * state.scale
        stuck = singular | _orthogonal(sigma, state.shadow, image)
        alpha = jnp.where(stuck, 0.0, state.rho / jnp.where(stuck, 1.0, sigma))
        x = vector.add_scaled(state.x, alpha, preconditioned)
        half = vector.add_scaled(residual, -alpha, image)

        preconditioned = precondition(problem, half)
        second_image = matvec(preconditioned)
        square = vector.dot(second_image, second_image)
        product = inner(second_image, half)
        skew = _orthogonal(product, second_image, half)
        omega = jnp.where(skew, 0.0, product / jnp.where(skew, 1.0, square))
        x = vector.add_scaled(x, omega, preconditioned)
        half = vector.add_scaled(half, -omega, second_image)

        rho = inner(state.shadow, half)
        restarts = stuck | skew | _orthogonal(rho, state.shadow, half)
        growth = rho / jnp.where(restarts, 1.0, state.rho)
        beta = jnp.where(restarts, 0.0, growth * alpha / jnp.where(restarts, 1.0, omega))
        direction = vector.add_scaled(state.direction, -omega, image)
        direction = vector.add_scaled(half, beta, direction)
        rho = jnp.where(restarts, inner(half, half), rho)
        broken = singular | (stuck & state.fresh) | (skew & _significant(half, residual))
        return BiCGStabState(
            x=x,
            residual=half,
            direction=direction,
            shadow=vector.where(restarts, half, state.shadow),
            rho=rho,
            fresh=restarts,
            scale=jnp.maximum(state.scale, stretch),
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


def _orthogonal(product: Array, x: PyTree, y: PyTree) -> Bool[Array, ""]:
    """Whether an inner product is zero as far as rounding lets one tell."""
    product, x, y = jax.lax.stop_gradient((product, x, y))
    level = NEGLIGIBLE * vector.epsilon(x)
    return jnp.abs(product) <= level * vector.norm(x) * vector.norm(y)


def _ratio(image: PyTree, v: PyTree) -> Float[Array, ""]:
    """‖A v‖ / ‖v‖, 0 where v is."""
    image, v = jax.lax.stop_gradient((image, v))
    norm = vector.norm(v)
    return vector.norm(image) / jnp.where(norm > 0, norm, 1.0)


def _significant(x: PyTree, reference: PyTree) -> Bool[Array, ""]:
    """Whether x is more than rounding has left of the reference."""
    x, reference = jax.lax.stop_gradient((x, reference))
    return vector.norm(x) > NEGLIGIBLE * vector.epsilon(x) * vector.norm(reference)
