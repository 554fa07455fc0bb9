"""Bordered: the entries of a matrix with a mean in it, which alone would be a full one."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from bilevel import vector
from bilevel_pde.block import Block
from bilevel_pde.jacobian import Jacobian
from bilevel_pde.mean_operator import Mean
from bilevel_pde.operator import Operator
from bilevel_pde.scaled import Scaled
from bilevel_pde.sum import Sum, joined


class Border(NamedTuple):
    """A multiple of [`Mean`][] somewhere in a matrix.

    - `factor`: in front of it.
    - `row`, `column`: where it begins.
    - `size`: of how many points.
    """

    factor: Any
    row: int
    column: int
    size: int

    def moved(self, rows: int, columns: int) -> "Border":
        """The same in a larger matrix."""
        return self._replace(row=self.row + rows, column=self.column + columns)


Parts = list[tuple[Any, Any, Any]]


def bordered_entries(operator: Operator) -> tuple[int, tuple[Any, Any, Array]]:
    """The entries of a matrix whose means are written with one more unknown each.

    A + c P, with P the mean of n numbers, has the solution of [[A, c 1], [1ᵀ, -n]] (x, m) =
    (b, 0), for m is then the mean of x; so that nothing is full.

    **Returns:** how many unknowns are new, which come last, and rows, columns and values as of
    `Operator.entries`.

    **Raises:** `IncompatibleError` from an operator that does not know its entries.
    """
    parts, borders = _parts(operator)
    size = operator.shape[0]
    for last, border in enumerate(borders, start=size):
        here, points = np.full(border.size, last), np.arange(border.size)
        factor = jnp.asarray(border.factor)
        parts += [
            (border.row + points, here, jnp.broadcast_to(factor, points.shape)),
            (here, border.column + points, np.ones(border.size)),
            (here[:1], here[:1], -np.full(1, float(border.size))),
        ]
    rows, columns = (joined([part[axis] for part in parts]) for axis in (0, 1))
    return len(borders), (rows, columns, jnp.concatenate([part[2] for part in parts]))


def _parts(operator: Operator) -> tuple[Parts, list[Border]]:
    """Lists of entries, and the means."""
    if isinstance(operator, Mean):
        return [], [Border(1.0, 0, 0, operator.grid.size)]
    if isinstance(operator, Scaled):
        parts, borders = _parts(operator.operator)
        factor = operator.factor
        scaled = [
            (rows, columns, vector.scale(factor, jnp.asarray(v))) for rows, columns, v in parts
        ]
        return scaled, [border._replace(factor=factor * border.factor) for border in borders]
    if isinstance(operator, Sum):
        return _together([(term, 0, 0) for term in operator.terms])
    if isinstance(operator, Block):
        heights = np.cumsum([0, *(vector.size(like) for like in operator.range_like)])
        widths = np.cumsum([0, *(vector.size(like) for like in operator.like)])
        return _together(
            [
                (block, int(heights[i]), int(widths[j]))
                for i, row in enumerate(operator.rows)
                for j, block in enumerate(row)
                if block is not None
            ]
        )
    if isinstance(operator, Jacobian):
        parts, borders = _parts(operator.matrix)
        parts.append(operator.rest())
        if operator.flipped:
            # The mean is symmetric, and only its place changes.
            parts = [(columns, rows, values) for rows, columns, values in parts]
            borders = [b._replace(row=b.column, column=b.row) for b in borders]
        return parts, borders
    return [operator.entries()], []


def _together(terms: list[tuple[Operator, int, int]]) -> tuple[Parts, list[Border]]:
    parts: Parts = []
    borders: list[Border] = []
    for term, above, before in terms:
        found, means = _parts(term)
        parts += [(rows + above, columns + before, values) for rows, columns, values in found]
        borders += [border.moved(above, before) for border in means]
    return parts, borders
