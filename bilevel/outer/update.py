"""Update: one step of the outer optimizer, compiled once for all budgets."""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from bilevel import vector
from bilevel.outer.task import Task
from bilevel.probe import Probe
from bilevel.refinement.fidelity import Fidelity
from bilevel.status import Status

Report: TypeAlias = Float[Array, " report"]
"""What one update did, one number for each of `REPORT`."""

_COUNTS = tuple(field.name for field in dataclasses.fields(Probe))

ERRORS = ("primal_error", "adjoint_error", "error")
"""The parts of the gradient's truncation error, and the total."""

REPORT = ("finite", "loss", "gradient_norm", *ERRORS, *_COUNTS, "error_applications")
"""The numbers in a report: whether the update was made, and what it saw."""

Update: TypeAlias = Callable[[PyTree, PyTree, Any, Fidelity], tuple[PyTree, PyTree, Report]]
"""``update(trained, optimizer_state, batch, fidelity)`` -> the next two, and a report."""


Gradient: TypeAlias = Callable[[PyTree, Any, Fidelity], tuple[Array, PyTree, Array]]
"""``gradient(trained, batch, fidelity)`` -> the loss, its gradient, numbers for the report."""

Application: TypeAlias = Callable[..., tuple[PyTree, PyTree, Report]]
"""``apply(trained, optimizer_state, batch, fidelity, *gradient(...))`` -> as an update."""


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
    gradient, apply = make_parts(task, optimizer)

    def update(
        trained: PyTree, optimizer_state: PyTree, batch: Any, fidelity: Fidelity
    ) -> tuple[PyTree, PyTree, Report]:
        found = gradient(trained, batch, fidelity)
        return apply(trained, optimizer_state, batch, fidelity, *found)

    return update


def make_parts(task: Task, optimizer: optax.GradientTransformation) -> tuple[Gradient, Application]:
    """The two halves of an update, for those who compare gradients before they use one.

    **Arguments:** as [`make_update`][].

    **Returns:** what computes a gradient, and what applies it.
    """
    static = eqx.filter(task.parameters, eqx.is_inexact_array, inverse=True)
    evaluate = _of_loss(task, static) if task.loss is not None else _of_result(task, static)
    extended = optax.with_extra_args_support(optimizer)
    real = jnp.result_type(float)

    def gradient(trained: PyTree, batch: Any, fidelity: Fidelity) -> tuple[Array, PyTree, Array]:
        value, found, errors, counts = evaluate(trained, batch, fidelity)
        numbers = [vector.norm(found), *errors, *counts]
        return value, found, jnp.stack([jnp.asarray(entry).astype(real) for entry in numbers])

    def apply(
        trained: PyTree,
        optimizer_state: PyTree,
        batch: Any,
        fidelity: Fidelity,
        value: Array,
        gradient: PyTree,
        numbers: Array,
    ) -> tuple[PyTree, PyTree, Report]:
        steps, next_state = extended.update(
            # JAX's gradient of a complex parameter is the conjugate of the steepest ascent.
            vector.conjugate(gradient),
            optimizer_state,
            trained,
            value=value,
            grad=gradient,
            value_fn=lambda other: evaluate(other, batch, fidelity)[0],
        )
        moved: PyTree = optax.apply_updates(trained, steps)
        if task.projection is not None:
            projected = task.projection(eqx.combine(moved, static))
            moved = _like(trained, projected, "projection")
        finite = jnp.isfinite(value) & _all_finite(gradient) & _all_finite(moved)
        head = jnp.stack([finite.astype(real), jnp.asarray(value).astype(real)])
        return (
            _choose(finite, moved, trained),
            _choose(finite, next_state, optimizer_state),
            jnp.concatenate([head, numbers]),
        )

    return gradient, apply


Evaluation: TypeAlias = Callable[
    [PyTree, Any, Fidelity], tuple[Array, PyTree, list[Any], list[Any]]
]


def _of_loss(task: Task, static: PyTree) -> Evaluation:
    loss = task.loss
    assert loss is not None

    def evaluate(
        trained: PyTree, batch: Any, fidelity: Fidelity
    ) -> tuple[Array, PyTree, list[Any], list[Any]]:
        def objective(trained: PyTree, probe: Probe) -> Array:
            value = loss(eqx.combine(trained, static), batch, fidelity.with_probe(probe))
            return _real_scalar("loss", value)

        value, (gradient, probe) = jax.value_and_grad(objective, argnums=(0, 1))(
            trained, Probe.zeros()
        )
        unknown = [jnp.nan for _ in ERRORS]
        return value, gradient, unknown, [*(getattr(probe, name) for name in _COUNTS), 0]

    return evaluate


def _of_result(task: Task, static: PyTree) -> Evaluation:
    hypergradient = task.hypergradient
    assert hypergradient is not None

    def evaluate(
        trained: PyTree, batch: Any, fidelity: Fidelity
    ) -> tuple[Array, PyTree, list[Any], list[Any]]:
        result = hypergradient(eqx.combine(trained, static), batch, fidelity)
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
        return value, gradient, _errors(result.error), counts

    return evaluate


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
