"""Sum: operators that act side by side."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse as sp
from jaxtyping import Array, Float, PyTree

from bilevel import vector
from bilevel_pde.grid import Grid
from bilevel_pde.operator import Operator
from bilevel_pde.scaled import Scaled
from bilevel_pde.triangle import Part


class Sum(Operator):
    """A + B + ...

    **Arguments:**

    - `terms`: at least one operator, all between the same fields.

    **Raises:** `ValueError` for terms between different fields: of other shapes, on grids with
    other points, or in another precision.
    """

    terms: tuple[Operator, ...]

    def __check_init__(self) -> None:
        """Refuse terms that do not fit."""
        first = self.terms[0]
        fields = _kinds((first.like, first.range_like))
        grid = grid_of(first)
        for term in self.terms[1:]:
            if _kinds((term.like, term.range_like)) != fields:
                names = " + ".join(f"{type(t).__name__} on {_described(t)}" for t in (first, term))
                msg = f"Sum: operators should be between the same fields, got {names}."
                raise ValueError(msg)
            other = grid_of(term)
            grid = grid or other
            if grid is not None and other is not None and not grid.coincides(other):
                msg = (
                    f"Sum: operators should be on the same points, got {type(first).__name__} on "
                    f"{grid} and {type(term).__name__} on {other}."
                )
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

    def triangle(self, part: Part, *, diagonal: bool) -> "Sum":
        """The sum of those of the terms."""
        return Sum(tuple(term.triangle(part, diagonal=diagonal) for term in self.terms))

    def norm_bound(self) -> Float[Array, ""]:
        """The sum of the terms' bounds."""
        return functools.reduce(jnp.add, (term.norm_bound() for term in self.terms))

    @property
    def symmetric(self) -> bool | None:
        """Whether every term is; not where just one is not."""
        known = [term.symmetric for term in self.terms]
        if all(known):
            return True
        return False if known.count(False) == 1 and known.count(None) == 0 else None

    @property
    def positive_definite(self) -> bool | None:
        """Whether every term is."""
        if self.symmetric is False:
            return False
        return True if all(term.positive_definite for term in self.terms) else None

    @property
    def singular(self) -> bool:
        """Whether every term is known to map constants to zero."""
        return all(term.singular for term in self.terms)


def _kinds(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: (tuple(leaf.shape), str(leaf.dtype)), tree)


def _described(operator: Operator) -> str:
    kinds = [f"{leaf.dtype}{list(leaf.shape)}" for leaf in jax.tree.leaves(operator.like)]
    return ", ".join(kinds)


def grid_of(operator: Operator) -> Grid | None:
    """The grid of an operator from its fields to themselves, where it is on one."""
    while isinstance(operator, Scaled | Sum):
        operator = operator.operator if isinstance(operator, Scaled) else operator.terms[0]
    grid = getattr(operator, "grid", None)
    return grid if isinstance(grid, Grid) else None


def joined(indices: list[Any]) -> Any:
    """Indices one after another, on the host where all of them are there."""
    on_host = all(isinstance(part, np.ndarray) for part in indices)
    return np.concatenate(indices) if on_host else jnp.concatenate(indices)
