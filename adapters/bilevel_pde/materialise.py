"""materialise: a field put into memory before a stencil reads it many times."""

import jax.numpy as jnp
from jaxtyping import Array


def materialise(field: Array) -> Array:
    """The field itself, computed once.

    XLA's CPU back end fuses whatever makes a field into the stencil that reads it, and so
    computes it anew for each neighbour: two stencils after each other cost 25 applications of
    five points, three 125.  It fuses nothing across a scatter of more than one number, into a
    buffer that is new anyway; `jax.lax.optimization_barrier` is gone before it fuses.  Not for
    fields that are in memory already, such as arguments and what a loop carries: these would
    be copied.

    >>> import jax.numpy as jnp
    >>> materialise(jnp.arange(3.0))
    Array([0., 1., 2.], dtype=float32)
    """
    if field.size < 2:
        return field
    ends = jnp.asarray([0, field.shape[0] - 1])
    places = (ends,) + (jnp.zeros_like(ends),) * (field.ndim - 1)
    return field.at[places].add(0, mode="promise_in_bounds", indices_are_sorted=True)
