"""Reverse mode through a loop with a traced trip count, in √(2 cap) states of memory."""

import dataclasses
import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jaxtyping import Array, Int, PyTree

from bilevel import vector
from bilevel.dependence import depends
from bilevel.solver.iteration import Iteration

LINEARIZATION_BYTES = 16 * 2**20
"""A segment keeps its linearisations, instead of its states, while they fit in here."""


class Layout:
    """Where the states of a loop of at most `cap` steps are kept: in √(2 cap) places.

    The forward pass stores the state at the start of every segment but the first.  The
    backward pass takes the segments from the last to the first, recomputes the states
    inside one, and needs no place for the starts of those it is done with.  So segment j,
    with j starts stored before it, may be one shorter than the one before: with `room`
    places the segments are room + 1, room, room - 1, ... steps long, which makes
    room (room + 3) / 2 steps.  Segments of equal length would take 2√cap places.

    - `room`: number of places.
    - `starts`: the step at which each segment starts, and the cap.
    """

    def __init__(self, cap: int):
        self.cap = cap
        self.room = max(math.ceil((math.sqrt(9 + 8 * cap) - 3) / 2), 1)
        starts = [0]
        while starts[-1] < cap:
            starts.append(min(starts[-1] + self.room + 2 - len(starts), cap))
        self.starts = np.asarray(starts, np.int32)

    def segment(self, step: Int[Array, ""]) -> Int[Array, ""]:
        """The segment that a step belongs to."""
        return jnp.searchsorted(self.starts, step, side="right").astype(jnp.int32) - 1

    @property
    def longest(self) -> int:
        """Steps of the first segment, which is the longest."""
        return int(self.starts[1])


def checkpoint(store: PyTree, index: Int[Array, ""], state: PyTree) -> PyTree:
    """Store the state that segment `index` starts from; the start itself is not stored.

    Its write goes to the first place all the same, and is overwritten by the next.
    """
    return write(store, jnp.maximum(index - 1, 0), state)


def state_at(store: PyTree, place: Int[Array, ""], before: PyTree) -> PyTree:
    """The state at a place; the one before all places where that is negative."""
    return vector.where(place < 0, before, read(store, jnp.maximum(place, 0)))


def allocate(count: int, like: PyTree) -> PyTree:
    """Room for so many things like this one."""
    return jax.tree.map(lambda leaf: jnp.zeros((count, *leaf.shape), leaf.dtype), like)


def write(store: PyTree, index: Int[Array, ""], state: PyTree) -> PyTree:
    """Put a state, or what else is kept, into its place."""
    return jax.tree.map(
        lambda buffer, leaf: jax.lax.dynamic_update_index_in_dim(buffer, leaf, index, 0),
        store,
        state,
    )


def read(store: PyTree, index: Int[Array, ""]) -> PyTree:
    """Take a state out of its place."""
    return jax.tree.map(
        lambda buffer: jax.lax.dynamic_index_in_dim(buffer, index, 0, keepdims=False), store
    )


def backward(
    plan: Layout,
    linearization: "Linearization",
    start: PyTree,
    store: PyTree,
    count: Int[Array, ""],
    stop: Int[Array, ""],
    cotangent: PyTree,
    *,
    truncated: bool = False,
) -> tuple[PyTree, PyTree, PyTree]:
    """Pull a cotangent of the last state back to step `stop`.

    **Arguments:**

    - `start`: the state at the start; `store`: the checkpoints of the forward pass.
    - `count`: steps done, traced; `stop`: where to stop, traced (0: the start).
    - `cotangent`: of the state after `count` steps.
    - `truncated`: whether `stop` may be other than the start; the full form has then no
        place to pull the residual's cotangent to, and the small one is used.

    **Returns:** cotangents of the state at `stop`, of the residual there (zero in the
    small form), and of the perturbed leaves of the iteration (`None` elsewhere).
    """
    fits = linearization.step_bytes * plan.longest <= LINEARIZATION_BYTES
    full = fits and not truncated
    segment = _with_linearizations if full else _with_states
    # The small form has no residual to pull back: carrying zeros would cost a state.
    none = linearization.no_residual
    cotangents = (cotangent, none) if full else (cotangent,)

    def body(carry: Any) -> Any:
        end, store, cotangents, gradient = carry
        index = plan.segment(end - 1)
        first = jnp.asarray(plan.starts)[index]
        last = jnp.maximum(first, stop)
        span = _Span(plan, index, first, last, end)
        state = state_at(store, index - 1, start)
        return last, *segment(span, linearization, state, store, cotangents, gradient)

    gradient = vector.zeros_like(linearization.active)
    carry = (count, store, cotangents, gradient)
    *_, cotangents, gradient = jax.lax.while_loop(lambda carry: carry[0] > stop, body, carry)
    return cotangents[0], (*cotangents, none)[1], gradient


def backward_stored(
    linearization: "Linearization",
    store: PyTree,
    count: Int[Array, ""],
    cotangent: PyTree,
    *,
    states: bool,
) -> tuple[PyTree, PyTree, PyTree]:
    """Pull a cotangent of the last state back to the start, every step being stored.

    **Arguments:**

    - `states`: whether the store holds the states that steps start from, rather than
        their linearisations.

    **Returns:** as [`backward`][].
    """
    none = linearization.no_residual

    def retreat(carry: Any) -> Any:
        count, cotangents, gradient = carry
        kept = read(store, count - 1)
        pull = linearization.pull_small if states else linearization.pull
        change, *cotangents = pull(kept, cotangents)
        return count - 1, tuple(cotangents), vector.add(gradient, change)

    cotangents = (cotangent,) if states else (cotangent, none)
    carry = (count, cotangents, vector.zeros_like(linearization.active))
    _, cotangents, gradient = jax.lax.while_loop(lambda carry: carry[0] > 0, retreat, carry)
    return cotangents[0], (*cotangents, none)[1], gradient


def linearize(iteration: Iteration, perturbed: PyTree, state: PyTree) -> "Linearization":
    """The derivative of a step with respect to what is perturbed.

    **Arguments:**

    - `iteration`: closed, so that its leaves are all it depends on.
    - `perturbed`: Python bools over the leaves of `iteration`: what is differentiated.
        Cotangents are accumulated for these leaves alone, so a large constant matrix
        costs nothing.
    - `state`: gives shapes only.
    """
    arrays, static = eqx.partition(iteration, eqx.is_array)
    active, inactive = eqx.partition(arrays, perturbed)
    rest = eqx.combine(inactive, static)
    state = _zeros(state)
    return Linearization(active, rest, state, _zeros(jax.eval_shape(iteration.residual, state)))


def _zeros(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), tree)


class Linearization:
    """The full step's derivative, split into what changes from step to step and what not."""

    def __init__(self, active: PyTree, rest: PyTree, state: PyTree, residual: PyTree):
        self.active = active
        self.rest = rest
        self.no_residual = residual
        structure: list[Any] = []

        def split(active: Any, state: Any, residual: Any) -> Any:
            def full(active: Any, state: Any, residual: Any) -> Any:
                return eqx.combine(active, self.rest).full(state, residual)

            outcome, pull = jax.vjp(full, active, state, residual)
            leaves, treedef = jax.tree.flatten(pull)
            structure.append(treedef)
            return outcome, [jnp.asarray(leaf) for leaf in leaves]

        # Traced once and replayed: how many arrays a derivative consists of may differ
        # between two traces, as an array that comes in twice is kept once or twice.
        closed = jax.make_jaxpr(split)(active, state, residual)
        self.treedef = structure[0]
        self.program = core.jaxpr_as_fun(closed)
        self.outcome = jax.tree.structure((state, residual))
        constants = len(jax.tree.leaves(active))
        variables = len(closed.jaxpr.invars) - constants
        flags = depends(closed, [False] * constants + [True] * variables)
        self.changes = flags[self.outcome.num_leaves :]
        _, leaves = self._differentiate(state, residual)
        self.fixed = [
            None if changes else leaf for leaf, changes in zip(leaves, self.changes, strict=True)
        ]
        self.varying = [
            jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
            for leaf, changes in zip(leaves, self.changes, strict=True)
            if changes
        ]
        self.step_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in self.varying)

    def _differentiate(self, state: Any, residual: Any) -> Any:
        outputs = self.program(*jax.tree.leaves((self.active, state, residual)))
        count = self.outcome.num_leaves
        return jax.tree.unflatten(self.outcome, outputs[:count]), outputs[count:]

    def forward(self, state: Any, residual: Any) -> tuple[Any, list[Array]]:
        """One full step, and the part of its derivative that changes."""
        outcome, leaves = self._differentiate(state, residual)
        varying = [leaf for leaf, changes in zip(leaves, self.changes, strict=True) if changes]
        return outcome, varying

    def pull(self, varying: list[Array], cotangents: Any) -> Any:
        """Cotangents of (active leaves, state, residual) of the step."""
        remaining = iter(varying)
        leaves = [
            next(remaining) if changes else leaf
            for leaf, changes in zip(self.fixed, self.changes, strict=True)
        ]
        return jax.tree.unflatten(self.treedef, leaves)(cotangents)

    def pull_small(self, state: Any, cotangents: Any) -> Any:
        """Cotangents of (active leaves, state) of the small step at a state."""

        def small(active: Any, state: Any) -> Any:
            return eqx.combine(active, self.rest).small(state)

        _, pull = jax.vjp(small, self.active, state)
        return pull(*cotangents)

    def step(self, state: Any, residual: Any) -> Any:
        """One full step."""
        return eqx.combine(self.active, self.rest).full(state, residual)

    def residual(self, state: Any) -> Any:
        """The residual at a state."""
        return eqx.combine(self.active, self.rest).residual(state)

    def small(self, state: Any) -> Any:
        """One small step."""
        return eqx.combine(self.active, self.rest).small(state)


@dataclasses.dataclass(frozen=True)
class _Span:
    """Steps first, ..., end - 1 of segment `index`, of which those from `last` on count."""

    plan: Layout
    index: Array
    first: Array
    last: Array
    end: Array


def _with_linearizations(
    span: _Span,
    linearization: Linearization,
    state: PyTree,
    store: PyTree,
    cotangents: Any,
    gradient: Any,
) -> Any:
    """Recompute a segment keeping its linearisations, and pull back through them."""
    first = span.first

    def advance(carry: Any) -> Any:
        count, state, residual, buffers = carry
        (state, residual), varying = linearization.forward(state, residual)
        return count + 1, state, residual, write(buffers, count - first, varying)

    def retreat(carry: Any) -> Any:
        count, cotangents, gradient = carry
        varying = read(buffers, count - 1 - first)
        change, *cotangents = linearization.pull(varying, cotangents)
        return count - 1, tuple(cotangents), vector.add(gradient, change)

    buffers = allocate(span.plan.longest, linearization.varying)
    carry = (first, state, linearization.residual(state), buffers)
    *_, buffers = jax.lax.while_loop(lambda carry: carry[0] < span.end, advance, carry)
    _, cotangents, gradient = jax.lax.while_loop(
        lambda carry: carry[0] > span.last, retreat, (span.end, cotangents, gradient)
    )
    return store, cotangents, gradient


def _with_states(
    span: _Span,
    linearization: Linearization,
    state: PyTree,
    store: PyTree,
    cotangents: Any,
    gradient: Any,
) -> Any:
    """Recompute a segment keeping its states, in the places of the starts behind it."""
    first, places = span.first, span.index

    def advance(carry: Any) -> Any:
        count, state, store = carry
        state = linearization.small(state)
        return count + 1, state, write(store, places + count - first, state)

    def retreat(carry: Any) -> Any:
        count, cotangents, gradient = carry
        inside = count - 1 - first
        at = vector.where(inside == 0, state, read(store, places + jnp.maximum(inside - 1, 0)))
        change, cotangent = linearization.pull_small(at, cotangents)
        return count - 1, (cotangent,), vector.add(gradient, change)

    # Nobody needs the state after the segment's last step: stop one step before it.
    *_, store = jax.lax.while_loop(
        lambda carry: carry[0] < span.end - 1, advance, (first, state, store)
    )
    _, cotangents, gradient = jax.lax.while_loop(
        lambda carry: carry[0] > span.last, retreat, (span.end, cotangents, gradient)
    )
    return store, cotangents, gradient
