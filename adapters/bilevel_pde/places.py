"""Places: where a sparse matrix says its entries are, checked before SciPy follows them."""

import itertools
from typing import Any

import numpy as np


def check_places(owner: str, matrix: Any) -> None:
    """Refuse indices that SciPy's conversions would follow out of their arrays.

    **Arguments:**

    - `owner`: who asks, for the message.
    - `matrix`: of SciPy, in any format.

    **Raises:** `ValueError` saying what is wrong, with the first index that is.
    """
    match matrix.format:
        case "csr" | "csc" | "bsr":
            check_compressed(owner, matrix)
        case "coo":
            _check_lengths(owner, matrix, (matrix.row, matrix.col, matrix.data))
            _check_range(owner, "row", matrix.row, matrix.shape[0])
            _check_range(owner, "column", matrix.col, matrix.shape[1])
        case "lil":
            _check_lists(owner, matrix)
        case "dok":
            rows, columns = np.array(list(matrix.keys()), np.int64).reshape(-1, 2).T
            _check_range(owner, "row", rows, matrix.shape[0])
            _check_range(owner, "column", columns, matrix.shape[1])
        case "dia":
            _check_diagonals(owner, matrix)
        case _:
            pass


def check_compressed(owner: str, matrix: Any) -> None:
    """Refuse CSR, CSC and BSR arrays that are no matrix.

    **Raises:** `ValueError`.
    """
    try:
        matrix.check_format(full_check=True)
    except (ValueError, IndexError, TypeError) as error:
        reason = f"the {matrix.format.upper()} arrays are no valid matrix: {error}"
        raise _invalid(owner, reason) from None


def _check_lists(owner: str, matrix: Any) -> None:
    """A list of columns and one of entries for each row."""
    count = matrix.shape[0]
    if len(matrix.rows) != count or len(matrix.data) != count:
        reason = (
            f"the LIL arrays are no valid matrix: {len(matrix.rows)} lists of columns and "
            f"{len(matrix.data)} of entries for {count} rows"
        )
        raise _invalid(owner, reason)
    for row, (columns, entries) in enumerate(zip(matrix.rows, matrix.data, strict=True)):
        if len(columns) != len(entries):
            reason = (
                f"the LIL arrays are no valid matrix: row {row} has {len(columns)} columns and "
                f"{len(entries)} entries"
            )
            raise _invalid(owner, reason)
    columns = np.array(list(itertools.chain.from_iterable(matrix.rows)))
    _check_range(owner, "column", columns, matrix.shape[1])


def _check_diagonals(owner: str, matrix: Any) -> None:
    """A row of entries for each offset; offsets that lead outside hold nothing."""
    offsets, data = np.asarray(matrix.offsets), np.asarray(matrix.data)
    fits = offsets.ndim == 1 and data.ndim == 2 and len(offsets) == len(data)
    if not fits or len(np.unique(offsets)) != len(offsets):
        reason = (
            f"the DIA arrays are no valid matrix: {data.shape} entries for the offsets "
            f"{offsets.tolist()}, which should be distinct, one for each row of entries"
        )
        raise _invalid(owner, reason)
    _check_integers(owner, "diagonal", offsets)


def _check_lengths(owner: str, matrix: Any, parts: tuple[Any, ...]) -> None:
    sizes = [np.shape(part) for part in parts]
    if len(set(sizes)) != 1 or len(sizes[0]) != 1:
        reason = (
            f"the {matrix.format.upper()} arrays are no valid matrix: rows, columns and entries "
            f"have the shapes {sizes}"
        )
        raise _invalid(owner, reason)


def _check_integers(owner: str, name: str, indices: np.ndarray) -> None:
    if len(indices) and indices.dtype.kind not in "iu":
        raise _invalid(owner, f"{name} indices must be integers, got {indices.dtype}")


def _check_range(owner: str, name: str, indices: np.ndarray, count: int) -> None:
    _check_integers(owner, name, indices)
    wrong = np.flatnonzero((indices < 0) | (indices >= count))
    if len(wrong):
        reason = (
            f"{len(wrong)} {name} indices are out of range, the first is "
            f"{indices[wrong[0]]} for {count} {name}s"
        )
        raise _invalid(owner, reason)


def _invalid(owner: str, reason: str) -> ValueError:
    return ValueError(f"{owner}: {reason}.")
