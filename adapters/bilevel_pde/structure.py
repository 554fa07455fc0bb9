"""Structure of a sparse matrix: is it sound, and which format is it applied in fastest."""

import dataclasses
from typing import Any, Literal

import numpy as np
import scipy.sparse as sp
from scipy.sparse.csgraph import reverse_cuthill_mckee

from bilevel_pde.places import check_compressed, check_places

Format = Literal["diagonals", "padded_columns", "segment_sum"]
"""How a sparse matrix is laid out."""

MOST_UNROLLED = 64
"""Diagonals or columns in one kernel; more of them take long to compile."""

COLUMN_SHARE = 10
"""A padded column pays where at least one row in so many has an entry in it.

An entry of the scattered tail costs as much as some ten of a column (measured on CPUs).
"""

REACH = 2**14
"""Mean distance |row - column| from which a better numbering of the unknowns is looked for.

So many float64 numbers are 128 KiB: what is nearer is found in the cache anyway.
"""

BETTER = 4
"""The numbering must bring neighbours so many times nearer; it costs two gathers."""


@dataclasses.dataclass(frozen=True)
class Structure:
    """What a matrix looks like, and what was chosen for it.

    - `format`, `reason`: the choice, and why.
    - `offsets`: columns minus rows of the diagonals that have entries, ascending; empty
        where the format is another.
    - `width`: how many padded columns; longer rows go into the tail.
    - `order`: for each new number of an unknown the old one, or `None` for no reordering.
    """

    format: Format
    reason: str
    offsets: tuple[int, ...] = ()
    width: int = 0
    order: np.ndarray | None = None


def canonical(matrix: Any, owner: str = "from_scipy", *, pattern: bool = False) -> sp.csr_array:
    """The matrix as CSR with sorted indices and without duplicates, checked, as a copy.

    **Arguments:**

    - `owner`: who asks, for the messages.
    - `pattern`: whether only the places of the entries matter and not what they are.

    **Raises:** `TypeError` for what is not sparse or not float32 or float64; `ValueError`
    for indices out of range and entries that are not finite.
    """
    given: Any = matrix
    if not sp.issparse(matrix):
        msg = (
            f"{owner}: matrix must be a scipy.sparse array or matrix, got "
            f"{type(matrix).__name__}. Make one of a dense array with scipy.sparse.csr_array(...)."
        )
        raise TypeError(msg)
    if given.ndim != 2:
        msg = f"{owner}: matrix must have two dimensions, got shape {given.shape}."
        raise ValueError(msg)
    if not pattern:
        _check_dtype(owner, given.dtype)
    check_places(owner, given)
    csr: Any = sp.csr_array(given.tocsr(copy=True))
    check_compressed(owner, csr)
    csr.sum_duplicates()
    if csr.nnz >= np.iinfo(np.int32).max:
        msg = f"{owner}: at most 2³¹ - 2 stored entries fit 32-bit indices, got {csr.nnz:,}."
        raise ValueError(msg)
    if pattern:
        return csr
    bad = np.flatnonzero(~np.isfinite(csr.data))
    if len(bad):
        row = int(np.searchsorted(csr.indptr, bad[0], side="right")) - 1
        msg = (
            f"{owner}: {len(bad)} of {csr.nnz:,} entries are not finite, the first is "
            f"{csr.data[bad[0]]} at ({row}, {csr.indices[bad[0]]})."
        )
        raise ValueError(msg)
    return csr


def _check_dtype(owner: str, dtype: np.dtype) -> None:
    if dtype in {np.dtype(np.float32), np.dtype(np.float64)}:
        return
    if np.issubdtype(dtype, np.complexfloating):
        instead = "Write the real system [[Re, -Im], [Im, Re]] with scipy.sparse.block_array"
    else:
        instead = "Convert it with matrix.astype(float)"
    msg = f"{owner}: entries must be float32 or float64, got {dtype}. {instead}."
    raise TypeError(msg)


def rows_of(csr: sp.csr_array) -> np.ndarray:
    """The row of each stored entry, int32."""
    lengths = np.diff(csr.indptr)
    return np.repeat(np.arange(csr.shape[0], dtype=np.int32), lengths)


def is_symmetric(csr: sp.csr_array) -> bool:
    """Whether A = Aᵀ to rounding: within 32 ulp of the largest entries of row and column."""
    if csr.shape[0] != csr.shape[1]:
        return False
    difference = sp.coo_array(csr - csr.T)
    if difference.nnz == 0:
        return True
    size = np.zeros(csr.shape[0], csr.dtype)
    np.maximum.at(size, rows_of(csr), np.abs(csr.data))
    allowed = 32 * np.finfo(csr.dtype).eps * np.minimum(size[difference.row], size[difference.col])
    return bool(np.all(np.abs(difference.data) <= allowed))


def is_singular(csr: sp.csr_array) -> bool:
    """Whether rows add up to zero to rounding, so that constants are in the kernel.

    Within 8 units of rounding of the entries in each row, and 2 of all entries in the sum of
    all rows. Errors of rounding partly cancel there, and a small multiple of the identity adds
    up: that of u - dt Δu on a fine grid is not far above rounding in each row.
    """
    rounding = np.finfo(csr.dtype).eps
    exact = csr.astype(np.float64)
    sums, sizes = exact.sum(axis=1), abs(exact).sum(axis=1)
    within = np.abs(sums) <= 8 * rounding * sizes
    return bool(sizes.size and within.all() and abs(sums.sum()) <= 2 * rounding * sizes.sum())


def choose(csr: sp.csr_array, format: Format | None = None) -> Structure:  # noqa: A002
    """Look at a canonical matrix and choose its format.

    **Arguments:**

    - `format`: to be taken whatever the structure; `None` chooses.

    **Raises:** `ValueError` for an unknown format, or one that the structure cannot bear.
    """
    match format:
        case None:
            return _diagonals(csr) or _columns_or_segments(csr)
        case "diagonals":
            offsets = _offsets(csr)
            if len(offsets) > 8 * MOST_UNROLLED:
                msg = (
                    f"from_scipy: the entries lie on {len(offsets):,} diagonals, too many for "
                    'format="diagonals". Leave format=None.'
                )
                raise ValueError(msg)
            return Structure(format, f"asked for; {len(offsets)} diagonals", offsets)
        case "padded_columns":
            found = _columns(csr)
            return dataclasses.replace(found, reason=f"asked for; {found.reason}")
        case "segment_sum":
            return Structure(format, "asked for")
        case _:
            msg = (
                'from_scipy: format must be "diagonals", "padded_columns", "segment_sum" or None, '
                f"got {format!r}."
            )
            raise ValueError(msg)


def _offsets(csr: sp.csr_array) -> tuple[int, ...]:
    rows, columns = csr.shape
    shifted = csr.indices.astype(np.int64) - rows_of(csr) + rows - 1
    used = np.flatnonzero(np.bincount(shifted, minlength=max(rows + columns - 1, 0)))
    return tuple(int(index) - rows + 1 for index in used)


def _diagonals(csr: sp.csr_array) -> Structure | None:
    if csr.nnz == 0:
        return Structure("diagonals", "there are no entries")
    offsets = _offsets(csr)
    slots = len(offsets) * csr.shape[0]
    if len(offsets) > MOST_UNROLLED or slots > 2 * csr.nnz:
        return None
    diagonals = "1 diagonal" if len(offsets) == 1 else f"{len(offsets)} diagonals"
    filled = 100 * csr.nnz / slots
    return Structure("diagonals", f"the entries lie on {diagonals}, {filled:.0f} % full", offsets)


def width(csr: sp.csr_array) -> int:
    """How many columns at least one row in `COLUMN_SHARE` reaches into."""
    rows = csr.shape[0]
    reaching = np.cumsum(np.bincount(np.diff(csr.indptr), minlength=1)[::-1])[::-1]
    return int(np.count_nonzero(COLUMN_SHARE * reaching[1:] >= max(rows, 1)))


def _columns_or_segments(csr: sp.csr_array) -> Structure:
    columns = width(csr)
    if columns == 0:
        return Structure("segment_sum", "fewer than one row in ten has entries")
    if columns > MOST_UNROLLED:
        mean = csr.nnz / csr.shape[0]
        reason = f"rows have {mean:.1f} entries on average, too many to unroll"
        return Structure("segment_sum", reason)
    return _columns(csr)


def _columns(csr: sp.csr_array) -> Structure:
    lengths = np.diff(csr.indptr)
    columns = min(width(csr), MOST_UNROLLED)
    tail = int(np.maximum(lengths - columns, 0).sum())
    mean, most = csr.nnz / max(csr.shape[0], 1), int(lengths.max(initial=0))
    held = f"hold all but {tail:,} of them" if tail else "hold all of them"
    reason = f"rows have {mean:.1f} entries on average and {most} at most: {columns} columns {held}"
    order = _better_numbering(csr)
    if order is not None:
        reason += "; unknowns renumbered inside, so that neighbours lie together in memory"
    return Structure("padded_columns", reason, width=columns, order=order)


def _better_numbering(csr: sp.csr_array) -> np.ndarray | None:
    """Reverse Cuthill-McKee, where gathers would reach far and it brings them near."""
    if csr.shape[0] != csr.shape[1]:
        return None
    rows = rows_of(csr)
    before = float(np.mean(np.abs(rows - csr.indices))) if csr.nnz else 0.0
    if before <= REACH:
        return None
    pattern = sp.csr_matrix((np.ones(csr.nnz, np.int8), csr.indices, csr.indptr), csr.shape)
    order = reverse_cuthill_mckee(pattern + pattern.T, symmetric_mode=True)
    numbers = np.empty(len(order), np.int32)
    numbers[order] = np.arange(len(order), dtype=np.int32)
    after = float(np.mean(np.abs(numbers[rows] - numbers[csr.indices])))
    return order.astype(np.int32) if BETTER * after <= before else None
