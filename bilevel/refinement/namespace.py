"""Namespace: NumPy for what lies on the host, JAX for what is traced or on a device."""

import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

AnyArray: TypeAlias = jax.Array | np.ndarray
"""An array of either kind."""

Namespace: TypeAlias = Any
"""The module `numpy` or the module `jax.numpy`: what both have under one name."""


def on_host(*trees: PyTree) -> bool:
    """Whether every leaf is a number of Python's or NumPy's.

    >>> on_host(np.int32(3), {"a": 0.5}), on_host(jnp.ones(2))
    (True, False)
    """
    return not any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(trees))


def namespace_of(*trees: PyTree) -> Namespace:
    """The module to compute with."""
    return np if on_host(*trees) else jnp


def decided(function: Callable[..., Any]) -> Callable[..., Any]:
    """A decision that NumPy makes where all it is told lies on the host.

    A controller decides once an epoch, or once an outer step, from a handful of numbers:
    compiling that takes longer than many a small problem takes to train.  With anything
    traced or on a device JAX decides, in one compiled call, and nobody waits for anything.

    **Arguments:**

    - `function`: (namespace, rule, *numbers) -> pytree. `rule` is hashable; the function
        uses the namespace for all it computes, and nothing of JAX besides.

    **Returns:** (rule, *numbers) -> pytree, its leaves arrays of the same kind.

    >>> @decided
    ... def larger(xp, rule, x, y):
    ...     return xp.maximum(x, y) + rule
    >>> larger(1, np.int32(2), np.int32(3)), larger(1, jnp.int32(2), np.int32(3))
    (array(4, dtype=int32), Array(4, dtype=int32))
    """

    @functools.partial(jax.jit, static_argnums=0)
    def compiled(rule: Any, *numbers: Any) -> Any:
        return function(jnp, rule, *numbers)

    @functools.wraps(function)
    def decide(rule: Any, *numbers: Any) -> Any:
        if not on_host(numbers):
            return compiled(rule, *numbers)
        # Both branches of a `where` are computed, and one of them may divide by zero.
        with np.errstate(all="ignore"):
            found = function(np, rule, *numbers)
            if all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(found)):
                return found
            return jax.tree.map(np.asarray, found)

    return decide
