"""Compile ahead of time, and count it: every compilation is one that was asked for."""

import time
from collections.abc import Callable, Hashable
from typing import Any, Generic, ParamSpec, TypeVar

import jax
import numpy as np

P = ParamSpec("P")
R = TypeVar("R")


class Executable(Generic[P, R]):
    """A function compiled once for each distinct shape, dtype, structure and sharding.

    jit compiles behind the caller's back. This compiles by itself and calls nothing but
    what it compiled, so `count` and `seconds` are the truth and not an inference.

    - `count`: compilations so far.
    - `seconds`: wall time they took, tracing included.

    >>> double = Executable(lambda x: 2 * x)
    >>> float(double(np.float32(3.0))), float(double(np.float32(4.0))), double.count
    (6.0, 8.0, 1)
    """

    def __init__(self, function: Callable[P, R]):
        self.count = 0
        self.seconds = 0.0
        self._function = function
        self._jitted = jax.jit(function)
        self._compiled: dict[Hashable, Callable[P, R]] = {}

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call the executable for these arguments, compiling it if there is none yet."""
        if jax.config.jax_disable_jit:  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]
            return self._function(*args, **kwargs)
        signature = _signature((args, kwargs))
        compiled = self._compiled.get(signature)
        if compiled is None:
            start = time.perf_counter()
            compiled = self._jitted.lower(*args, **kwargs).compile()
            self.seconds += time.perf_counter() - start
            self.count += 1
            self._compiled[signature] = compiled
        return compiled(*args, **kwargs)


def _signature(arguments: Any) -> Hashable:
    leaves, structure = jax.tree.flatten(arguments)
    return structure, tuple(_leaf_signature(leaf) for leaf in leaves)


def _leaf_signature(leaf: Any) -> Hashable:
    if isinstance(leaf, jax.Array):
        # A sharding that was asked for is part of the executable, a default one is not.
        sharding = leaf.sharding if leaf.committed else None
        return leaf.shape, leaf.dtype, leaf.weak_type, sharding
    if isinstance(leaf, np.ndarray | np.generic):
        return leaf.shape, leaf.dtype
    return type(leaf)
