"""Faces: a field at points brought to the faces between them."""

from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from bilevel_pde.grid import Grid
from bilevel_pde.shift import shift

Mean = Literal["arithmetic", "harmonic"]


def to_faces(
    grid: Grid, field: Any, axis: int, mean: Mean = "arithmetic", *, positive: bool = False
) -> Float[Array, "..."]:
    """A field on the faces across an axis, of `grid.face_shape(axis)`.

    Between points their mean.  On a face at a side where there is no point: for the
    arithmetic mean the field continued linearly, which is of second order where it is smooth;
    for the harmonic mean the value of the outermost point, as of a field that is constant
    around each.

    **Arguments:**

    - `field`: at the points, of the grid's shape.
    - `mean`: `"arithmetic"`, or `"harmonic"`, which is right where a coefficient jumps.
    - `positive`: continue to no less than half of the outermost value.

    >>> [float(v) for v in to_faces(Grid(3), jnp.array([2.0, 4.0, 8.0]), 0)]
    [1.0, 3.0, 6.0, 10.0]
    """
    field = jnp.broadcast_to(jnp.asarray(field, grid.dtype), grid.shape)
    step = tuple(-int(d == axis) for d in range(grid.ndim))
    if grid.is_periodic(axis):
        return mean_of(shift(field, step, (True,) * grid.ndim), field, mean)

    def points(start: int | None, stop: int | None) -> Array:
        return field[(slice(None),) * axis + (slice(start, stop),)]

    inner = mean_of(points(None, -1), points(1, None), mean)
    outermost = ((points(0, 1), points(1, 2)), (points(-1, None), points(-2, -1)))
    ends = [
        on_side(grid, axis, side, first, second, mean, positive=positive)
        for side, (first, second) in enumerate(outermost)
    ]
    return jnp.concatenate([ends[0], inner, ends[1]], axis)


def on_side(
    grid: Grid, axis: int, side: int, first: Any, second: Any, mean: Mean, *, positive: bool
) -> Any:
    """A field on the face at a side, from its outermost value and the next one inwards."""
    on_boundary = grid.centering[axis] == "vertex" and grid.boundary[axis][side].on_boundary
    if on_boundary or grid.shape[axis] == 1 or mean == "harmonic":
        return first
    end = 1.5 * first - 0.5 * second
    return jnp.maximum(end, 0.5 * first) if positive else end


def below(grid: Grid, faces: Any, axis: int) -> Any:
    """For each point what is on the face below it."""
    if grid.is_periodic(axis) or faces.ndim == 0 or faces.shape[axis] == 1:
        return faces
    return faces[(slice(None),) * axis + (slice(None, -1),)]


def above(grid: Grid, faces: Any, axis: int) -> Any:
    """For each point what is on the face above it."""
    if faces.ndim == 0 or faces.shape[axis] == 1:
        return faces
    if grid.is_periodic(axis):
        step = tuple(int(d == axis) for d in range(grid.ndim))
        return shift(jnp.asarray(faces), step, (True,) * grid.ndim)
    return faces[(slice(None),) * axis + (slice(1, None),)]


def mean_of(a: Array, b: Array, mean: Mean) -> Array:
    """The mean on the face between two points."""
    if mean == "arithmetic":
        return 0.5 * (a + b)
    total = a + b
    return 2.0 * a * b / jnp.where(total == 0, 1.0, total)
