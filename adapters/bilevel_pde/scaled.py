"""Scaled: a number times an operator."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import scipy.sparse as sp
from jax.core import Tracer
from jaxtyping import Array, Float, PyTree

from bilevel import vector
from bilevel_pde.operator import Operator
from bilevel_pde.triangle import Part


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

    def triangle(self, part: Part, *, diagonal: bool) -> "Scaled":
        """C times that of A."""
        return Scaled(self.factor, self.operator.triangle(part, diagonal=diagonal))

    def norm_bound(self) -> Float[Array, ""]:
        """|c| times that of A."""
        return jnp.abs(jnp.asarray(self.factor)) * self.operator.norm_bound()

    @property
    def symmetric(self) -> bool | None:
        """As of A."""
        return self.operator.symmetric

    @property
    def positive_definite(self) -> bool | None:
        """As of A where c is known and positive; the sign of a traced c is not known."""
        known = self.operator.positive_definite
        # That A is not positive definite for another reason than its sign is -A's, too.
        if self.symmetric is False or isinstance(self.factor, Tracer):
            return False if self.symmetric is False else None
        factor = float(np.asarray(self.factor))
        if factor > 0:
            return known
        # Of the negative of a matrix that is not definite nothing is known.
        return False if factor == 0 or known else None

    @property
    def singular(self) -> bool:
        """As of A."""
        return self.operator.singular
