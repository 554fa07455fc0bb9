"""Quasilinear systems M(x) x = b(x), and Picard's iteration for them."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree

from bilevel import vector
from bilevel.bound import BoundProblem
from bilevel.budget import Budget
from bilevel.operator import LinearOperator, as_operator
from bilevel.problem import InnerProblem
from bilevel.solver.base import IncompatibleError, InnerSolver, default_tolerance
from bilevel.solver.bicgstab import BiCGStab
from bilevel.solver.newton import linear_correction
from bilevel_pde.jacobian import Jacobian
from bilevel_pde.operator import Operator
from bilevel_pde.source import Near

LINEARISATIONS = 50
"""The most of them where nobody named a number: Picard's iteration converges fast or never."""


@dataclasses.dataclass(frozen=True)
class LaggedProblem(BoundProblem):
    """A bound problem that knows its matrix and right-hand side at a point."""

    lagged: Callable[[Any], tuple[LinearOperator, Any]] | None = None


class Quasilinear(InnerProblem):
    """x*(θ) with M(x*, θ) x* = b(x*, θ), M an operator for each x.

    **Arguments:**

    - `system`: system(x, theta) -> (M, b), an operator and a field like x.
    - `frozen`: whether its derivative takes M and b as constant in x: N = M(x*) in place of
        the Jacobian.
    - `held`: whether M and b are constant in x altogether, also in the residual's derivative;
        what a frozen problem is differentiated as.

    >>> import jax.numpy as jnp, bilevel as bl
    >>> problem = Quasilinear(lambda x, theta: (bl.LinearOperator(lambda v: (1 + x) * v), theta))
    >>> solver = Picard(linear=bl.GMRES())
    >>> round(float(bl.solve(problem, jnp.ones(1) * 2.0, jnp.zeros(1), solver=solver).value[0]), 4)
    1.0
    """

    system: Callable[[Any, Any], tuple[Any, Any]]
    frozen: bool = eqx.field(static=True, default=False)
    held: bool = eqx.field(static=True, default=False)

    def residual(self, x: PyTree, theta: PyTree) -> PyTree:
        """M(x) x - b(x)."""
        matrix, rhs = self.system(jax.lax.stop_gradient(x) if self.held else x, theta)
        return vector.subtract(as_operator(matrix).matvec(x), rhs)

    def equation(self, x: PyTree) -> InnerProblem:
        """Itself, or where the linearisation is frozen, the same with M and b held."""
        del x
        return Quasilinear(self.system, frozen=True, held=True) if self.frozen else self

    def at(self, theta: PyTree) -> LaggedProblem:
        """The problem at one θ, as solvers see it."""

        def lagged(x: Any) -> tuple[LinearOperator, Any]:
            matrix, rhs = self.system(x, theta)
            return as_operator(matrix), rhs

        return LaggedProblem(
            name="quasilinear system",
            residual=lambda x: vector.negative(self.residual(x, theta)),
            lagged=lagged,
            near=lambda x: self._source(x, theta),
        )

    def _source(self, x: PyTree, theta: PyTree) -> Near | Operator | None:
        """The matrix at x, and the Jacobian where that is another one."""
        matrix = self.system(x, theta)[0]
        if not isinstance(matrix, Operator):
            return None
        return matrix if self.held else Near(matrix, Jacobian(matrix, self.system, x, theta))


class PicardState(eqx.Module):
    """Iterate, how often a matrix was applied, and iterations of the linear solver."""

    x: PyTree
    applications: Int[Array, ""]
    inner_iterations: Int[Array, ""]


class Picard(InnerSolver):
    """Picard's iteration for M(x) x = b(x): solve with the matrix at the last iterate.

    Every iteration is one linear solve, started at the last iterate.  The iterations count
    against the budget of the solve, those of the linear solver against `linear_budget`.
    Unrolling differentiates the linear solves implicitly, M's dependence on x included.

    **Arguments:**

    - `linear`: any solver for linear systems; [`bilevel.BiCGStab`][] by default.
    - `linear_budget`: of each linear solve; by default to within rounding.
    - `adjoint_budget`: of the transposed solves of an unrolled derivative; by default to
        within rounding.

    **Raises:** `IncompatibleError` for a solver that solves no linear systems, and for problems
    that are no [`Quasilinear`][].

    >>> import jax.numpy as jnp, bilevel as bl
    >>> problem = Quasilinear(lambda x, theta: (bl.LinearOperator(lambda v: (1 + x) * v), theta))
    >>> solver = Picard(linear=bl.GMRES())  # x = 2 / (1 + x₀), with x₀ = 0
    >>> budget = bl.Budget(iterations=1)
    >>> bl.solve(
    ...     problem, jnp.ones(1) * 2.0, jnp.zeros(1), solver=solver, budget=budget
    ... ).value.tolist()
    [2.0]
    """

    instead: ClassVar[str] = "Newton"

    linear: InnerSolver = BiCGStab()
    linear_budget: Budget | None = None
    adjoint_budget: Budget | None = None

    def __check_init__(self) -> None:
        """Refuse a solver that cannot solve linear systems."""
        if not self.linear.linear_adjoint:
            msg = (
                f"Picard: linear={type(self.linear).__name__} does not solve linear systems. Use "
                "BiCGStab, GMRES or Jacobi."
            )
            raise IncompatibleError(msg)

    def check(self, problem: BoundProblem) -> None:
        """Refuse a problem that has no matrix at a point.

        **Raises:** `IncompatibleError`.
        """
        if not isinstance(problem, LaggedProblem):
            msg = (
                f"Picard cannot solve this {problem.name}: it needs a Quasilinear problem, whose "
                "matrix it can hold. Use Newton instead."
            )
            raise IncompatibleError(msg)

    def init(self, problem: BoundProblem, x: PyTree) -> PicardState:
        """The start."""
        del problem
        return PicardState(x, jnp.int32(1), jnp.int32(0))

    def step(self, problem: BoundProblem, state: PicardState, residual: PyTree) -> PicardState:
        """One linear solve."""
        del residual
        assert isinstance(problem, LaggedProblem)
        assert problem.lagged is not None
        operator, rhs = problem.lagged(state.x)
        default = self.linear.default_budget(rhs)
        budget = default if self.linear_budget is None else self.linear_budget
        back = default if self.adjoint_budget is None else self.adjoint_budget
        guess = jax.lax.stop_gradient(state.x)
        rhs = _moving_together(rhs, operator.matvec(guess))
        x, effort = linear_correction(
            operator, rhs, self.linear, budget, adjoint_budget=back, guess=guess
        )
        return PicardState(
            x,
            state.applications + effort.applications,
            state.inner_iterations + effort.iterations,
        )

    def applications(self, state: PicardState, iterations: Int[Array, ""]) -> Int[Array, ""]:
        """Those of the linear solver, and one for each residual."""
        return state.applications + iterations

    def inner_iterations(self, state: PicardState, iterations: Int[Array, ""]) -> Int[Array, ""]:
        """Those of the linear solver."""
        del iterations
        return state.inner_iterations

    def default_budget(self, x0: PyTree) -> Budget:
        """To within rounding, in a few iterations."""
        return Budget(iterations=LINEARISATIONS, rtol=default_tolerance(x0))


def _moving_together(rhs: PyTree, image: PyTree) -> PyTree:
    """The right-hand side, every part of it perturbed where any part or the matrix is.

    A linear solve can be transposed only if its whole right-hand side is linear, and zero, as
    that of the continuity equation, is no linear function of anything.
    """
    anchor = sum(jnp.sum(leaf) for leaf in jax.tree.leaves((rhs, image)))
    return jax.tree.map(lambda leaf: leaf + jnp.where(False, anchor, 0.0).astype(leaf.dtype), rhs)
