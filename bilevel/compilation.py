"""Compile once: calls outside jit reuse one executable for all traced values."""

import functools
import types
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jax.core import Tracer


class _Function:
    """A function as part of a cache key: itself and the objects its closure holds.

    jit keys on the function alone and would go on using the values that its closure
    held at the first call; a rebound closure variable must compile anew.
    """

    def __init__(self, function: Callable[..., Any]):
        self.function = function
        self.captured = tuple(_cells(function))

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, _Function)
            and self.function == other.function
            and len(self.captured) == len(other.captured)
            and all(a is b for a, b in zip(self.captured, other.captured, strict=True))
        )

    def __hash__(self) -> int:
        return hash((self.function, *map(id, self.captured)))


def _cells(function: Callable[..., Any]) -> list[Any]:
    if isinstance(function, functools.partial):
        parts = [function.func, *function.args, *function.keywords.values()]
        return [*parts, *(_cells(function.func))]
    if isinstance(function, types.MethodType):
        return [*vars(function.__self__).values()] if hasattr(function.__self__, "__dict__") else []
    contents: list[Any] = []
    for cell in getattr(function, "__closure__", None) or ():
        try:
            content = cell.cell_contents
        except ValueError:  # a name that is not bound yet
            continue
        contents.append(content)
        if isinstance(content, types.FunctionType) and content is not function:
            contents.extend(_cells(content))
    return contents


def _is_traced_leaf(leaf: Any) -> bool:
    if isinstance(leaf, jax.Array | np.ndarray | np.generic):
        return True
    return isinstance(leaf, float | complex) and not isinstance(leaf, bool)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function of pytrees that hold arrays and Python objects.

    Arrays and Python floats anywhere in the arguments are traced; functions, strings,
    integers and the rest are part of the cache key. Inside someone else's trace with
    traced values in a closure, the function is inlined instead: the outer jit compiles it.
    """

    @functools.partial(jax.jit, static_argnums=0)
    def call(static: tuple[Any, ...], dynamic: list[Any]) -> Any:
        leaves, treedef = static
        remaining = iter(dynamic)
        merged = [next(remaining) if leaf is _SLOT else _unwrap(leaf) for leaf in leaves]
        args, kwargs = jax.tree.unflatten(treedef, merged)
        outcome = function(*args, **kwargs)
        arrays, rest = eqx.partition(outcome, eqx.is_array)
        return arrays, _Constant(rest)

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        leaves, treedef = jax.tree.flatten((args, kwargs))
        static = tuple(
            _SLOT
            if _is_traced_leaf(leaf)
            else (_Function(leaf) if callable(leaf) and not isinstance(leaf, type) else leaf)
            for leaf in leaves
        )
        captured = [
            item for leaf in static if isinstance(leaf, _Function) for item in leaf.captured
        ]
        if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(captured)):
            return function(*args, **kwargs)
        try:
            hash((static, treedef))
        except TypeError:
            return function(*args, **kwargs)
        dynamic = [leaf for leaf in leaves if _is_traced_leaf(leaf)]
        arrays, rest = call((static, treedef), dynamic)
        return eqx.combine(arrays, rest.value)

    return wrapper


@jax.tree_util.register_static
class _Constant:
    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Constant)

    def __hash__(self) -> int:
        return 0


class _Slot:
    def __repr__(self) -> str:
        return "traced"


_SLOT = _Slot()


def _unwrap(leaf: Any) -> Any:
    return leaf.function if isinstance(leaf, _Function) else leaf
