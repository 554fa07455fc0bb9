"""Sum: operators that act side by side."""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
import scipy.sparse as sp
from jaxtyping import Array, PyTree

from bilevel import vector
from bilevel_pde.operator import Operator


class Sum(Operator):
    """A + B + ...

    **Arguments:**

    - `terms`: at least one operator, all between the same fields.

    **Raises:** `ValueError` for terms of different shapes.
    """

    terms: tuple[Operator, ...]

    def __check_init__(self) -> None:
        """Refuse terms that do not fit."""
        shapes = {term.shape for term in self.terms}
        if len(shapes) != 1:
            found = ", ".join(f"{type(term).__name__} {term.shape}" for term in self.terms)
            msg = f"Sum: operators should be between the same fields, got {found}."
            raise ValueError(msg)

    @classmethod
    def of(cls, *operators: Operator) -> "Sum":
        """The sum; sums among the operators join it."""
        terms: list[Operator] = []
        for operator in operators:
            terms += operator.terms if isinstance(operator, Sum) else (operator,)
        return cls(tuple(terms))

    @property
    def like(self) -> PyTree:
        """As of every term."""
        return self.terms[0].like

    @property
    def range_like(self) -> PyTree:
        """As of every term."""
        return self.terms[0].range_like

    def matvec(self, v: PyTree) -> PyTree:
        """A v + B v + ..."""
        return functools.reduce(vector.add, (term.matvec(v) for term in self.terms))

    def rmatvec(self, v: PyTree) -> PyTree:
        """Aᵀ v + Bᵀ v + ..."""
        return functools.reduce(vector.add, (term.rmatvec(v) for term in self.terms))

    def transposed(self) -> "Sum":
        """Aᵀ + Bᵀ + ..."""
        return Sum(tuple(term.transposed() for term in self.terms))

    def diagonal(self) -> PyTree | None:
        """The sum of the diagonals, where every term has one."""
        diagonals = [term.diagonal() for term in self.terms]
        if any(diagonal is None for diagonal in diagonals):
            return None
        return functools.reduce(vector.add, diagonals)

    def to_scipy(self) -> sp.csr_array:
        """The sum of the matrices."""
        matrices = (term.to_scipy() for term in self.terms)
        return sp.csr_array(functools.reduce(lambda a, b: a + b, matrices))

    def entries(self) -> tuple[Any, Any, Array]:
        """Those of every term, one after another."""
        parts = [term.entries() for term in self.terms]
        rows, columns = (joined([part[axis] for part in parts]) for axis in (0, 1))
        return rows, columns, jnp.concatenate([part[2] for part in parts])

    @property
    def symmetric(self) -> bool | None:
        """Whether every term is."""
        return True if all(term.symmetric for term in self.terms) else None

    @property
    def positive_definite(self) -> bool | None:
        """Whether every term is."""
        return True if all(term.positive_definite for term in self.terms) else None


def joined(indices: list[Any]) -> Any:
    """Indices one after another, on the host where all of them are there."""
    on_host = all(isinstance(part, np.ndarray) for part in indices)
    return np.concatenate(indices) if on_host else jnp.concatenate(indices)
