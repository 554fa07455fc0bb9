"""Minimal residuals for symmetric systems."""

from typing import ClassVar

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from bilevel import vector
from bilevel.bound import BoundProblem
from bilevel.solver.base import InnerSolver
from bilevel.solver.preconditioning import Preconditioner, precondition, prepare_preconditioner
from bilevel.status import Status

NEGLIGIBLE = 16.0
"""So many units of rounding, relative to the operator's norm, count as zero."""

STATIONARY = 0.25
"""‖A r‖ of so many square roots of rounding, relative to ‖A‖ ‖r‖, counts as zero.

It falls to a hundredth of one where the residual is a least-squares one, and no further for
rounding; in a system with a solution it stays above 1/κ.
"""


class MINRESState(eqx.Module):
    """Iterate, recursive residual, and what Lanczos and the QR factorisation go on from.

    In the notation of Paige and Saunders: `previous` and `current` are the Lanczos vectors
    vₖ₋₁ and vₖ, `image` is M⁻¹vₖ (`None` without a preconditioner, where it is vₖ itself),
    `older` and `newer` the last two directions, `beta` couples vₖ₋₁ and vₖ, `epsilon` and
    `delta` are what the rotations so far left in the next column, `cosine` and `sine` the
    last rotation, `phi` the residual norm measured by M⁻¹.  `old_image` is M⁻¹vₖ₋₁, and
    `scale` the largest column norm of the tridiagonal matrix, which estimates the norm of
    the operator.
    """

    x: PyTree
    residual: PyTree
    previous: PyTree
    current: PyTree
    old_image: PyTree | None
    image: PyTree | None
    older: PyTree
    newer: PyTree
    beta: Float[Array, ""]
    delta: Float[Array, ""]
    epsilon: Float[Array, ""]
    cosine: Float[Array, ""]
    sine: Float[Array, ""]
    phi: Float[Array, ""]
    scale: Float[Array, ""]
    status: Int[Array, ""]


class MINRES(InnerSolver):
    """MINRES for a symmetric (Hermitian) linear system, definite or not.

    Paige and Saunders 1975: the smallest residual in the Krylov space, from a recurrence of
    three terms.  With a preconditioner the residual is smallest in the norm of M⁻¹; what
    the loop goes by is its Euclidean norm all the same, from a recursion of the residual
    vector that is confirmed on the true one.

    A singular operator with a right-hand side out of its range ends as `INCONSISTENT`, once
    the residual is as small as it gets and not zero: where A r vanishes next to ‖A‖ ‖r‖ (Choi,
    Paige and Saunders 2011).  So does one that is singular to the square root of rounding
    level.  An operator that is not symmetric, or a preconditioner that is not positive definite
    ends as `BREAKDOWN`.

    **Arguments:**

    - `preconditioner`: v -> M⁻¹v, symmetric positive definite, close to |A|⁻¹; or an object
        with `at(problem, x)` that returns such a function.

    >>> import jax.numpy as jnp, bilevel as bl
    >>> problem = bl.LinearSystem(jnp.array([[0.0, 1.0], [1.0, 0.0]]), jnp.array([2.0, 3.0]))
    >>> solution = bl.solve(problem, None, jnp.zeros(2), solver=bl.MINRES())
    >>> [round(float(v), 4) for v in solution.value]
    [3.0, 2.0]
    """

    requires: ClassVar[frozenset[str]] = frozenset({"operator", "symmetric"})
    recursive: ClassVar[bool] = True
    linear_adjoint: ClassVar[bool] = True
    divides_by_residual: ClassVar[bool] = True

    preconditioner: Preconditioner | None = None

    def prepare(self, problem: BoundProblem, x: PyTree) -> BoundProblem:
        """Set the preconditioner up."""
        return prepare_preconditioner(problem, self.preconditioner, x)

    def init(self, problem: BoundProblem, x: PyTree) -> MINRESState:
        """Start Lanczos from the residual."""
        residual = problem.residual(x)
        image = None if problem.precondition is None else precondition(problem, residual)
        square = vector.dot(residual, residual if image is None else image)
        norm = _root(square)
        inverse = _inverse(norm)
        none = vector.zeros_like(residual)
        zero, one = jnp.zeros_like(norm), jnp.ones_like(norm)
        return MINRESState(
            x=x,
            residual=residual,
            previous=none,
            current=vector.scale(inverse, residual),
            old_image=None if image is None else none,
            image=None if image is None else vector.scale(inverse, image),
            older=none,
            newer=none,
            beta=zero,
            delta=zero,
            epsilon=zero,
            cosine=-one,
            sine=zero,
            phi=norm,
            scale=zero,
            status=_status(square < 0),
        )

    def step(self, problem: BoundProblem, state: MINRESState, residual: PyTree) -> MINRESState:
        """One Lanczos step, one rotation, one update of the iterate."""
        assert problem.operator is not None
        z = state.current if state.image is None else state.image
        w = problem.operator.matvec(z)
        old_z = state.previous if state.old_image is None else state.old_image
        coupling = vector.dot(old_z, w)
        w = vector.add_scaled(w, -state.beta, state.previous)
        alpha = vector.dot(z, w)
        w = vector.add_scaled(w, -alpha, state.current)
        image = None if state.image is None else precondition(problem, w)
        square = vector.dot(w, w if image is None else image)
        beta = _root(jnp.abs(square))
        scale = jnp.maximum(state.scale, _root(state.beta**2 + alpha**2 + beta**2))
        negligible = NEGLIGIBLE * vector.epsilon(residual) * scale
        exhausted = beta <= negligible
        beta = jnp.where(exhausted, 0.0, beta)

        # The last rotation acts on the new column of the tridiagonal matrix, and a new one
        # annihilates its last entry.
        delta = state.cosine * state.delta + state.sine * alpha
        gamma_bar = state.sine * state.delta - state.cosine * alpha
        gamma = _root(gamma_bar**2 + beta**2)
        following_delta = -state.cosine * beta
        # ‖A r‖ = φ √(γ̄² + δ̄²) for the residual before this step.
        vanishing = STATIONARY * vector.epsilon(residual) ** 0.5 * scale
        stationary = _root(gamma_bar**2 + following_delta**2) <= vanishing
        singular = (gamma <= negligible) | stationary
        inverse = jnp.where(singular, 0.0, 1.0) / jnp.where(singular, 1.0, gamma)
        cosine, sine = gamma_bar * inverse, beta * inverse
        direction = vector.add_scaled(z, -state.epsilon, state.older)
        direction = vector.add_scaled(direction, -delta, state.newer)
        direction = vector.scale(inverse, direction)

        phi = sine * state.phi
        following = vector.scale(_inverse(beta), w)
        next_residual = vector.scale(sine**2, residual)
        next_residual = vector.add_scaled(next_residual, -phi * cosine, following)
        # A singular column offers nothing: the iterate and its residual stay.
        next_residual = vector.where(singular, residual, next_residual)
        indefinite = (square < 0) & ~exhausted
        # Symmetry makes the two couplings of neighbours equal, whatever else rounding does.
        one_sided = jnp.abs(coupling - state.beta) > vector.epsilon(residual) ** (1 / 3) * scale
        return MINRESState(
            x=vector.add_scaled(state.x, cosine * state.phi, direction),
            residual=next_residual,
            previous=state.current,
            current=following,
            old_image=state.image,
            image=None if image is None else vector.scale(_inverse(beta), image),
            older=state.newer,
            newer=direction,
            beta=beta,
            delta=following_delta,
            epsilon=state.sine * beta,
            cosine=cosine,
            sine=sine,
            phi=phi,
            scale=scale,
            status=jnp.where(
                stationary & ~indefinite & ~one_sided,
                jnp.int32(Status.INCONSISTENT),
                _status(singular | indefinite | one_sided),
            ),
        )

    def residual(self, problem: BoundProblem, state: MINRESState) -> PyTree:
        """The recursive residual."""
        del problem
        return state.residual

    def failure(self, state: MINRESState) -> Int[Array, ""]:
        """`INCONSISTENT` or `BREAKDOWN` once the system proved to be of the wrong kind."""
        return state.status


def _status(broken: Array) -> Int[Array, ""]:
    return jnp.where(broken, jnp.int32(Status.BREAKDOWN), jnp.int32(Status.CONVERGED))


def _root(square: Array) -> Array:
    """√ with a derivative of zero, not infinity, at zero."""
    positive = square > 0
    root = jnp.sqrt(jnp.where(positive, square, 1.0))
    # NaN is not positive and must flow on.
    return jnp.where(positive, root, square * 0.0)


def _inverse(number: Array) -> Array:
    """1/x; 0 for 0, as a vector without length keeps none."""
    zero = number == 0
    return jnp.where(zero, 0.0, 1.0) / jnp.where(zero, 1.0, number)
