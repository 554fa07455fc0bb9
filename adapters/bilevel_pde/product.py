"""Product: one operator after another."""

from typing import Any

import jax
import numpy as np
import scipy.sparse as sp
from jax.core import Tracer
from jaxtyping import Array, Float, PyTree

from bilevel import vector
from bilevel.solver.base import IncompatibleError
from bilevel_pde.operator import Operator


class Product(Operator):
    """A B: first B, then A.

    **Arguments:**

    - `left`: A; `right`: B, whose result A acts on.

    **Raises:** `ValueError` for operators that do not follow one another.
    """

    left: Operator
    right: Operator

    def __check_init__(self) -> None:
        """Refuse factors that do not fit."""
        given, expected = _kinds(self.right.range_like), _kinds(self.left.like)
        if given != expected:
            msg = (
                f"Product: {type(self.left).__name__} acts on fields {expected}, got those of "
                f"{type(self.right).__name__}, {given}."
            )
            raise ValueError(msg)

    @property
    def like(self) -> PyTree:
        """As of B."""
        return self.right.like

    @property
    def range_like(self) -> PyTree:
        """As of A."""
        return self.left.range_like

    def matvec(self, v: PyTree) -> PyTree:
        """A (B v)."""
        return self.left.matvec(self.right.matvec(v))

    def rmatvec(self, v: PyTree) -> PyTree:
        """Bᵀ (Aᵀ v)."""
        return self.right.rmatvec(self.left.rmatvec(v))

    def transposed(self) -> "Product":
        """Bᵀ Aᵀ."""
        return Product(self.right.transposed(), self.left.transposed())

    def diagonal(self) -> None:
        """Unknown: it takes the product of the matrices."""
        return

    def norm_bound(self) -> Float[Array, ""]:
        """The product of the factors' bounds."""
        return self.left.norm_bound() * self.right.norm_bound()

    def to_scipy(self) -> sp.csr_array:
        """The product of the matrices."""
        return sp.csr_array(self.left.to_scipy() @ self.right.to_scipy())

    def entries(self) -> tuple[Any, Any, Array]:
        """The products A[i, k] B[k, j], one for each pair of entries that meet.

        **Raises:** `IncompatibleError` where the rows and columns of a factor are traced:
        how many pairs meet must be known while tracing.
        """
        rows, inner, left = self.left.entries()
        outer, columns, right = self.right.entries()
        if any(isinstance(part, Tracer) for part in (rows, inner, outer, columns)):
            msg = (
                f"{type(self).__name__} lists its entries only where those of its factors stand "
                "still: make the operators outside of the traced function, and let it trace "
                "their values alone."
            )
            raise IncompatibleError(msg)
        rows, inner, outer, columns = (np.asarray(p) for p in (rows, inner, outer, columns))
        by_row = np.argsort(outer, kind="stable")
        starts = np.searchsorted(outer[by_row], np.arange(vector.size(self.left.like) + 1))
        lengths = np.diff(starts)[inner]
        first = np.repeat(np.arange(len(inner)), lengths)
        rank = np.arange(len(first)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        second = by_row[starts[inner[first]] + rank]
        return rows[first], columns[second], left[first] * right[second]


def _kinds(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: (tuple(leaf.shape), str(leaf.dtype)), tree)
