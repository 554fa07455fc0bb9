"""Traffic: what one application of an operator sends between devices, from its decomposition."""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp

from bilevel_arrays.mesh.composite import reaches
from bilevel_arrays.mesh.halo import Reach
from bilevel_arrays.mesh.layout import Layout
from bilevel_arrays.mesh.partitioned import Partitioned
from bilevel_pde.grid import Grid


class HaloTraffic(NamedTuple):
    """What is sent in one application of an operator.

    **Arguments:**

    - `total`: bytes sent by all devices together.
    - `largest`: bytes sent by the device that sends the most.
    - `messages`: messages sent by the device that sends the most of them.

    >>> HaloTraffic(total=64, largest=32, messages=2).largest
    32
    """

    total: int
    largest: int
    messages: int


def halo_traffic(operator: Partitioned, dtype: Any = None) -> HaloTraffic:
    """The bytes that one application of a partitioned operator sends: its blocks' surface.

    Each block sends to each neighbour the rows that the operator reads of it: for a stencil that
    reaches one point, the points on their common side. Of n₁ × n₂ × n₃ points in slabs of p devices
    these are 2 (p − 1) n₂ n₃ numbers, or 2 p n₂ n₃ on a periodic axis. The transpose sends as many.
    Along a mesh axis that cuts nothing there are copies of the field, each of which sends its own.
    Terms of a sum count each; where they read the same rows, the compiler may send these once.

    **Arguments:**

    - `operator`: as of [`partition`][].
    - `dtype`: of the field; that of the grid by default.

    **Raises:** `TypeError` for an operator that is not partitioned.

    >>> import jax, bilevel_pde as pde
    >>> from bilevel_arrays import mesh
    >>> one = mesh.device_mesh(devices=jax.devices()[:1])
    >>> halo_traffic(mesh.partition(pde.laplacian(pde.Grid((8, 8))), one))
    HaloTraffic(total=0, largest=0, messages=0)
    """
    if not isinstance(operator, Partitioned):
        msg = (
            "halo_traffic: operator should be a partitioned one, got "
            f"{type(operator).__name__}. Make it with mesh.partition(operator, mesh, axes)."
        )
        raise TypeError(msg)
    size = jnp.dtype(operator.like.dtype if dtype is None else dtype).itemsize
    parts = [_of(operator.layout, operator.grid, reach) for reach in reaches(operator.block)]
    total, largest, messages = (
        (sum(column) for column in zip(*parts, strict=True)) if parts else (0, 0, 0)
    )
    return HaloTraffic(total * size, largest * size, messages)


def _of(layout: Layout, grid: Grid, reach: Reach) -> tuple[int, int, int]:
    """Numbers sent by all and by the busiest device, and messages of that."""
    shape = list(layout.block(grid.shape))
    total = largest = messages = 0
    for axis in layout.cut:
        surface = math.prod(shape) // shape[axis]
        count, closed = layout.counts[axis], grid.is_periodic(axis)
        # Along an axis of the mesh that cuts nothing every copy of a line exchanges.
        lines = layout.mesh.size // count
        for width in reach.widths[axis]:
            senders = count if closed else count - 1
            total += lines * senders * width * surface
            # A block with neighbours on both sides, where there is one.
            messages += int(width > 0)
            largest += width * surface
        if not closed and count == 2:
            # Each has one neighbour only.
            most = max(reach.widths[axis])
            largest -= (sum(reach.widths[axis]) - most) * surface
            messages -= int(min(reach.widths[axis]) > 0)
        if reach.corners:
            # What came along this axis is sent on along the next ones.
            shape[axis] += sum(reach.widths[axis])
    return total, largest, messages
