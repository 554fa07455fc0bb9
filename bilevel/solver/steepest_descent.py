"""Steepest descent for linear systems."""

from typing import Any, ClassVar

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree

from bilevel import vector
from bilevel.bound import BoundProblem
from bilevel.solver.base import InnerSolver
from bilevel.solver.preconditioning import precondition, prepare_preconditioner
from bilevel.status import Status


class SteepestDescentState(eqx.Module):
    """Iterate, recursive residual, and why it stopped."""

    x: PyTree
    residual: PyTree
    status: Int[Array, ""]


class SteepestDescent(InnerSolver):
    """Steepest descent with exact line search for a symmetric positive definite linear system.

    x ← x + α z with z = M⁻¹r and α = ⟨r, z⟩ / ⟨z, Az⟩ (Cauchy 1847; Saad 2003, algorithm
    5.2), at the rate (κ - 1) / (κ + 1) an iteration in the norm of A.  The residual is updated
    recursively, one operator application an iteration, and confirmed by the loop.  A
    direction of non-positive curvature stops it with `BREAKDOWN`.

    **Arguments:**

    - `preconditioner`: v -> M⁻¹v, symmetric positive definite; or an object with
        `at(problem, x)` that returns such a function.

    >>> import jax.numpy as jnp, bilevel as bl
    >>> problem = bl.LinearSystem(jnp.diag(jnp.array([1.0, 3.0])), jnp.ones(2))
    >>> solution = bl.solve(
    ...     problem, None, jnp.zeros(2), solver=bl.SteepestDescent(), budget=bl.Budget(iterations=1)
    ... )
    >>> [float(v) for v in solution.value]
    [0.5, 0.5]
    """

    requires: ClassVar[frozenset[str]] = frozenset({"operator", "symmetric", "positive_definite"})
    recursive: ClassVar[bool] = True
    linear_adjoint: ClassVar[bool] = True
    conditioned: ClassVar[bool] = True
    divides_by_residual: ClassVar[bool] = True

    preconditioner: Any = None

    def prepare(self, problem: BoundProblem, x: PyTree) -> BoundProblem:
        """Set the preconditioner up."""
        return prepare_preconditioner(problem, self.preconditioner, x)

    def init(self, problem: BoundProblem, x: PyTree) -> SteepestDescentState:
        """Evaluate the residual."""
        return SteepestDescentState(x, problem.residual(x), jnp.int32(Status.CONVERGED))

    def step(
        self, problem: BoundProblem, state: SteepestDescentState, residual: PyTree
    ) -> SteepestDescentState:
        """Minimise the energy along the preconditioned residual."""
        assert problem.operator is not None
        direction = precondition(problem, residual)
        image = problem.operator.matvec(direction)
        energy, curvature = vector.dot(residual, direction), vector.dot(direction, image)
        # NaN is no breakdown: it flows on into the residual, where the loop sees it.
        broken = (curvature <= 0) | (energy <= 0)
        length = jnp.where(broken, 0.0, energy / jnp.where(broken, 1.0, curvature))
        return SteepestDescentState(
            x=vector.add_scaled(state.x, length, direction),
            residual=vector.add_scaled(residual, -length, image),
            status=jnp.where(broken, jnp.int32(Status.BREAKDOWN), jnp.int32(Status.CONVERGED)),
        )

    def residual(self, problem: BoundProblem, state: SteepestDescentState) -> PyTree:
        """The recursive residual."""
        del problem
        return state.residual

    def failure(self, state: SteepestDescentState) -> Int[Array, ""]:
        """`BREAKDOWN` once a direction of non-positive curvature came up."""
        return state.status
