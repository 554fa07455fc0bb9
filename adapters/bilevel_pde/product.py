"""Product: one operator after another."""

import itertools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse as sp
from jax.core import Tracer
from jaxtyping import Array, Float, PyTree

from bilevel import vector
from bilevel.solver.base import IncompatibleError
from bilevel_pde.diffusion import Diffusion
from bilevel_pde.listed_entries import diagonal_like
from bilevel_pde.materialise import materialise
from bilevel_pde.operator import Operator
from bilevel_pde.scaled import Scaled
from bilevel_pde.shift import shift
from bilevel_pde.stencil import Stencil
from bilevel_pde.sum import grid_of

MOST_MATCHED = 2**19
"""Entries of a factor that are matched on the host for a diagonal, each time it is asked for."""


class Product(Operator):
    """A B: first B, then A.

    **Arguments:**

    - `left`: A; `right`: B, whose result A acts on.

    **Raises:** `ValueError` for operators that do not follow one another: between fields of
    different shapes, or on grids with other points.
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
        first, last = _factor_at(self.right, "left"), _factor_at(self.left, "right")
        grid, other = grid_of(first), grid_of(last)
        if grid is not None and other is not None and not other.coincides(grid):
            msg = (
                f"Product: operators should be on the same points, got {type(last).__name__} on "
                f"{other} after {type(first).__name__} on {grid}."
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
        return self.left.matvec(jax.tree.map(materialise, self.right.matvec(v)))

    def rmatvec(self, v: PyTree) -> PyTree:
        """Bᵀ (Aᵀ v)."""
        return self.right.rmatvec(jax.tree.map(materialise, self.left.rmatvec(v)))

    def transposed(self) -> "Product":
        """Bᵀ Aᵀ."""
        return Product(self.right.transposed(), self.left.transposed())

    def diagonal(self) -> PyTree | None:
        """Σₖ A[i, k] B[k, i], from the pairs of entries that meet there and no others.

        `None` for a rectangular product, and where the factors do not list their entries, or
        their rows and columns are traced, or there are more than half a million of them, of
        which matching takes seconds: pde.from_scipy(product.to_scipy()) then has a diagonal.
        Factors on a grid are matched by their offsets, whatever their size.
        """
        if self.shape[0] != self.shape[1] or _kinds(self.like) != _kinds(self.range_like):
            return None
        on_grid = [_stencil_of(factor) for factor in (self.left, self.right)]
        if on_grid[0] is not None and on_grid[1] is not None:
            return _diagonal_of(on_grid[0], on_grid[1])
        try:
            rows, inner, left = self.left.entries()
            outer, columns, right = self.right.entries()
        except IncompatibleError:
            return None
        if any(isinstance(part, Tracer) for part in (rows, inner, outer, columns)):
            return None
        if max(len(rows), len(outer)) > MOST_MATCHED:
            return None
        width = vector.size(self.left.like)
        ahead = np.asarray(rows, np.int64) * width + np.asarray(inner)
        back = np.asarray(columns, np.int64) * width + np.asarray(outer)
        places = np.intersect1d(ahead, back)
        factors = [
            _at(places, numbers, values) for numbers, values in ((ahead, left), (back, right))
        ]
        return diagonal_like(self.like, places // max(width, 1), factors[0] * factors[1])

    @property
    def singular(self) -> bool:
        """Whether B is known to map constants to zero."""
        return self.right.singular

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


def _factor_at(operator: Operator, end: Literal["left", "right"]) -> Operator:
    """The first or last factor of products of products, without numbers in front."""
    while isinstance(operator, Product | Scaled):
        operator = operator.operator if isinstance(operator, Scaled) else getattr(operator, end)
    return operator


def _stencil_of(operator: Operator) -> Stencil | None:
    if isinstance(operator, Diffusion):
        return operator.stencil()
    return operator if isinstance(operator, Stencil) else None


def _diagonal_of(left: Stencil, right: Stencil) -> Array:
    """Σₒ A's coefficient of the way there times B's, over there, of the way back."""
    grid = left.grid
    periodic = tuple(grid.is_periodic(axis) for axis in range(grid.ndim))
    total = jnp.zeros(grid.shape, grid.dtype)
    for there, back in itertools.product(left.offsets, right.offsets):
        around = (a + b for a, b in zip(there, back, strict=True))
        if all(
            step % points == 0 if closed else step == 0
            for step, points, closed in zip(around, grid.shape, periodic, strict=True)
        ):
            total += left.coefficient(there) * shift(right.coefficient(back), there, periodic)
    return total


def _at(places: np.ndarray, numbers: np.ndarray, values: Array) -> Array:
    """Values added up by their place, those elsewhere left out."""
    index = np.searchsorted(places, numbers)
    inside = np.flatnonzero(np.append(places, -1)[index] == numbers)
    return jax.ops.segment_sum(values[inside], index[inside], len(places))


def _kinds(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: (tuple(leaf.shape), str(leaf.dtype)), tree)
