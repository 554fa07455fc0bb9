"""Conjugate gradients."""

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
"""A curvature of so many units of rounding, relative to the largest, counts as zero."""


class ConjugateGradientState(eqx.Module):
    """Iterate, recursive residual, direction, and the numbers that go on with them.

    `energy` is ⟨r, M⁻¹r⟩, `square` is ⟨p, M p⟩ of the direction, and `largest` the largest
    Rayleigh quotient of M⁻¹A so far.
    """

    x: PyTree
    residual: PyTree
    direction: PyTree
    energy: Float[Array, ""]
    square: Float[Array, ""]
    largest: Float[Array, ""]
    status: Int[Array, ""]


class ConjugateGradient(InnerSolver):
    """Conjugate gradients for a symmetric positive definite linear system.

    Hestenes and Stiefel 1952, with the recursive residual; what it claims is confirmed
    on the true residual by the loop, which restarts it where rounding made the two drift
    apart.  A direction whose curvature is not positive, or vanishes next to those before
    it, stops it with `BREAKDOWN`: the operator is indefinite or singular.

    **Arguments:**

    - `preconditioner`: v -> M⁻¹v, symmetric positive definite, close to A⁻¹; or an
        object with `at(problem, x)` that returns such a function.

    >>> import jax.numpy as jnp, bilevel as bl
    >>> problem = bl.LinearSystem(jnp.diag(jnp.array([1.0, 2.0])), jnp.ones(2))
    >>> solution = bl.solve(problem, None, jnp.zeros(2), solver=bl.ConjugateGradient())
    >>> [float(v) for v in solution.value]
    [1.0, 0.5]
    """

    requires: ClassVar[frozenset[str]] = frozenset({"operator", "symmetric"})
    recursive: ClassVar[bool] = True
    linear_adjoint: ClassVar[bool] = True
    divides_by_residual: ClassVar[bool] = True

    preconditioner: Preconditioner | None = None

    def prepare(self, problem: BoundProblem, x: PyTree) -> BoundProblem:
        """Set the preconditioner up."""
        return prepare_preconditioner(problem, self.preconditioner, x)

    def init(self, problem: BoundProblem, x: PyTree) -> ConjugateGradientState:
        """Start along the preconditioned residual."""
        residual = problem.residual(x)
        direction = precondition(problem, residual)
        energy = vector.dot(residual, direction)
        return ConjugateGradientState(
            x=x,
            residual=residual,
            direction=direction,
            energy=energy,
            square=energy,
            largest=jnp.zeros_like(energy),
            status=jnp.int32(Status.CONVERGED),
        )

    def step(
        self, problem: BoundProblem, state: ConjugateGradientState, residual: PyTree
    ) -> ConjugateGradientState:
        """Minimise the energy along the direction, and conjugate the next one."""
        assert problem.operator is not None
        image = problem.operator.matvec(state.direction)
        curvature = vector.dot(state.direction, image)
        negligible = NEGLIGIBLE * vector.epsilon(residual) * state.largest * state.square
        # NaN is no breakdown: it flows on into the residual, where the loop sees it.
        broken = (curvature <= negligible) | (state.energy <= 0)
        length = jnp.where(broken, 0.0, state.energy / jnp.where(broken, 1.0, curvature))
        x = vector.add_scaled(state.x, length, state.direction)
        residual = vector.add_scaled(residual, -length, image)
        preconditioned = precondition(problem, residual)
        energy = vector.dot(residual, preconditioned)
        ratio = energy / jnp.where(broken, 1.0, state.energy)
        quotient = curvature / jnp.where(broken, 1.0, state.square)
        return ConjugateGradientState(
            x=x,
            residual=residual,
            direction=vector.add_scaled(preconditioned, ratio, state.direction),
            energy=energy,
            # M⁻¹r is M-orthogonal to the old direction, so this takes no inner product.
            square=energy + ratio**2 * state.square,
            largest=jnp.maximum(state.largest, quotient),
            status=jnp.where(broken, jnp.int32(Status.BREAKDOWN), jnp.int32(Status.CONVERGED)),
        )

    def residual(self, problem: BoundProblem, state: ConjugateGradientState) -> PyTree:
        """The recursive residual."""
        del problem
        return state.residual

    def failure(self, state: ConjugateGradientState) -> Int[Array, ""]:
        """`BREAKDOWN` once a direction without positive curvature came up."""
        return state.status
