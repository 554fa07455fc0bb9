"""Gradient descent with a line search."""

from typing import ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from bilevel import vector
from bilevel.bound import BoundProblem
from bilevel.solver.first_order import FirstOrderSolver
from bilevel.solver.line_search import (
    failure_of,
    first_length,
    objective_of,
    rounding_hides,
    slack,
)
from bilevel.solver.parameter import positive, whole, within
from bilevel.status import Status


class ArmijoState(eqx.Module):
    """Iterate and objective, last and first step length, largest gradient norm, and counts."""

    x: PyTree
    value: Float[Array, ""]
    length: Float[Array, ""]
    first_length: Float[Array, ""]
    largest_norm: Float[Array, ""]
    evaluations: Int[Array, ""]
    status: Int[Array, ""]


class ArmijoGradientDescent(FirstOrderSolver):
    """Gradient descent with a backtracking line search on the objective.

    Armijo 1966: the step α is shrunk until objective(x + αr) ≤ objective(x) - c α ‖r‖².
    Every search starts from the last step, enlarged, so that steps may grow again.  Where
    the decrease drowns in rounding the condition is tested on slopes instead,
    ⟨r(x + αr), r⟩ ≥ (2c - 1) ‖r‖² (Hager and Zhang 2005, equation 4.1), so that the method
    does not stall at the square root of rounding level.

    Multiplying the objective by a number changes nothing but the step lengths.  A search
    that finds no step ends the solve, as `ROUNDING` where rounding explains it and as
    `LINE_SEARCH` otherwise.  Unrolling takes the step lengths as constants.

    **Arguments:**

    - `step_size`: the first step tried, in units of x over units of the gradient; by
        default 1 over the curvature along the first gradient. Traced.
    - `decrease`: c in (0, 1/2). Traced.
    - `shrink`: factor of backtracking, in (0, 1). Traced.
    - `growth`: factor between one step and the first try of the next, at least 1. Traced.
    - `trials`: most steps tried in one search, static.

    **Raises:** `ValueError` for arguments out of range.

    >>> import bilevel as bl
    >>> problem = bl.Minimization(lambda x, theta: theta * (x - 3.0) ** 2)
    >>> solution = bl.solve(problem, 1e6, 0.0, solver=bl.ArmijoGradientDescent())
    >>> float(solution.value)
    3.0
    """

    adaptive: ClassVar[bool] = True

    step_size: Float[Array, ""] | float | None = None
    decrease: Float[Array, ""] | float = 1e-4
    shrink: Float[Array, ""] | float = 0.5
    growth: Float[Array, ""] | float = 1.5
    trials: int = eqx.field(static=True, default=30)

    def __check_init__(self) -> None:
        """Validate the parameters where they are concrete."""
        name = "ArmijoGradientDescent"
        if self.step_size is not None:
            positive(name, "step_size", self.step_size)
        for field in ("decrease", "shrink"):
            positive(name, field, getattr(self, field))
        within(name, "decrease", self.decrease, 0.0, 0.5)
        within(name, "shrink", self.shrink, 0.0, 1.0)
        within(name, "growth", self.growth, 1.0, float("inf"))
        whole(name, "trials", self.trials)

    def init(self, problem: BoundProblem, x: PyTree) -> ArmijoState:
        """The first step to try, as if it had come from a step before."""
        residual = problem.residual(x)
        norm = vector.norm(jax.lax.stop_gradient(residual))
        if self.step_size is None:
            first, products = first_length(problem, x, residual), 1
        else:
            first, products = jnp.asarray(self.step_size), 0
        length, growth = first.astype(norm.dtype), jnp.asarray(self.growth, norm.dtype)
        return ArmijoState(
            x=x,
            value=jax.lax.stop_gradient(objective_of(problem)(x)),
            length=jax.lax.stop_gradient(length / growth),
            first_length=jax.lax.stop_gradient(length),
            largest_norm=norm,
            evaluations=jnp.int32(1 + products),
            status=jnp.int32(Status.CONVERGED),
        )

    def step(self, problem: BoundProblem, state: ArmijoState, residual: PyTree) -> ArmijoState:
        """Search along the residual and go there."""
        norm = vector.norm(jax.lax.stop_gradient(residual))
        largest_norm = jnp.maximum(state.largest_norm, norm)
        trial, status = self._search(problem, state, residual, largest_norm)
        return ArmijoState(
            x=vector.add_scaled(state.x, jnp.where(trial.accepted, trial.length, 0.0), residual),
            value=jnp.where(trial.accepted, trial.value, state.value),
            length=jnp.where(trial.accepted, trial.length, state.length),
            first_length=state.first_length,
            largest_norm=largest_norm,
            evaluations=state.evaluations + trial.number,
            status=status,
        )

    def failure(self, state: ArmijoState) -> Int[Array, ""]:
        """`ROUNDING` or `LINE_SEARCH` once a search found no step."""
        return state.status

    def applications(self, state: ArmijoState, iterations: Int[Array, ""]) -> Int[Array, ""]:
        """Objectives that the searches evaluated, and one gradient an iteration."""
        return state.evaluations + iterations

    def _search(
        self,
        problem: BoundProblem,
        state: ArmijoState,
        residual: PyTree,
        largest_norm: Float[Array, ""],
    ) -> tuple["_Trial", Int[Array, ""]]:
        objective = objective_of(problem)
        x, r, value = jax.lax.stop_gradient((state.x, residual, state.value))
        squared = vector.dot(r, r)
        dtype = squared.dtype
        shrink, growth, decrease = (
            jax.lax.stop_gradient(jnp.asarray(factor, dtype))
            for factor in (self.shrink, self.growth, self.decrease)
        )

        def attempt(length: Array, number: Array) -> _Trial:
            point = vector.add_scaled(x, length, r)
            here = objective(point)

            def flat() -> Bool[Array, ""]:
                return vector.dot(problem.residual(point), r) >= (2 * decrease - 1) * squared

            required = (decrease * length * squared).astype(value.dtype)
            lower = (here <= value - required) & (here < value)
            # The gradient is evaluated only where the objective cannot decide.
            drowned = ~clear & (here <= value + slack(value))
            accepted = jax.lax.cond(drowned, flat, lambda: clear & lower)
            return _Trial(length, here, number, accepted)

        first = state.length * growth
        # Told from the first trial: one that a search has shrunk would look drowned anyway.
        norm = jnp.sqrt(squared)
        hidden = rounding_hides(value, norm, state.first_length, largest_norm, decrease)
        clear = (decrease * first * squared > slack(value)) | ~hidden
        trial = jax.lax.while_loop(
            lambda trial: ~trial.accepted & (trial.number < self.trials),
            lambda trial: attempt(trial.length * shrink, trial.number + 1),
            attempt(first, jnp.int32(1)),
        )
        why = failure_of(value, norm, state.first_length, largest_norm)
        status = jnp.where(trial.accepted, jnp.int32(Status.CONVERGED), why)
        return jax.lax.stop_gradient((trial, status))


class _Trial(NamedTuple):
    """One try of a search: a step length, the objective there, and what came of it."""

    length: Float[Array, ""]
    value: Float[Array, ""]
    number: Int[Array, ""]
    accepted: Bool[Array, ""]
