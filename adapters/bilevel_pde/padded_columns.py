"""PaddedColumns: a sparse matrix with rows of similar lengths, column after column."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse as sp
from jaxtyping import Array, Float, Int

from bilevel_pde.assembled import AssembledMatrix, checked_vector, times, without_padding
from bilevel_pde.explicit_product import explicit_product
from bilevel_pde.structure import MOST_UNROLLED, Structure, rows_of, width


class Columns(eqx.Module):
    """Where each number of a [`PaddedColumns`][] stands in the matrix.

    First `width` columns of `height` numbers: the k-th entries of all rows, padded where a
    row has fewer. Then the tail: what longer rows have beyond.

    - `columns`: of each number the column in the matrix; `slots`: its place in the CSR data,
        or their count for padding.
    - `tail_rows`: the row of each number of the tail, ascending; the last is padding.
    - `order`, `inverse`: for each inner number of an unknown the outer one, and back; `None`
        where they are the same.
    """

    columns: Int[Array, " size"]
    slots: Int[Array, " size"]
    tail_rows: Int[Array, " tail"]
    order: Int[Array, " height"] | None
    inverse: Int[Array, " height"] | None
    width: int = eqx.field(static=True)
    height: int = eqx.field(static=True)

    @classmethod
    def of(cls, csr: sp.csr_array, count: int, order: np.ndarray | None) -> "Columns":
        """Lay a canonical matrix out in so many columns and a tail."""
        height = csr.shape[0]
        rows, columns = rows_of(csr), csr.indices.astype(np.int32)
        slots = np.arange(csr.nnz, dtype=np.int32)
        inverse = None
        if order is not None:
            inverse = np.empty_like(order)
            inverse[order] = np.arange(height, dtype=np.int32)
            rows, columns = inverse[rows], inverse[columns]
            by_row = np.lexsort((columns, rows))
            rows, columns, slots = rows[by_row], columns[by_row], slots[by_row]
        starts = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=height))])
        rank = np.arange(csr.nnz) - starts[rows]
        beyond = rank >= count
        flat = rank[~beyond] * height + rows[~beyond]
        # Padding reads what is near in memory, and adds zero times that.
        nearby = np.minimum(np.arange(height, dtype=np.int32), max(csr.shape[1] - 1, 0))
        held, places = np.tile(nearby, count), np.full(count * height, csr.nnz, np.int32)
        held[flat], places[flat] = columns[~beyond], slots[~beyond]
        # The tail ends with a number of padding. What is padding in the transpose reads it, and
        # there is always a scatter: XLA fuses across anything else, and would compute the
        # product anew for every gather that a later operation does from it.
        last = ([height - 1], [nearby[-1]], [csr.nnz]) if csr.nnz else ([], [], [])
        tail = [
            np.append(part[beyond], end).astype(np.int32)
            for part, end in zip((rows, columns, slots), last, strict=True)
        ]
        return cls(
            columns=jnp.asarray(np.concatenate([held, tail[1]])),
            slots=jnp.asarray(np.concatenate([places, tail[2]])),
            tail_rows=jnp.asarray(tail[0]),
            order=None if order is None else jnp.asarray(order),
            inverse=None if inverse is None else jnp.asarray(inverse),
            width=count,
            height=height,
        )


class PaddedColumns(AssembledMatrix):
    """A sparse matrix stored in columns of its rows' first, second, ... entries.

    Made by `from_scipy`.  A v is one gather a column, all in one kernel, and a sum over the
    tail of what few long rows have beyond.  Where neighbours lie far from each other in
    memory, the unknowns are renumbered inside (reverse Cuthill-McKee).  The transpose is
    laid out in the same way: neither Aᵀ v nor the derivative of A v scatters.  See
    `AssembledMatrix` for what all formats share.

    >>> import jax.numpy as jnp, scipy.sparse as sp, bilevel_pde as pde
    >>> matrix = sp.csr_array([[2.0, 0.0, 1.0], [0.0, 3.0, 0.0], [5.0, 0.0, 0.0]])
    >>> operator = pde.from_scipy(matrix, format="padded_columns")
    >>> operator.matvec(jnp.arange(3.0)), operator.rmatvec(jnp.arange(3.0))
    (Array([2., 3., 0.], dtype=float32), Array([10.,  3.,  0.], dtype=float32))
    """

    layout: Columns
    other_layout: Columns | None
    through: Int[Array, " other_size"]
    back: Int[Array, " size"] | None

    @classmethod
    def of(cls, csr: sp.csr_array, structure: Structure, known: dict[str, Any]) -> "PaddedColumns":
        """Lay a canonical matrix out, and where its transpose finds its numbers."""
        layout = Columns.of(csr, structure.width, structure.order)
        numbered = sp.csr_array((np.arange(csr.nnz), csr.indices, csr.indptr), csr.shape)
        mirrored = sp.csr_array(numbered.T)
        mirrored.sort_indices()
        mirror = np.asarray(mirrored.data)
        other, back = None, None
        if not _same_pattern(csr, mirrored):
            other = Columns.of(mirrored, min(width(mirrored), MOST_UNROLLED), structure.order)
            back_mirror = np.empty_like(mirror)
            back_mirror[mirror] = np.arange(csr.nnz)
            back = _through(layout, other, back_mirror)
        stored = np.append(csr.data, csr.dtype.type(0))[np.asarray(layout.slots)]
        return cls(
            stored=jnp.asarray(stored),
            extent=csr.shape,
            count=csr.nnz,
            reason=structure.reason,
            **known,
            layout=layout,
            other_layout=other,
            through=_through(layout if other is None else other, layout, mirror),
            back=back,
        )

    @property
    def slots(self) -> Int[Array, " size"]:
        """Places in `values`."""
        return self.layout.slots

    def coordinates(self) -> tuple[Array, Array]:
        """Rows and columns, column after column, then the tail."""
        layout = self.layout
        # On the host where the arrays are: a callback must not compute in JAX.
        numerical: Any = np if isinstance(layout.columns, np.ndarray) else jnp
        rows = numerical.tile(numerical.arange(layout.height, dtype=np.int32), layout.width)
        rows, columns = numerical.concatenate([rows, layout.tail_rows]), layout.columns
        if layout.order is None:
            return rows, columns
        return layout.order[rows], layout.order[columns]

    def matvec(self, v: Array) -> Array:
        """A v."""
        v = checked_vector(self, v)
        if self.count == 0:
            return _product(self.layout, self.stored, v)
        return _with_explicit_transpose(self, v)

    def rmatvec(self, v: Array) -> Array:
        """Aᵀ v."""
        v = checked_vector(self, v, transposed=True)
        return self.matvec(v) if self.symmetric else self.transposed().matvec(v)

    def transposed(self) -> "PaddedColumns":
        """Aᵀ in a layout of its own, which a symmetric structure shares."""
        if self.symmetric:
            return self
        shared = self.other_layout is None
        return PaddedColumns(
            stored=_gather(self._entries(), self.through),
            extent=(self.extent[1], self.extent[0]),
            count=self.count,
            reason=self.reason,
            is_symmetric=self.is_symmetric,
            is_positive_definite=self.is_positive_definite,
            is_singular=bool(self.is_symmetric and self.is_singular),
            layout=self.layout if self.other_layout is None else self.other_layout,
            other_layout=None if shared else self.layout,
            through=self.through if self.back is None else self.back,
            back=None if shared else self.through,
        )

    def diagonal(self) -> Float[Array, " n"] | None:
        """The entries whose row is their column."""
        if self.extent[0] != self.extent[1]:
            return None
        rows, columns = self.coordinates()
        on = jnp.where(rows == columns, self._entries(), 0)
        return jax.ops.segment_sum(on, rows, self.extent[0])

    def _entries(self) -> Array:
        return without_padding(self.stored, self.slots < self.count)


def _product(layout: Columns, stored: Float[Array, " size"], v: Array) -> Array:
    height = layout.height
    inner = v if layout.order is None else _gather(v, layout.order)
    total = jnp.zeros((height, *v.shape[1:]), jnp.result_type(stored, v))
    for start in range(0, layout.width * height, max(height, 1)):
        part = slice(start, start + height)
        total = total + times(stored[part], _gather(inner, layout.columns[part]))
    part = slice(layout.width * height, None)
    products = times(stored[part], _gather(inner, layout.columns[part]))
    total = total.at[layout.tail_rows].add(
        products, indices_are_sorted=True, mode="promise_in_bounds"
    )
    return total if layout.inverse is None else _gather(total, layout.inverse)


def _gather(v: Array, indices: Array) -> Array:
    return jnp.asarray(v).at[indices].get(mode="promise_in_bounds")


def _same_pattern(a: sp.csr_array, b: sp.csr_array) -> bool:
    if a.shape != b.shape:
        return False
    return np.array_equal(a.indptr, b.indptr) and np.array_equal(a.indices, b.indices)


def _through(target: Columns, source: Columns, mirror: np.ndarray) -> Array:
    """For each number of the target's layout where the source's has it.

    **Arguments:**

    - `mirror`: of each entry in the order of the target's CSR data its place in the source's.

    **Returns:** indices; those of padding are of padding.
    """
    wanted, held = np.asarray(target.slots), np.asarray(source.slots)
    places = np.zeros(len(mirror) + 1, np.int32)
    places[held] = np.arange(len(held), dtype=np.int32)
    found = places[np.append(mirror, len(mirror))[wanted]]
    if target is source:
        # Nearer in memory than one for all.
        padding = wanted == len(mirror)
        found[padding] = np.flatnonzero(padding)
    return jnp.asarray(found)


# Compiled as one also where the caller is not: the kernels are fused, and traced once.
@jax.jit
def _with_explicit_transpose(operator: PaddedColumns, v: Array) -> Array:
    """A v whose transpose is Aᵀ v as it is written out: transposing gathers would scatter."""
    stored = operator.entries()[2]

    def product(v: Array) -> Array:
        return _product(operator.layout, stored, v)

    def mirrored(v: Array) -> Array:
        if operator.symmetric:
            return product(v)
        transposed = operator.transposed()
        return _product(transposed.layout, transposed.stored, v)

    return explicit_product(stored, v, operator.extent[0], product, product, mirrored)
