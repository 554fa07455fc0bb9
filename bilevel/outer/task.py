"""Task: what is trained."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import PRNGKeyArray, PyTree

from bilevel.budget import Budget
from bilevel.outer.policy import parse_policy
from bilevel.outer.settings import TaskSettings, validated
from bilevel.refinement.fidelity import Fidelity, as_fidelity
from bilevel.refinement.ladder import Ladder
from bilevel.refinement.progressive import ProgressiveRefinement
from bilevel.signature import brief, check_callable

Loss: TypeAlias = Callable[..., Any]
"""``loss(theta, batch, fidelity) -> scalar``, or with a memory after them and beside it."""

Batches: TypeAlias = Sequence[Any] | Callable[[int, PRNGKeyArray], Iterable[Any]]
"""A sequence of batches, or ``batches(epoch, key) -> iterable of batches``."""


_FUNCTIONS = {
    "loss": ("theta", "batch", "fidelity"),
    "hypergradient": ("theta", "batch", "fidelity"),
    "validate": ("theta",),
    "projection": ("theta",),
    "report": ("runs", "directory"),
}


class Hypergradient(Protocol):
    """What a task's `hypergradient` returns: `bl.hypergradient`'s result, or the like.

    - `value`: the loss, a real scalar.
    - `gradient`: like theta.
    - `error`: with `.total`, the estimated truncation error of the gradient; or `None`.
    - `primal`, `adjoint`: with `.iterations`; `adjoint` may be `None`.
    """

    @property
    def value(self) -> Any: ...  # noqa: D102
    @property
    def gradient(self) -> Any: ...  # noqa: D102
    @property
    def error(self) -> Any: ...  # noqa: D102
    @property
    def primal(self) -> Any: ...  # noqa: D102
    @property
    def adjoint(self) -> Any: ...  # noqa: D102


@dataclasses.dataclass(frozen=True)
class Task:
    """What is trained: parameters, a loss, data, a validation metric.

    The loss takes its budgets from the fidelity, usually by ``bl.solve(...,
    fidelity=fidelity)``, and the outer loop decides which fidelity that is.

    **Arguments:**

    - `theta0`: parameters to start from, any pytree.  Floating and complex arrays are
        trained; integers, functions and the rest stay as they are.  A Python number is
        trained too, except inside an Equinox module, where it is a setting.
    - `loss`: ``loss(theta, batch, fidelity) -> real scalar``, traced by JAX.
    - `batches`: `None` for one update an epoch, with ``batch=None``; a sequence of
        batches (pytrees of arrays), used in this order every epoch; or
        ``batches(epoch, key) -> iterable``, called with the number of the epoch, from
        1, and a random key of its own.
    - `validate`: ``validate(theta) -> real scalar``, smaller is better.  It should
        solve at full accuracy.  `None` takes the mean training loss of each epoch.
    - `hypergradient`: ``hypergradient(theta, batch, fidelity)`` in place of `loss`,
        returning what `bl.hypergradient` returns; then controllers learn its estimated
        truncation error.

    - `memory`: pytree of arrays that the loss keeps from update to update, such as
        `bl.WarmStarts`.  It is the loss's fourth argument, and comes back beside the
        scalar: ``loss(theta, batch, fidelity, memory) -> (scalar, memory)``; likewise for
        `hypergradient`.  An update that is not made leaves it as it was.

    What a task recommends, for those who call it without saying so:

    - `name`: for tables, files and pictures.
    - `metric_name`: what `validate` measures, with its unit.
    - `optimizer`: any optax optimizer.
    - `epochs`: how long to train.
    - `ladder`: fidelities from coarse to fine.
    - `full`: fidelity of the full solve, a `Fidelity` or a `Budget` for both solves;
        the finest of the ladder by default.
    - `refinement`: settings of `ProgressiveRefinement` on this ladder, by name.
    - `controller`: a controller of its own.
    - `policies`: what `compare` runs by default, such as ``("full", "prdp")``.
    - `projection`: ``projection(theta) -> theta`` onto the admissible set, applied after
        every update.
    - `report`: ``report(runs, directory)``, called by the command line with all finished
        runs and their directory (`None` if nothing is kept), for a table or a picture of
        the task's own.
    - `jit_validate`: whether `validate` is compiled; `False` calls it as it is, for
        metrics that leave JAX.

    **Raises:** `TypeError` or `ValueError` naming the argument.

    >>> import bilevel as bl
    >>> def loss(theta, batch, fidelity):
    ...     return (theta - 2.0) ** 2
    >>> task = Task(5.0, loss, validate=lambda theta: abs(theta - 2.0), name="distance")
    >>> task.parameters.dtype.kind
    'f'

    How to write a file of them, and how to do without them: docs/tasks.md.
    """

    theta0: PyTree
    loss: Loss | None = None
    batches: Batches | None = None
    validate: Callable[[PyTree], Any] | None = None
    _: dataclasses.KW_ONLY
    hypergradient: Callable[..., Any] | None = None
    memory: PyTree = None
    name: str = "task"
    metric_name: str = "metric"
    optimizer: optax.GradientTransformation | None = None
    epochs: int | None = None
    ladder: Ladder | None = None
    full: Fidelity | Budget | None = None
    refinement: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any])
    controller: Any | None = None
    policies: Sequence[str] = ()
    projection: Callable[[PyTree], PyTree] | None = None
    report: Callable[[Sequence[Any], Path | None], object] | None = None
    jit_validate: bool = True

    def __post_init__(self) -> None:
        self._check_functions()
        self._check_batches()
        self._check_recommendations()
        self._check_memory()
        if not jax.tree.leaves(self.trainable):
            msg = (
                f"Task: theta0 holds nothing to train, got {brief(self.theta0)}. Give it at least "
                "one floating-point array; write 5.0 rather than 5."
            )
            raise ValueError(msg)

    @property
    def parameters(self) -> PyTree:
        """`theta0` with its numbers and NumPy arrays as JAX arrays."""

        def convert(leaf: Any) -> Any:
            if isinstance(leaf, eqx.Module):
                return jax.tree.map(lambda inner: _array(inner, numbers=False), leaf)
            return _array(leaf, numbers=True)

        return jax.tree.map(convert, self.theta0, is_leaf=lambda node: isinstance(node, eqx.Module))

    @property
    def trainable(self) -> PyTree:
        """The part of the parameters that is trained; `None` in place of the rest."""
        return eqx.filter(self.parameters, eqx.is_inexact_array)

    @property
    def full_fidelity(self) -> Fidelity | None:
        """The fidelity of the full solve; `None` where neither `full` nor `ladder` tells."""
        if isinstance(self.full, Budget):
            return as_fidelity("Task", "full", self.full)
        if self.full is None and self.ladder is not None:
            return self.ladder.finest
        return self.full

    @property
    def first_memory(self) -> PyTree:
        """`memory` with its numbers and NumPy arrays as JAX arrays; `None` if there is none."""
        return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.result_type(leaf)), self.memory)

    def epoch_batches(self, epoch: int, key: Callable[[int], PRNGKeyArray]) -> Iterator[Any]:
        """The batches of one epoch.

        **Arguments:**

        - `epoch`: its number, from 1.
        - `key`: makes the random key of an epoch, called if one is needed.

        **Raises:** `TypeError` or `ValueError` where a callable gives no batches.
        """
        if self.batches is None:
            yield None
            return
        found: Any = self.batches(epoch, key(epoch)) if callable(self.batches) else self.batches
        if not isinstance(found, Iterable):
            msg = (
                f"Task: batches(epoch, key) should return an iterable of batches, got "
                f"{brief(found)}."
            )
            raise TypeError(msg)
        count = 0
        for count, batch in enumerate(found, start=1):  # noqa: B007
            yield batch
        if count == 0:
            msg = f"Task: batches(epoch, key) gave no batch in epoch {epoch}; one is the least."
            raise ValueError(msg)

    def _check_functions(self) -> None:
        if (self.loss is None) == (self.hypergradient is None):
            given = "neither" if self.loss is None else "both"
            msg = f"Task: give either loss or hypergradient, got {given}."
            raise ValueError(msg)
        for name, arguments in _FUNCTIONS.items():
            value = getattr(self, name)
            if value is None:
                continue
            if name in ("loss", "hypergradient") and self.memory is not None:
                arguments = (*arguments, "memory")  # noqa: PLW2901
            check_callable("Task", name, value, arguments)

    def _check_memory(self) -> None:
        for path, leaf in jax.tree_util.tree_leaves_with_path(self.memory):
            if not isinstance(leaf, jax.Array | np.ndarray | np.generic | int | float | complex):
                msg = (
                    f"Task: memory should hold arrays and numbers only, got {brief(leaf)} at "
                    f"memory{jax.tree_util.keystr(path)}. What never changes belongs in the loss."
                )
                raise TypeError(msg)

    def _check_batches(self) -> None:
        batches: Any = self.batches
        if batches is None:
            return
        if callable(batches):
            check_callable("Task", "batches", batches, ("epoch", "key"))
            return
        if isinstance(batches, jax.Array | np.ndarray):
            msg = (
                f"Task: batches should be a sequence of batches, got one array of shape "
                f"{batches.shape}. Give [array] for one batch, list(array) for one a row."
            )
            raise TypeError(msg)
        if not isinstance(batches, Sequence) or isinstance(batches, str | bytes):
            msg = (
                f"Task: batches should be None, a sequence or a function of (epoch, key), got "
                f"{brief(batches)}. An iterator is empty after one epoch: give list(batches)."
            )
            raise TypeError(msg)
        if not batches:
            msg = "Task: batches holds no batch. Give at least one, or None for a full batch."
            raise ValueError(msg)

    def _check_recommendations(self) -> None:
        validated(
            TaskSettings,
            "Task",
            name=self.name,
            metric_name=self.metric_name,
            epochs=self.epochs,
            policies=_names(self.policies),
            jit_validate=self.jit_validate,
        )
        for entry in self.policies:
            parse_policy(entry)
        for name, kinds in (("ladder", Ladder), ("full", Fidelity | Budget)):
            value = getattr(self, name)
            if value is not None and not isinstance(value, kinds):
                msg = f"Task: {name} should be a {_kinds(kinds)}, got {brief(value)}."
                raise TypeError(msg)
        check_parts("Task", "optimizer", self.optimizer, ("init", "update"), "an optax optimizer")
        check_parts(
            "Task", "controller", self.controller, ("init", "update", "fidelity"), "a controller"
        )
        if self.refinement and self.ladder is None:
            msg = "Task: refinement needs a ladder to move along; give ladder= too."
            raise ValueError(msg)
        if self.ladder is not None:
            ProgressiveRefinement(self.ladder, **self.refinement)


def check_parts(owner: str, name: str, value: Any, parts: tuple[str, ...], expected: str) -> None:
    """Raise a `TypeError` if a value that is not `None` lacks one of the named methods."""
    if value is None:
        return
    missing = [part for part in parts if not callable(getattr(value, part, None))]
    if missing or isinstance(value, type):
        why = "a class instead of an object of it" if isinstance(value, type) else brief(value)
        msg = (
            f"{owner}: {name} should be {expected} with {', '.join(parts)}, got {why}"
            f"{'' if isinstance(value, type) else ' without ' + ', '.join(missing)}."
        )
        raise TypeError(msg)


def _array(leaf: Any, *, numbers: bool) -> Any:
    if isinstance(leaf, np.ndarray | np.generic) or (numbers and isinstance(leaf, float | complex)):
        # A Python number is weakly typed; a parameter keeps its dtype whatever it meets.
        return jnp.asarray(leaf, dtype=jnp.result_type(leaf))
    return leaf


def _names(policies: Any) -> Any:
    return tuple(policies) if isinstance(policies, list | tuple) else policies


def _kinds(kinds: Any) -> str:
    return " or a ".join(kind.__name__ for kind in getattr(kinds, "__args__", (kinds,)))
