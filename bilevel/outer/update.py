"""Update: one step of the outer optimizer, compiled once for all budgets."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from bilevel import vector
from bilevel.outer.task import Task
from bilevel.outer.warm_starts import collected, probed, with_probes
from bilevel.probe import Probe
from bilevel.refinement.fidelity import Fidelity
from bilevel.signature import brief
from bilevel.status import Status

Report: TypeAlias = Float[Array, " report"]
"""What one update did, one number for each of `REPORT`."""

_COUNTS = tuple(field.name for field in dataclasses.fields(Probe))

ERRORS = ("primal_error", "adjoint_error", "error")
"""The parts of the gradient's truncation error, and the total."""

HEAD = ("finite", "loss", "gradient_noise")
"""What an update tells of itself; the rest comes with its gradient."""

REPORT = (*HEAD, "gradient_norm", *ERRORS, *_COUNTS, "error_applications")
"""The numbers in a report: whether the update was made, and what it saw."""


class State(NamedTuple):
    """What an update changes.

    - `trained`: the trained part of the parameters.
    - `optimizer`: its state.
    - `memory`: of the task.
    - `previous`: the gradient of the batch before, to see how far batches are apart; NaN
        where there is none, `None` where nobody looks.
    """

    trained: PyTree
    optimizer: PyTree
    memory: PyTree = None
    previous: PyTree = None

    def first(self) -> "State":
        """As it is before the first batch of an epoch."""
        if self.previous is None:
            return self
        unknown = jax.tree.map(lambda leaf: leaf * jnp.nan, self.trained)
        return self._replace(previous=unknown)


class Gradient(NamedTuple):
    """A gradient and what came with it.

    - `value`: the loss.
    - `gradient`: like the parameters.
    - `numbers`: of the report, from the gradient's norm on.
    - `memory`: after the solves.
    """

    value: Array
    gradient: PyTree
    numbers: Array
    memory: PyTree


Update: TypeAlias = Callable[[State, Any, Fidelity], tuple[State, Report]]
"""``update(state, batch, fidelity)`` -> the next state, and a report."""

Differentiation: TypeAlias = Callable[[PyTree, PyTree, Any, Fidelity], Gradient]
"""``differentiate(trained, memory, batch, fidelity)`` -> a gradient."""

Application: TypeAlias = Callable[[State, Any, Fidelity, Gradient], tuple[State, Report]]
"""``apply(state, batch, fidelity, gradient)`` -> as an update."""


def make_update(task: Task, optimizer: optax.GradientTransformation) -> Update:
    """The update of a task's parameters, a pure function for jit.

    It differentiates the loss with respect to the parameters and to a probe put into
    the fidelity, so what the solves did comes out of the same backward pass.  Where the
    loss, the gradient or the next parameters are not finite, parameters and optimizer
    state stay as they are and the report says so.

    **Arguments:**

    - `task`: its parameters fix the structure and everything that is not trained.
    - `optimizer`: any optax transformation, with or without extra arguments; line
        searches get `value`, `grad` and `value_fn`, whose solves no report counts.

    **Returns:** the update.
    """
    differentiate, apply = make_parts(task, optimizer)

    def update(state: State, batch: Any, fidelity: Fidelity) -> tuple[State, Report]:
        gradient = differentiate(state.trained, state.memory, batch, fidelity)
        return apply(state, batch, fidelity, gradient)

    return update


def make_parts(
    task: Task, optimizer: optax.GradientTransformation
) -> tuple[Differentiation, Application]:
    """The two halves of an update, for those who compare gradients before they use one.

    **Arguments:** as [`make_update`][].

    **Returns:** what computes a gradient, and what applies it.
    """
    static = eqx.filter(task.parameters, eqx.is_inexact_array, inverse=True)
    evaluate = _of_loss(task, static) if task.loss is not None else _of_result(task, static)
    extended = optax.with_extra_args_support(optimizer)
    real = jnp.result_type(float)

    def differentiate(trained: PyTree, memory: PyTree, batch: Any, fidelity: Fidelity) -> Gradient:
        value, found, errors, counts, memory = evaluate(trained, memory, batch, fidelity)
        numbers = [vector.norm(found), *errors, *counts]
        numbers = jnp.stack([jnp.asarray(entry).astype(real) for entry in numbers])
        return Gradient(value, found, numbers, memory)

    def apply(
        state: State, batch: Any, fidelity: Fidelity, found: Gradient
    ) -> tuple[State, Report]:
        value, gradient = found.value, found.gradient
        steps, optimizer_state = extended.update(
            # JAX's gradient of a complex parameter is the conjugate of the steepest ascent.
            vector.conjugate(gradient),
            state.optimizer,
            state.trained,
            value=value,
            grad=gradient,
            value_fn=lambda other: evaluate(other, state.memory, batch, fidelity)[0],
        )
        moved: PyTree = optax.apply_updates(state.trained, steps)
        if task.projection is not None:
            projected = task.projection(eqx.combine(moved, static))
            moved = _like(state.trained, projected, "projection")
        finite = jnp.isfinite(value) & _all_finite(gradient) & _all_finite(moved)
        noise = _noise(gradient, state.previous)
        head = jnp.stack([jnp.asarray(entry).astype(real) for entry in (finite, value, noise)])
        previous = None if state.previous is None else gradient
        after = State(moved, optimizer_state, found.memory, previous)
        kept = [_choose(finite, new, old) for new, old in zip(after, state, strict=True)]
        return State(*kept), jnp.concatenate([head, found.numbers])

    return differentiate, apply


def _noise(gradient: PyTree, previous: PyTree) -> Array | float:
    """Of a batch's gradient: two of them lie √2 of their standard deviation apart."""
    if previous is None:
        return jnp.nan
    return vector.norm(vector.subtract(gradient, previous)) / math.sqrt(2)


Evaluated: TypeAlias = tuple[Array, PyTree, list[Any], list[Any], PyTree]
Evaluation: TypeAlias = Callable[[PyTree, PyTree, Any, Fidelity], Evaluated]
"""``evaluate(trained, memory, batch, fidelity)`` -> value, gradient, errors, counts, memory."""


def _of_loss(task: Task, static: PyTree) -> Evaluation:
    loss = task.loss
    assert loss is not None

    def evaluate(trained: PyTree, memory: PyTree, batch: Any, fidelity: Fidelity) -> Evaluated:
        def objective(trained: PyTree, probe: Probe, slots: list[PyTree]) -> tuple[Array, PyTree]:
            theta, reporting = eqx.combine(trained, static), fidelity.with_probe(probe)
            if task.memory is None:
                return _real_scalar("loss", loss(theta, batch, reporting)), None
            given = with_probes(memory, slots)
            value, kept = _with_memory("loss", memory, loss(theta, batch, reporting, given))
            return _real_scalar("loss", value), kept

        differentiated = jax.value_and_grad(objective, argnums=(0, 1, 2), has_aux=True)
        (value, kept), (gradient, probe, adjoints) = differentiated(
            trained, Probe.zeros(), probed(memory)
        )
        unknown = [jnp.nan for _ in ERRORS]
        counts = [*(getattr(probe, name) for name in _COUNTS), 0]
        return value, gradient, unknown, counts, collected(kept, adjoints)

    return evaluate


def _of_result(task: Task, static: PyTree) -> Evaluation:
    hypergradient = task.hypergradient
    assert hypergradient is not None

    def evaluate(trained: PyTree, memory: PyTree, batch: Any, fidelity: Fidelity) -> Evaluated:
        theta, kept = eqx.combine(trained, static), None
        if task.memory is None:
            result = hypergradient(theta, batch, fidelity)
        else:
            found = hypergradient(theta, batch, fidelity, memory)
            result, kept = _with_memory("hypergradient", memory, found)
        missing = [
            name
            for name in ("value", "gradient", "error", "primal", "adjoint")
            if not hasattr(result, name)
        ]
        if missing:
            msg = (
                f"Task: hypergradient should return what bl.hypergradient returns, got "
                f"{type(result).__name__} without {', '.join(missing)}."
            )
            raise TypeError(msg)
        gradient = _like(trained, result.gradient, "hypergradient's gradient")
        value = _real_scalar("hypergradient's value", result.value)
        counts = [*_counts(result), _error_applications(result)]
        return value, gradient, _errors(result.error), counts, kept

    return evaluate


def _with_memory(name: str, before: PyTree, returned: Any) -> tuple[Any, PyTree]:
    """What a function of a task with a memory returned: its result, and the next memory."""
    if not isinstance(returned, tuple) or len(returned) != 2:
        msg = (
            f"Task: with a memory, {name} should return two things, its result and the next "
            f"memory, got {brief(returned)}."
        )
        raise TypeError(msg)
    result, memory = returned
    layouts = [
        jax.tree.map(lambda leaf: f"{jnp.result_type(leaf)}{list(jnp.shape(leaf))}", tree)
        for tree in (before, memory)
    ]
    if jax.tree.structure(before) != jax.tree.structure(memory) or layouts[0] != layouts[1]:
        msg = (
            f"Task: the memory that {name} returns should be like the one it was given, "
            f"{layouts[0]}, got {layouts[1]}."
        )
        raise TypeError(msg)
    return result, memory


def _errors(error: Any) -> list[Any]:
    """Primal part, adjoint part and total; a bare number is a total."""
    if error is None:
        return [jnp.nan for _ in ERRORS]
    if hasattr(error, "total"):
        return [getattr(error, part, jnp.nan) for part in ("primal", "adjoint", "total")]
    return [jnp.nan, jnp.nan, error]


def _counts(result: Any) -> list[Any]:
    """The probe's numbers, from the cost where there is one, else from the two solutions."""
    solutions = [part for part in (result.primal, result.adjoint) if part is not None]
    statuses = [jnp.asarray(part.status) for part in solutions]
    known: dict[str, Any] = {
        "solves": float(jnp.size(result.primal.iterations)),
        "failures": sum(jnp.sum(status >= Status.DIVERGED) for status in statuses),
    }
    cost = getattr(result, "cost", None)
    for side, part, applications in (
        ("primal", result.primal, "operator_applications"),
        ("adjoint", result.adjoint, "transposed_applications"),
    ):
        own = [0] if part is None else getattr(part, "inner_iterations", part.iterations)
        applied = [0] if part is None else part.applications
        known[f"{side}_iterations"] = jnp.sum(
            jnp.asarray(own if cost is None else getattr(cost, f"{side}_iterations"))
        )
        known[f"{side}_applications"] = jnp.sum(
            jnp.asarray(applied if cost is None else getattr(cost, applications))
        )
        known[f"{side}_residual"] = _relative_residual(part)
        known[f"{side}_capped"] = (
            0 if part is None else jnp.sum(jnp.asarray(part.status) == Status.BUDGET)
        )
    return [known[name] for name in _COUNTS]


def _relative_residual(solution: Any) -> Any:
    """Residual norms relative to each solve's own scale, summed; NaN where there is none."""
    scale = getattr(solution, "scale", None)
    if scale is None:
        return jnp.nan
    scale = jnp.asarray(scale)
    # A zero right-hand side is met exactly or not at all.
    return jnp.sum(jnp.where(scale > 0, solution.residual_norm / jnp.where(scale > 0, scale, 1), 0))


def _error_applications(result: Any) -> Any:
    return jnp.sum(jnp.asarray(getattr(getattr(result, "cost", None), "error_applications", 0)))


def _like(trained: PyTree, other: PyTree, name: str) -> PyTree:
    """The trained part of another pytree, checked against the parameters."""
    structure = jax.tree.structure(trained)
    candidate = eqx.filter(other, eqx.is_inexact_array)
    if jax.tree.structure(candidate) != structure:
        msg = (
            f"Task: {name} should be like theta ({structure}), got {jax.tree.structure(candidate)}."
        )
        raise TypeError(msg)
    for (path, leaf), found in zip(
        jax.tree_util.tree_leaves_with_path(trained), jax.tree.leaves(candidate), strict=True
    ):
        if leaf.shape != found.shape:
            where = jax.tree_util.keystr(path) or "theta"
            msg = f"Task: {name} should be like theta; {where} is {leaf.shape}, got {found.shape}."
            raise ValueError(msg)
    return jax.tree.map(lambda leaf, found: found.astype(leaf.dtype), trained, candidate)


def _real_scalar(name: str, value: Any) -> Array:
    shape, dtype = jnp.shape(value), jnp.result_type(value)
    if shape != () or not jnp.issubdtype(dtype, jnp.floating):
        msg = (
            f"Task: {name} should be one real floating-point number, got {dtype}{list(shape)}. "
            "Reduce it, for example with jnp.mean."
        )
        raise TypeError(msg)
    return jnp.asarray(value)


def _all_finite(tree: PyTree) -> Array:
    return jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]).all()


def _choose(finite: Array, moved: PyTree, kept: PyTree) -> PyTree:
    # In the dtype of what is kept: an optimizer that widened its state would otherwise
    # compile anew at its second step.
    return jax.tree.map(
        lambda new, old: jnp.where(finite, jnp.asarray(new).astype(old.dtype), old), moved, kept
    )
