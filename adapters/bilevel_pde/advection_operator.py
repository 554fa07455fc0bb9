"""Advection: v·∇u and ∇·(v u)."""

from collections.abc import Sequence
from typing import Any, Literal, cast

import jax.numpy as jnp
import numpy as np

from bilevel_pde.boundary import Neumann, Periodic
from bilevel_pde.definiteness import Definiteness, is_varied
from bilevel_pde.faces import above, below, to_faces
from bilevel_pde.folding import fold, number
from bilevel_pde.grid import Grid
from bilevel_pde.stencil import Stencil

Scheme = Literal["upwind", "central"]


def advection(
    grid: Grid,
    velocity: Any,
    scheme: Scheme = "upwind",
    *,
    conservative: bool = False,
    at: Literal["points", "faces"] = "points",
) -> Stencil:
    """v·∇u, or ∇·(v u) in conservative form.

    **Arguments:**

    - `velocity`: for each axis a component, a number or a field of the grid's shape, traced or
        not; in one dimension also the component itself.
    - `scheme`: `"upwind"`, of first order, whose matrix is an M-matrix for a velocity without
        divergence; or `"central"`, of second order.
    - `conservative`: ∇·(v u) by fluxes through faces, so that sums over the grid change by what
        passes its sides only; otherwise v·∇u, which is zero for constants.
    - `at`: where the velocity is given, at `"points"` or, in conservative form, on `"faces"`,
        each component of `grid.face_shape(axis)`; it is brought there otherwise.

    **Raises:** `ValueError` for components of wrong number or shape, or an unknown scheme.

    >>> operator = advection(Grid(3, extent=4.0), 2.0)
    >>> [float(v) for v in operator @ jnp.array([1.0, 2.0, 4.0])]
    [2.0, 2.0, 4.0]
    """
    if scheme not in {"upwind", "central"}:
        msg = f"advection: scheme should be 'upwind' or 'central', got {scheme!r}."
        raise ValueError(msg)
    if at != "points" and not (at == "faces" and conservative):
        msg = (
            "advection: at should be 'points', or in conservative form 'faces', got "
            f"at={at!r}, conservative={conservative}."
        )
        raise ValueError(msg)
    terms: dict[tuple[int, ...], Any] = {(0,) * grid.ndim: 0.0}
    for axis, component in enumerate(_components(grid, velocity)):
        h = grid.spacing[axis]
        low, high = _at_faces(grid, component, axis, on_faces=conservative, at=at)
        minus = tuple(-int(d == axis) for d in range(grid.ndim))
        plus = tuple(int(d == axis) for d in range(grid.ndim))
        centre = 0.0
        if scheme == "central":
            below_part, above_part = low / 2, high / 2
            if conservative and low.ndim:
                centre = (high - low) / 2
        else:
            # What flows in through the face below, and out through the one above backwards.
            below_part, above_part = _positive(low), _negative(high)
            outwards = _positive(high) - _negative(low)
            centre = outwards if conservative else below_part - above_part
        weight = grid.weights()[axis]
        if conservative and np.any(weight != 1):
            # The face at a vertex on a side is that vertex, and its control volume is half.
            first, last = (_at_end(grid, axis, side) for side in (0, 1))
            centre = (centre + last * above_part - first * below_part) / weight
            below_part, above_part = (
                (1 - first) * below_part / weight,
                (1 - last) * above_part / weight,
            )
        terms[minus] = -below_part / h
        terms[plus] = above_part / h
        terms[(0,) * grid.ndim] = terms[(0,) * grid.ndim] + centre / h
    if not any(np.ndim(c) and is_varied(c) for c in terms.values()):
        return Stencil(grid, terms)
    # Fields of numbers are not looked through: what they are is known but for v = 0.
    folded = fold(grid, terms)
    closed = all(isinstance(s, Neumann | Periodic) for pair in grid.boundary for s in pair)
    known = Definiteness(singular=(closed and not conservative) or None)
    return Stencil.folded(grid, folded.coefficients, folded.sources, known)


def _components(grid: Grid, velocity: Any) -> tuple[Any, ...]:
    if not isinstance(velocity, Sequence):
        components: tuple[Any, ...] = (velocity,)
    else:
        components = tuple(cast("Sequence[Any]", velocity))
    if len(components) != grid.ndim:
        msg = (
            f"advection: velocity should have one component for each of {grid.ndim} axes, got "
            f"{len(components)}. Give a tuple of numbers or fields."
        )
        raise ValueError(msg)
    return components


def _at_faces(grid: Grid, component: Any, axis: int, *, on_faces: bool, at: str) -> tuple[Any, Any]:
    """The velocity that goes with the neighbours below and above each point."""
    if jnp.issubdtype(jnp.result_type(component), jnp.complexfloating):
        msg = "advection: velocity should be real, got a complex component."
        raise TypeError(msg)
    if np.ndim(component) == 0:
        value = number(grid, component)
        return value, value
    expected = grid.face_shape(axis) if at == "faces" else grid.shape
    if np.shape(component) != expected:
        msg = (
            f"advection: component {axis} of the velocity at {at} should be a number or have "
            f"shape {expected}, got {np.shape(component)}."
        )
        raise ValueError(msg)
    field = jnp.asarray(component, grid.dtype)
    if not on_faces:
        return field, field
    faces = field if at == "faces" else to_faces(grid, field, axis)
    return below(grid, faces, axis), above(grid, faces, axis)


def _at_end(grid: Grid, axis: int, side: int) -> np.ndarray[Any, Any]:
    """One at the vertices on a side, zero elsewhere."""
    line = np.zeros(grid.shape[axis])
    line[-side] = float(grid.boundary[axis][side].on_boundary)
    return grid.line(axis, line)


def _positive(velocity: Any) -> Any:
    return np.maximum(velocity, 0) if isinstance(velocity, np.ndarray) else jnp.maximum(velocity, 0)


def _negative(velocity: Any) -> Any:
    return np.minimum(velocity, 0) if isinstance(velocity, np.ndarray) else jnp.minimum(velocity, 0)
