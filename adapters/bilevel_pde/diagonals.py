"""Diagonals: a banded matrix as shifted products."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse as sp
from jaxtyping import Array, Float, Int

from bilevel_pde.assembled import AssembledMatrix, checked_vector, times, without_padding
from bilevel_pde.explicit_product import explicit_product
from bilevel_pde.structure import Structure, rows_of


class Diagonals(AssembledMatrix):
    """A sparse matrix stored by its diagonals, made by `from_scipy`.

    Row i of diagonal o holds A[i, i + o]; A v is the sum of the diagonals times shifted v,
    one kernel without a gather.  Of a symmetric matrix only the upper diagonals are read,
    from memory that is what an application takes its time for.  See `AssembledMatrix` for
    what all formats share.

    >>> import jax.numpy as jnp, scipy.sparse as sp, bilevel_pde as pde
    >>> matrix = sp.diags_array([1.0, -2.0, 1.0], offsets=[-1, 0, 1], shape=(4, 4))
    >>> operator = pde.from_scipy(matrix)
    >>> operator
    Diagonals(4 × 4, 10 entries, float32, symmetric; the entries lie on 3 diagonals, 83 % full)
    >>> operator.matvec(jnp.ones(4))
    Array([-1.,  0.,  0., -1.], dtype=float32)
    """

    places: Int[Array, " size"]
    offsets: tuple[int, ...] = eqx.field(static=True)

    @classmethod
    def of(cls, csr: sp.csr_array, structure: Structure, known: dict[str, Any]) -> "Diagonals":
        """Lay a canonical matrix out."""
        rows, columns = csr.shape
        numbers = np.full(rows + columns, -1)
        offsets = np.asarray(structure.offsets, int)
        numbers[offsets + rows] = np.arange(len(offsets))
        row = rows_of(csr)
        flat = numbers[csr.indices.astype(np.int64) - row + rows] * rows + row
        stored = np.zeros(len(offsets) * rows, csr.dtype)
        places = np.full(len(stored), csr.nnz, np.int32)
        stored[flat], places[flat] = csr.data, np.arange(csr.nnz)
        return cls(
            stored=jnp.asarray(stored),
            extent=(rows, columns),
            count=csr.nnz,
            reason=structure.reason,
            **known,
            places=jnp.asarray(places),
            offsets=structure.offsets,
        )

    @property
    def slots(self) -> Int[Array, " size"]:
        """Places in `values`."""
        return self.places

    def coordinates(self) -> tuple[Array, Array]:
        """Rows and columns, diagonal by diagonal."""
        rows = np.tile(np.arange(self.extent[0], dtype=np.int32), len(self.offsets))
        shifts = np.repeat(np.asarray(self.offsets, np.int32), self.extent[0])
        columns = np.clip(rows + shifts, 0, max(self.extent[1] - 1, 0))
        return rows, columns  # pyright: ignore[reportReturnType]

    def matvec(self, v: Array) -> Array:
        """A v: the sum of the diagonals times v shifted up by the offset."""
        v = checked_vector(self, v)
        return _symmetric_product(self, v) if self._mirrored() else _product(self, v)

    def rmatvec(self, v: Array) -> Array:
        """Aᵀ v: the sum of what the diagonals times v are, shifted back."""
        v = checked_vector(self, v, transposed=True)
        if self.symmetric:
            return self.matvec(v)
        return _transposed_product(self, v)

    def transposed(self) -> "Diagonals":
        """Aᵀ: each diagonal shifted, on the other side."""
        return self if self.symmetric else _transposed(self)

    def diagonal(self) -> Float[Array, " n"] | None:
        """The diagonal of offset 0."""
        if self.extent[0] != self.extent[1]:
            return None
        found = [diagonal for offset, diagonal in self.parts() if offset == 0]
        return found[0] if found else jnp.zeros(self.extent[0], self.stored.dtype)

    def parts(self) -> list[tuple[int, Array]]:
        """Offset and entries of each diagonal, an entry a row, zero outside of the matrix."""
        rows = self.extent[0]
        stored = self.stored
        if self.count < self._room():
            # Outside of the matrix the shifted vector is zero, and so is the derivative.
            stored = without_padding(stored, self.places < self.count)
        return [
            (offset, stored[number * rows : (number + 1) * rows])
            for number, offset in enumerate(self.offsets)
        ]

    def _mirrored(self) -> bool:
        """Whether each diagonal below the main one is known to be one above it, moved."""
        below = {offset for offset in self.offsets if offset < 0}
        above = {-offset for offset in self.offsets if offset > 0}
        return bool(self.symmetric and below and below == above)

    def _room(self) -> int:
        """How many entries the diagonals have inside of the matrix."""
        rows, columns = self.extent
        return sum(min(rows, columns - o) - max(0, -o) for o in self.offsets)


# Compiled as one also where the caller is not: the kernels are fused, and compiled once.
@jax.jit
def _product(operator: Diagonals, v: Array) -> Array:
    length = operator.extent[0]
    total = _nothing(operator, length, v)
    for offset, diagonal in operator.parts():
        total = total + times(diagonal, _shift(v, offset, length))
    return total


@jax.jit
def _symmetric_product(operator: Diagonals, v: Array) -> Array:
    length = operator.extent[0]
    parts = operator.parts()
    reach = min(max(operator.offsets), length // 2)
    # Where nothing lies outside, plain slices do, which XLA reads at the speed of memory; one
    # that may has to be asked about at every entry.
    pieces = (range(reach, length - reach), range(reach), range(length - reach, length))

    def halved(v: Array) -> Array:
        total = _nothing(operator, length, v)
        for rows in pieces:
            total = total.at[rows.start : rows.stop].set(_rows(parts, v, rows))
        return total

    def product(v: Array) -> Array:
        # Every entry has a derivative of its own.
        return _product(operator, v)

    return explicit_product(operator.stored, v, length, product, halved, halved)


def _rows(parts: list[tuple[int, Array]], v: Array, rows: range) -> Array:
    """Some rows of the product with a symmetric matrix, from its diagonals on one side."""
    total = jnp.zeros((len(rows), *v.shape[1:]), jnp.result_type(parts[0][1], v))
    for offset, diagonal in parts:
        if offset >= 0:
            total = total + times(_cut(diagonal, rows, 0), _cut(v, rows, offset))
        if offset > 0:
            total = total + times(_cut(diagonal, rows, -offset), _cut(v, rows, -offset))
    return total


def _cut(v: Array, rows: range, offset: int) -> Array:
    """V at these rows moved by an offset, zero where it has nothing."""
    start, stop = rows.start + offset, rows.stop + offset
    within = slice(max(start, 0), max(min(stop, v.shape[0]), 0))
    missing = (max(min(-start, len(rows)), 0), max(min(stop - v.shape[0], len(rows)), 0))
    if not any(missing):
        return v[within]
    return jnp.pad(v[within], [missing] + [(0, 0)] * (v.ndim - 1))


@jax.jit
def _transposed_product(operator: Diagonals, v: Array) -> Array:
    length = operator.extent[1]
    total = _nothing(operator, length, v)
    for offset, diagonal in operator.parts():
        total = total + _shift(times(diagonal, v), -offset, length)
    return total


@jax.jit
def _transposed(operator: Diagonals) -> Diagonals:
    rows, columns = operator.extent
    count = operator.count
    stored, present = [], []
    real = (operator.places < count).reshape(-1, max(rows, 1))
    parts = zip(operator.parts(), real, strict=True)
    for (offset, diagonal), there in reversed(list(parts)):
        stored.append(_shift(diagonal, -offset, columns))
        present.append(_shift(there.astype(jnp.int32), -offset, columns))
    if not stored:
        return dataclasses.replace(operator, extent=(columns, rows))
    by_row = jnp.stack(present, axis=1).ravel()
    ranks = jnp.where(by_row > 0, jnp.cumsum(by_row) - 1, count)
    return Diagonals(
        stored=jnp.concatenate(stored),
        extent=(columns, rows),
        count=count,
        reason=operator.reason,
        is_symmetric=operator.is_symmetric,
        is_positive_definite=operator.is_positive_definite,
        is_singular=bool(operator.is_symmetric and operator.is_singular),
        places=ranks.reshape(columns, -1).T.ravel().astype(jnp.int32),
        offsets=tuple(-offset for offset in reversed(operator.offsets)),
    )


def _nothing(operator: Diagonals, length: int, v: Array) -> Array:
    return jnp.zeros((length, *v.shape[1:]), jnp.result_type(operator.stored, v))


def _shift(v: Array, offset: int, length: int) -> Array:
    """W with w[i] = v[i + offset] for 0 ≤ i < length, zero where v has nothing."""
    ends = [(-offset, length - v.shape[0] + offset, 0)]
    return jax.lax.pad(v, jnp.zeros((), v.dtype), ends + [(0, 0, 0)] * (v.ndim - 1))
