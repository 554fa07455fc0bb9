"""Halos: the points next to a block that its neighbours hold, sent by `jax.lax.ppermute`."""

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from bilevel_arrays.mesh.layout import Layout
from bilevel_pde.shift import shift

Offset = tuple[int, ...]
Side = Literal[0, 1]


class Reach(NamedTuple):
    """How far a stencil reads beyond a block.

    - `widths`: for each axis of the grid the points below and above; zero along axes that are
        not cut.
    - `corners`: whether an offset moves along two cut axes at once, so that corners are read.
    """

    widths: tuple[tuple[int, int], ...]
    corners: bool

    @classmethod
    def of(cls, layout: Layout, offsets: Iterable[Offset]) -> "Reach":
        """What offsets reach."""
        given = tuple(offsets)
        widths = [(0, 0)] * len(layout.axes)
        for axis in layout.cut:
            steps = [offset[axis] for offset in given]
            widths[axis] = (max([0, *(-step for step in steps)]), max([0, *steps]))
        corners = any(sum(offset[axis] != 0 for axis in layout.cut) > 1 for offset in given)
        return cls(tuple(widths), corners)

    def check(self, owner: str, layout: Layout, shape: Sequence[int]) -> None:
        """Refuse blocks that are thinner than what is read of them.

        **Raises:** `ValueError`.
        """
        block = layout.block(shape)
        for axis in layout.cut:
            widest = max(self.widths[axis])
            if block[axis] >= widest:
                continue
            most = shape[axis] // widest
            msg = (
                f"partition: blocks along the grid's axis {axis} should be at least as thick as "
                f"the {widest} points that the {owner} reads of a neighbour, got {block[axis]} "
                f"of {shape[axis]} points on {layout.counts[axis]} devices. Cut this axis into "
                f"at most {max(most, 1)} blocks, or cut another one."
            )
            raise ValueError(msg)


class Halos:
    """A block with what its neighbours hold around it, within `shard_map`.

    Zero beyond the sides of the domain, as in [`bilevel_pde.shift`][].
    """

    def __init__(self, block: Array, layout: Layout, reach: Reach, periodic: tuple[bool, ...]):
        self.layout, self.reach, self.periodic = layout, reach, periodic
        self.block = block
        self.rows: dict[tuple[int, Side], Array] = {}
        self.extended = block
        if reach.corners:
            # Axis after axis, so that corners come along.
            for axis in layout.cut:
                low, high = self._received(self.extended, axis)
                parts = [part for part in (low, self.extended, high) if part is not None]
                self.extended = jnp.concatenate(parts, axis)
            return
        for axis in layout.cut:
            for side, part in enumerate(self._received(block, axis)):
                if part is not None:
                    self.rows[axis, 1 if side else 0] = part

    def _received(self, field: Array, axis: int) -> tuple[Array | None, Array | None]:
        low, high = self.reach.widths[axis]
        closed = self.periodic[axis]
        return (
            neighbour(field, self.layout, axis, 0, low, periodic=closed) if low else None,
            neighbour(field, self.layout, axis, 1, high, periodic=closed) if high else None,
        )

    def moved(self, offset: Offset) -> Array:
        """The block with at each point the value `offset` points further."""
        rest = list(offset)
        field = self.extended
        wraps = tuple(
            closed and axis not in self.layout.cut for axis, closed in enumerate(self.periodic)
        )
        for axis in self.layout.cut:
            rest[axis] = 0
            if self.reach.corners:
                start = self.reach.widths[axis][0] + offset[axis]
                field = jax.lax.slice_in_dim(field, start, start + self.block.shape[axis], 1, axis)
            elif offset[axis]:
                field = self._with_rows(axis, offset[axis])
        return shift(field, tuple(rest), wraps)

    def _with_rows(self, axis: int, step: int) -> Array:
        return joined(self.block, self.rows[axis, 1 if step > 0 else 0], axis, step)


def joined(block: Array, rows: Array, axis: int, step: int) -> Array:
    """The block with at each point the value `step` points further, from the rows beyond it."""
    # Paddings fuse into whatever reads them, which joined slices do not.
    along = tuple(step * int(d == axis) for d in range(block.ndim))
    inside = shift(block, along, (False,) * block.ndim)
    spare, far = rows.shape[axis] - abs(step), block.shape[axis] - abs(step)
    padding = [(0, 0, 0)] * block.ndim
    padding[axis] = (far, -spare, 0) if step > 0 else (-spare, far, 0)
    return inside + jax.lax.pad(rows, np.zeros((), rows.dtype), padding)


def neighbour(
    field: Array, layout: Layout, axis: int, side: Side, width: int, *, periodic: bool
) -> Array:
    """Within `shard_map`, the rows of the block below (0) or above (1) that lie next to this one.

    Zero where there is no such block.
    """
    name, count, size = layout.axes[axis], layout.counts[axis], field.shape[axis]
    start = 0 if side else size - width
    rows = jax.lax.slice_in_dim(field, start, start + width, 1, axis)
    if count == 1:
        return rows if periodic else jnp.zeros_like(rows)
    step = -1 if side else 1
    pairs = [(i, (i + step) % count) for i in range(count) if periodic or 0 <= i + step < count]
    return jax.lax.ppermute(rows, name, pairs)
