"""What a function or an object holds on to, as part of a cache key."""

import array
import collections
import dataclasses
import functools
import itertools
import sys
import types
import zlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.core import Tracer

MOST = 4096
"""How many values and objects are looked at before a capture counts as unseen."""

LIBRARIES = frozenset({"bilevel", "equinox", "jax", "jaxlib", "numpy", "optax", "jaxtyping"})
"""Their objects, beside those of the standard library, hold nothing that a user would set anew."""

_VALUES = (bool, int, float, complex, str, bytes, types.NoneType, np.generic)
_KINDS = frozenset(_VALUES)
_RECORDS = (types.SimpleNamespace, collections.UserDict, collections.UserList, collections.ChainMap)
_SEQUENCES = (list, tuple, set, frozenset, collections.deque)


class Held(NamedTuple):
    """What was found in a capture.

    - `parts`: in the order they were found: values, objects, checksums of NumPy arrays.
    - `seen`: whether that is all; `False` after `MOST` of them, and where an object of
        another language does not let its contents be seen.
    """

    parts: tuple[Any, ...]
    seen: bool

    @property
    def traced(self) -> bool:
        """Whether there is a tracer among the parts."""
        return any(isinstance(part, Tracer) for part in self.parts)


class Captured:
    """Functions or objects as part of a cache key: themselves, and what they compute with.

    jit keys on a function alone, and would go on using the values that its closure, the
    globals it names or the object it belongs to held at the first call.  Whoever calls a
    solver outside jit has not asked for that: a variable bound anew, an entry of a
    container, an attribute of an object, its class or a module set anew, a NumPy array
    changed in place must all compile anew.  Where that cannot be seen (`held.seen`), nothing
    compiled may be used.

    **Arguments:**

    - `things`: the functions, objects and classes.
    """

    def __init__(self, *things: Any):
        self.things = things
        self.held = held(things)

    def refresh(self) -> None:
        """Take what is held now for what the key was made of.

        Called when a function has been traced: what it did to its own tally by being called
        is not a change that it must be called again for.
        """
        self.held = held(self.things)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Captured)
            and self.things == other.things
            and same(self.held.parts, other.held.parts)
        )

    def __hash__(self) -> int:
        return hash(self.things)


def classes_in(tree: Any) -> tuple[type, ...]:
    """The user's own classes among the nodes of a pytree."""
    found: dict[type, None] = {}

    def note(node: Any) -> bool:
        for kind in type(node).__mro__:
            if _is_users(kind):
                found[kind] = None
        return False

    jax.tree.flatten(tree, is_leaf=note)
    return tuple(found)


class _Listed(NamedTuple):
    """The values of a container that holds nothing else, compared at once."""

    values: tuple[Any, ...]
    kinds: tuple[type, ...]


def same(first: tuple[Any, ...], second: tuple[Any, ...]) -> bool:
    """Whether two captures hold the same: equal numbers and strings, identical objects."""
    return len(first) == len(second) and all(
        a is b or (type(a) is type(b) and isinstance(a, (*_VALUES, _Listed)) and bool(a == b))
        for a, b in zip(first, second, strict=True)
    )


def held(roots: Iterable[Any]) -> Held:
    """What functions, objects and classes hold, however deep.

    Followed are closures, defaults, attributes and the globals that code names; attributes
    of modules and of classes, as far as they are the user's own; containers, `__slots__`.

    >>> rates = [1, 2]
    >>> def scaled(x):
    ...     return rates[0] * x
    >>> before = held([scaled]).parts
    >>> rates[0] = 3
    >>> same(before, held([scaled]).parts)
    False
    """
    found: list[Any] = []
    seen: set[int] = set()
    kept: list[Any] = []  # alive until the end, or another object would get the same id
    opaque = False
    roots = tuple(roots)
    functions = (getattr(root, "__func__", root) for root in roots)
    homes = frozenset(id(f.__globals__) for f in functions if isinstance(f, types.FunctionType))
    pending = [iter(roots)]
    while pending:
        item: Any = next(pending[-1], _END)
        if item is _END:
            pending.pop()
            continue
        depth = len(pending) - 1
        if isinstance(item, _VALUES):
            found.append(item)
            continue
        if id(item) in seen:
            continue
        seen.add(id(item))
        kept.append(item)
        if len(kept) + len(found) > 2 * MOST:
            return Held(tuple(found), seen=False)
        # A method or a partial is made anew all the time: what it is made of counts.
        if depth > 0 and not isinstance(item, functools.partial | types.MethodType):
            found.append(item)
        if isinstance(item, np.ndarray) and not item.dtype.hasobject:
            found.append(_checksum(item))
        elif (listed := _listed(item)) is not None:
            found.append(listed)
        else:
            parts = _parts(item, homes)
            if parts is None:
                opaque = True
            else:
                pending.append(parts)
    return Held(tuple(found), seen=not opaque)


_END = object()


def _checksum(values: Any) -> int:
    return zlib.crc32(np.ascontiguousarray(values).view(np.uint8).data)


def _listed(item: Any) -> _Listed | None:
    """A container of values alone, looked at in one go; `None` for anything else."""
    if type(item) is dict:
        values: tuple[Any, ...] = (*item, *item.values())
    elif type(item) in _SEQUENCES:
        values = tuple(item)
    else:
        return None
    kinds = tuple(map(type, values))
    return _Listed(values, kinds) if _KINDS.issuperset(kinds) else None


def _parts(item: Any, homes: frozenset[int]) -> Iterator[Any] | None:
    """What an object can compute with, one level down; `None` where that cannot be seen."""
    parts: Iterator[Any] | None = iter(())
    if isinstance(item, types.FunctionType):
        parts = _of_function(item, homes)
    elif isinstance(item, functools.partial):
        parts = iter((item.func, *item.args, *item.keywords.values()))
    elif isinstance(item, types.MethodType):
        parts = iter((item.__func__, item.__self__))
    elif isinstance(item, type):
        parts = _of_class(item) if _is_users(item) else parts
    elif isinstance(item, jax.Array | types.ModuleType | types.BuiltinFunctionType):
        pass
    elif (wrapped := _wrapped(item)) is not None:
        parts = iter((wrapped,))
    elif _is_library(type(item).__module__):
        parts = _inside(item)
    else:
        parts = _of_object(item)
    return parts


def _wrapped(item: Any) -> Any:
    """The function behind jit, a cache or a custom rule."""
    return getattr(item, "__wrapped__", None) if callable(item) else None


def _inside(item: Any) -> Iterator[Any]:
    """What a container holds, or a record of a library: the user's own things may be in it."""
    if isinstance(item, dict | types.MappingProxyType):
        return iter((*item, *item.values()))
    if isinstance(item, _SEQUENCES):
        return iter(tuple(item))
    if isinstance(item, np.ndarray):  # of objects
        return iter(tuple(item.flat))
    if isinstance(item, array.array | bytearray):
        return iter((bytes(item),))
    if isinstance(item, _RECORDS) or dataclasses.is_dataclass(item):
        return iter(tuple(vars(item).values())) if hasattr(item, "__dict__") else iter(())
    return iter(())


def _of_object(item: Any) -> Iterator[Any] | None:
    """Attributes, those of the class included, beside what it holds as a container."""
    if hasattr(item, "__array__") and not isinstance(item, np.ndarray):
        try:
            values = np.asarray(item)
            return iter((_checksum(values), f"{values.dtype}{values.shape}"))
        except Exception:  # noqa: BLE001
            return None  # it lies on another device, or is of no dtype that NumPy knows
    kinds = type(item).__mro__
    slots = [slot for kind in kinds for slot in _slots(kind)]
    if not hasattr(item, "__dict__") and not any("__slots__" in vars(kind) for kind in kinds):
        return None
    values = [*vars(item).values()] if hasattr(item, "__dict__") else []
    for slot in slots:
        try:
            values.append(slot.__get__(item))
        except AttributeError:  # a slot that is empty
            continue
    return itertools.chain(_inside(item), values, filter(_is_users, kinds))


@functools.lru_cache(maxsize=1024)
def _slots(kind: type) -> tuple[types.MemberDescriptorType, ...]:
    slots = vars(kind).values() if _is_users(kind) else ()
    return tuple(slot for slot in slots if isinstance(slot, types.MemberDescriptorType))


def _of_class(kind: type) -> Iterator[Any]:
    """Functions and attributes of a class, and the classes it is made from."""
    for name, member in tuple(vars(kind).items()):
        if isinstance(member, property):
            yield from (member.fget,)
            continue
        # Equinox wraps methods; what it wraps is a function all the same.
        inner = getattr(member, "method", getattr(member, "__wrapped__", member))
        inner = getattr(inner, "__func__", inner)
        if isinstance(inner, types.FunctionType) or not name.startswith("__"):
            yield inner
    yield from filter(_is_users, kind.__bases__)


def _of_function(function: types.FunctionType, homes: frozenset[int]) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # a name that is not bound yet
            continue
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    yield from vars(function).values()
    space = function.__globals__
    if id(space) not in homes and not _is_users_module(space.get("__name__", "")):
        return
    names = _names(function.__code__)
    for name in names:
        if name not in space:
            continue
        value = space[name]
        yield value
        if isinstance(value, types.ModuleType) and _is_users_module(value.__name__):
            yield from (vars(value)[part] for part in names if part in vars(value))


def _is_users(kind: type) -> bool:
    return _is_users_module(kind.__module__)


@functools.lru_cache(maxsize=1024)
def _is_library(module: str) -> bool:
    root = module.partition(".")[0]
    return root in LIBRARIES or root in sys.stdlib_module_names


@functools.lru_cache(maxsize=1024)
def _is_users_module(name: str) -> bool:
    """Whether its code and its globals may change while it runs: it is not installed."""
    if _is_library(name) or name.startswith("bilevel_"):
        return name.startswith("bilevel_task_")
    file = getattr(sys.modules.get(name), "__file__", None) or ""
    return "site-packages" not in file and "dist-packages" not in file


@functools.lru_cache(maxsize=1024)
def _names(code: types.CodeType) -> tuple[str, ...]:
    """Names that code may look up among the globals, nested functions included."""
    names = dict.fromkeys(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names.update(dict.fromkeys(_names(constant)))
    return tuple(names)
