"""Transfers on blocks: interpolation between two grids whose blocks lie over one another."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from bilevel_arrays.mesh.halo import neighbour
from bilevel_arrays.mesh.layout import Layout
from bilevel_pde.coarsening import Transfer
from bilevel_pde.transfer import AxisTransfer

Direction = tuple[Any, ...]


class Lookup(eqx.Module):
    """For each point of one axis the entries of another grid's, with weights.

    - `below`, `above`: so many points of the neighbouring blocks are read.
    - `columns`: pairs of indices into a block with these points around it, and weights, each
        with one entry a point along the axis.
    """

    axis: int = eqx.field(static=True)
    below: int = eqx.field(static=True)
    above: int = eqx.field(static=True)
    periodic: bool = eqx.field(static=True)
    columns: tuple[tuple[Any, Any], ...]

    @classmethod
    def of(
        cls,
        layout: Layout,
        axis: int,
        table: tuple[np.ndarray, np.ndarray],
        source: int,
        *,
        wraps: bool,
    ) -> "Lookup | None":
        """A table in blocks; `None` where it reaches beyond the next block.

        **Arguments:**

        - `source`: points of the grid that is read.
        """
        indices, weights = table
        count, ndim = layout.counts[axis], len(layout.axes)
        size = source // count
        block = np.repeat(np.arange(count), len(indices) // count)[:, None]
        local = indices - block * size
        if wraps:
            # The short way around.
            local = (local + source // 2) % source - source // 2
        local = np.where(weights == 0, np.clip(local, 0, size - 1), local)
        below, above = max(0, -int(local.min())), max(0, int(local.max()) - size + 1)
        if max(below, above) > size:
            return None
        shape = [len(indices) if d == axis else 1 for d in range(ndim)]
        columns = tuple(
            ((places + below).astype(np.int32).reshape(shape), part.reshape(shape))
            for places, part in zip(local.T, weights.T, strict=True)
        )
        return cls(axis, below, above, wraps, columns)

    def __call__(self, field: Array, layout: Layout) -> Array:
        """A block of the one grid from a block of the other."""
        parts = [field]
        for side, width in ((0, self.below), (1, self.above)):
            if width:
                rows = neighbour(
                    field, layout, self.axis, 1 if side else 0, width, periodic=self.periodic
                )
                parts = [*parts, rows] if side else [rows, *parts]
        extended = jnp.concatenate(parts, self.axis)
        total: Any = None
        for places, part in self.columns:
            read = jnp.take(extended, places.reshape(-1), axis=self.axis)
            term = jnp.asarray(part).astype(field.dtype) * read
            total = term if total is None else total + term
        return total


class Nested(eqx.Module):
    """Interpolation along one axis whose fine points stand regularly between the coarse ones.

    - `transfer`: of one block; `whole`: of the grid.
    - `volumes`: shares of a cell that fine points, and coarse ones, stand for, where not all are 1.
    """

    axis: int = eqx.field(static=True)
    transfer: AxisTransfer = eqx.field(static=True)
    volumes: tuple[Any, Any] | None

    @classmethod
    def of(cls, layout: Layout, axis: int, transfer: AxisTransfer) -> "Nested | None":
        """The interpolation in blocks; `None` where it is not regular, or blocks are not."""
        count, ndim = layout.counts[axis], len(layout.axes)
        if transfer.nested is None or transfer.fine != 2 * transfer.coarse:
            return None
        shape = [-1 if d == axis else 1 for d in range(ndim)]
        fine, coarse = transfer.weights(transfer.fine), transfer.weights(transfer.coarse)
        volumes = None
        if fine is not None and coarse is not None:
            volumes = (fine.reshape(shape), coarse.reshape(shape))
        block = dataclasses.replace(
            transfer, fine=transfer.fine // count, coarse=transfer.coarse // count
        )
        return cls(axis, block, volumes)

    def prolong(self, field: Array, layout: Layout) -> Array:
        """A coarse block to a fine one."""
        sides, last = self.transfer.sides, layout.counts[self.axis] - 1
        place = jax.lax.axis_index(layout.axes[self.axis])
        rows: list[Array] = []
        for side, end in ((0, 0), (1, last)):
            closed = "wrap" in sides
            beyond = neighbour(field, layout, self.axis, 1 if side else 0, 1, periodic=closed)
            reflection = 0.0 if closed else self.transfer.reflection(sides[side])
            if reflection:
                index = field.shape[self.axis] - 1 if side else 0
                outermost = jax.lax.slice_in_dim(field, index, index + 1, 1, self.axis)
                beyond = jnp.where(place == end, reflection * outermost, beyond)
            rows.append(beyond)
        extended = jnp.concatenate([rows[0], field, rows[1]], self.axis)
        return self.transfer.spread(extended, self.axis)

    def restrict(self, field: Array, layout: Layout) -> Array:
        """A fine block to a coarse one, the scaled adjoint."""
        if self.volumes is not None:
            field = field * jnp.asarray(self.volumes[0]).astype(field.dtype)
        shape = list(field.shape)
        shape[self.axis] //= 2
        like = jax.ShapeDtypeStruct(tuple(shape), field.dtype)
        transposed = jax.linear_transpose(lambda v: self.prolong(v, layout), like)
        coarse = 0.5 * transposed(field)[0]
        if self.volumes is not None:
            coarse = coarse / jnp.asarray(self.volumes[1]).astype(field.dtype)
        return coarse


class BlockTransfer(eqx.Module):
    """Fields between a grid and the next coarser one, both in blocks.

    - `steps`: for each axis along which the grids differ either what is done within a block
        (an `AxisTransfer`, where the axis is not cut), or a [`Nested`][], or a pair of
        [`Lookup`][].
    - `gathered`: whether the coarse field is whole on every device.
    """

    layout: Layout = eqx.field(static=True)
    axes: tuple[int, ...] = eqx.field(static=True)
    steps: tuple[Any, ...]
    gathered: bool = eqx.field(static=True)

    @classmethod
    def of(cls, layout: Layout, transfer: Transfer, *, gathered: bool) -> "BlockTransfer | None":
        """A transfer in blocks; `None` where blocks of the two grids do not lie together."""
        if not (layout.divides(transfer.fine) and layout.divides(transfer.coarse)):
            return None
        steps: list[Any] = []
        for axis, along in transfer.axes:
            step: Any = along
            if axis in layout.cut:
                step = Nested.of(layout, axis, along) or _lookups(layout, axis, along)
            if step is None:
                return None
            steps.append(Whole(axis, along) if axis not in layout.cut else step)
        return cls(layout, tuple(axis for axis, _ in transfer.axes), tuple(steps), gathered)

    def prolong(self, field: Array) -> Array:
        """A coarse field, in blocks or whole, to fine blocks."""
        if self.gathered:
            field = self.layout.own(field, self.layout.spec)
        for step in self.steps:
            field = step.prolong(field, self.layout)
        return field

    def restrict(self, field: Array) -> Array:
        """Fine blocks to a coarse field, in blocks or whole."""
        for step in reversed(self.steps):
            field = step.restrict(field, self.layout)
        return self.layout.whole(field) if self.gathered else field


class Whole(eqx.Module):
    """A transfer along an axis that is not cut."""

    axis: int = eqx.field(static=True)
    transfer: AxisTransfer = eqx.field(static=True)

    def prolong(self, field: Array, layout: Layout) -> Array:
        """Within the block."""
        return self.transfer.prolong(field, self.axis)

    def restrict(self, field: Array, layout: Layout) -> Array:
        """Within the block."""
        return self.transfer.restrict(field, self.axis)


class Lookups(eqx.Module):
    """A transfer along a cut axis by tables, one a direction."""

    upwards: Lookup
    downwards: Lookup

    def prolong(self, field: Array, layout: Layout) -> Array:
        """A coarse block to a fine one."""
        return self.upwards(field, layout)

    def restrict(self, field: Array, layout: Layout) -> Array:
        """A fine block to a coarse one."""
        return self.downwards(field, layout)


def _lookups(layout: Layout, axis: int, transfer: AxisTransfer) -> Lookups | None:
    up, down = transfer.tables()
    wraps = "wrap" in transfer.sides
    upwards = Lookup.of(layout, axis, up, transfer.coarse, wraps=wraps)
    downwards = Lookup.of(layout, axis, down, transfer.fine, wraps=wraps)
    return None if upwards is None or downwards is None else Lookups(upwards, downwards)


class Gathering(eqx.Module):
    """A transfer from fine blocks to a coarse grid that cannot be cut: what is fine is gathered."""

    layout: Layout = eqx.field(static=True)
    transfer: Any

    def prolong(self, field: Array) -> Array:
        """A whole coarse field to fine blocks."""
        fine = self.transfer.prolong(field)
        return self.layout.own(fine, self.layout.spec)

    def restrict(self, field: Array) -> Array:
        """Fine blocks to a whole coarse field."""
        return self.transfer.restrict(self.layout.whole(field))
