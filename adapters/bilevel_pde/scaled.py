"""Scaled: a number times an operator."""

from typing import Any

import numpy as np
import scipy.sparse as sp
from jaxtyping import Array, Float, PyTree

from bilevel import vector
from bilevel_pde.operator import Operator


class Scaled(Operator):
    """c A.

    **Arguments:**

    - `factor`: c, a real number, traced or not.
    - `operator`: A.
    """

    factor: Float[Array, ""] | float
    operator: Operator

    @classmethod
    def of(cls, factor: Array | float, operator: Operator) -> Operator:
        """C A; a number in front of a scaled operator joins the one that is there."""
        if isinstance(operator, Scaled):
            return cls(factor * operator.factor, operator.operator)
        return cls(factor, operator)

    @property
    def like(self) -> PyTree:
        """As of A."""
        return self.operator.like

    @property
    def range_like(self) -> PyTree:
        """As of A."""
        return self.operator.range_like

    def matvec(self, v: PyTree) -> PyTree:
        """C A v."""
        return vector.scale(self.factor, self.operator.matvec(v))

    def rmatvec(self, v: PyTree) -> PyTree:
        """C Aᵀ v."""
        return vector.scale(self.factor, self.operator.rmatvec(v))

    def transposed(self) -> "Scaled":
        """C Aᵀ."""
        return Scaled(self.factor, self.operator.transposed())

    def diagonal(self) -> PyTree | None:
        """C times the diagonal of A."""
        diagonal = self.operator.diagonal()
        return None if diagonal is None else vector.scale(self.factor, diagonal)

    def to_scipy(self) -> sp.csr_array:
        """C times the matrix of A."""
        return sp.csr_array(self.operator.to_scipy() * float(np.asarray(self.factor)))

    def entries(self) -> tuple[Any, Any, Array]:
        """Those of A, times c."""
        rows, columns, values = self.operator.entries()
        return rows, columns, vector.scale(self.factor, values)

    @property
    def symmetric(self) -> bool | None:
        """As of A."""
        return self.operator.symmetric

    @property
    def positive_definite(self) -> bool | None:
        """As of A where c is known and positive."""
        if isinstance(self.factor, float | int | np.generic):
            return self.operator.positive_definite if self.factor > 0 else None
        return None
