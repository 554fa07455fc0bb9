"""Galerkin: coarse operators R A P of a stencil, with an interpolation made of the stencil."""

import functools
import itertools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from bilevel.solver.base import IncompatibleError
from bilevel_pde.boundary import Centering, Dirichlet
from bilevel_pde.definiteness import Definiteness, Offset
from bilevel_pde.grid import Grid
from bilevel_pde.shift import shift
from bilevel_pde.stencil import Stencil

FEWEST = 8
"""An axis of fewer points is not made coarser."""


class Interpolation(eqx.Module):
    """Interpolation that keeps A u = 0 at the fine points between the coarse ones.

    Every second point along some axes is a coarse one.  A point between two of them along one
    axis takes their values in the parts that the equation of its own row asks for, once what
    it couples to on either side is added up; points between more of them follow from those
    (Dendy, Black box multigrid, J. Comput. Phys. 48, 1982).  Where coefficients jump, the
    flux is continuous then, which linear interpolation misses.

    - `grid`, `below`: the fine and the coarse grid.
    - `axes`: those along which every second point is coarse.
    - `parts`: for each direction to a coarse point, its part in the points that have one
        there, and nothing else.
    """

    grid: Grid = eqx.field(static=True)
    below: Grid = eqx.field(static=True)
    axes: tuple[int, ...] = eqx.field(static=True)
    parts: dict[Offset, Array]

    def prolong(self, field: Array) -> Array:
        """A field of the coarse grid interpolated to the fine one."""
        total = placed(self.grid, self.axes, field, (0,) * self.grid.ndim)
        by_kind: dict[Offset, Any] = {}
        for direction, part in self.parts.items():
            seen = field
            for axis in self.axes:
                if direction[axis]:
                    seen = seen_from(self.grid, seen, axis, direction[axis])
            kind = tuple(abs(step) for step in direction)
            by_kind[kind] = by_kind.get(kind, 0.0) + part.astype(seen.dtype) * seen
        for kind, values in by_kind.items():
            total = total + placed(self.grid, self.axes, values, kind)
        return total

    def restrict(self, field: Array) -> Array:
        """The transpose of `prolong`."""
        like = jax.ShapeDtypeStruct(self.below.shape, field.dtype)
        return jax.linear_transpose(self.prolong, like)(field)[0]


def interpolation(operator: Stencil, axes: tuple[int, ...]) -> Interpolation:
    """The interpolation of a stencil's own rows."""
    grid, ndim = operator.grid, operator.grid.ndim
    periodic = tuple(grid.is_periodic(axis) for axis in range(ndim))
    ones = jnp.ones(grid.shape, grid.dtype)
    # What is multiplied with points outside must not count.
    inside = {
        offset: operator.coefficient(offset) * shift(ones, offset, periodic)
        for offset in operator.offsets
    }
    found: dict[Offset, Any] = {}
    for count in range(1, len(axes) + 1):
        for between in itertools.combinations(axes, count):
            collapsed: dict[Offset, Any] = {}
            for offset, coefficient in inside.items():
                kept = tuple(o if d in between else 0 for d, o in enumerate(offset))
                collapsed[kept] = collapsed.get(kept, 0.0) + coefficient
            centre = collapsed.pop((0,) * ndim)
            centre = jnp.where(centre == 0, 1.0, centre)
            for signs in itertools.product((-1, 1), repeat=count):
                direction = tuple(
                    signs[between.index(d)] if d in between else 0 for d in range(ndim)
                )
                found[direction] = _followed(collapsed, found, direction, periodic) / centre
    parts = {direction: _taken(grid, axes, field, direction) for direction, field in found.items()}
    return Interpolation(grid, _below(grid, axes), axes, parts)


def _followed(
    collapsed: dict[Offset, Any], found: dict[Offset, Any], direction: Offset, periodic: Any
) -> Any:
    """The part of the coarse point in a direction by all paths from neighbour to neighbour."""
    total: Any = 0.0
    for offset, coefficient in collapsed.items():
        if all(o in {0, s} for o, s in zip(offset, direction, strict=True)):
            rest = tuple(s - o for o, s in zip(offset, direction, strict=True))
            further = shift(found[rest], offset, periodic) if any(rest) else 1.0
            total = total - coefficient * further
    return total


def galerkin(operator: Stencil, axes: tuple[int, ...]) -> tuple[Stencil, Interpolation]:
    """Pᵀ A P on the grid of every second point along some axes, and P.

    P is that of the symmetric part of A, so that what is made of Aᵀ is the transpose.

    **Raises:** `IncompatibleError` for a stencil that reaches further than one point.
    """
    if any(abs(step) > 1 for offset in operator.offsets for step in offset):
        msg = (
            "Multigrid: coarse='galerkin' takes stencils that reach one point along each axis. Use "
            "coarse='rediscretised', or pde.AlgebraicMultigrid."
        )
        raise IncompatibleError(msg)
    even: Any = operator if operator.symmetric else operator + operator.transposed()
    transfer = interpolation(even, axes)
    grid = transfer.below
    colours = [
        _colours(points, periodic=grid.is_periodic(d)) for d, points in enumerate(grid.shape)
    ]
    counts = [int(colour.max()) + 1 for colour in colours]

    def image(number: Array) -> Array:
        """Pᵀ A P on the points of one colour."""
        field: Any = jnp.ones((1,) * grid.ndim, bool)
        for axis in reversed(range(grid.ndim)):
            mine = jnp.asarray(colours[axis]) == number % counts[axis]
            field = field & mine.reshape([-1 if d == axis else 1 for d in range(grid.ndim)])
            number = number // counts[axis]
        return transfer.restrict(operator.matvec(transfer.prolong(field.astype(grid.dtype))))

    images = jax.lax.map(image, jnp.arange(np.prod(counts)))
    offsets: tuple[Offset, ...] = tuple(itertools.product((-1, 0, 1), repeat=grid.ndim))

    def coefficient(offset: Array) -> Array:
        """What a point sees at an offset: the neighbour is the only one of its colour."""
        which: Any = jnp.zeros((1,) * grid.ndim, int)
        there: Any = jnp.ones((1,) * grid.ndim, bool)
        for axis, points in enumerate(grid.shape):
            at = jnp.arange(points) + offset[axis]
            shape = [-1 if d == axis else 1 for d in range(grid.ndim)]
            number = jnp.asarray(colours[axis])[at % points].reshape(shape)
            which = which * counts[axis] + number
            if not grid.is_periodic(axis):
                there = there & ((at >= 0) & (at < points)).reshape(shape)
        found = jnp.take_along_axis(images, which[None], axis=0)[0]
        return jnp.where(there, found, 0.0)

    # In a loop, or XLA would look them up anew wherever they are read.
    fields = jax.lax.map(coefficient, jnp.asarray(offsets))
    terms: dict[Offset, Any] = {
        offset: (field,) for offset, field in zip(offsets, fields, strict=True)
    }
    known = Definiteness(operator.symmetric, None, operator.definiteness.singular)
    coarse = Stencil.folded(grid, terms, None, known)
    return (coarse.declared(symmetric=True) if operator.symmetric else coarse), transfer


def _below(grid: Grid, axes: tuple[int, ...]) -> Grid:
    """The grid of coarse points; conditions on its sides are in its stencil."""
    shape = tuple(
        len(range(start_of(grid, axis), points, 2)) if axis in axes else points
        for axis, points in enumerate(grid.shape)
    )
    # Cells all have the same volume.
    centering: tuple[Centering, ...] = tuple(
        "vertex" if grid.is_periodic(axis) or start_of(grid, axis) else "cell"
        for axis in range(grid.ndim)
    )
    return Grid(shape, grid.extent, grid.boundary, centering, grid.origin, grid.dtype)


def start_of(grid: Grid, axis: int) -> int:
    """The first coarse point: not the one next to a vertex whose value is prescribed."""
    held = all(isinstance(side, Dirichlet) for side in grid.boundary[axis])
    return int(held and grid.centering[axis] == "vertex")


def placed(
    grid: Grid,
    axes: tuple[int, ...],
    field: Array,
    kind: Offset,
    shape: tuple[int, ...] | None = None,
) -> Array:
    """Values at coarse points, or along axes of the kind 1 at those between, on the fine grid.

    **Arguments:**

    - `shape`: of the fine field, where it is a part of the grid's.
    """
    widths = [(0, 0, 0)] * grid.ndim
    for axis in axes:
        first = (start_of(grid, axis) + kind[axis]) % 2
        last = first + 2 * (field.shape[axis] - 1)
        widths[axis] = (first, (shape or grid.shape)[axis] - 1 - last, 1)
    return jax.lax.pad(field, np.zeros((), field.dtype), widths)


def _taken(grid: Grid, axes: tuple[int, ...], field: Array, direction: Offset) -> Array:
    slices = [slice(None)] * grid.ndim
    for axis in axes:
        slices[axis] = slice((start_of(grid, axis) + direction[axis]) % 2, None, 2)
    return field[tuple(slices)]


def seen_from(grid: Grid, field: Array, axis: int, step: int) -> Array:
    """For the points between coarse ones along an axis, the coarse ones before or behind them."""
    fewer, start = field.shape[axis], start_of(grid, axis)
    move = -start if step < 0 else 1 - start
    if grid.is_periodic(axis) and move:
        offset = tuple(move * int(d == axis) for d in range(grid.ndim))
        field, move = shift(field, offset, (True,) * grid.ndim), 0
    count = grid.shape[axis] - fewer
    widths = [(0, 0, 0)] * grid.ndim
    widths[axis] = (-move, count - fewer + move, 0)
    return jax.lax.pad(field, np.zeros((), field.dtype), widths)


@functools.cache
def _colours(points: int, *, periodic: bool) -> np.ndarray:
    """Numbers such that three points in a row have three different ones."""
    index = np.arange(points)
    if not periodic or points % 3 == 0:
        return index % 3
    fours = points % 3
    if points < 4 * fours:
        return index
    return np.where(index < 4 * fours, index % 4, (index - 4 * fours) % 3)
