"""Triangle: which entries of a matrix are on one side of its diagonal."""

from typing import Any, Literal

import numpy as np

from bilevel_pde.grid import Grid

Part = Literal["lower", "upper"]


def keeps(part: Part, rows: Any, columns: Any, *, diagonal: bool) -> Any:
    """Whether an entry belongs to a part, for rows and columns that may be traced."""
    if part == "lower":
        return rows >= columns if diagonal else rows > columns
    return rows <= columns if diagonal else rows < columns


def mask(grid: Grid, offset: tuple[int, ...], part: Part, *, diagonal: bool) -> Any:
    """Where the entries of a stencil's offset belong to a part, fields being in C order.

    **Returns:** `True` or `False` for all of them, or an array that broadcasts to the grid: the
    entries that close a periodic axis are on the other side of the diagonal.
    """
    # Of C order the first axis that differs decides.
    decided: Any = np.zeros((1,) * grid.ndim, int)
    for axis, step in enumerate(offset):
        if step == 0:
            continue
        index = np.arange(grid.shape[axis])
        target = index + step
        if grid.is_periodic(axis):
            target = target % grid.shape[axis]
        side = np.sign(target - index)
        if np.all(side == side[0]):
            side = side[:1]
        shape = [-1 if d == axis else 1 for d in range(grid.ndim)]
        decided = np.where(decided == 0, side.reshape(shape), decided)
    kept = np.asarray(keeps(part, 0, decided, diagonal=diagonal))
    return bool(kept.flat[0]) if np.all(kept == kept.flat[0]) else kept
