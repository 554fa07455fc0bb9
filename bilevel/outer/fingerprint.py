"""Fingerprint: what a run is begun with, so far as that can be compared."""

import dataclasses
import functools
import types
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from bilevel.outer.task import Task

_DEPTH = 12
_SHOWN = 3
_ABSENT = "absent"


class OtherRunError(ValueError):
    """A checkpoint is whole, and of a run that was begun with something else."""


def fingerprint(task: Task, optimizer: Any, controller: Any, seed: int) -> dict[str, str]:
    """What must be the same for a run to go on, in words, by where it stands.

    Compared are the seed, the task's names, the structure, shapes and dtypes of the
    parameters and of listed batches, the optimizer with the numbers its closures hold (a
    learning rate, a schedule's), the controller with its ladder, and the numbers that the
    loss holds in its own closure.

    The code of the loss, of a metric and of a function that makes batches cannot be
    compared, nor can what they reach through globals or objects, or values inside arrays.

    >>> import optax
    >>> task = Task(1.0, lambda theta, batch, fidelity: theta**2)
    >>> fast, slow = (fingerprint(task, optax.sgd(rate), None, 0) for rate in (0.5, 0.1))
    >>> len(differences(fast, slow))
    1
    """
    found = {
        "seed": str(seed),
        "task.name": task.name,
        "task.metric_name": task.metric_name,
        "theta": _layout(task.parameters),
        "task.batches": _batches(task.batches),
        "task.memory": _ABSENT if task.memory is None else _layout(task.first_memory),
    }
    for name in ("loss", "hypergradient", "validate", "projection"):
        function = getattr(task, name)
        found[f"task.{name}"] = _ABSENT if function is None else "given"
    function = task.loss if task.hypergradient is None else task.hypergradient
    roots = (("loss", function), ("optimizer", optimizer), ("controller", controller))
    for root, thing in roots:
        found.update(_walk(root, thing, 0, set()))
    return found


def differences(before: dict[str, str], now: dict[str, str]) -> list[str]:
    """What differs between two fingerprints, an entry in words each."""
    names = [*before, *(name for name in now if name not in before)]
    return [
        f"{name} was {was}, is {given}"
        for name in names
        if (was := before.get(name, _ABSENT)) != (given := now.get(name, _ABSENT))
    ]


def some(entries: list[str]) -> str:
    """The first few of them in one line."""
    more = len(entries) - _SHOWN
    return "; ".join(entries[:_SHOWN]) + (f"; and {more} more" if more > 0 else "")


def _walk(path: str, thing: Any, depth: int, seen: set[int]) -> Iterator[tuple[str, str]]:
    if thing is None or isinstance(thing, bool | int | float | complex | str | np.generic):
        yield path, repr(thing)
        return
    if isinstance(thing, jax.Array | np.ndarray):
        yield path, repr(thing.item()) if _is_number(thing) else _layout(thing)
        return
    if depth >= _DEPTH or id(thing) in seen:
        return
    seen.add(id(thing))
    # Lists, dictionaries and plain objects are left out: a loss may keep a tally in them.
    if not isinstance(thing, tuple | types.FunctionType | functools.partial):
        yield path, getattr(thing, "__qualname__", type(thing).__name__)
    for name, part in _parts(thing):
        yield from _walk(f"{path}{name}", part, depth + 1, seen)


def _parts(thing: Any) -> Iterator[tuple[str, Any]]:
    """What a value is made of, with how that is written behind its name."""
    if isinstance(thing, tuple):
        names = getattr(thing, "_fields", None)
        for index, part in enumerate(thing):
            yield f"[{index}]" if names is None else f".{names[index]}", part
    elif isinstance(thing, functools.partial):
        yield "", thing.func
        yield from ((f"[{index}]", part) for index, part in enumerate(thing.args))
        yield from ((f".{name}", part) for name, part in thing.keywords.items())
    elif isinstance(thing, types.MethodType):
        yield "", thing.__func__
        yield "", thing.__self__
    elif isinstance(thing, types.FunctionType):
        for name, cell in zip(thing.__code__.co_freevars, thing.__closure__ or (), strict=True):
            try:
                yield f".{name}", cell.cell_contents
            except ValueError:  # a name that is not bound yet
                continue
        yield from ((f".{index}", part) for index, part in enumerate(thing.__defaults__ or ()))
        yield from ((f".{name}", part) for name, part in (thing.__kwdefaults__ or {}).items())
    elif dataclasses.is_dataclass(thing) and not isinstance(thing, type):
        for field in dataclasses.fields(thing):
            yield f".{field.name}", getattr(thing, field.name, None)


def _is_number(array: Any) -> bool:
    return array.ndim == 0 and not jnp.issubdtype(array.dtype, jax.dtypes.prng_key)


def _batches(batches: Any) -> str:
    if batches is None:
        return "one full batch"
    if callable(batches):
        return "a function"
    return f"{len(batches)} of {_layout(batches[0])}"


def _layout(tree: PyTree) -> str:
    """Structure, shapes and dtypes of a pytree."""

    def described(leaf: Any) -> str:
        if isinstance(leaf, jax.Array | np.ndarray | np.generic):
            return f"{leaf.dtype}{list(leaf.shape)}"
        return type(leaf).__name__

    leaves = jax.tree_util.tree_leaves_with_path(tree)
    parts = [f"{jax.tree_util.keystr(path)} {described(leaf)}".strip() for path, leaf in leaves]
    return ", ".join(parts) or "nothing"
