"""SegmentSum: a sparse matrix without structure, as a sum over each row's entries."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse as sp
from jaxtyping import Array, Float, Int

from bilevel_pde.assembled import AssembledMatrix, checked_vector, times
from bilevel_pde.structure import Structure, rows_of


class SegmentSum(AssembledMatrix):
    """A sparse matrix stored entry by entry, row after row, made by `from_scipy`.

    For rows of very different lengths, or very many empty ones.  See `AssembledMatrix` for
    what all formats share.

    >>> import jax.numpy as jnp, scipy.sparse as sp, bilevel_pde as pde
    >>> matrix = sp.coo_array(([2.0, 3.0], ([5, 70], [4, 9])), shape=(100, 100))
    >>> operator = pde.from_scipy(matrix)
    >>> operator
    SegmentSum(100 × 100, 2 entries, float32; fewer than one row in ten has entries)
    >>> float(operator.matvec(jnp.arange(100.0))[70])
    27.0
    """

    rows: Int[Array, " count"]
    columns: Int[Array, " count"]
    by_column: Int[Array, " count"]
    by_row: Int[Array, " count"]

    @classmethod
    def of(cls, csr: sp.csr_array, structure: Structure, known: dict[str, Any]) -> "SegmentSum":
        """Lay a canonical matrix out."""
        rows = rows_of(csr)
        by_column = np.lexsort((rows, csr.indices)).astype(np.int32)
        by_row = np.empty_like(by_column)
        by_row[by_column] = np.arange(csr.nnz, dtype=np.int32)
        return cls(
            stored=jnp.asarray(csr.data),
            extent=csr.shape,
            count=csr.nnz,
            reason=structure.reason,
            **known,
            rows=jnp.asarray(rows),
            columns=jnp.asarray(csr.indices.astype(np.int32)),
            by_column=jnp.asarray(by_column),
            by_row=jnp.asarray(by_row),
        )

    @property
    def slots(self) -> Int[Array, " size"]:
        """Each entry in its place."""
        return np.arange(self.count, dtype=np.int32)  # pyright: ignore[reportReturnType]

    def coordinates(self) -> tuple[Array, Array]:
        """Rows and columns, row by row."""
        return self.rows, self.columns

    def matvec(self, v: Array) -> Array:
        """A v: products summed row by row."""
        v = checked_vector(self, v)
        products = times(self.stored, v.at[self.columns].get(mode="promise_in_bounds"))
        return jax.ops.segment_sum(
            products, self.rows, self.extent[0], indices_are_sorted=True, mode="promise_in_bounds"
        )

    def rmatvec(self, v: Array) -> Array:
        """Aᵀ v: products summed by column."""
        v = checked_vector(self, v, transposed=True)
        if self.symmetric:
            return self.matvec(v)
        products = times(self.stored, v.at[self.rows].get(mode="promise_in_bounds"))
        return jax.ops.segment_sum(products, self.columns, self.extent[1], mode="promise_in_bounds")

    def transposed(self) -> "SegmentSum":
        """Aᵀ, its rows in order."""
        if self.symmetric:
            return self

        def reordered(parts: Array) -> Array:
            return parts.at[self.by_column].get(mode="promise_in_bounds", unique_indices=True)

        return SegmentSum(
            stored=reordered(self.stored),
            extent=(self.extent[1], self.extent[0]),
            count=self.count,
            reason=self.reason,
            is_symmetric=self.is_symmetric,
            is_positive_definite=self.is_positive_definite,
            is_singular=bool(self.is_symmetric and self.is_singular),
            rows=reordered(self.columns),
            columns=reordered(self.rows),
            by_column=self.by_row,
            by_row=self.by_column,
        )

    def diagonal(self) -> Float[Array, " n"] | None:
        """The entries whose row is their column."""
        if self.extent[0] != self.extent[1]:
            return None
        on = jnp.where(self.rows == self.columns, self.stored, 0)
        return jax.ops.segment_sum(on, self.rows, self.extent[0], indices_are_sorted=True)
