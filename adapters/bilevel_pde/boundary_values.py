"""Boundary values: numbers or fields on the sides of a grid, brought into a field on it."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from bilevel_pde.grid import Grid

BoundaryValues = Mapping[tuple[int, int], Any]


def insert(
    grid: Grid, sources: Mapping[tuple[int, int], tuple[Any, ...]], values: BoundaryValues
) -> Float[Array, "..."]:
    """A field with the values of each side times its sources in the points next to it."""
    total = jnp.zeros(grid.shape, grid.dtype)
    for (axis, side), given in sided(grid, values).items():
        value = on_side(grid, axis, side, given)
        for source in sources.get((axis, side), ()):
            face = jnp.broadcast_to(source * value, value.shape)
            points = grid.shape[axis] - 1
            padding = [(0, 0, 0)] * grid.ndim
            padding[axis] = (0, points, 0) if side == 0 else (points, 0, 0)
            total += jax.lax.pad(face, np.zeros((), grid.dtype), padding)
    return total


def sided(grid: Grid, values: Any) -> BoundaryValues:
    """Boundary values by side, and by nothing else.

    **Raises:** `TypeError` for what is no mapping, `ValueError` for other keys.
    """
    sides = [(a, s) for a in range(grid.ndim) if not grid.is_periodic(a) for s in (0, 1)]
    if not isinstance(values, Mapping):
        msg = (
            f"boundary_term: values should be a mapping from sides (axis, 0 or 1) among {sides}, "
            f"got {type(values).__name__}."
        )
        raise TypeError(msg)
    for key in values:
        if key not in sides:
            msg = f"boundary_term: values belong to sides (axis, 0 or 1) among {sides}, got {key}."
            raise ValueError(msg)
    return values


def on_side(grid: Grid, axis: int, side: int, given: Any) -> Float[Array, "..."]:
    """A boundary value as a field on its side, with one point across it.

    **Raises:** `ValueError` for values of another shape, `TypeError` for complex ones.
    """
    face = tuple(1 if d == axis else n for d, n in enumerate(grid.shape))
    flat = tuple(n for d, n in enumerate(grid.shape) if d != axis)
    if jnp.issubdtype(jnp.result_type(given), jnp.complexfloating):
        msg = f"boundary_term: the value of side {axis, side} should be real, got a complex one."
        raise TypeError(msg)
    value = jnp.asarray(given, grid.dtype)
    if value.shape in {(), flat}:
        return jnp.broadcast_to(value.reshape(face if value.ndim else ()), face)
    if value.shape != face:
        msg = (
            f"boundary_term: the value of side {axis, side} should be a number or have shape "
            f"{flat}, got {value.shape}."
        )
        raise ValueError(msg)
    return value
