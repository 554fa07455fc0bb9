"""Gradient descent with a line search."""

from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from bilevel import vector
from bilevel.bound import BoundProblem
from bilevel.solution import Status
from bilevel.solver.first_order import FirstOrderSolver
from bilevel.solver.line_search import failure_of, first_length, objective_of, slack
from bilevel.solver.parameter import positive, whole, within


class ArmijoState(eqx.Module):
    """Iterate, last step length, first gradient norm, evaluations, and why it stopped."""

    x: PyTree
    length: Float[Array, ""]
    first_norm: Float[Array, ""]
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

    step_size: Float[Array, ""] | float | None = None
    decrease: Float[Array, ""] | float = 1e-4
    shrink: Float[Array, ""] | float = 0.5
    growth: Float[Array, ""] | float = 1.5
    trials: int = eqx.field(static=True, default=50)

    recursive: ClassVar[bool] = False

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
        norm = jax.lax.stop_gradient(vector.norm(residual))
        evaluations = 1
        if self.step_size is None:
            length = first_length(problem, x, residual)
            evaluations = 2
        else:
            length = jax.lax.stop_gradient(jnp.asarray(self.step_size, norm.dtype))
        length = length / jax.lax.stop_gradient(jnp.asarray(self.growth, norm.dtype))
        return ArmijoState(
            x, length, norm, jnp.int32(evaluations), jnp.int32(Status.CONVERGED)
        )

    def step(self, problem: BoundProblem, state: ArmijoState, residual: PyTree) -> ArmijoState:
        """Search along the residual and go there."""
        length, tried, success, status = self._search(problem, state, residual)
        x = vector.add_scaled(state.x, jnp.where(success, length, 0.0), residual)
        return ArmijoState(
            x,
            jnp.where(success, length, state.length),
            state.first_norm,
            state.evaluations + tried,
            status,
        )

    def failure(self, state: ArmijoState) -> Int[Array, ""]:
        """`ROUNDING` or `LINE_SEARCH` once a search found no step."""
        return state.status

    def applications(self, state: ArmijoState, iterations: Int[Array, ""]) -> Int[Array, ""]:
        """Objectives that the searches evaluated, and one gradient an iteration."""
        return state.evaluations + iterations

    def _search(
        self, problem: BoundProblem, state: ArmijoState, residual: PyTree
    ) -> tuple[Float[Array, ""], Int[Array, ""], Bool[Array, ""], Int[Array, ""]]:
        objective = objective_of(problem)
        x, r, last, growth, shrink, decrease = jax.lax.stop_gradient(
            (state.x, residual, state.length, self.growth, self.shrink, self.decrease)
        )
        value = jax.lax.stop_gradient(objective(x))
        squared = vector.dot(r, r)
        dtype = squared.dtype

        def acceptable(length: Array) -> Bool[Array, ""]:
            point = vector.add_scaled(x, length, r)
            here = objective(point)

            def flat() -> Bool[Array, ""]:
                return vector.dot(problem.residual(point), r) >= (2 * decrease - 1) * squared

            equal = here <= value + slack(value)
            sufficient = here <= value - (decrease * length * squared).astype(value.dtype)
            # The gradient is evaluated only where the objective cannot decide.
            return sufficient | jax.lax.cond(equal & ~sufficient, flat, lambda: jnp.array(False))

        def shorten(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            length, tried, _ = carry
            length = length * jnp.asarray(shrink, dtype)
            return length, tried + 1, acceptable(length)

        def goes_on(carry: tuple[Array, Array, Array]) -> Array:
            _, tried, accepted = carry
            return ~accepted & (tried < self.trials)

        first = last.astype(dtype) * jnp.asarray(growth, dtype)
        start = (first, jnp.int32(1), acceptable(first))
        length, tried, success = jax.lax.stop_gradient(
            jax.lax.while_loop(goes_on, shorten, start)
        )
        level = jnp.sqrt(jnp.finfo(dtype).eps) * state.first_norm
        status = failure_of(value, first * squared, jnp.sqrt(squared) <= level)
        status = jnp.where(success, jnp.int32(Status.CONVERGED), status)
        return length, tried, success, jax.lax.stop_gradient(status)
