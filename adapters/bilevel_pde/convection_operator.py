"""Convection: what carries each component of a velocity on a staggered grid."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from bilevel_pde.advection_operator import Scheme, advection
from bilevel_pde.boundary_values import on_side
from bilevel_pde.shift import shift
from bilevel_pde.staggered import Staggered, Velocity
from bilevel_pde.stencil import Stencil

Walls = Sequence[Mapping[tuple[int, int], Any] | None]


def convection(
    staggered: Staggered,
    velocity: Velocity,
    component: int,
    scheme: Scheme = "central",
    *,
    conservative: bool = True,
    walls: Walls | None = None,
) -> Stencil:
    """w·∇ or ∇·(w ·), as it acts on one component of the velocity.

    **Arguments:**

    - `velocity`: w, of the shapes of `staggered.components`, traced or not.
    - `component`: which one is carried.
    - `scheme`, `conservative`: as of [`advection`][]. For a w without divergence both
        forms are of the same flow; the conservative one with central differences keeps the
        kinetic energy as well (Harlow & Welch 1965).
    - `walls`: for each component its values on sides, as for [`Divergence`][]; zero by default.

    >>> import jax.numpy as jnp
    >>> cavity = Staggered((4, 4))
    >>> still = tuple(jnp.zeros(grid.shape) for grid in cavity.components)
    >>> convection(cavity, still, 0).grid.shape
    (3, 4)
    """
    given = (None,) * staggered.ndim if walls is None else walls
    grid = staggered.components[component]
    carriers: list[Array] = []
    for axis, values in enumerate(given):
        v, sides = velocity[axis], values or {}
        if axis == component:
            v = _to_cells(staggered, v, axis, sides) if conservative else v
            # Below face i of a periodic axis is cell i - 1.
            if conservative and grid.is_periodic(axis):
                v = shift(v, _along(grid.ndim, axis, -1), (True,) * grid.ndim)
        else:
            v = (_with_walls if conservative else _to_cells)(staggered, v, axis, sides)
            v = _to_faces(staggered, v, component)
        carriers.append(v)
    return advection(
        grid,
        tuple(carriers),
        scheme,
        conservative=conservative,
        at="faces" if conservative else "points",
    )


def _to_cells(
    staggered: Staggered, v: Array, axis: int, sides: Mapping[tuple[int, int], Any]
) -> Array:
    """A component from the faces it is on to cells along its axis."""
    if staggered.cells.is_periodic(axis):
        return 0.5 * (v + shift(v, _along(v.ndim, axis, 1), (True,) * v.ndim))
    whole = _with_walls(staggered, v, axis, sides)
    return _averaged(whole, axis)


def _with_walls(
    staggered: Staggered, v: Array, axis: int, sides: Mapping[tuple[int, int], Any]
) -> Array:
    """A component with the faces on the walls, which its grid leaves out."""
    if staggered.cells.is_periodic(axis):
        return v
    grid = staggered.components[axis]
    ends = [
        jnp.broadcast_to(
            on_side(grid, axis, side, sides.get((axis, side), 0.0)).astype(v.dtype),
            tuple(1 if d == axis else n for d, n in enumerate(v.shape)),
        )
        for side in (0, 1)
    ]
    return jnp.concatenate([ends[0], v, ends[1]], axis=axis)


def _to_faces(staggered: Staggered, v: Array, axis: int) -> Array:
    """What is in cells along an axis to the inner faces across it."""
    if staggered.cells.is_periodic(axis):
        return 0.5 * (v + shift(v, _along(v.ndim, axis, -1), (True,) * v.ndim))
    return _averaged(v, axis)


def _averaged(v: Array, axis: int) -> Array:
    before = (slice(None),) * axis
    return 0.5 * (v[(*before, slice(1, None))] + v[(*before, slice(None, -1))])


def _along(ndim: int, axis: int, step: int) -> tuple[int, ...]:
    return tuple(step * int(d == axis) for d in range(ndim))
