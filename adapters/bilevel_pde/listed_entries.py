"""ListedEntries: an operator given entry by entry, on whatever fields."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse as sp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int, PyTree

from bilevel_pde.operator import Operator
from bilevel_pde.triangle import Part, keeps


class ListedEntries(Operator):
    """A part of another operator, such as a triangle of a product.

    **Arguments:**

    - `rows`, `columns`, `values`: as of `Operator.entries`.
    - `domain`, `codomain`: shapes and dtypes of the fields, pytrees of
        `jax.ShapeDtypeStruct`, flattened leaf by leaf in C order.
    """

    rows: Int[Array, " count"]
    columns: Int[Array, " count"]
    values: Float[Array, " count"]
    domain: PyTree = eqx.field(static=True)
    codomain: PyTree = eqx.field(static=True)

    @classmethod
    def triangle_of(cls, operator: Operator, part: Part, *, diagonal: bool) -> "ListedEntries":
        """One side of a square operator's diagonal.

        **Raises:** `IncompatibleError` from an operator that does not list its entries.
        """
        rows, columns, values = operator.entries()
        kept = keeps(part, rows, columns, diagonal=diagonal)
        if isinstance(kept, np.ndarray):
            rows, columns, values = rows[kept], columns[kept], values[kept]
        else:
            values = jnp.where(kept, values, 0)
        return cls(rows, columns, values, operator.like, operator.range_like)

    @property
    def like(self) -> PyTree:
        """Of the fields it acts on."""
        return self.domain

    @property
    def range_like(self) -> PyTree:
        """Of the fields it returns."""
        return self.codomain

    def matvec(self, v: PyTree) -> PyTree:
        """A v: products summed by row."""
        return self._summed(v, self.columns, self.rows, self.codomain)

    def rmatvec(self, v: PyTree) -> PyTree:
        """Aᵀ v: products summed by column."""
        return self._summed(v, self.rows, self.columns, self.domain)

    def _summed(self, v: PyTree, sources: Any, targets: Any, like: PyTree) -> PyTree:
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like)
        flat, unflatten = ravel_pytree(zeros)
        products = self.values * ravel_pytree(v)[0][sources]
        return unflatten(jax.ops.segment_sum(products, targets, flat.size).astype(flat.dtype))

    def transposed(self) -> "ListedEntries":
        """Aᵀ."""
        return ListedEntries(self.columns, self.rows, self.values, self.codomain, self.domain)

    def diagonal(self) -> PyTree | None:
        """The entries whose row is their column."""
        if self.shape[0] != self.shape[1]:
            return None
        on = jnp.where(self.rows == self.columns, self.values, 0)
        return diagonal_like(self.domain, self.rows, on)

    def entries(self) -> tuple[Any, Any, Array]:
        """As they were given."""
        return self.rows, self.columns, self.values

    def to_scipy(self) -> sp.csr_array:
        """The matrix."""
        places = np.asarray(self.rows), np.asarray(self.columns)
        return sp.csr_array(sp.coo_array((np.asarray(self.values), places), shape=self.shape))


def diagonal_like(like: PyTree, rows: Any, values: Array) -> PyTree:
    """Numbers added up by rows, as a field."""
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like)
    flat, unflatten = ravel_pytree(zeros)
    return unflatten(flat.at[rows].add(values.astype(flat.dtype)))
