"""Compile once: calls outside jit reuse one executable for all traced values."""

import functools
import types
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from bilevel.captured import Captured, classes_in


def _is_traced_leaf(leaf: Any) -> bool:
    if isinstance(leaf, jax.Array | np.ndarray | np.generic):
        return True
    return isinstance(leaf, float | complex) and not isinstance(leaf, bool)


def _may_hold(leaf: Any) -> bool:
    return not isinstance(leaf, int | str | bytes | types.NoneType)


def _inside_jit() -> bool:
    """Whether an outer jit traces this: it compiles everything, constants once."""
    return isinstance(jnp.zeros(()), Tracer)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function of pytrees that hold arrays and Python objects.

    Arrays and Python floats anywhere in the arguments are traced; functions, strings,
    integers and the rest are part of the cache key, functions and objects together with
    what they hold ([`Captured`][]). Inside someone else's jit, with traced values in a
    closure, or where what something holds cannot be seen, the function is called as it is.
    """

    @functools.partial(jax.jit, static_argnums=0)
    def call(static: tuple[Any, ...], dynamic: list[Any]) -> Any:
        leaves, treedef, classes = static
        remaining = iter(dynamic)
        merged = [next(remaining) if leaf is _SLOT else _unwrap(leaf) for leaf in leaves]
        args, kwargs = jax.tree.unflatten(treedef, merged)
        outcome = function(*args, **kwargs)
        arrays, rest = eqx.partition(outcome, eqx.is_array)
        for part in (*leaves, classes):
            if isinstance(part, Captured):
                part.refresh()
        return arrays, _Constant(rest)

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if _inside_jit():
            return function(*args, **kwargs)
        leaves, treedef = jax.tree.flatten((args, kwargs))
        static = tuple(
            _SLOT if _is_traced_leaf(leaf) else (Captured(leaf) if _may_hold(leaf) else leaf)
            for leaf in leaves
        )
        classes = Captured(*classes_in((args, kwargs)))
        captures = [leaf.held for leaf in (*static, classes) if isinstance(leaf, Captured)]
        if any(capture.traced or not capture.seen for capture in captures):
            return function(*args, **kwargs)
        try:
            hash((static, treedef, classes))
        except TypeError:
            return function(*args, **kwargs)
        dynamic = [leaf for leaf in leaves if _is_traced_leaf(leaf)]
        arrays, rest = call((static, treedef, classes), dynamic)
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
    return leaf.things[0] if isinstance(leaf, Captured) else leaf
