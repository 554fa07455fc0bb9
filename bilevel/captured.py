"""What a function or an object holds on to, as part of a cache key."""

import functools
import types
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

import equinox as eqx
import jax
import numpy as np

DEPTH = 4
"""How many containers, objects and functions deep a capture is followed."""

LIBRARIES = frozenset({"bilevel", "builtins", "equinox", "jax", "jaxlib", "numpy", "optax"})
"""Their classes and functions hold nothing that a user would rebind."""

_VALUES = (bool, int, float, complex, str, bytes, types.NoneType, np.generic)

_TALLIED = (int, str, bytes, types.NoneType)


class Captured:
    """A function or an object as part of a cache key: itself, and what it computes with.

    jit keys on the function alone, and would go on using the values that its closure,
    the globals it names or the object it belongs to held at the first call.  Whoever
    calls a solver outside jit has not asked for that: a variable bound anew, an entry
    of a dictionary or an attribute set anew, a NumPy array changed in place must all
    compile anew.
    """

    def __init__(self, thing: Any):
        self.thing = thing
        self.held = tuple(_held([thing]))

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Captured)
            and bool(self.thing == other.thing)
            and same(self.held, other.held)
        )

    def __hash__(self) -> int:
        return hash((self.thing, len(self.held)))


class Classes:
    """The user's own classes among the nodes of a pytree, with the globals that they name."""

    def __init__(self, tree: Any):
        found: dict[type, None] = {}

        def note(node: Any) -> bool:
            for kind in type(node).__mro__:
                if _is_users(kind):
                    found[kind] = None
            return False

        jax.tree.flatten(tree, is_leaf=note)
        self.kinds = tuple(found)
        self.held = tuple(_held(_functions(self.kinds)))

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Classes) and self.kinds == other.kinds and same(self.held, other.held)
        )

    def __hash__(self) -> int:
        return hash((self.kinds, len(self.held)))


def same(first: tuple[Any, ...], second: tuple[Any, ...]) -> bool:
    """Whether two captures hold the same: equal numbers and strings, identical objects."""
    return len(first) == len(second) and all(
        a is b or (type(a) is type(b) and isinstance(a, _VALUES) and bool(a == b))
        for a, b in zip(first, second, strict=True)
    )


def _held(roots: Iterable[Any]) -> list[Any]:
    roots = list(roots)
    homes = {id(root.__globals__) for root in map(_bare, roots) if _is_function(root)}
    found: list[Any] = []
    seen: set[int] = set()

    def visit(item: Any, depth: int) -> None:
        if isinstance(item, _VALUES):
            found.append(item)
            return
        if id(item) in seen:
            return
        seen.add(id(item))
        # A method or a partial is made anew all the time: what it is made of counts.
        if depth > 0 and not isinstance(item, functools.partial | types.MethodType):
            found.append(item)
        if isinstance(item, np.ndarray):
            if not item.dtype.hasobject:
                found.append(zlib.crc32(np.ascontiguousarray(item).view(np.uint8).data))
        elif depth < DEPTH:
            for part in _parts(item, homes):
                visit(part, depth + 1)

    for root in roots:
        visit(root, 0)
    return found


def _bare(function: Any) -> Any:
    return function.__func__ if isinstance(function, types.MethodType) else function


def _is_function(thing: Any) -> bool:
    return isinstance(_bare(thing), types.FunctionType)


def _is_users(kind: type) -> bool:
    return kind.__module__.partition(".")[0] not in LIBRARIES


def _functions(kinds: Iterable[type]) -> Iterator[Any]:
    for kind in kinds:
        for member in vars(kind).values():
            # Equinox wraps methods; what it wraps is a function all the same.
            function = getattr(member, "method", getattr(member, "__wrapped__", member))
            if isinstance(function, types.FunctionType):
                yield function


def _parts(item: Any, homes: set[int]) -> Iterator[Any]:
    """What an object can compute with, one level down."""
    if isinstance(item, eqx.Module):
        yield from jax.tree.leaves(item)
    elif isinstance(item, functools.partial):
        yield from (item.func, *item.args, *item.keywords.values())
    elif isinstance(item, types.MethodType):
        yield from (item.__func__, item.__self__)
    elif isinstance(item, types.FunctionType):
        yield from _captures(item)
        # A function of another module is a library's; what it names stays as it is.
        if id(item.__globals__) in homes:
            yield from (item.__globals__[n] for n in _names(item.__code__) if n in item.__globals__)
    elif isinstance(item, dict):
        yield from item.values()
    elif isinstance(item, list | tuple | set | frozenset):
        # A list of words or counts is a tally, kept by a function with side effects.
        yield from (part for part in item if not isinstance(part, _TALLIED))
    elif not isinstance(item, type | types.ModuleType | jax.Array) and _is_users(type(item)):
        yield from getattr(item, "__dict__", {}).values()


def _captures(function: types.FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # a name that is not bound yet
            continue
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()


@functools.lru_cache(maxsize=1024)
def _names(code: types.CodeType) -> tuple[str, ...]:
    """Names that code may look up among the globals, nested functions included."""
    names = dict.fromkeys(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names.update(dict.fromkeys(_names(constant)))
    return tuple(names)
