"""Single precision where double is JAX's default."""

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from bilevel import vector


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
