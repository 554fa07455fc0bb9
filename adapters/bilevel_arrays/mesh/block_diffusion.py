"""Diffusion on blocks: fluxes through the faces of one device's points."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from bilevel_arrays.mesh.block_stencil import block_colours, in_precision, periodic_axes
from bilevel_arrays.mesh.halo import Halos, Offset, Reach, neighbour
from bilevel_arrays.mesh.layout import Layout
from bilevel_pde.diffusion import Diffusion
from bilevel_pde.faces import mean_of, on_side
from bilevel_pde.grid import Grid

Pieces = tuple[Any, ...]


class BlockDiffusion(eqx.Module):
    """−∇·(k∇u) + c u with the conductances of a block's faces, the shared ones on both sides.

    - `conductances`: for each axis the factors whose product is k/h² on the faces, such as a
        field and what the sides make of it. Along its axis each has one entry, or for every block
        one face more than points.
    - `scales`: for each axis what rows are multiplied with.
    """

    grid: Grid = eqx.field(static=True)
    layout: Layout = eqx.field(static=True)
    conductances: tuple[Pieces, ...]
    scales: tuple[Any, ...]
    reaction: Pieces

    @classmethod
    def of(cls, operator: Diffusion, layout: Layout, *, within: bool = False) -> "BlockDiffusion":
        """The operator in blocks.

        **Arguments:**

        - `within`: whether this is done within `shard_map`, where all of the operator is there.
        """
        grid = operator.grid
        conductances: tuple[Pieces, ...] = ()
        for axis in range(grid.ndim):
            k, line = operator.face_factors(axis)
            points = None if operator.points is None else operator.points[axis]
            if points is None or within or points.shape != grid.shape:
                k = overlapping(grid, layout, k, axis)
            else:
                # The rows next to a block are all that its faces need of its neighbours.
                k = between_points(operator, layout, jnp.asarray(points), axis)
            conductances = (*conductances, (k, overlapping(grid, layout, line, axis)))
        scales = tuple(operator.row_scale(axis) for axis in range(grid.ndim))
        return cls(grid, layout, conductances, scales, operator.reaction)

    @property
    def offsets(self) -> tuple[Offset, ...]:
        """Itself and the next points along each axis."""
        return axis_offsets(self.grid)

    @property
    def reach(self) -> Reach:
        """One point."""
        return Reach.of(self.layout, self.offsets)

    def matvec(self, v: Array) -> Array:
        """A v, of blocks."""
        around = Halos(v, self.layout, self.reach, periodic_axes(self.grid))
        total = jnp.zeros_like(v)
        for piece in self.reaction:
            total += in_precision(piece, v) * v
        for axis in range(self.grid.ndim):
            scale = self.scales[axis]
            low, high = (in_precision(k, v) for k in self._sides(axis))
            below, above = (
                around.moved(tuple(step * int(d == axis) for d in range(v.ndim)))
                for step in (-1, 1)
            )
            flux = low * (v - below)
            flux += high * (v - above)
            total += flux if scale is None else in_precision(scale, v) * flux
        return total

    def diagonal(self) -> Array:
        """The diagonal at the block's points."""
        total = jnp.zeros(self.layout.block(self.grid.shape), self.grid.dtype)
        for piece in self.reaction:
            total += piece
        for axis in range(self.grid.ndim):
            low, high = self._sides(axis)
            scale = self.scales[axis]
            total += low + high if scale is None else scale * (low + high)
        return total

    def colours(self) -> tuple[Array, int]:
        """Colours of the block's points for Gauss-Seidel, and how many there are."""
        return block_colours(self.grid, self.layout, self.offsets)

    def _sides(self, axis: int) -> tuple[Any, Any]:
        """K/h² of the faces below and above each point."""
        low: Any = 1.0
        high: Any = 1.0
        for part in self.conductances[axis]:
            single = part.ndim == 0 or part.shape[axis] == 1
            below = part if single else part[(slice(None),) * axis + (slice(None, -1),)]
            above = part if single else part[(slice(None),) * axis + (slice(1, None),)]
            low, high = low * below, high * above
        return low, high


def axis_offsets(grid: Grid) -> tuple[Offset, ...]:
    """The point itself and the next ones along each axis."""
    axes = range(grid.ndim)
    steps = [tuple(s * int(d == axis) for d in axes) for axis in axes for s in (-1, 1)]
    return ((0,) * grid.ndim, *steps)


def between_points(operator: Diffusion, layout: Layout, points: Array, axis: int) -> Array:
    """What `overlapping` makes of a coefficient's faces, block by block from its points."""
    grid, mean = operator.grid, operator.mean
    closed, last = grid.is_periodic(axis), layout.counts[axis] - 1

    def faces(k: Array) -> Array:
        rows = [neighbour(k, layout, axis, side, 1, periodic=closed) for side in (0, 1)]
        k = jnp.concatenate([rows[0], k, rows[1]], axis)

        def row(index: int) -> Array:
            return jax.lax.slice_in_dim(k, index, index + 1, 1, axis)

        size = k.shape[axis]
        lower = jax.lax.slice_in_dim(k, 0, size - 1, 1, axis)
        upper = jax.lax.slice_in_dim(k, 1, size, 1, axis)
        inner = mean_of(lower, upper, mean)
        if closed:
            return inner
        name = layout.axes[axis]
        place = 0 if layout.counts[axis] == 1 else jax.lax.axis_index(name)
        low = on_side(grid, axis, 0, row(1), row(2), mean, positive=True)
        high = on_side(grid, axis, 1, row(size - 2), row(size - 3), mean, positive=True)
        count = size - 1
        index = jax.lax.broadcasted_iota(jnp.int32, inner.shape, axis)
        inner = jnp.where((index == 0) & (place == 0), low, inner)
        return jnp.where((index == count - 1) & (place == last), high, inner)

    return jax.shard_map(faces, mesh=layout.mesh, in_specs=layout.spec, out_specs=layout.spec)(
        points
    )


def overlapping(grid: Grid, layout: Layout, faces: Any, axis: int) -> Any:
    """A field on faces with those between two blocks twice, once for each."""
    if faces.ndim == 0 or faces.shape[axis] == 1:
        return faces
    xp: Any = np if isinstance(faces, np.ndarray) else jnp
    points, count = grid.shape[axis], layout.counts[axis]
    size = points // count

    def rows(start: int | None, stop: int | None, step: int | None = None) -> Any:
        return faces[(slice(None),) * axis + (slice(start, stop, step),)]

    before, after = faces.shape[:axis], faces.shape[axis + 1 :]
    inner = rows(0, points).reshape(*before, count, size, *after)
    last = rows(size, None, size)
    if grid.is_periodic(axis):
        # Face i is below point i: the one above the last point is the first.
        last = xp.concatenate([last, rows(0, 1)], axis)
    last = last.reshape(*before, count, 1, *after)
    return xp.concatenate([inner, last], axis + 1).reshape(*before, count * (size + 1), *after)
