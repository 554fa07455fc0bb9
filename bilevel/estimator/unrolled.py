"""Unrolling: the derivative of the truncated computation itself."""

from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from bilevel import vector
from bilevel.budget import Budget
from bilevel.closed import stopped
from bilevel.estimator.base import Estimator, Record, Setting, no_adjoint
from bilevel.forward_only import forward_only
from bilevel.perturbation import with_derivative_of
from bilevel.reverse_only import reverse_only
from bilevel.solution import Solution
from bilevel.solver.base import IncompatibleError, InnerSolver
from bilevel.solver.checkpointing import (
    Layout,
    Linearization,
    allocate,
    backward,
    backward_stored,
    checkpoint,
    linearize,
    write,
)
from bilevel.solver.iteration import Iteration, begin, close_iteration
from bilevel.solver.loop import Recorder, drive
from bilevel.solver.parameter import whole
from bilevel.status import Status

STORED_BYTES = 256 * 2**20
"""store="all" keeps linearisations where they fit in here or are no larger than two states."""

_NO_REVERSE = (
    "Unrolled(mode='forward') is for jax.jvp, jax.jacfwd and bl.hypergradient; jax.grad and "
    "jax.jacrev need reverse mode. Use Unrolled(), or jax.jacfwd."
)
_NO_FORWARD = (
    "Unrolled: jax.jvp, jax.jacfwd and jax.linearize need forward mode, and Unrolled() goes "
    "backward through its checkpoints. Use Unrolled(mode='forward'), or jax.grad, jax.vjp or "
    "jax.jacrev; Implicit() goes through both modes."
)
_NO_SECOND_REVERSE = (
    "Unrolled: the derivative of its gradient needs forward mode over reverse mode, as in "
    "jax.hessian or jax.jacfwd(jax.grad(f)), not jax.grad of it. Use one of these, or Implicit(), "
    "which any order and mode goes through."
)


class Unrolled(Estimator):
    """The derivative of the iteration: exactly that of the K steps that were done.

    Reverse mode goes through a loop with a traced number of steps by two-level
    checkpointing: √(2 max_iterations) states are kept, and the steps between them are
    computed once more on the way back.

    **Arguments:**

    - `last`: differentiate only the last so many steps (truncated back-propagation,
        Shaban et al. 2019), taking the state before them as constant; `None` for all.
    - `max_iterations`: the most steps there is room for, static. An iteration that hits it
        before its budget says `UNROLL_LIMIT`.
    - `store`: "checkpoints", or "all" to keep every step and compute nothing twice.
    - `mode`: "reverse", or "forward", which needs no memory at all and pays where θ has
        few entries; forward mode cannot be used under `jax.grad`.

    One step is made however good the start is, for none would have a derivative of zero; where
    the budget allows none, the gradient is NaN.  The fewer there are, the farther the derivative
    is from that of the solution, which the error estimate tells.  It refers to the exact
    hypergradient, like that of every estimator.

    >>> import jax, bilevel as bl
    >>> problem = bl.Minimization(lambda x, theta: 0.5 * (x - theta) ** 2)
    >>> def value(theta):
    ...     return bl.solve(
    ...         problem,
    ...         theta,
    ...         0.0,
    ...         solver=bl.GradientDescent(step_size=0.5),
    ...         estimator=bl.Unrolled(),
    ...         budget=bl.Budget(iterations=2),
    ...     ).value
    >>> float(jax.grad(value)(1.0))  # 1 - (1 - 0.5)²
    0.75
    """

    solves_adjoint: ClassVar[bool] = False

    last: int | None = eqx.field(static=True, default=None)
    max_iterations: int = eqx.field(static=True, default=1024)
    store: str = eqx.field(static=True, default="checkpoints")
    mode: str = eqx.field(static=True, default="reverse")

    def __check_init__(self) -> None:
        """Validate the options."""
        whole("Unrolled", "max_iterations", self.max_iterations)
        if self.last is not None:
            whole("Unrolled", "last", self.last)
            if self.last > self.max_iterations:
                msg = (
                    f"Unrolled: last={self.last} asks for more steps than there is room for, "
                    f"max_iterations={self.max_iterations}. Use Unrolled(last={self.last}, "
                    f"max_iterations={self.last}) or more."
                )
                raise ValueError(msg)
            if self.store != "checkpoints":
                msg = "Unrolled: last= keeps checkpoints only; leave out store='all'."
                raise ValueError(msg)
        _one_of("store", self.store, ("checkpoints", "all"))
        _one_of("mode", self.mode, ("reverse", "forward"))
        if self.mode == "forward" and (self.last is not None or self.store != "checkpoints"):
            msg = (
                "Unrolled: mode='forward' keeps no steps, so last= and store= have no meaning in "
                "it. Leave them out or use mode='reverse'."
            )
            raise ValueError(msg)

    @property
    def keeps_checkpoints(self) -> bool:
        """Whether steps are computed once more on the way back."""
        return self.store == "checkpoints"

    @property
    def forward_only(self) -> bool:
        """Whether the mode is "forward"."""
        return self.mode == "forward"

    def check_budget(self, budget: Budget | None) -> None:
        """Refuse a fixed number of steps beyond `max_iterations`."""
        if budget is None or self.forward_only or budget.has_tolerance:
            return
        if budget.concrete_iterations > self.max_iterations:
            steps = budget.concrete_iterations
            msg = (
                f"Unrolled: the budget asks for {steps} steps, and there is room for "
                f"max_iterations={self.max_iterations}. Use Unrolled(max_iterations={steps})."
            )
            raise ValueError(msg)

    def solve(self, setting: Setting, record: Record) -> Solution:
        """The inner solve with the derivative of its iteration."""
        solver, budget, history = setting.solver, setting.budget, setting.history
        bound = setting.problem.at(setting.theta)
        solver.check(bound)
        _require_steps(solver)
        bound = solver.prepare(bound, setting.x0)
        iteration, state, residual = begin(bound, solver, setting.x0, budget)
        if self.mode == "forward":
            final, solution, _ = drive(
                iteration, state, residual, budget, history=history, differentiated=True
            )
        else:
            closed = close_iteration(iteration, state, residual)
            closed, state, residual = reverse_only((closed, state, residual), _NO_FORWARD)
            differentiable = _reverse(self, history)
            final, solution = differentiable(closed, state, residual, budget, record)
        solution, value = stopped(solution), solver.value(final)
        # The derivative of no step at all is a zero that the solution's is not.
        failed = (solution.status >= Status.DIVERGED) | (solution.iterations == 0)
        trust = jnp.where(failed, jnp.nan, 1.0)
        if solver.divides_by_residual:
            # There its steps are 0 / 0: a zero derivative would be made up.
            trust = jnp.where(vector.norm(stopped(residual)) > 0, trust, jnp.nan)
        if self.forward_only:
            value = forward_only(value, _NO_REVERSE)
        value = with_derivative_of(solution.value, value, trust)
        return eqx.tree_at(lambda s: s.value, solution, value)


def _require_steps(solver: InnerSolver) -> None:
    if not solver.black_box:
        return
    msg = (
        f"Unrolled differentiates the iteration, and {type(solver).__name__} is a black box: a "
        "whole run of somebody else's code, which no derivative goes through. Use Implicit, or "
        "Neumann or Nystrom, which differentiate the solution."
    )
    raise IncompatibleError(msg)


def _reverse(options: Unrolled, history: int) -> Any:
    """The whole iteration as one function with a derivative of its own.

    Its arguments are (iteration, state, residual, budget, record) and its results the final
    state, which carries the derivative, and the solution.
    """
    plan = Layout(options.max_iterations)

    def differentiable(iteration: Iteration, *rest: Any) -> Any:
        arrays, static = eqx.partition(iteration, eqx.is_array)

        def driven(*start: Any, recorder: Recorder | None = None) -> tuple[Any, Solution, Any]:
            return drive(
                *start, history=history, limit=plan.cap, differentiated=True, recorder=recorder
            )

        @jax.custom_vjp
        def solve(arrays: Any, state: Any, residual: Any, budget: Any, record: Any) -> Any:
            del record
            iteration = eqx.combine(arrays, static)
            final, solution, _ = driven(iteration, state, residual, budget)
            return final, solution

        def forward(arrays: Any, *rest: Any) -> Any:
            # JAX hands constants over as Python numbers, captured ones among them.
            values, state, residual, budget, record = jax.tree.map(
                lambda leaf: jnp.asarray(leaf.value), (arrays, *rest), is_leaf=_is_marked
            )
            perturbed = jax.tree.map(
                lambda leaf: leaf.perturbed and eqx.is_inexact_array(jnp.asarray(leaf.value)),
                arrays,
                is_leaf=_is_marked,
            )
            iteration = eqx.combine(values, static)
            linearization = linearize(iteration, perturbed, state)
            recorder = _recorder(options, plan, linearization, state)
            final, solution, store = driven(iteration, state, residual, budget, recorder=recorder)
            kept = (values, state, store, solution, record, _Static(perturbed))
            return (final, solution), kept

        def pull(kept: Any, cotangents: Any) -> Any:
            values, first, store, solution, record, flags = kept
            # JAX hands constants back as Python numbers.
            first = jax.tree.map(jnp.asarray, first)
            cotangent = jax.tree.map(_dense, cotangents[0], is_leaf=_is_symbolic_zero)
            iteration = eqx.combine(values, static)
            count = solution.iterations
            stop = jnp.int32(0)
            if options.last is not None:
                stop = jnp.maximum(count - options.last, 0)
            linearization = linearize(iteration, flags.value, first)
            of_state, of_residual, of_arrays = _pull_back(
                options, plan, linearization, first, store, count, stop, cotangent
            )
            # Without a step no cotangent comes this far, and zeros would look like a derivative.
            poison = jnp.where(count > 0, 1.0, jnp.nan)
            of_arrays = vector.scale(poison, of_arrays)
            whole_way = stop == 0
            none = jax.tree.map(jnp.zeros_like, (of_state, of_residual))
            of_state, of_residual = vector.where(whole_way, (of_state, of_residual), none)
            share = (count - stop) / jnp.maximum(count, 1)
            applied = jnp.round(solution.applications * share).astype(jnp.int32)
            none = vector.zeros_like(solution.value)
            record = record.filled(solution, no_adjoint(none, applied, idle=count == 0), none)
            of_arrays, of_state, of_residual = forward_only(
                (of_arrays, of_state, of_residual), _NO_SECOND_REVERSE
            )
            return of_arrays, of_state, of_residual, None, record

        solve.defvjp(forward, pull, symbolic_zeros=True)
        return solve(arrays, *jax.tree.map(jnp.asarray, rest))

    return differentiable


@jax.tree_util.register_static
class _Static:
    """What is known while tracing, riding along as structure."""

    def __init__(self, value: PyTree):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Static) and self.value == other.value

    def __hash__(self) -> int:
        return hash(tuple(jax.tree.leaves(self.value)))


def _is_marked(leaf: Any) -> bool:
    return isinstance(leaf, jax.custom_derivatives.CustomVJPPrimal)


def _is_symbolic_zero(leaf: Any) -> bool:
    return isinstance(leaf, jax.custom_derivatives.SymbolicZero)


def _dense(cotangent: Any) -> Any:
    if _is_symbolic_zero(cotangent):
        return jnp.zeros(cotangent.shape, cotangent.dtype)
    return cotangent


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        msg = f"Unrolled: {name} must be one of {', '.join(allowed)}, got {value!r}."
        raise ValueError(msg)


def _recorder(
    options: Unrolled,
    plan: Layout,
    linearization: Linearization,
    state: PyTree,
) -> Recorder:
    if options.keeps_checkpoints:
        return Recorder(allocate(plan.room, state), plan.starts, checkpoint)
    states = _stores_states(plan, linearization, state)

    def advance(store: Any, count: Array, state: Any, residual: Any) -> Any:
        if states:
            return write(store, count, state), *linearization.step(state, residual)
        (state, residual), varying = linearization.forward(state, residual)
        return write(store, count, varying), state, residual

    store = allocate(plan.cap, state if states else linearization.varying)
    whole = np.asarray([0, plan.cap], np.int32)
    return Recorder(store, whole, lambda store, _index, _state: store, advance)


def _pull_back(
    options: Unrolled,
    plan: Layout,
    linearization: Linearization,
    start: PyTree,
    store: PyTree,
    count: Array,
    stop: Array,
    cotangent: PyTree,
) -> Any:
    if options.keeps_checkpoints:
        truncated = options.last is not None
        return backward(
            plan, linearization, start, store, count, stop, cotangent, truncated=truncated
        )
    states = _stores_states(plan, linearization, start)
    return backward_stored(linearization, store, count, cotangent, states=states)


def _stores_states(plan: Layout, linearization: Linearization, state: PyTree) -> bool:
    """Whether states, rather than linearisations, are kept of every step."""
    of_state = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    step = linearization.step_bytes
    return step > 2 * of_state and step * plan.cap > STORED_BYTES
