"""Layout: which axes of a grid are cut into blocks, and along which axes of a device mesh."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.core import Tracer
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from bilevel_pde.grid import Grid


@dataclasses.dataclass(frozen=True)
class Layout:
    """A grid cut into equal blocks, one a device.

    - `mesh`: the devices.
    - `axes`: for each axis of the grid the mesh axis that it is cut along, or `None`.
    - `gather_below`: grids of at most so many points are held whole by every device.
    """

    mesh: Mesh
    axes: tuple[str | None, ...]
    gather_below: int = 0

    @classmethod
    def of(
        cls, grid: Grid, mesh: Any, axes: str | Sequence[str | None] | None, gather_below: int = 0
    ) -> "Layout":
        """The layout of a grid.

        **Arguments:**

        - `axes`: `None` takes the mesh's axes for the first axes of the grid, in their order.

        **Raises:** `TypeError` for what is no mesh and for a mesh whose axes are not automatic,
        `ValueError` for an axis that the mesh does not have, or has been named twice, for a wrong
        number of them, and for a mesh that does not divide the grid.
        """
        check_mesh("partition", mesh)
        names = tuple(mesh.axis_names)
        if axes is None:
            axes = names
            if len(names) > grid.ndim:
                msg = (
                    f"partition: the mesh has {len(names)} axes {names} and the grid {grid.ndim}. "
                    "Say with axes= which of them each axis of the grid is cut along."
                )
                raise ValueError(msg)
            axes = (*axes, *(None,) * (grid.ndim - len(names)))
        given: tuple[Any, ...] = (axes,) if isinstance(axes, str) else tuple(axes)
        given = (*given, *(None,) * (grid.ndim - len(given))) if isinstance(axes, str) else given
        if len(given) != grid.ndim:
            msg = (
                f"partition: axes should name a mesh axis or None for each of the grid's "
                f"{grid.ndim} axes, got {len(given)}: {axes!r}."
            )
            raise ValueError(msg)
        for name in given:
            if name is not None and name not in names:
                msg = (
                    f"partition: axes should name axes of the mesh, {names}, got {name!r}. Name "
                    "one of those, or None for an axis of the grid that is not cut."
                )
                raise ValueError(msg)
            if name is not None and given.count(name) > 1:
                msg = f"partition: axes should name each mesh axis once, got {axes!r}."
                raise ValueError(msg)
        layout = cls(mesh, given, gather_below)
        layout.check(grid)
        return layout

    def check(self, grid: Grid) -> None:
        """Refuse a grid that cannot be cut into equal blocks.

        **Raises:** `ValueError`.
        """
        for axis, (points, count) in enumerate(zip(grid.shape, self.counts, strict=True)):
            if points % count == 0:
                continue
            nearest = max(round(points / count), 1) * count
            msg = (
                f"partition: the {count} devices of mesh axis {self.axes[axis]!r} should divide "
                f"the {points} points of the grid's axis {axis} without rest, got "
                f"{points % count} left over. Take {nearest} points, a mesh axis of "
                f"{_divisor(points, count)} devices, or another axis of the grid."
            )
            raise ValueError(msg)

    @property
    def counts(self) -> tuple[int, ...]:
        """Blocks along each axis of the grid."""
        return tuple(1 if name is None else self.mesh.shape[name] for name in self.axes)

    @property
    def cut(self) -> tuple[int, ...]:
        """The axes of the grid that have more than one block."""
        return tuple(axis for axis, count in enumerate(self.counts) if count > 1)

    @property
    def blocks(self) -> int:
        """Blocks in all."""
        return math.prod(self.counts)

    @property
    def spec(self) -> PartitionSpec:
        """How a field lies on the mesh."""
        return PartitionSpec(*self.axes)

    @property
    def sharding(self) -> NamedSharding:
        """How a field lies on the devices."""
        return NamedSharding(self.mesh, self.spec)

    def divides(self, grid: Grid) -> bool:
        """Whether a grid can be cut into equal blocks."""
        return all(
            points % count == 0 for points, count in zip(grid.shape, self.counts, strict=True)
        )

    def block(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of one block of a field."""
        return tuple(points // count for points, count in zip(shape, self.counts, strict=True))

    def spec_of(self, shape: Sequence[int]) -> PartitionSpec:
        """How a coefficient lies on the mesh that has one entry, or a block's, along each axis."""
        if not shape:
            return PartitionSpec()
        return PartitionSpec(
            *(
                name if size > 1 and count > 1 else None
                for size, name, count in zip(shape, self.axes, self.counts, strict=True)
            )
        )

    def own(self, field: Array, spec: PartitionSpec) -> Array:
        """Within `shard_map`, this device's block of a field that every device holds whole."""
        for axis, name in enumerate(spec):
            if name is None:
                continue
            size = field.shape[axis] // self.mesh.shape[name]
            start = jax.lax.axis_index(name) * size
            field = jax.lax.dynamic_slice_in_dim(field, start, size, axis)
        return field

    def whole(self, block: Array) -> Array:
        """Within `shard_map`, the field whose blocks the devices hold."""
        for axis in self.cut:
            block = jax.lax.all_gather(block, self.axes[axis], axis=axis, tiled=True)
        return block

    def total(self, number: Array) -> Array:
        """Within `shard_map`, the sum over all blocks."""
        names = tuple(name for name in (self.axes[axis] for axis in self.cut) if name is not None)
        return jax.lax.psum(number, names) if names else number

    def check_field(self, name: str, field: Any) -> None:
        """Refuse an array that lies on other devices than the mesh's.

        **Raises:** `ValueError`.
        """
        if isinstance(field, Tracer) or not isinstance(field, jax.Array):
            return
        if not field.committed or field.sharding.device_set == set(self.mesh.devices.flat):
            return
        lies = sorted(device.id for device in field.sharding.device_set)
        expected = sorted(device.id for device in self.mesh.devices.flat)
        msg = (
            f"{name}: the array should lie on the devices of the operator's mesh, {expected}, got "
            f"one on devices {lies}. Bring it there with mesh.place(array, mesh, axes)."
        )
        raise ValueError(msg)


def check_mesh(owner: str, mesh: Any) -> None:
    """Refuse what is no mesh of automatic axes.

    **Raises:** `TypeError`.
    """
    if not isinstance(mesh, Mesh):
        msg = (
            f"{owner}: mesh should be a jax.sharding.Mesh, got {type(mesh).__name__}. "
            "bilevel_arrays.mesh.device_mesh() makes one."
        )
        raise TypeError(msg)
    explicit = [
        name
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind != AxisType.Auto
    ]
    if explicit:
        msg = (
            f"{owner}: axes of the mesh should be of type Auto, for the solvers leave it to the "
            f"compiler where sums are taken, got {explicit[0]!r} of another type. Make the mesh "
            "with bilevel_arrays.mesh.device_mesh(), or jax.make_mesh(..., axis_types=(Auto,))."
        )
        raise TypeError(msg)


def _divisor(points: int, count: int) -> int:
    """The most devices, no more than there are, that divide the points."""
    return max(n for n in range(1, count + 1) if points % n == 0)
