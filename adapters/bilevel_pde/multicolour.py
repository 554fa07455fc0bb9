"""Colours: unknowns that do not see one another, for Gauss-Seidel on any sparse matrix."""

from typing import Any, Literal

import numpy as np
import scipy.sparse as sp

from bilevel_pde.scipy_matrix import concrete_matrix

Order = Literal["greedy", "natural"]


def colouring(matrix: Any, order: Order = "greedy") -> np.ndarray:
    """Colours of the unknowns of a matrix, for [`GaussSeidel`][] with `colours=`.

    Unknowns that an entry joins get different colours, so that all of one colour are updated
    at once.

    **Arguments:**

    - `matrix`: a square `scipy.sparse` matrix or an operator of this adapter, not traced; its
        entries do not matter, only where they are. Those of one θ do for all.
    - `order`: `"greedy"` for few colours, which is fast; or `"natural"`, the levels of the
        triangle below the diagonal: a sweep is then exactly the one that goes through the
        unknowns one after another, a solve with the lower triangle. That may take as many
        colours as there are unknowns, each of which is a step.

    **Returns:** an integer for each unknown, from 0, shape (n,).

    **Raises:** `ValueError` for a matrix that is not square or no valid one, and another order,
    `IncompatibleError` for a traced one.

    >>> import scipy.sparse as sp
    >>> chain = sp.diags_array([1.0, 4.0, 1.0], offsets=[-1, 0, 1], shape=(5, 5))
    >>> colouring(chain).tolist(), colouring(chain, "natural").tolist()
    ([0, 1, 0, 1, 0], [0, 1, 2, 3, 4])
    """
    if order not in {"greedy", "natural"}:
        msg = f"colouring: order should be 'greedy' or 'natural', got {order!r}."
        raise ValueError(msg)
    csr = concrete_matrix("colouring", matrix, pattern=True)
    ones = sp.csr_array((np.ones(csr.nnz, np.int8), csr.indices, csr.indptr), csr.shape)
    pattern = sp.csr_array(ones + ones.T)
    pattern.sort_indices()
    colours = np.full(csr.shape[0], -1)
    for row, (start, stop) in enumerate(zip(pattern.indptr, pattern.indptr[1:], strict=False)):
        neighbours = pattern.indices[start:stop]
        taken = colours[neighbours[neighbours < row]]
        if order == "natural":
            colours[row] = taken.max(initial=-1) + 1
        else:
            free = np.ones(len(taken) + 1, bool)
            free[taken[taken < len(free)]] = False
            colours[row] = int(np.argmax(free))
    return colours
