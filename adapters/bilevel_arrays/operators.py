"""Operators: matrices of any library, sparse ones included, as linear operators."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from bilevel.operator import LinearOperator
from bilevel_arrays.space import Space, compat


def as_operator(
    owner: str,
    operator: Any,
    space: Space,
    *,
    symmetric: bool | None,
    positive_definite: bool | None,
) -> LinearOperator:
    """Make an operator of what a user gave.

    **Arguments:**

    - `operator`: a square matrix of the space's library, a sparse one of `scipy.sparse`,
        `cupyx.scipy.sparse` or `torch.sparse`, a function v -> A v, a pair of functions
        (v -> A v, v -> Aᵀ v), or an object with `matvec` and optionally `rmatvec` and `diagonal`.
    - `symmetric`, `positive_definite`: what was declared.

    **Returns:** the operator; its `rmatvec` is `None` where nobody gave one.

    **Raises:** `TypeError` for anything else and for a matrix of another library, `ValueError`
    for one that is not square.
    """
    declared = [
        getattr(operator, name, None) if given is None else given
        for name, given in (("symmetric", symmetric), ("positive_definite", positive_definite))
    ]
    kind, definite = (value if isinstance(value, bool) else None for value in declared)
    if definite and kind is None:
        kind = True
    given: Any = operator
    parts: tuple[Any, Any, Any]
    if _is_matrix(given):
        parts = _of_matrix(owner, operator, space)
    elif isinstance(given, tuple) and len(given) == 2:
        parts = (*given, None)
    elif callable(getattr(given, "matvec", None)):
        diagonal, adjoint = (getattr(given, name, None) for name in ("diagonal", "rmatvec"))
        diagonal = diagonal() if callable(diagonal) else diagonal
        parts = operator.matvec, adjoint if callable(adjoint) else None, diagonal
    elif callable(operator):
        parts = operator, None, None
    else:
        msg = (
            f"{owner}: the operator must be a square matrix, dense or sparse, a matvec function, a "
            f"pair (matvec, rmatvec) or an object with a matvec method, got "
            f"{type(operator).__name__}."
        )
        raise TypeError(msg)
    matvec, rmatvec, diagonal = parts
    return LinearOperator(matvec, rmatvec, diagonal, None, kind, definite)


def is_symmetric(matrix: Any, space: Space) -> bool | None:
    """Whether a constant matrix is symmetric; `None` for what is no square one, and for NaN."""
    if not _is_matrix(matrix) or matrix.shape[0] != matrix.shape[1]:
        return None
    _check_library("LinearSystem", matrix, space)
    matrix = matrix.detach() if space.is_torch else matrix
    transposed = _transposed(matrix, space)
    if _is_scipy(matrix):
        largest, difference = abs(matrix).max(), abs(matrix - transposed).max()
    elif _is_sparse_torch(matrix):
        coordinates = matrix.detach().to_sparse_coo()
        largest = _largest_entry(coordinates)
        difference = _largest_entry(coordinates - coordinates.t())
    else:
        xp = space.xp
        largest, difference = xp.max(xp.abs(matrix)), xp.max(xp.abs(matrix - transposed))
    largest, difference = float(largest), float(difference)
    if not np.isfinite(largest):
        return None
    return difference <= 100 * space.epsilon * largest


def _largest_entry(sparse: Any) -> Any:
    values = sparse.coalesce().values()
    return values.abs().max() if values.numel() else 0.0


def _is_scipy(operator: Any) -> bool:
    """Whether it is a sparse matrix of SciPy or, with the same methods, of CuPy."""
    module = type(operator).__module__
    sparse = module.startswith(("scipy.sparse", "cupyx.scipy.sparse"))
    return sparse and hasattr(operator, "nnz")


def _is_sparse_torch(operator: Any) -> bool:
    return compat.is_torch_array(operator) and str(operator.layout) != "torch.strided"


def _is_matrix(operator: Any) -> bool:
    return _is_scipy(operator) or (compat.is_array_api_obj(operator) and len(operator.shape) == 2)


def _of_matrix(
    owner: str, matrix: Any, space: Space
) -> tuple[Callable[[Any], Any], Callable[[Any], Any], PyTree]:
    rows, columns = (int(number) for number in matrix.shape)
    if rows != columns:
        msg = (
            f"{owner}: the matrix must be square, got shape {(rows, columns)}. For least squares "
            "use Minimization, or the normal equations as a matvec function."
        )
        raise ValueError(msg)
    _check_library(owner, matrix, space)
    leaves = jax.tree.leaves(space.like)
    if len(leaves) != 1 or len(leaves[0].shape) == 0 or leaves[0].shape[0] != rows:
        shapes = ", ".join(str(tuple(leaf.shape)) for leaf in leaves)
        msg = (
            f"{owner}: a matrix of shape {(rows, columns)} acts on one array of {rows} entries, "
            f"got x0 of shape {shapes}."
        )
        raise TypeError(msg)
    transposed: list[Any] = []

    def rmatvec(v: Any) -> Any:
        if not transposed:  # made once, where an adjoint asks for it
            transposed.append(_transposed(matrix, space))
        return transposed[0] @ v

    return lambda v: matrix @ v, rmatvec, _diagonal(matrix, space)


def _check_library(owner: str, matrix: Any, space: Space) -> None:
    module = type(matrix).__module__
    numpy_like = space.xp is compat.array_namespace(np.zeros(0))
    if _is_scipy(matrix):
        fits = numpy_like if module.startswith("scipy") else space.xp.__name__.endswith("cupy")
        place = None
    else:
        fits = compat.array_namespace(matrix) is space.xp
        place = compat.device(matrix) if fits else None
    if not fits:
        msg = (
            f"{owner}: the matrix is a {module}.{type(matrix).__name__} and the unknown of "
            f"{space.xp.__name__}: give both in one library, on one device."
        )
        raise TypeError(msg)
    if place is not None and place != space.device:
        msg = (
            f"{owner}: the matrix is on {place} and the unknown on {space.device}. Move one of "
            "them."
        )
        raise TypeError(msg)
    if str(matrix.dtype).rpartition(".")[2] != str(space.dtype).rpartition(".")[2]:
        msg = (
            f"{owner}: the matrix is of {matrix.dtype} and the unknown of {space.dtype}. Convert "
            "one of them."
        )
        raise TypeError(msg)


def _transposed(matrix: Any, space: Space) -> Any:
    if _is_scipy(matrix):
        return matrix.T.tocsr()
    if _is_sparse_torch(matrix):
        return matrix.detach().to_sparse_coo().t().coalesce()
    return space.xp.matrix_transpose(matrix)


def _entries(matrix: Any, space: Space) -> tuple[Any, Any, Any]:
    """Rows, columns and values of a sparse tensor, without sorting what is sorted."""
    if str(matrix.layout) != "torch.sparse_csr":
        matrix = matrix.to_sparse_coo().coalesce()
        return (*matrix.indices(), matrix.values())
    starts = matrix.crow_indices()
    rows = space.xp.arange(len(starts) - 1, device=starts.device)
    return rows.repeat_interleave(starts.diff()), matrix.col_indices(), matrix.values()


def _diagonal(matrix: Any, space: Space) -> Any:
    if _is_scipy(matrix):
        return matrix.diagonal()
    if _is_sparse_torch(matrix):
        rows, columns, values = _entries(matrix.detach(), space)
        on = rows == columns
        return values.new_zeros(matrix.shape[0]).index_put((rows[on],), values[on])
    return space.xp.linalg.diagonal(matrix)
