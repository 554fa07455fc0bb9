"""Rows of vectors: the stored basis of a Krylov space."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Inexact, Int, PyTree

from bilevel import vector


def coefficient_dtype(like: PyTree, *, complex_linear: bool) -> jnp.dtype:
    """The dtype of inner products in the space of a vector."""
    real = vector.real_dtype(like)
    return jnp.dtype(jnp.result_type(real, jnp.complex64)) if complex_linear else real


def allocate(like: PyTree, rows: int) -> PyTree:
    """So many zero vectors, along a leading axis of every leaf."""
    return jax.tree.map(lambda leaf: jnp.zeros((rows, *leaf.shape), leaf.dtype), like)


def read(basis: PyTree, index: Int[Array, ""]) -> PyTree:
    """One vector of the basis."""
    return jax.tree.map(
        lambda rows: jax.lax.dynamic_index_in_dim(rows, index, 0, keepdims=False), basis
    )


def write(basis: PyTree, index: Int[Array, ""], v: PyTree) -> PyTree:
    """The basis with one vector replaced."""
    return jax.tree.map(
        lambda rows, leaf: jax.lax.dynamic_update_index_in_dim(rows, leaf, index, 0), basis, v
    )


def project(basis: PyTree, v: PyTree, *, complex_linear: bool) -> Inexact[Array, " rows"]:
    """The inner products ⟨qᵢ, v⟩ with every vector of the basis.

    **Arguments:**

    - `complex_linear`: whether the space is a complex one; the real part otherwise.
    """
    total: Array | None = None
    for rows, leaf in zip(jax.tree.leaves(basis), jax.tree.leaves(v), strict=True):
        # The conjugate of the vector, so that the basis is never copied.
        products = jnp.tensordot(rows, vector.conjugate(leaf), axes=leaf.ndim)
        products = vector.conjugate(products) if complex_linear else products.real
        total = products if total is None else total + products
    assert total is not None
    return total


def combine(coefficients: Inexact[Array, " rows"], basis: PyTree) -> PyTree:
    """The linear combination Σ cᵢ qᵢ, in the dtypes of the basis."""

    def leaf(rows: Array) -> Array:
        kind = rows.dtype if jnp.iscomplexobj(coefficients) else jnp.finfo(rows.dtype).dtype
        return jnp.tensordot(coefficients.astype(kind), rows, axes=1)

    return jax.tree.map(leaf, basis)
