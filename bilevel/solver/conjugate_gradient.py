"""Conjugate gradients."""

from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from bilevel import vector
from bilevel.bound import BoundProblem
from bilevel.solution import Status
from bilevel.solver.base import InnerSolver
from bilevel.solver.preconditioning import precondition, prepare_preconditioner


class ConjugateGradientState(eqx.Module):
    """Iterate, recursive residual, direction, and ⟨r, M⁻¹r⟩."""

    x: PyTree
    residual: PyTree
    direction: PyTree
    energy: Float[Array, ""]
    broken: Int[Array, ""]


class ConjugateGradient(InnerSolver):
    """Conjugate gradients for a symmetric positive definite linear system.

    Hestenes and Stiefel 1952, with the recursive residual; what it claims is confirmed
    on the true residual by the loop, which restarts it where rounding made the two drift
    apart.  A direction of non-positive curvature stops it with `BREAKDOWN`.

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
    instead: ClassVar[str] = "GMRES or BiCGStab"
    recursive: ClassVar[bool] = True
    linear_adjoint: ClassVar[bool] = True

    preconditioner: Callable[[Any], Any] | None = None

    def prepare(self, problem: BoundProblem, x: PyTree) -> BoundProblem:
        """Set the preconditioner up."""
        return prepare_preconditioner(problem, self.preconditioner, x)

    def init(self, problem: BoundProblem, x: PyTree) -> ConjugateGradientState:
        """Start along the preconditioned residual."""
        residual = problem.residual(x)
        direction = precondition(problem, residual)
        return ConjugateGradientState(
            x, residual, direction, vector.dot(residual, direction), jnp.int32(Status.CONVERGED)
        )

    def step(
        self, problem: BoundProblem, state: ConjugateGradientState, residual: PyTree
    ) -> ConjugateGradientState:
        """Minimise the energy along the direction, and conjugate the next one."""
        assert problem.operator is not None
        image = problem.operator.matvec(state.direction)
        curvature = vector.dot(state.direction, image)
        # NaN is no breakdown: it flows on into the residual, where the loop sees it.
        broken = (curvature <= 0) | (state.energy <= 0)
        length = jnp.where(broken, 0.0, state.energy / jnp.where(broken, 1.0, curvature))
        x = vector.add_scaled(state.x, length, state.direction)
        residual = vector.add_scaled(residual, -length, image)
        preconditioned = precondition(problem, residual)
        energy = vector.dot(residual, preconditioned)
        ratio = energy / jnp.where(broken, 1.0, state.energy)
        direction = vector.add_scaled(preconditioned, ratio, state.direction)
        status = jnp.where(broken, jnp.int32(Status.BREAKDOWN), jnp.int32(Status.CONVERGED))
        return ConjugateGradientState(x, residual, direction, energy, status)

    def residual(self, problem: BoundProblem, state: ConjugateGradientState) -> PyTree:
        """The recursive residual."""
        del problem
        return state.residual

    def failure(self, state: ConjugateGradientState) -> Int[Array, ""]:
        """`BREAKDOWN` once a direction of non-positive curvature came up."""
        return state.broken
