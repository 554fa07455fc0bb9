"""from_scipy: a sparse matrix of SciPy as an operator."""

from typing import Any

import jax
import scipy.sparse as sp

from bilevel.solver.base import IncompatibleError
from bilevel_pde import structure
from bilevel_pde.assembled import AssembledMatrix
from bilevel_pde.diagonals import Diagonals
from bilevel_pde.operator import Operator
from bilevel_pde.padded_columns import PaddedColumns
from bilevel_pde.segment_sum import SegmentSum
from bilevel_pde.structure import Format

KINDS = {
    "diagonals": Diagonals,
    "padded_columns": PaddedColumns,
    "segment_sum": SegmentSum,
}


def from_scipy(
    matrix: Any,
    *,
    format: Format | None = None,  # noqa: A002
    positive_definite: bool | None = None,
) -> AssembledMatrix:
    """An operator with the entries of a SciPy sparse matrix, in the format that suits it.

    Looks at the structure: few diagonals become shifted products, rows of similar lengths
    padded columns with a tail for long rows, anything else a sum row by row.  The operator
    says what it became and why (`operator.reason`, and its repr).

    **Arguments:**

    - `matrix`: any `scipy.sparse` array or matrix (COO, CSR, CSC, DIA, BSR, LIL, DOK) of
        float32 or float64, square for solves and of any shape for products; copied.
        Unsorted indices are sorted and duplicates summed, as `tocsr` does; explicit zeros
        stay, and so does the structure. Without JAX's double precision
        (`jax_enable_x64`) float64 becomes float32, as everywhere in JAX.
    - `format`: "diagonals", "padded_columns" or "segment_sum"; `None` chooses.
    - `positive_definite`: whether the matrix is symmetric positive definite, if that is
        known. Symmetry is looked at, and whether rows add up to zero, as those of a closed
        problem do.

    **Returns:** an operator on vectors (n,) or (n, k), an [`AssembledMatrix`][].

    **Raises:** `TypeError` for what is not sparse, and for integer, boolean or complex
    entries; `ValueError` for indices out of range, entries that are not finite, and
    `positive_definite=True` for a matrix that is not symmetric or has a diagonal entry
    that is not positive.

    >>> import jax.numpy as jnp, scipy.sparse as sp, bilevel as bl, bilevel_pde as pde
    >>> matrix = sp.diags_array([-1.0, 2.0, -1.0], offsets=[-1, 0, 1], shape=(3, 3))
    >>> operator = pde.from_scipy(matrix, positive_definite=True)
    >>> problem = bl.LinearSystem(operator, jnp.ones(3))
    >>> solution = bl.solve(problem, None, jnp.zeros(3), solver=bl.ConjugateGradient())
    >>> [round(float(v), 3) for v in solution.value]
    [1.5, 2.0, 1.5]
    """
    csr = structure.canonical(matrix)
    symmetric = structure.is_symmetric(csr)
    if positive_definite:
        if not symmetric:
            msg = "from_scipy: positive_definite=True, but the matrix is not symmetric."
            raise ValueError(msg)
        if (csr.diagonal() <= 0).any():
            msg = (
                "from_scipy: positive_definite=True, but the diagonal has entries that are not "
                "positive."
            )
            raise ValueError(msg)
    singular = structure.is_singular(csr)
    csr = csr.astype(jax.dtypes.canonicalize_dtype(csr.dtype))
    chosen = structure.choose(csr, format)
    known = {
        "is_symmetric": symmetric,
        "is_positive_definite": positive_definite,
        "is_singular": singular and not positive_definite,
    }
    return KINDS[chosen.format].of(csr, chosen, known)


def concrete_matrix(
    owner: str, matrix: Any, instead: str = "", *, pattern: bool = False
) -> sp.csr_array:
    """A square matrix, or an operator's, on the host, checked as by `from_scipy`.

    **Arguments:**

    - `owner`: who asks, for the message; `instead`: what else there is where it is traced.
    - `pattern`: whether only the places of the entries matter and not what they are.

    **Raises:** `IncompatibleError` for a traced operator; `TypeError` for what is no matrix,
    or one that is not float32 or float64; `ValueError` for one that is not square, has
    indices out of range, or entries that are not finite.
    """
    if isinstance(matrix, Operator):
        try:
            matrix = matrix.to_scipy()
        except (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError) as error:
            msg = (
                f"{owner} needs the numbers of its matrix, and these are traced. Make it outside "
                f"of the traced function, of the matrix for one θ{instead}."
            )
            raise IncompatibleError(msg) from error
    if not sp.issparse(matrix):
        msg = (
            f"{owner}: matrix should be a scipy.sparse matrix or an operator of bilevel_pde, got "
            f"{type(matrix).__name__}."
        )
        raise TypeError(msg)
    csr = structure.canonical(matrix, owner, pattern=pattern)
    rows, columns = csr.shape
    if rows != columns:
        msg = f"{owner}: matrix should be square, got shape ({rows}, {columns})."
        raise ValueError(msg)
    return csr
