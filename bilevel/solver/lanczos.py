"""Extreme eigenvalues of a symmetric operator by a few Lanczos steps."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from bilevel import vector


class Extremes(NamedTuple):
    """What a few Lanczos steps say of a spectrum; constants, without derivatives.

    - `smallest`, `largest`: extreme Ritz values, inside the spectrum to within rounding.
    - `upper`: an upper bound of the spectrum.
    - `uncertainty`: an eigenvalue lies within so much of `smallest`.
    """

    smallest: Float[Array, ""]
    largest: Float[Array, ""]
    upper: Float[Array, ""]
    uncertainty: Float[Array, ""]


def extreme_eigenvalues(
    matvec: Callable[[Any], Any],
    like: PyTree,
    steps: int,
    precondition: Callable[[Any], Any] = lambda v: v,
) -> Extremes:
    """Estimate the extreme eigenvalues of M⁻¹A from a random start that never changes.

    Lanczos 1950, in the inner product of M.  The upper bound adds the last off-diagonal
    entry, weighted as in Zhou and Li 2011 (equation 2.9); it fails only for a start
    without a share in the largest eigenvector.

    **Arguments:**

    - `matvec`: v -> A v, symmetric.
    - `like`: a vector of the space, for structure, shapes and dtypes.
    - `steps`: operator applications, static.
    - `precondition`: v -> M⁻¹v, symmetric positive definite.

    >>> import jax.numpy as jnp
    >>> found = extreme_eigenvalues(lambda v: jnp.arange(1.0, 6.0) * v, jnp.zeros(5), 5)
    >>> round(float(found.smallest), 3), round(float(found.largest), 3)
    (1.0, 5.0)
    """
    dtype = vector.real_dtype(like)
    small = 100 * vector.epsilon(like)
    start = random_vector(like)
    image = precondition(start)
    length = jnp.sqrt(vector.dot(start, image))
    v, q = vector.scale(1.0 / length, start), vector.scale(1.0 / length, image)
    zero = jnp.zeros((), dtype)

    def step(carry: Any, first: Array) -> Any:
        before, v, q, beta, reference, level, ended = carry
        w = matvec(q)
        alpha = vector.dot(q, w).astype(dtype)
        w = vector.add_scaled(vector.add_scaled(w, -alpha, v), -beta, before)
        image = precondition(w)
        beta_next = jnp.sqrt(jnp.maximum(vector.dot(w, image), 0.0)).astype(dtype)
        reference = jnp.where(first, alpha, reference)
        level = jnp.maximum(level, jnp.maximum(jnp.abs(alpha), beta_next))
        # An invariant subspace is used up: the rest of the matrix repeats a value within the
        # spectrum. (False for NaN, which must come out.)
        alpha = jnp.where(ended, reference, alpha)
        ended = ended | (beta_next <= small * level)
        beta_next = jnp.where(ended, 0.0, beta_next)
        inverse = jnp.where(ended, 0.0, 1.0 / jnp.where(ended, 1.0, beta_next))
        following = (vector.scale(inverse, w), vector.scale(inverse, image))
        return (v, *following, beta_next, reference, level, ended), (alpha, beta_next)

    carry = (vector.zeros_like(v), v, q, zero, zero, zero, jnp.array(False))
    is_first = jnp.arange(steps) == 0
    _, (diagonal, off_diagonal) = jax.lax.scan(step, carry, is_first)
    beside = off_diagonal[:-1]
    matrix = jnp.diag(diagonal) + jnp.diag(beside, 1) + jnp.diag(beside, -1)
    values, vectors = jnp.linalg.eigh(jax.lax.stop_gradient(matrix))
    rest = jax.lax.stop_gradient(off_diagonal[-1]) * jnp.abs(vectors[-1])
    return Extremes(values[0], values[-1], values[-1] + jnp.max(rest), rest[0])


def random_vector(like: PyTree) -> PyTree:
    """A vector of normally distributed entries, the same at every call."""
    leaves, treedef = jax.tree.flatten(like)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    entries = [
        jax.random.normal(key, leaf.shape, leaf.dtype)
        for key, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(treedef, entries)
