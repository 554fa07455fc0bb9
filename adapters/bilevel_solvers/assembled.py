"""Assembled: the matrix of a linear system, as SciPy has it on the host."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse as sp
from jax.core import Tracer
from jaxtyping import PyTree

from bilevel import vector
from bilevel.operator import LinearOperator
from bilevel.solver.base import IncompatibleError
from bilevel.solver.dense import dense_matrix

MOST = 4000
"""Unknowns up to which an operator without entries is made a dense matrix, column by column."""


class Assembled:
    """The matrix of an operator: what of it goes to the host, and what becomes of it there.

    **Arguments:**

    - `owner`: who asks, for messages.
    - `like`: a vector of the space.

    `arrays` go to the host, where `csr` makes a matrix (n, n) in double precision of them, in
    flat coordinates.

    **Raises:** `IncompatibleError` for a large operator that has no entries to list, and for a
    complex matrix unless `is_complex` ones are welcome.
    """

    def __init__(
        self, owner: str, operator: LinearOperator, like: PyTree, *, is_complex: bool = False
    ):
        if operator.matrix is not None and jnp.iscomplexobj(operator.matrix) and not is_complex:
            msg = (
                f"{owner} takes real matrices only, got {operator.matrix.dtype}. Use bl.GMRES, or "
                'scipy_sparse("splu").'
            )
            raise IncompatibleError(msg)
        self.csr: Callable[[Any], sp.csr_array]
        self.arrays: Any
        entries = _entries(operator.source)
        if entries is not None:
            rows, columns, values = entries
            known = not any(isinstance(part, Tracer) for part in (rows, columns))
            places = (np.asarray(rows), np.asarray(columns)) if known else None
            size = vector.size(like)
            self.arrays = [values] if known else [values, rows, columns]

            def of_entries(arrays: Any) -> sp.csr_array:
                there = places or tuple(arrays[1:])
                values = np.asarray(arrays[0], float)
                return sp.csr_array(sp.coo_array((values, there), shape=(size, size)))

            self.csr = of_entries
            return
        if operator.matrix is None and vector.size(like) > MOST:
            msg = (
                f"{owner} needs the entries of the matrix, and an operator of {vector.size(like)} "
                "unknowns that is a function does not list them. Give LinearSystem a matrix or "
                "bilevel_pde.from_scipy(matrix), or use a Krylov method without a preconditioner."
            )
            raise IncompatibleError(msg)
        self.arrays = [jax.lax.stop_gradient(dense_matrix(operator, like))]
        self.csr = _of_dense


def has_entries(operator: LinearOperator) -> bool:
    """Whether the matrix is at hand without applying the operator to unit vectors."""
    return operator.matrix is not None or _entries(operator.source) is not None


def _of_dense(arrays: Any) -> sp.csr_array:
    matrix = np.asarray(arrays[0])
    return sp.csr_array(matrix if np.iscomplexobj(matrix) else matrix.astype(float))


def _entries(source: Any) -> Any:
    """Rows, columns and values of what a linear system was made of; `None` where it has none."""
    if source is None or not type(source).__module__.startswith("bilevel_pde."):
        return None
    source = getattr(source, "exact", source)
    try:
        rows, columns, values = source.entries()
    except (AttributeError, IncompatibleError):
        return None
    return rows, columns, jax.lax.stop_gradient(jnp.asarray(values))
