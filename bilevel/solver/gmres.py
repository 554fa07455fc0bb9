"""Generalised minimal residuals, restarted."""

from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Inexact, Int, PyTree

from bilevel import vector
from bilevel.bound import BoundProblem
from bilevel.budget import Budget
from bilevel.solver import basis as rows
from bilevel.solver.arnoldi import NEGLIGIBLE, arnoldi
from bilevel.solver.base import InnerSolver
from bilevel.solver.parameter import whole
from bilevel.solver.preconditioning import Preconditioner, precondition, prepare_preconditioner
from bilevel.status import Status


class GMRESState(eqx.Module):
    """Iterate, the true residual there, operator applications in cycles, and the status."""

    x: PyTree
    residual: PyTree
    applications: Int[Array, ""]
    status: Int[Array, ""]


class GMRES(InnerSolver):
    """GMRES(m) for any linear system, preconditioned from the right.

    Saad and Schultz 1986, Saad 1993.  One iteration of a budget is one restart *cycle*: up
    to `restart` steps of Arnoldi and the correction of smallest residual in the space they
    span.  A cycle ends early where that residual meets the tolerance of the budget or the
    space is exhausted; the `applications` of the solution count what was done.  Residuals
    are true ones, evaluated after every cycle.

    A cycle that gains nothing would be repeated for ever, so it stops the iteration: with
    `ROUNDING` where the residual is small, and otherwise with `BREAKDOWN`: the operator is
    singular, `restart` is too small, or the preconditioner is not linear and `flexible` not
    set.

    **Arguments:**

    - `restart`: m, the most steps of a cycle; m + 1 vectors are stored. Static.
    - `preconditioner`: v -> M⁻¹v, close to A⁻¹ (to its transpose in the solve of an adjoint);
        or an object with `at(problem, x)` that returns such a function.
    - `flexible`: whether M⁻¹ may be any function, such as a few steps of an iteration; m
        more vectors are stored.

    >>> import jax.numpy as jnp, bilevel as bl
    >>> problem = bl.LinearSystem(jnp.array([[2.0, 1.0], [-1.0, 1.0]]), jnp.array([3.0, 0.0]))
    >>> solution = bl.solve(problem, None, jnp.zeros(2), solver=bl.GMRES())
    >>> [round(float(v), 4) for v in solution.value], int(solution.iterations)
    ([1.0, 1.0], 1)
    """

    requires: ClassVar[frozenset[str]] = frozenset({"operator"})
    linear_adjoint: ClassVar[bool] = True
    divides_by_residual: ClassVar[bool] = True

    restart: int = eqx.field(static=True, default=30)
    preconditioner: Preconditioner | None = None
    flexible: bool = eqx.field(static=True, default=False)

    def __check_init__(self) -> None:
        """Validate the options."""
        whole("GMRES", "restart", self.restart)
        if self.flexible and self.preconditioner is None:
            msg = (
                "GMRES: flexible=True stores what a preconditioner returns, and there is none. "
                "Give preconditioner=, or leave flexible out."
            )
            raise ValueError(msg)

    def prepare(self, problem: BoundProblem, x: PyTree) -> BoundProblem:
        """Set the preconditioner up."""
        return prepare_preconditioner(problem, self.preconditioner, x)

    def init(self, problem: BoundProblem, x: PyTree) -> GMRESState:
        """Evaluate the residual."""
        return GMRESState(x, problem.residual(x), jnp.int32(0), jnp.int32(Status.CONVERGED))

    def step(self, problem: BoundProblem, state: GMRESState, residual: PyTree) -> GMRESState:
        """One restart cycle."""
        assert problem.operator is not None
        complex_linear = problem.complex_linear(residual)
        norm_dtype = vector.real_dtype(residual)
        target = jnp.zeros((), norm_dtype) if problem.target is None else problem.target
        space = arnoldi(
            problem.operator.matvec,
            problem.precondition,
            residual,
            target.astype(norm_dtype),
            min(self.restart, _dimension(residual, complex_linear=complex_linear)),
            complex_linear=complex_linear,
            keep=self.flexible,
        )
        weights = least_squares(space.hessenberg, space.norm, space.count)
        if space.preconditioned is None:
            # One more weight, of zero: cutting the last row off would copy the basis.
            correction = rows.combine(jnp.pad(weights, (0, 1)), space.basis)
            correction = precondition(problem, correction)
        else:
            correction = rows.combine(weights, space.preconditioned)
        x = vector.add(state.x, correction)
        after = problem.residual(x)
        before = jax.lax.stop_gradient(space.norm)
        gained_nothing = vector.norm(jax.lax.stop_gradient(after)) >= before * (
            1.0 - 4.0 * vector.epsilon(residual)
        )
        small = before <= vector.epsilon(residual) ** 0.5 * problem.reference(before)
        reason = jnp.where(small, jnp.int32(Status.ROUNDING), jnp.int32(Status.BREAKDOWN))
        status = jnp.where(gained_nothing, reason, jnp.int32(Status.CONVERGED))
        return GMRESState(
            x=vector.where(gained_nothing, state.x, x),
            residual=vector.where(gained_nothing, residual, after),
            applications=state.applications + space.count,
            status=status,
        )

    def residual(self, problem: BoundProblem, state: GMRESState) -> PyTree:
        """The true residual, evaluated at the end of the cycle."""
        del problem
        return state.residual

    def failure(self, state: GMRESState) -> Int[Array, ""]:
        """`BREAKDOWN` or `ROUNDING` once a cycle gained nothing."""
        return state.status

    def applications(self, state: GMRESState, iterations: Int[Array, ""]) -> Int[Array, ""]:
        """The steps of all cycles, a true residual after each, and the first residual."""
        return state.applications + iterations + 1

    def default_budget(self, x0: PyTree) -> Budget:
        """As many operator applications as other solvers get, in cycles."""
        budget = super().default_budget(x0)
        return Budget(iterations=max(-(-budget.iterations // self.restart), 20), rtol=budget.rtol)


def least_squares(
    hessenberg: Inexact[Array, "rows steps"], norm: Float[Array, ""], count: Int[Array, ""]
) -> Inexact[Array, " steps"]:
    """The y that minimises |norm e₁ - H y|, zero beyond the first `count` entries.

    A last column that adds nothing to the others, as a singular operator gives, is left
    out.

    **Arguments:**

    - `hessenberg`: upper Hessenberg, zero from column `count` on.
    """
    steps = hessenberg.shape[1]
    unused = jnp.arange(steps) >= count
    # Ones below the diagonal make the unused columns orthogonal to all else.
    filled = hessenberg + jnp.eye(steps + 1, steps, -1, hessenberg.dtype) * unused
    orthogonal, triangular = jnp.linalg.qr(filled)
    pivots = jnp.abs(jnp.diagonal(jax.lax.stop_gradient(triangular)))
    largest = jnp.max(jnp.where(unused, 0.0, pivots))
    dropped = unused | (pivots <= NEGLIGIBLE * jnp.finfo(hessenberg.dtype).eps * largest)
    triangular = triangular + jnp.diag(jnp.where(dropped, 1.0 - jnp.diagonal(triangular), 0.0))
    projected = jnp.where(dropped, 0.0, norm * orthogonal[0].conj())
    return jax.scipy.linalg.solve_triangular(triangular, projected)


def _dimension(x: PyTree, *, complex_linear: bool) -> int:
    """The dimension of the space of x over the numbers that the operator is linear in."""
    if complex_linear:
        return vector.size(x)
    return sum(leaf.size * (2 if jnp.iscomplexobj(leaf) else 1) for leaf in jax.tree.leaves(x))
