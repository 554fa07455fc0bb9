"""Reverse mode through a loop with a traced trip count, in 2√cap states of memory."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.extend import core
from jaxtyping import Array, Int, PyTree

from bilevel import vector
from bilevel.dependence import depends
from bilevel.solver.iteration import Iteration

LINEARIZATION_BYTES = 16 * 2**20
"""A segment keeps its linearisations, instead of its states, while they fit in here."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """How many states a loop of at most `cap` steps keeps: `slots` of them, `stride` apart.

    The backward pass recomputes one segment of `stride` steps at a time, so slots +
    stride states are alive at once; both are about √cap.
    """

    cap: int
    stride: int

    @property
    def slots(self) -> int:
        """Number of states stored in the forward pass."""
        return -(-self.cap // self.stride)


def layout(cap: int, slots: int | None) -> Layout:
    """The layout for a cap; √cap slots unless told."""
    count = max(1, math.isqrt(cap - 1) + 1 if cap > 1 else 1) if slots is None else min(slots, cap)
    return Layout(cap, -(-cap // count))


def allocate(plan: Layout, state: PyTree) -> PyTree:
    """Room for the checkpoints."""
    return jax.tree.map(lambda leaf: jnp.zeros((plan.slots, *leaf.shape), leaf.dtype), state)


def write(store: PyTree, index: Int[Array, ""], state: PyTree) -> PyTree:
    """Put a state, or what else is kept, into its slot."""
    return jax.tree.map(
        lambda buffer, leaf: jax.lax.dynamic_update_index_in_dim(buffer, leaf, index, 0),
        store,
        state,
    )


def read(store: PyTree, index: Int[Array, ""]) -> PyTree:
    """Take a state out of its slot."""
    return jax.tree.map(
        lambda buffer: jax.lax.dynamic_index_in_dim(buffer, index, 0, keepdims=False), store
    )


def backward(
    plan: Layout,
    iteration: Iteration,
    perturbed: PyTree,
    store: PyTree,
    count: Int[Array, ""],
    stop: Int[Array, ""],
    cotangent: PyTree,
    *,
    truncated: bool = False,
) -> tuple[PyTree, PyTree, PyTree]:
    """Pull a cotangent of the last state back to step `stop`.

    **Arguments:**

    - `iteration`: closed, so that its leaves are all it depends on.
    - `perturbed`: Python bools over the leaves of `iteration`: what is differentiated.
        Cotangents are accumulated for these leaves alone, so a large constant matrix
        costs nothing.
    - `store`: the checkpoints of the forward pass.
    - `count`: steps done, traced; `stop`: where to stop, traced (0: the start).
    - `cotangent`: of the state after `count` steps.
    - `truncated`: whether `stop` may be other than the start; the full form has then no
        place to pull the residual's cotangent to, and the small one is used.

    **Returns:** cotangents of the state at `stop`, of the residual there (zero in the
    small form), and of the perturbed leaves of the iteration (`None` elsewhere).
    """
    linearization = linearize(iteration, perturbed, read(store, jnp.int32(0)))
    gradient = vector.zeros_like(linearization.active)
    no_residual = linearization.no_residual
    fits = linearization.step_bytes * plan.stride <= LINEARIZATION_BYTES
    recompute = _with_linearizations if fits and not truncated else _with_states
    segment = recompute(plan, linearization)

    def body(carry: Any) -> Any:
        end, cotangents, gradient = carry
        first = ((end - 1) // plan.stride) * plan.stride
        start = jnp.maximum(first, stop)
        cotangents, gradient = segment(
            read(store, first // plan.stride), first, start, end, cotangents, gradient
        )
        return start, cotangents, gradient

    carry = (count, (cotangent, no_residual), gradient)
    _, cotangents, gradient = jax.lax.while_loop(lambda carry: carry[0] > stop, body, carry)
    return *cotangents, gradient


def backward_stored(
    linearization: "Linearization",
    store: PyTree,
    count: Int[Array, ""],
    cotangent: PyTree,
) -> tuple[PyTree, PyTree, PyTree]:
    """Pull a cotangent of the last state back to the start, every linearisation being stored.

    **Returns:** as [`backward`][].
    """

    def retreat(carry: Any) -> Any:
        count, cotangents, gradient = carry
        change, *cotangents = linearization.pull(read(store, count - 1), tuple(cotangents))
        return count - 1, tuple(cotangents), vector.add(gradient, change)

    gradient = vector.zeros_like(linearization.active)
    carry = (count, (cotangent, linearization.no_residual), gradient)
    _, cotangents, gradient = jax.lax.while_loop(lambda carry: carry[0] > 0, retreat, carry)
    return *cotangents, gradient


def linearize(iteration: Iteration, perturbed: PyTree, state: PyTree) -> "Linearization":
    """The derivative of a step with respect to the perturbed leaves; `state` gives shapes only."""
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

    def pull_small(self, state: Any, cotangent: Any) -> Any:
        """Cotangents of (active leaves, state) of the small step at a state."""

        def small(active: Any, state: Any) -> Any:
            return eqx.combine(active, self.rest).small(state)

        _, pull = jax.vjp(small, self.active, state)
        return pull(cotangent)

    def residual(self, state: Any) -> Any:
        """The residual at a state."""
        return eqx.combine(self.active, self.rest).residual(state)

    def small(self, state: Any) -> Any:
        """One small step."""
        return eqx.combine(self.active, self.rest).small(state)


def _with_linearizations(plan: Layout, linearization: Linearization) -> Callable[..., Any]:
    def segment(
        state: Any, first: Array, start: Array, end: Array, cotangents: Any, gradient: Any
    ) -> Any:
        buffers = [
            jnp.zeros((plan.stride, *leaf.shape), leaf.dtype) for leaf in linearization.varying
        ]

        def advance(carry: Any) -> Any:
            count, state, residual, buffers = carry
            (state, residual), varying = linearization.forward(state, residual)
            return count + 1, state, residual, write(buffers, count - first, varying)

        def retreat(carry: Any) -> Any:
            count, cotangents, gradient = carry
            varying = read(buffers, count - 1 - first)
            change, *cotangents = linearization.pull(varying, tuple(cotangents))
            return count - 1, tuple(cotangents), vector.add(gradient, change)

        carry = (first, state, linearization.residual(state), buffers)
        *_, buffers = jax.lax.while_loop(lambda carry: carry[0] < end, advance, carry)
        _, cotangents, gradient = jax.lax.while_loop(
            lambda carry: carry[0] > start, retreat, (end, cotangents, gradient)
        )
        return cotangents, gradient

    return segment


def _with_states(plan: Layout, linearization: Linearization) -> Callable[..., Any]:
    def segment(
        state: Any, first: Array, start: Array, end: Array, cotangents: Any, gradient: Any
    ) -> Any:
        buffers = jax.tree.map(
            lambda leaf: jnp.zeros((plan.stride, *leaf.shape), leaf.dtype), state
        )

        def advance(carry: Any) -> Any:
            count, state, buffers = carry
            state = linearization.small(state)
            return count + 1, state, write(buffers, count + 1 - first, state)

        def retreat(carry: Any) -> Any:
            count, (cotangent, of_residual), gradient = carry
            state = read(buffers, count - 1 - first)
            change, cotangent = linearization.pull_small(state, cotangent)
            return count - 1, (cotangent, of_residual), vector.add(gradient, change)

        # Nobody needs the state after the segment's last step: stop one step before it.
        carry = (first, state, write(buffers, jnp.int32(0), state))
        *_, buffers = jax.lax.while_loop(lambda carry: carry[0] < end - 1, advance, carry)
        _, cotangents, gradient = jax.lax.while_loop(
            lambda carry: carry[0] > start, retreat, (end, cotangents, gradient)
        )
        return cotangents, gradient

    return segment
