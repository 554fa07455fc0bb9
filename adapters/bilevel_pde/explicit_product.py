"""explicit_product: A v computed in one way, differentiated and transposed in others."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def explicit_product(
    stored: Float[Array, " size"],
    v: Array,
    rows: int,
    product: Callable[[Array], Array],
    fast: Callable[[Array], Array],
    mirrored: Callable[[Array], Array],
) -> Array:
    """A v whose value, derivative with respect to A, and transpose are each written out.

    JAX takes the transpose of a product from nobody but that of a solve. So y = A v is half
    of the solution of [[I, 0], [-A, I]] [x, y] = [v, 0], whose transpose is solved with a
    product with Aᵀ, and whose derivative with respect to A is that of A v. Unlike a function
    with a custom derivative it can be transposed by `jax.linear_transpose`.

    **Arguments:**

    - `stored`: the entries, which `product` refers to.
    - `v`: shape (columns,), or (columns, k) for several vectors; `rows`: of A v.
    - `product`: A v, to be differentiated with respect to `stored`.
    - `fast`: A v, to be computed; may read fewer entries than `product` where others are
        known to equal them.
    - `mirrored`: Aᵀ w.

    >>> import jax, jax.numpy as jnp
    >>> entries = jnp.array([2.0, 3.0])
    >>> times = lambda v: entries * v
    >>> explicit_product(entries, jnp.ones(2), 2, times, times, times)
    Array([2., 3.], dtype=float32)
    """
    v = v.astype(jnp.result_type(stored, v))
    # JAX transposes a solve only if all of its right-hand side has a tangent, or none of it:
    # these zeros have one wherever v has, `identity` has where the entries have, and of the
    # transposed solve's the unused half of the solution.
    shape = (rows, *v.shape[1:])
    nothing = jnp.broadcast_to(jnp.where(False, jnp.sum(v), 0), shape).astype(v.dtype)

    def identity(v: Array) -> Array:
        return v + jnp.where(False, jnp.sum(stored) * v, 0)

    x, y = jax.lax.custom_linear_solve(
        lambda pair: (identity(pair[0]), pair[1] - product(pair[0])),
        (v, nothing),
        solve=lambda _, rhs: (rhs[0], rhs[1] + fast(rhs[0])),
        transpose_solve=lambda _, rhs: (rhs[0] + mirrored(rhs[1]), rhs[1]),
    )
    return y + jnp.where(False, jnp.sum(x), 0).astype(v.dtype)
