"""Single precision where double is JAX's default."""

import contextlib
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from bilevel import vector

T = TypeVar("T")


def defaults_of(x: PyTree) -> Any:
    """A context whose default dtypes are those of x, for tracing what makes arrays of its own.

    A library that writes `jnp.zeros(n)` mixes double precision into single, and some refuse to
    go on.

    >>> import jax.numpy as jnp
    >>> with defaults_of(jnp.zeros(2, jnp.float32)):
    ...     print(jnp.zeros(2).dtype)
    float32
    """
    config: Any = jax.config
    if vector.real_dtype(x) == jnp.float32 and config.jax_enable_x64:
        return jax.enable_x64(False)
    return contextlib.nullcontext()


def in_precision_of(x: PyTree, solver: T) -> T:
    """A solver whose traced numbers, tolerances for one, are of the precision of x.

    >>> import jax.numpy as jnp
    >>> in_precision_of(jnp.zeros(2), {"rtol": jnp.ones(()), "steps": 3})["steps"]
    3
    """
    dtype = vector.real_dtype(x)

    def convert(leaf: Any) -> Any:
        real = isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jnp.floating)
        return leaf.astype(dtype) if real else leaf

    return jax.tree.map(convert, solver)
