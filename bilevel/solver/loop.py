"""The one loop: every solver, to a traced budget, with every way of stopping."""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from bilevel import vector
from bilevel.bound import BoundProblem
from bilevel.budget import Budget
from bilevel.solution import Solution
from bilevel.solver.base import InnerSolver
from bilevel.solver.iteration import Iteration, begin, stopping_norm
from bilevel.status import Status

BLOW_UP = 1e8
"""A residual this many times the start's counts as divergence: 27 doublings."""

PATIENCE = 10
"""Steps after which a stationary iteration that has not shrunk its residual diverges."""

LONG, STANDSTILL = 100, 1e-6
"""Steps after which one that shrinks its residual by less a step, over half of them, diverges."""

GROWN = 1e3
"""At the end of a budget, a residual this many times the scale that still grows diverges."""

MOST_ROUNDING = 0.3
"""Part of the scale that rounding is believed to leave of a residual."""


class Progress(eqx.Module):
    """What the loop carries besides the solver's state.

    Norms are carried as squares: a root is taken where it is compared, and every number
    less that the loop carries is one kernel less to compile.  They are in the unit of the
    iteration, and so are the `Limits`.

    - `count`: iterations done; `square`: of the residual norm now.
    - `mark`: the square at the last power of two, so that the reduction rate over the
        second half of a solve needs no history.
    """

    count: Int[Array, ""]
    square: Float[Array, ""]
    mark: Float[Array, ""]
    history: Float[Array, " length"] | None

    @property
    def norm(self) -> Float[Array, ""]:
        """The residual norm."""
        return jnp.sqrt(self.square)

    @property
    def mark_count(self) -> Int[Array, ""]:
        """The iteration of the mark: the last power of two before this one, or 0."""
        before = self.count - 1
        return jnp.where(before >= 2, 1 << (31 - jax.lax.clz(before)), 0)


class Limits(eqx.Module):
    """When to stop, evaluated once before the loop; residual norms are in units."""

    budget: Int[Array, ""]
    iterations: Int[Array, ""]
    minimum: Int[Array, ""]
    tolerance: Float[Array, ""]
    start: Float[Array, ""]
    reference: Float[Array, ""]


@dataclasses.dataclass(frozen=True)
class Recorder:
    """What a forward pass keeps for the backward one.

    - `store`: initial buffers.
    - `starts`: steps before which a checkpoint is taken, from 0, and at last the cap.
    - `checkpoint`: (store, index, state) -> store.
    - `advance`: (store, count, state, residual) -> (store, state, residual), a step that
        records something itself; `None` for the plain step.
    """

    store: PyTree
    starts: np.ndarray
    checkpoint: Callable[[Any, Int[Array, ""], Any], Any]
    advance: Callable[[Any, Int[Array, ""], Any, Any], tuple[Any, Any, Any]] | None = None


def run(
    problem: BoundProblem,
    solver: InnerSolver,
    x0: PyTree,
    budget: Budget,
    *,
    minimum: int = 0,
    history: int = 0,
) -> Solution:
    """Run a solver until its budget, its tolerance, or a failure stops it.

    **Arguments:**

    - `problem`: bound to its θ, and prepared by the solver.
    - `minimum`: iterations done however good the start is, unless its residual is zero.
    - `history`: length of the residual history to keep, static; 0 keeps none.
    """
    unit = None
    narrow = problem.rhs is not None and jnp.finfo(vector.real_dtype(problem.rhs)).bits < 64
    if narrow and not solver.black_box:
        # Krylov methods square what they are given, too, and squares of single precision
        # vanish below 1e-19: a linear system is solved next to one, whatever its units.
        unit = jax.lax.stop_gradient(vector.unit(vector.robust_norm(problem.rhs)))
        problem, x0, budget = _in_units(problem, x0, budget, unit)
    iteration, state, residual = begin(problem, solver, x0, budget)
    _, solution, _ = drive(
        iteration, state, residual, budget, minimum=minimum, history=history, restarts=True
    )
    if unit is None:
        return solution
    sizes = ("residual_norm", "tolerance", "scale", "history")
    known = {name: getattr(solution, name) for name in sizes}
    scaled = {name: None if size is None else unit * size for name, size in known.items()}
    return dataclasses.replace(solution, value=vector.scale(unit, solution.value), **scaled)


def _in_units(
    problem: BoundProblem, x0: PyTree, budget: Budget, unit: Array
) -> tuple[BoundProblem, PyTree, Budget]:
    """The linear system for x over a power of two."""
    operator = problem.operator
    assert operator is not None
    inverse = 1.0 / unit
    rhs, start = vector.scale(inverse, problem.rhs), vector.scale(inverse, x0)

    def residual(x: PyTree) -> PyTree:
        if x is start:  # the problem may know the residual at its own start
            return vector.scale(inverse, problem.residual(x0))
        return vector.subtract(rhs, operator.matvec(x))

    scaled = dataclasses.replace(problem, residual=residual, rhs=rhs)
    atol = jnp.asarray(budget.atol, unit.dtype) * inverse
    return scaled, start, eqx.tree_at(lambda b: b.atol, budget, atol)


def drive(
    iteration: Iteration,
    state: PyTree,
    residual: PyTree,
    budget: Budget,
    *,
    minimum: int = 0,
    history: int = 0,
    limit: int | None = None,
    differentiated: bool = False,
    restarts: bool = False,
    recorder: Recorder | None = None,
) -> tuple[PyTree, Solution, PyTree]:
    """Drive an iteration from a state; see [`run`][].

    **Arguments:**

    - `limit`: static cap besides the budget's traced one (room for checkpoints).
    - `differentiated`: whether the steps themselves are, so that one is made however good
        the start: none would have a derivative of zero, which the solution has not.
    - `restarts`: restart a recursive residual from the true one, where they drifted apart.
    - `recorder`: what to keep for a backward pass.

    **Returns:** the final state, the solution, and the recorder's store.
    """
    solver = iteration.solver
    square = iteration.measured(residual)
    norm = jnp.sqrt(square)
    limits = _limits(iteration, budget, norm, vector.epsilon(residual), minimum, limit)
    progress = Progress(
        count=jnp.int32(0),
        square=square,
        mark=square,
        history=_start_history(history, norm),
    )
    # A recursive residual is part of the state already: carrying it too would copy it.
    recording = recorder is not None and recorder.advance is not None
    carried = None if solver.recursive and not recording else residual
    store = None if recorder is None else recorder.store
    sweep = _sweep(iteration, limits, recorder, differentiated=differentiated)
    if solver.recursive and restarts and recorder is None:
        state, progress, true_norm, applications, failure = _confirmed(
            iteration, sweep, state, progress, limits
        )
    else:
        state, _, progress, store = sweep(state, carried, progress, store)
        applications = jnp.asarray(solver.applications(state, progress.count), jnp.int32)
        failure = iteration.failure(state)
        true_norm = progress.norm
        if iteration.confirms(state):
            true_norm = jnp.sqrt(iteration.measured(iteration.true_residual(state)))
            applications = applications + 1
    unit = iteration.unit
    solution = Solution(
        value=solver.value(state),
        status=_status(iteration, failure, progress, limits, true_norm, solver.value(state)),
        residual_norm=unit * true_norm,
        iterations=progress.count,
        inner_iterations=jnp.asarray(solver.inner_iterations(state, progress.count), jnp.int32),
        tolerance=unit * limits.tolerance,
        scale=iteration.scale,
        rate=_rate(progress),
        applications=applications + iteration.applications_before,
        history=None if progress.history is None else unit * progress.history,
    )
    return state, solution, store


def _sweep(
    iteration: Iteration, limits: Limits, recorder: Recorder | None, *, differentiated: bool
) -> Callable[..., Any]:
    """The loop itself: (state, carried residual, progress, store) -> the same at its end."""

    def plain_step(store: Any, count: Array, state: Any, residual: Any) -> tuple[Any, Any, Any]:
        del count
        return store, *iteration.full(state, residual)

    step = plain_step if recorder is None or recorder.advance is None else recorder.advance

    def active(carry: Any) -> Array:
        state, _, progress, _ = carry
        unfinished = (progress.norm > limits.tolerance) | (
            (progress.count < limits.minimum) & (progress.norm > 0)
        )
        if differentiated:
            unfinished = unfinished | (progress.count == 0)
        return (
            unfinished
            & (progress.count < limits.iterations)
            & (progress.norm <= BLOW_UP * limits.reference)  # false for NaN, too
            & (iteration.failure(state) == Status.CONVERGED)
        )

    def body(carry: Any) -> Any:
        state, carried, progress, store = carry
        residual = iteration.residual(state) if carried is None else carried
        store, state, residual = step(store, progress.count, state, residual)
        square = iteration.square(state, residual, limits.tolerance)
        done = iteration.solver.done(state) if iteration.solver.black_box else None
        progress = _advance(progress, square, done)
        return state, None if carried is None else residual, progress, store

    def sweep(state: Any, carried: Any, progress: Progress, store: Any) -> Any:
        carry = (state, carried, progress, store)
        if recorder is None:
            return jax.lax.while_loop(active, body, carry)
        starts, checkpoint = jnp.asarray(recorder.starts), recorder.checkpoint

        def segment(carry: Any) -> Any:
            state, carried, progress, store = carry
            index = jnp.searchsorted(starts, progress.count, side="right") - 1
            store = checkpoint(store, index, state)
            return jax.lax.while_loop(
                lambda carry: active(carry) & (carry[2].count < starts[index + 1]),
                body,
                (state, carried, progress, store),
            )

        return jax.lax.while_loop(active, segment, carry)

    return sweep


def _limits(
    iteration: Iteration,
    budget: Budget,
    norm: Array,
    epsilon: float,
    minimum: int,
    limit: int | None,
) -> Limits:
    scale = iteration.scale / iteration.unit
    iterations = jnp.asarray(budget.iterations, jnp.int32)
    return Limits(
        budget=iterations,
        iterations=iterations if limit is None else jnp.minimum(iterations, limit),
        minimum=jnp.int32(minimum),
        tolerance=stopping_norm(budget, iteration.scale, epsilon) / iteration.unit,
        start=norm,
        reference=jnp.maximum(norm, scale),
    )


def _advance(progress: Progress, square: Array, done: Array | None) -> Progress:
    count = progress.count + 1 if done is None else jnp.asarray(done, jnp.int32)
    # The mark moves from count c to 2c: c, c+1, ..., 2c are measured against c.
    moves = (progress.count >= 2) & (progress.count & (progress.count - 1) == 0)
    history = progress.history
    if history is not None:
        history = history.at[count].set(jnp.sqrt(square).astype(history.dtype), mode="drop")
    advanced = Progress(
        count=count,
        square=square,
        mark=jnp.where(moves, progress.square, progress.mark),
        history=history,
    )
    if done is None:
        return advanced
    # Many iterations at once: the mark is where the mean rate of this run passed its count.
    steps, since = count - progress.count, count - advanced.mark_count
    shrunk = jnp.where(square > 0, progress.square / jnp.where(square > 0, square, 1.0), jnp.inf)
    mark = square * shrunk ** (since / jnp.maximum(steps, 1)).astype(square.dtype)
    return eqx.tree_at(lambda p: p.mark, advanced, jnp.where(square > 0, mark, progress.square))


def _start_history(length: int, norm: Array) -> Array | None:
    if length == 0:
        return None
    return jnp.full((length,), jnp.nan, norm.dtype).at[0].set(norm)


def _confirmed(
    iteration: Iteration,
    sweep: Callable[..., Any],
    state: PyTree,
    progress: Progress,
    limits: Limits,
) -> tuple[PyTree, Progress, Array, Array, Array]:
    """Sweep, and go on from the true residual while that helps and the budget lasts.

    A fresh state at the last iterate evaluates the true residual, which both confirms the
    recursive one and is what a further sweep starts from.

    **Returns:** a fresh state at the last iterate, the progress, the true residual norm
    there, the applications, and the failure that ended the last sweep.
    """
    solver = iteration.solver

    def again(carry: Any) -> Any:
        state, progress, square, _, applications, _ = carry
        before = progress.count
        progress = eqx.tree_at(lambda p: p.square, progress, square)
        state, _, progress, _ = sweep(state, None, progress, None)
        applications = applications + solver.applications(state, progress.count - before)
        failure = iteration.failure(state)
        state = iteration.restart(state)
        residual = iteration.residual(state)
        after = iteration.measured(residual)
        return state, progress, after, square, applications.astype(jnp.int32), failure

    def worthwhile(carry: Any) -> Array:
        _, progress, square, before, applications, failure = carry
        return (applications == 0) | (
            (square < 0.25 * before)
            & (jnp.sqrt(square) > limits.tolerance)
            & (progress.norm <= limits.tolerance)
            & (progress.count < limits.iterations)
            & (failure == Status.CONVERGED)
        )

    square, none = progress.square, jnp.int32(0)
    carry = (state, progress, square, square, none, iteration.failure(state))
    state, progress, square, _, applications, failure = jax.lax.while_loop(worthwhile, again, carry)
    # The last fresh state evaluated a residual, too.
    return state, progress, jnp.sqrt(square), applications + 1, failure


def _rate(progress: Progress) -> Array:
    steps = progress.count - progress.mark_count
    exponent = 0.5 / jnp.maximum(steps, 1).astype(progress.square.dtype)
    ratio = progress.square / progress.mark
    return jnp.where((steps > 0) & (progress.mark > 0), ratio**exponent, jnp.nan)


def _status(
    iteration: Iteration,
    failure: Array,
    progress: Progress,
    limits: Limits,
    true_norm: Array,
    value: PyTree,
) -> Array:
    def code(status: Status) -> Array:
        return jnp.int32(status)

    # The recursion says converged, the truth does not: rounding may explain a little of it.
    level = jnp.sqrt(jnp.finfo(true_norm.dtype).eps) * limits.reference
    level = jnp.maximum(level, 10.0 * limits.tolerance)
    level = _attainable(iteration, level, limits.reference, true_norm, value)
    result = jnp.where(true_norm > level, code(Status.BREAKDOWN), code(Status.ROUNDING))
    at_limit = progress.count >= limits.iterations
    result = jnp.where(at_limit, code(Status.UNROLL_LIMIT), result)
    result = jnp.where(progress.count >= limits.budget, code(Status.BUDGET), result)
    ceiling, grain = BLOW_UP * limits.reference, _grain(iteration, value)
    diverged = (true_norm > ceiling) | (progress.norm > ceiling)
    if iteration.solver.stationary:
        rate = _rate(progress)
        stalled = (progress.count >= PATIENCE) & (progress.norm >= limits.start) & (rate >= 1.0)
        if iteration.grain is not None:
            # A map that shrunk it, and does no more: a mode that does not contract is left.
            slowest = 1.0 - max(STANDSTILL, 1e2 * iteration.grain)
            stuck = (progress.count >= LONG) & (rate >= slowest)
            stalled = stalled | (stuck & (progress.norm > jnp.maximum(level, 1e3 * grain)))
        diverged = diverged | (stalled & (progress.norm > iteration.noise / iteration.unit))
    elif not iteration.solver.recursive:
        # Residuals that go up and down are no divergence; those of Krylov methods may go far.
        grown = progress.norm > GROWN * limits.reference
        grown = grown & (_rate(progress) > 1.0) & (progress.count >= PATIENCE)
        diverged = diverged | grown
    result = jnp.where(diverged, code(Status.DIVERGED), result)
    if iteration.solver.recursive:
        # A recursion that lost touch with the truth is no iteration that ran out of budget.
        lost = true_norm > 10.0 * progress.norm + level
        result = jnp.where(lost & ~diverged, code(Status.BREAKDOWN), result)
    # Nothing can be told of the operator from a residual that is all rounding.
    told = (failure == Status.BREAKDOWN) | (failure == Status.INCONSISTENT)
    drowned = told & (true_norm <= level)
    failure = jnp.where(drowned, code(Status.ROUNDING), failure)
    result = jnp.where(failure != Status.CONVERGED, failure, result)
    swallowed = jnp.where(grain > 10.0 * limits.tolerance, Status.ROUNDING, Status.CONVERGED)
    result = jnp.where(true_norm <= limits.tolerance, swallowed.astype(jnp.int32), result)
    finite = jnp.isfinite(true_norm) & jnp.isfinite(progress.norm) & ~jnp.isnan(limits.tolerance)
    result = jnp.where(finite, result, code(Status.NONFINITE))
    if iteration.floor is None:
        return result
    # Whatever became of it, this is why; running out of a budget would have come first anyway.
    impossible = iteration.floor > limits.tolerance * iteration.unit
    impossible = impossible & ((result == Status.CONVERGED) | (result >= Status.DIVERGED))
    return jnp.where(impossible, code(Status.INCONSISTENT), result)


def _grain(iteration: Iteration, value: PyTree) -> Array | float:
    """What rounding may make of T(x) - x.

    A map without a fixed point, x + b, has one in floating point: any x that swallows b.
    """
    grain = iteration.grain
    return 0.0 if grain is None else grain * vector.robust_norm(value) / iteration.unit


def _attainable(
    iteration: Iteration, level: Array, reference: Array, true_norm: Array, value: PyTree
) -> Array:
    """The level below which a residual may be rounding, of a large solution in low precision."""
    rounding = iteration.rounding
    if rounding is None:
        return level
    found = jax.lax.cond(
        true_norm > level, lambda: rounding(value) / iteration.unit, lambda: jnp.zeros_like(level)
    )
    # A solution as large as this solves nothing: that of a singular system grows without bound.
    return jnp.where(found <= MOST_ROUNDING * reference, jnp.maximum(level, found), level)
