"""Newton's method, with a dense factorisation or a Krylov solver inside."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from bilevel import vector
from bilevel.bound import BoundProblem
from bilevel.budget import Budget
from bilevel.operator import LinearOperator
from bilevel.solution import Solution
from bilevel.solver.base import IncompatibleError, InnerSolver
from bilevel.solver.default_linear import default_linear_solver
from bilevel.solver.line_search import first_length
from bilevel.solver.linear import solve_linear, trusted
from bilevel.solver.parameter import whole
from bilevel.status import Status

SUFFICIENT = 1e-4
"""Share of the predicted decrease that a damped step must bring (Armijo's constant)."""


class NewtonState(eqx.Module):
    """Iterate, the true residual there, and what it took.

    - `applications`: evaluations of the residual, and applications of its derivative.
    - `inner_iterations`: of the linear solver.
    """

    x: PyTree
    residual: PyTree
    applications: Int[Array, ""]
    inner_iterations: Int[Array, ""]


class Newton(InnerSolver):
    """Damped Newton iteration; with a Krylov solver inside, Newton–Krylov.

    Each step solves N δ = r with N the Hessian or Jacobian, and halves δ until the
    objective (or the residual norm where there is none) decreases enough.  N is never
    formed unless `linear` is `Direct`.  Unrolling differentiates the linear solves
    implicitly and takes the step length as constant.

    **Arguments:**

    - `linear`: any linear solver; `None` picks one by size and symmetry.
    - `linear_budget`: its budget; by default a relative residual of 1e-4.
    - `halvings`: most halvings of one step; 0 takes full steps always.
    - `adjoint_budget`: of the transposed solves of an unrolled derivative; by default as
        `linear_budget`.

    >>> import bilevel as bl
    >>> problem = bl.RootFinding(lambda x, theta: x**2 - theta)
    >>> solution = bl.solve(problem, 9.0, 2.0, solver=bl.Newton(), budget=bl.Budget(rtol=1e-5))
    >>> round(float(solution.value), 4), int(solution.iterations) <= 5
    (3.0, True)
    """

    linear: InnerSolver | None = None
    linear_budget: Budget | None = None
    halvings: int = eqx.field(static=True, default=10)
    adjoint_budget: Budget | None = None

    def __check_init__(self) -> None:
        """Refuse a solver that cannot solve linear systems."""
        whole("Newton", "halvings", self.halvings, low=0)
        if self.linear is not None and not self.linear.linear_adjoint:
            msg = (
                f"Newton: linear={type(self.linear).__name__} does not solve linear systems. Use "
                "ConjugateGradient, MINRES, GMRES or Direct."
            )
            raise IncompatibleError(msg)

    def init(self, problem: BoundProblem, x: PyTree) -> NewtonState:
        """Evaluate the residual once."""
        return NewtonState(x, problem.residual(x), jnp.int32(1), jnp.int32(0))

    def step(self, problem: BoundProblem, state: NewtonState, residual: PyTree) -> NewtonState:
        """Solve for the correction and damp it."""
        linear = self.linear or default_linear_solver(problem, state.x)
        budget = self.linear_budget
        if budget is None:
            cap = linear.default_budget(state.x).iterations
            budget = Budget(iterations=cap, rtol=1e-4)
        operator = problem.linearize(state.x)
        correction, effort = linear_correction(
            operator, residual, linear, budget, adjoint_budget=self.adjoint_budget
        )
        if problem.objective is not None:
            correction = _downhill(problem, state.x, residual, correction)
        length, tried = self._length(problem, state.x, residual, correction)
        x = vector.add_scaled(state.x, length, correction)
        return NewtonState(
            x,
            problem.residual(x),
            state.applications + effort.applications + 1 + tried,
            state.inner_iterations + effort.iterations,
        )

    def residual(self, problem: BoundProblem, state: NewtonState) -> PyTree:
        """The residual evaluated at the end of the step."""
        del problem
        return state.residual

    def applications(self, state: NewtonState, iterations: Int[Array, ""]) -> Int[Array, ""]:
        """Evaluations of the residual, and applications of its derivative."""
        del iterations
        return state.applications

    def inner_iterations(self, state: NewtonState, iterations: Int[Array, ""]) -> Int[Array, ""]:
        """Those of the linear solver."""
        del iterations
        return state.inner_iterations

    def _length(
        self, problem: BoundProblem, x: PyTree, residual: PyTree, correction: PyTree
    ) -> tuple[Float[Array, ""], Int[Array, ""]]:
        norm = vector.norm(residual)
        if self.halvings == 0:
            return jnp.ones_like(norm), jnp.int32(0)
        x, residual, correction = jax.lax.stop_gradient((x, residual, correction))
        slope = vector.dot(residual, correction)
        # A correction this small is Newton's last: a residual that shrinks no more is rounding.
        last = vector.norm(correction) <= vector.epsilon(x) ** 0.5 * vector.norm(x)
        objective = problem.objective
        value = None if objective is None else jax.lax.stop_gradient(objective(x))

        def enough(length: Array) -> Array:
            trial = vector.add_scaled(x, length, correction)
            if objective is None or value is None:
                after = vector.norm(problem.residual(trial))
                return (after <= (1 - SUFFICIENT * length) * norm) | (last & jnp.isfinite(after))
            # Near the solution the decrease drowns in rounding: then any step will do.
            slack = 10 * jnp.finfo(value.dtype).eps * jnp.abs(value)
            return objective(trial) <= value - SUFFICIENT * length * slope + slack

        def halve(carry: tuple[Array, Array]) -> tuple[Array, Array]:
            length, tried = carry
            return 0.5 * length, tried + 1

        def goes_on(carry: tuple[Array, Array]) -> Array:
            length, tried = carry
            return (tried < self.halvings) & ~enough(length)

        length, tried = jax.lax.while_loop(goes_on, halve, (jnp.ones_like(norm), jnp.int32(0)))
        return jax.lax.stop_gradient(length), tried + 1


def _downhill(problem: BoundProblem, x: PyTree, residual: PyTree, correction: PyTree) -> PyTree:
    """The correction, or a gradient step where it does not lead down: N is indefinite there."""
    slope = vector.dot(residual, jax.lax.stop_gradient(correction))
    # False for NaN, which a failed factorisation gives.
    leads_down = (slope > 0) & jnp.isfinite(slope)
    start = jax.lax.stop_gradient(residual)
    usable = leads_down | ~(vector.norm(start) > 0)

    def gradient_step() -> PyTree:
        return vector.scale(first_length(problem, x, start), residual)

    return jax.lax.cond(usable, lambda: correction, gradient_step)


class Effort(NamedTuple):
    """What a linear solve took, both int32."""

    iterations: Int[Array, ""]
    applications: Int[Array, ""]


def linear_correction(
    operator: LinearOperator,
    rhs: PyTree,
    solver: InnerSolver,
    budget: Budget,
    *,
    adjoint_budget: Budget | None = None,
    guess: PyTree | None = None,
) -> tuple[Any, Effort]:
    """N⁻¹ b to a budget, differentiable in both as the exact inverse is.

    **Arguments:**

    - `adjoint_budget`: of the transposed solve; by default `budget`.
    - `guess`: where the solve starts; by default at zero.
    """

    # What is counted travels as floats: whole numbers could not be differentiated along.
    def counted(solution: Solution) -> Any:
        counts = Effort(solution.iterations, solution.applications)
        return jax.tree.map(lambda count: count.astype(float), counts)

    def forward(_: Any, rhs: Any) -> Any:
        solution, _ = solve_linear(operator, rhs, solver, budget, guess)
        # Where the solve broke down a part of the correction leads down all the same; a start
        # that NaN never let go of is none, be it of a correction or of its tangent.
        poison = jnp.where(solution.status == Status.NONFINITE, jnp.nan, 1.0)
        return vector.scale(poison, solution.value), counted(solution)

    def backward(_: Any, rhs: Any) -> Any:
        back = budget if adjoint_budget is None else adjoint_budget
        solution, _ = solve_linear(operator.transposed(rhs), rhs, solver, back)
        return trusted(solution), counted(solution)

    value, counts = jax.lax.custom_linear_solve(
        operator.matvec, rhs, forward, transpose_solve=backward, has_aux=True
    )
    counts = jax.lax.stop_gradient(counts)
    return value, jax.tree.map(lambda count: count.astype(jnp.int32), counts)
