"""Extreme eigenvalues of a symmetric operator by a few Lanczos steps."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from bilevel import vector
from bilevel.solver import basis


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
    precondition: Callable[[Any], Any] | None = None,
) -> Extremes:
    """Estimate the extreme eigenvalues of M⁻¹A from a random start that never changes.

    Lanczos 1950, in the inner product of M, with full reorthogonalisation: without it, what
    comes after a converged eigenvector is rounding noise, and differs with the machine.
    The upper bound adds the last off-diagonal entry, weighted as in Zhou and Li 2011
    (equation 2.9); it fails only for a start without a share in the largest eigenvector.

    **Arguments:**

    - `matvec`: v -> A v, symmetric.
    - `like`: a vector of the space, for structure, shapes and dtypes.
    - `steps`: operator applications, static; no more than there are unknowns are done. As
        many vectors are kept, twice that with a preconditioner.
    - `precondition`: v -> M⁻¹v, symmetric positive definite.

    >>> import jax.numpy as jnp
    >>> found = extreme_eigenvalues(lambda v: jnp.arange(1.0, 6.0) * v, jnp.zeros(5), 5)
    >>> round(float(found.smallest), 3), round(float(found.largest), 3)
    (1.0, 5.0)
    """
    dtype = vector.real_dtype(like)
    small = 100 * vector.epsilon(like)
    # A complex unknown has two directions over the reals.
    leaves = jax.tree.leaves(like)
    steps = min(steps, sum(leaf.size * (2 if jnp.iscomplexobj(leaf) else 1) for leaf in leaves))

    def normalise(w: PyTree) -> tuple[PyTree, PyTree, Array]:
        image = w if precondition is None else precondition(w)
        length = jnp.sqrt(jnp.maximum(vector.dot(w, image), 0.0)).astype(dtype)
        inverse = jnp.where(length == 0, 0.0, 1.0 / jnp.where(length == 0, 1.0, length))
        return vector.scale(inverse, w), vector.scale(inverse, image), length

    def step(carry: Any, index: Array) -> Any:
        v, q, rows, images, reference, level, ended = carry
        rows = basis.write(rows, index, v)
        # Without a preconditioner the two bases are one.
        images = None if precondition is None else basis.write(images, index, q)
        w = matvec(q)
        alpha = vector.dot(q, w).astype(dtype)
        for _ in range(2):  # once leaves what cancellation has left over
            shares = basis.project(rows if images is None else images, w, complex_linear=False)
            w = vector.subtract(w, basis.combine(shares, rows))
        v, q, beta = normalise(w)
        reference = jnp.where(index == 0, alpha, reference)
        level = jnp.maximum(level, jnp.maximum(jnp.abs(alpha), beta))
        # An invariant subspace is used up: the rest of the matrix repeats a value within the
        # spectrum. (False for NaN, which must come out.)
        alpha = jnp.where(ended, reference, alpha)
        ended = ended | (beta <= small * level)
        return (v, q, rows, images, reference, level, ended), (alpha, jnp.where(ended, 0.0, beta))

    v, q, _ = normalise(random_vector(like))
    rows = basis.allocate(like, steps)
    zero = jnp.zeros((), dtype)
    carry = (v, q, rows, None if precondition is None else rows, zero, zero, jnp.array(False))
    _, (diagonal, off_diagonal) = jax.lax.scan(step, carry, jnp.arange(steps))
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
