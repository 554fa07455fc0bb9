"""Interpolation on blocks that follows the coefficients, of Galerkin's coarse operators."""

from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array

from bilevel_arrays.mesh.halo import joined, neighbour
from bilevel_arrays.mesh.layout import Layout
from bilevel_pde.galerkin import Interpolation, placed, seen_from, start_of


class BlockInterpolation(eqx.Module):
    """An [`Interpolation`][] between two grids in blocks.

    - `interpolation`: its parts lie on the mesh as fields do.
    - `gathered`: whether the coarse field is whole on every device.
    """

    layout: Layout = eqx.field(static=True)
    interpolation: Interpolation
    gathered: bool = eqx.field(static=True)

    @classmethod
    def of(
        cls, layout: Layout, interpolation: Interpolation, *, gathered: bool
    ) -> "BlockInterpolation | None":
        """The interpolation in blocks; `None` where blocks of the grids do not lie together."""
        fine, coarse = interpolation.grid, interpolation.below
        if not (layout.divides(fine) and layout.divides(coarse)):
            return None
        for axis in layout.cut:
            if axis in interpolation.axes and fine.shape[axis] != 2 * coarse.shape[axis]:
                return None
        return cls(layout, interpolation, gathered)

    def prolong(self, field: Array) -> Array:
        """A coarse field, in blocks or whole, to fine blocks."""
        if self.gathered:
            field = self.layout.own(field, self.layout.spec)
        return self._prolonged(field)

    def restrict(self, field: Array) -> Array:
        """Fine blocks to a coarse field, in blocks or whole: the transpose."""
        shape = self.layout.block(self.interpolation.below.shape)
        like = jax.ShapeDtypeStruct(shape, field.dtype)
        coarse = jax.linear_transpose(self._prolonged, like)(field)[0]
        return self.layout.whole(coarse) if self.gathered else coarse

    def _prolonged(self, field: Array) -> Array:
        grid, axes = self.interpolation.grid, self.interpolation.axes
        shape = self.layout.block(grid.shape)
        total = placed(grid, axes, field, (0,) * grid.ndim, shape)
        by_kind: dict[tuple[int, ...], Any] = {}
        seen: dict[tuple[int, ...], Array] = {(0,) * grid.ndim: field}
        for direction, part in self.interpolation.parts.items():
            for axis in axes:
                # Along one axis more than what was seen already.
                known = tuple(step * int(d < axis) for d, step in enumerate(direction))
                found = tuple(step * int(d <= axis) for d, step in enumerate(direction))
                if found not in seen:
                    seen[found] = self._seen(seen[known], axis, direction[axis])
            kind = tuple(abs(step) for step in direction)
            term = part.astype(field.dtype) * seen[direction]
            by_kind[kind] = by_kind[kind] + term if kind in by_kind else term
        for kind, values in by_kind.items():
            total = total + placed(grid, axes, values, kind, shape)
        return total

    def _seen(self, field: Array, axis: int, step: int) -> Array:
        """For the points between coarse ones along an axis, the coarse ones before or behind."""
        grid = self.interpolation.grid
        if axis not in self.layout.cut:
            return seen_from(grid, field, axis, step)
        start = start_of(grid, axis)
        move = -start if step < 0 else 1 - start
        if move == 0:
            return field
        closed = grid.is_periodic(axis)
        rows = neighbour(field, self.layout, axis, 1 if move > 0 else 0, 1, periodic=closed)
        return joined(field, rows, axis, move)
