"""Black boxes: a solver whose step is a whole run of somebody else's code."""

import abc
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from bilevel import vector
from bilevel.bound import BoundProblem
from bilevel.solver.base import MOST_ITERATIONS, default_tolerance
from bilevel.status import Status
from bilevel_solvers.foreign import ForeignSolver

STALLED = 0.5
"""A run that leaves more than this share of the residual is the last one."""

TIGHTER = 1e-2
"""What the tolerance of each further run is multiplied by: a library's norm may be another."""

ROUNDINGS = 10.0
"""Roots of rounding, relative to the scale, that may be left: of a minimum one sees no more."""


class Run(eqx.Module):
    """What a run is asked for.

    - `start`: where it starts, like x. `residual`: r there, downhill.
    - `iterations`: int32, the most that it may do; at least 1.
    - `target`: the Euclidean residual norm at which the caller will stop, in the units of the
        residual. `tolerance`: the same for the first run, and smaller for each further one,
        which there is where the library took another norm for small.
    """

    start: PyTree
    residual: PyTree
    iterations: Int[Array, ""]
    target: Float[Array, ""]
    tolerance: Float[Array, ""]


class BlackBoxState(eqx.Module):
    """Iterate, iterations and runs so far, the residual norm before the last run, the status."""

    x: PyTree
    iterations: Int[Array, ""]
    runs: Int[Array, ""]
    before: Float[Array, ""]
    status: Int[Array, ""]


class BlackBox(ForeignSolver):
    """A solver that hands the whole problem to somebody else's code; subclass it for your own.

    A step is a run to what is left of the budget.  Iterations are the library's own, so that a
    cap on them is kept and reported; and what it calls converged is confirmed by the loop on the
    true residual.  Where that is not small enough yet, it is run again with a tighter tolerance,
    until a run comes no closer: then the status is `ROUNDING` where rounding explains it, and
    `STOPPED` where it does not.  No derivative goes through a run: use `Implicit`.

    >>> import jax, jax.numpy as jnp, bilevel as bl, bilevel_solvers
    >>> class Bisect(bilevel_solvers.BlackBox):
    ...     def run(self, problem, asked):
    ...         def halve(_, ends):
    ...             middle = 0.5 * (ends[0] + ends[1])
    ...             right = problem.residual(middle) > 0
    ...             return jnp.where(right, middle, ends[0]), jnp.where(right, ends[1], middle)
    ...
    ...         ends = asked.start - 4.0, asked.start + 4.0
    ...         lower, upper = jax.lax.fori_loop(0, asked.iterations, halve, ends)
    ...         return 0.5 * (lower + upper), asked.iterations
    >>> problem = bl.RootFinding(lambda x, theta: x**3 - theta)
    >>> solution = bl.solve(problem, 8.0, 1.0, solver=Bisect(), budget=bl.Budget(iterations=20))
    >>> round(float(solution.value), 3), int(solution.iterations)
    (2.0, 20)
    """

    adaptive: ClassVar[bool] = True
    black_box: ClassVar[bool] = True

    @abc.abstractmethod
    def run(self, problem: BoundProblem, asked: Run) -> tuple[PyTree, Any]:
        """Run once.

        **Returns:** where it ended, like `asked.start`, and the iterations it did, int32. NaN
        in the first says that it failed.
        """

    def init(self, problem: BoundProblem, x: PyTree) -> BlackBoxState:
        """Nothing has been run."""
        del problem
        before = jnp.full((), jnp.inf, vector.real_dtype(x))
        return BlackBoxState(x, jnp.int32(0), jnp.int32(0), before, jnp.int32(Status.CONVERGED))

    def step(self, problem: BoundProblem, state: BlackBoxState, residual: PyTree) -> BlackBoxState:
        """Run the library, unless the last run was in vain."""
        norm = vector.robust_norm(residual).astype(state.before.dtype)
        scale = norm if problem.scale is None else problem.scale.astype(norm.dtype)
        target = default_tolerance(residual) * scale if problem.target is None else problem.target
        target = target.astype(norm.dtype)
        cap = jnp.int32(MOST_ITERATIONS) if problem.cap is None else problem.cap
        asked = Run(
            start=state.x,
            residual=residual,
            iterations=jnp.maximum(cap - state.iterations, 1),
            target=target,
            tolerance=target * jnp.asarray(TIGHTER, norm.dtype) ** state.runs,
        )
        # An infinite norm of finite entries comes no closer either, and would run for ever.
        stalled = (state.runs > 0) & ~(norm < STALLED * state.before)
        x, iterations = jax.lax.cond(
            stalled, lambda: (state.x, jnp.int32(0)), lambda: self._counted(problem, asked)
        )
        small = norm <= ROUNDINGS * vector.epsilon(residual) ** 0.5 * scale
        reason = jnp.where(small, jnp.int32(Status.ROUNDING), jnp.int32(Status.STOPPED))
        return BlackBoxState(
            x=x,
            iterations=state.iterations + iterations,
            runs=state.runs + 1,
            before=norm,
            status=jnp.where(stalled, reason, jnp.int32(Status.CONVERGED)),
        )

    def failure(self, state: BlackBoxState) -> Int[Array, ""]:
        """`ROUNDING` or `STOPPED` once a run was in vain."""
        return state.status

    def done(self, state: BlackBoxState) -> Int[Array, ""]:
        """The library's iterations."""
        return state.iterations

    def _counted(self, problem: BoundProblem, asked: Run) -> tuple[PyTree, Array]:
        x, iterations = self.run(problem, asked)
        return x, jnp.maximum(jnp.asarray(iterations, jnp.int32), 0)
