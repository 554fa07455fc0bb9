"""Folding: what a stencil reads outside of the grid becomes coefficients of points inside."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array

from bilevel_pde.boundary import Ghost
from bilevel_pde.definiteness import Offset
from bilevel_pde.grid import Grid, Side

Pieces = tuple[Any, ...]


class Folded(NamedTuple):
    """A stencil without points outside.

    **Arguments:**

    - `coefficients`: for each offset the pieces whose sum is its coefficient, numbers without
        dimensions or arrays that broadcast to the grid.
    - `sources`: for each side what its boundary value is multiplied with.
    - `oblique`: whether an offset leaves the grid and moves along its side at a time.
    """

    coefficients: dict[Offset, Pieces]
    sources: dict[tuple[int, int], Pieces]
    oblique: bool


def fold(grid: Grid, coefficients: Mapping[Offset, Any]) -> Folded:
    """Replace points outside of the grid by what the boundary conditions make of them."""
    centre = (0,) * grid.ndim
    terms: dict[Offset, Pieces] = {centre: ()}
    for given, coefficient in coefficients.items():
        offset = _offset(grid, given)
        terms[offset] = (*terms.get(offset, ()), piece(grid, coefficient, f"of offset {offset}"))
    sources: dict[tuple[int, int], Pieces] = {}
    oblique = False
    for axis in range(grid.ndim):
        if grid.is_periodic(axis):
            continue
        for offset, parts in list(terms.items()):
            if offset[axis] == 0 or not any(is_there(part) for part in parts):
                continue
            side: Side = 0 if offset[axis] < 0 else 1
            ghost = cast("Ghost", grid.ghost(axis, side))
            row = 0 if side == 0 else grid.shape[axis] - 1
            inwards = -offset[axis]
            for weight, step in ((ghost.first, 0), (ghost.second, inwards)):
                if weight:
                    mask = grid.line(axis, np.where(np.arange(grid.shape[axis]) == row, weight, 0))
                    target = (*offset[:axis], step, *offset[axis + 1 :])
                    terms[target] = (*terms.get(target, ()), *(part * mask for part in parts))
            oblique = oblique or sum(o != 0 for o in offset) > 1
            factor = np.asarray(ghost.source, grid.dtype)
            at_side = tuple(_row(part, axis, row) * factor for part in parts)
            sources[axis, side] = join(sources.get((axis, side), ()) + at_side)
    merged = {offset: merge(grid, parts) for offset, parts in terms.items()}
    kept = {o: parts for o, parts in merged.items() if o == centre or any(map(is_there, parts))}
    return Folded(kept, sources, oblique)


def merge(grid: Grid, parts: Sequence[Any]) -> Pieces:
    """Add up pieces that vary along the same axes, and all if one varies along every axis."""
    joined = join(parts)
    whole = [part for part in joined if part.ndim and part.shape == grid.shape]
    if whole and len(joined) > 1:
        total = whole[0]
        for part in joined:
            total = total if part is whole[0] else total + part
        return (total,)
    kept = tuple(part for part in joined if is_there(part))
    return kept or (np.zeros((), grid.dtype),)


def join(parts: Sequence[Any]) -> Pieces:
    """Add up pieces of equal shape."""
    sums: dict[tuple[int, ...], Any] = {}
    for part in parts:
        shape = tuple(part.shape)
        # Sums of numbers without dimensions are scalars to NumPy, and arrays here.
        total = part if shape not in sums else sums[shape] + part
        sums[shape] = np.asarray(total) if isinstance(total, np.generic) else total
    return tuple(sums.values())


def piece(grid: Grid, coefficient: Any, what: str) -> Any:
    """A coefficient as an array without dimensions or of the grid's number of them."""
    if jnp.issubdtype(jnp.result_type(coefficient), jnp.complexfloating):
        msg = f"Stencil: coefficients should be real, got a complex one {what}."
        raise TypeError(msg)
    if np.ndim(coefficient) == 0:
        value = number(grid, coefficient)
        if isinstance(value, np.ndarray) and not np.isfinite(value):
            msg = f"Stencil: coefficients should be finite, got {coefficient} {what}."
            raise ValueError(msg)
        return value
    shape = np.shape(coefficient)
    try:
        fits = np.broadcast_shapes(shape, grid.shape) == grid.shape
    except ValueError:
        fits = False
    if not fits:
        msg = (
            f"Stencil: a coefficient should be a number or broadcast to the grid {grid.shape}, "
            f"got shape {shape} {what}."
        )
        raise ValueError(msg)
    whole = (1,) * (grid.ndim - len(shape)) + tuple(shape)
    small = sum(size > 1 for size in whole) <= 1
    if small and isinstance(coefficient, np.ndarray):
        return np.asarray(coefficient, grid.dtype).reshape(whole)
    return jnp.asarray(coefficient, grid.dtype).reshape(whole)


def number(grid: Grid, value: Any) -> Any:
    """A number in the grid's dtype, on the host unless it is an array of JAX."""
    if isinstance(value, Tracer):
        return value.astype(grid.dtype)
    return np.asarray(value, grid.dtype)


def checked(grid: Grid, v: Any) -> Array:
    """A field of the right shape.

    **Raises:** `ValueError` for another shape, `TypeError` for integers.
    """
    field = jnp.asarray(v)
    if field.shape != grid.shape:
        msg = f"A field on this grid should have shape {grid.shape}, got {field.shape}."
        raise ValueError(msg)
    if not jnp.issubdtype(field.dtype, jnp.inexact):
        msg = f"A field should be of a floating dtype, got {field.dtype}. Use field.astype(float)."
        raise TypeError(msg)
    return field


def _offset(grid: Grid, offset: Any) -> Offset:
    steps = tuple(offset) if isinstance(offset, tuple) else (offset,)
    if len(steps) != grid.ndim or not all(isinstance(o, int | np.integer) for o in steps):
        msg = (
            f"Stencil: an offset should be a tuple of {grid.ndim} integers, one for each axis, "
            f"got {offset!r}."
        )
        raise ValueError(msg)
    for axis, o in enumerate(steps):
        if grid.is_periodic(axis):
            if 2 * abs(o) >= grid.shape[axis]:
                msg = (
                    f"Stencil: offset {offset} meets itself around the periodic axis {axis} of "
                    f"{grid.shape[axis]} points; use at least {2 * abs(o) + 1}."
                )
                raise ValueError(msg)
        elif abs(o) > 1:
            msg = (
                f"Stencil: offset {offset} reaches {abs(o)} points across sides of axis {axis}; "
                "boundary conditions are known one point outside. Use offsets of -1, 0 and "
                "1 there, or a product of two stencils."
            )
            raise ValueError(msg)
    return tuple(int(o) for o in steps)


def _row(part: Any, axis: int, row: int) -> Any:
    if part.ndim == 0 or part.shape[axis] == 1:
        return part
    return part[(slice(None),) * axis + (slice(row, row + 1),)]


def is_there(part: Any) -> bool:
    """Whether a piece may be other than zero."""
    return not isinstance(part, np.ndarray) or bool(np.any(part))
