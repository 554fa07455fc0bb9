"""Factors: sparse LU factorisations on the host, kept while their matrix is in use."""

import hashlib
import threading
from collections import OrderedDict
from typing import Any

import numpy as np
import scipy.sparse as sp
from scipy.sparse.linalg import splu

KEPT = 32
"""Factorisations that are kept at most; the one unused for longest makes room."""

ROOM = 2**30
"""Bytes of factors that are kept at most, beyond the last two factorisations."""

LEAST = 4 * np.finfo(np.float64).eps
"""A reciprocal condition number below this is rounding of the factorisation."""


class Factorization:
    """LU factors of a matrix that was scaled to entries of size 1, or the lack of them.

    **Arguments:**

    - `matrix`: A, square, float64, in CSC.
    - `definite`: whether it is symmetric positive definite, so that no pivots are looked
        for and the ordering keeps the symmetry.
    - `rounding`: a relative size to which the entries are known: where a change by so little
        makes the matrix singular, it is.

    Attribute `singular`: whether there are no factors to solve with, for the matrix is
    singular to rounding or has entries that are not finite.
    """

    def __init__(self, matrix: sp.csc_array, *, definite: bool, rounding: float = 0.0):
        self.lu: Any = None
        self.row_scale, self.column_scale = _scales(matrix, definite=definite)
        if not (np.isfinite(self.row_scale).all() and np.isfinite(self.column_scale).all()):
            return
        scaled = matrix.copy()
        columns = np.repeat(np.arange(matrix.shape[1]), np.diff(matrix.indptr))
        scaled.data = self.row_scale[matrix.indices] * matrix.data * self.column_scale[columns]
        try:
            if definite:
                lu = splu(
                    scaled,
                    permc_spec="MMD_AT_PLUS_A",
                    diag_pivot_thresh=0.0,
                    options={"SymmetricMode": True},
                )
            else:
                lu = splu(scaled)
        except RuntimeError:
            # SuperLU: "Factor is exactly singular".
            return
        norm = float(abs(scaled).sum(axis=0).max())
        if norm * _inverse_norm(lu) * max(LEAST, rounding) < 1:
            self.lu = lu

    @property
    def size(self) -> int:
        """Bytes of the factors: an index and a number for each entry."""
        return 0 if self.lu is None else 12 * int(self.lu.nnz)

    @property
    def singular(self) -> bool:
        """Whether there is nothing to solve with."""
        return self.lu is None

    def solve(self, b: np.ndarray, *, transposed: bool) -> np.ndarray:
        """A⁻¹b, or A⁻ᵀb; NaN for a singular matrix.

        **Arguments:**

        - `b`: shape (n,) or (n, k), real or complex.
        """
        if self.lu is None:
            return np.full(b.shape, np.nan)
        if np.iscomplexobj(b):
            real, imaginary = (
                self.solve(part, transposed=transposed) for part in (np.real(b), np.imag(b))
            )
            return real + 1j * imaginary
        before, after = self.row_scale, self.column_scale
        if transposed:
            before, after = after, before
        column = (slice(None), *([None] * (b.ndim - 1)))
        right = np.asarray(before[column] * b, np.float64)
        return after[column] * self.lu.solve(right, "T" if transposed else "N")


class Factors:
    """The last few factorisations, found again by the content of their matrix.

    A matrix and its transpose share one.  Safe to use from several threads.

    **Arguments:**

    - `kept`: how many, at most.
    - `room`: bytes that they take, at most; the last two are kept whatever they take.
    """

    def __init__(self, kept: int = KEPT, room: int = ROOM):
        self.kept, self.room = kept, room
        self.made = 0
        self._known: OrderedDict[bytes, Factorization] = OrderedDict()
        self._lock = threading.Lock()

    def find(self, matrix: sp.coo_array, *, definite: bool) -> tuple[bytes, bool, Factorization]:
        """The factors of a matrix, made if need be.

        **Returns:** their key, whether they are those of the transpose, and the factors.
        """
        by_column, by_row = sp.csc_array(matrix), sp.csr_array(matrix)
        for form in (by_column, by_row):
            form.sum_duplicates()
            form.eliminate_zeros()
        key, mirrored = (_digest(form, definite=definite) for form in (by_column, by_row))
        with self._lock:
            for candidate, transposed in ((key, False), (mirrored, True)):
                if candidate in self._known:
                    self._known.move_to_end(candidate)
                    return candidate, transposed, self._known[candidate]
            # 1 / κ is the relative distance to the nearest singular matrix, so that one whose
            # entries were rounded once is no further away than half a unit.
            rounding = float(np.finfo(matrix.dtype).eps) / 2
            doubled = by_column.astype(np.float64)
            found = Factorization(doubled, definite=definite, rounding=rounding)
            self.made += 1
            self._known[key] = found
            while len(self._known) > self.kept or (len(self._known) > 2 and self.size > self.room):
                self._known.popitem(last=False)
            return key, False, found

    def get(self, key: bytes) -> Factorization | None:
        """The factors of a key, where they are still there."""
        with self._lock:
            found = self._known.get(key)
            if found is not None:
                self._known.move_to_end(key)
            return found

    @property
    def size(self) -> int:
        """Bytes of all factors kept."""
        return sum(factors.size for factors in self._known.values())

    def clear(self) -> None:
        """Let all of them go."""
        with self._lock:
            self._known.clear()


def _digest(form: sp.csc_array | sp.csr_array, *, definite: bool) -> bytes:
    content = hashlib.blake2b(digest_size=16, person=b"definite" if definite else b"any")
    for part in (form.indptr, form.indices, form.data):
        content.update(np.ascontiguousarray(part).data)
    content.update(str((form.shape, form.data.dtype, form.indices.dtype)).encode())
    return content.digest()


def _scales(matrix: sp.csc_array, *, definite: bool) -> tuple[np.ndarray, np.ndarray]:
    """Powers of two that bring the largest entries of rows and columns near 1.

    A matrix may be scaled badly and yet be solved well: its condition is told after this.
    An empty row or column gets an infinite scale, entries that are not finite NaN.
    """
    if definite:
        diagonal = matrix.diagonal()
        if (diagonal > 0).all():
            scale = _power(diagonal) ** 0.5
            scale = 2.0 ** np.round(np.log2(scale))
            return scale, scale
    size = abs(matrix)
    rows = _power(_most(size, axis=1))
    size.data = size.data * np.where(np.isfinite(rows), rows, 0.0)[size.indices]
    return rows, _power(_most(size, axis=0))


def _most(size: sp.csc_array, axis: int) -> np.ndarray:
    return np.asarray(size.max(axis=axis).todense(), np.float64).ravel()


def _power(size: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        return np.where(np.isfinite(size), 2.0 ** -np.round(np.log2(size)), np.nan)


def _inverse_norm(lu: Any, iterations: int = 5) -> float:
    """‖A⁻¹‖₁ from below, mostly exact: Hager's estimate in Higham's form (1988).

    SciPy's `onenormest` draws from NumPy's global random state.
    """
    n = lu.shape[0]
    x = np.full(n, 1.0 / n)
    norm = 0.0
    for _ in range(iterations):
        y = lu.solve(x)
        if not np.isfinite(y).all():
            return np.inf
        norm = max(norm, float(np.abs(y).sum()))
        z = lu.solve(np.where(y >= 0, 1.0, -1.0), "T")
        peak = int(np.argmax(np.abs(z)))
        if not abs(z[peak]) > z @ x:
            break
        x = np.zeros(n)
        x[peak] = 1.0
    index = np.arange(n)
    alternating = (-1.0) ** index * (1 + index / max(n - 1, 1))
    return max(norm, 2 * float(np.abs(lu.solve(alternating)).sum()) / (3 * n))
