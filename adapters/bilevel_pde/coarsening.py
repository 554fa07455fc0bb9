"""Coarsening: the same differential operator on a grid of half as many intervals."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from bilevel_pde import folding
from bilevel_pde.boundary import Boundary
from bilevel_pde.definiteness import Offset
from bilevel_pde.diffusion import Diffusion
from bilevel_pde.grid import Grid
from bilevel_pde.operator import Operator
from bilevel_pde.stencil import Stencil
from bilevel_pde.transfer import AxisTransfer, Side, coarser, intervals

FEWEST = 4
"""An axis of fewer intervals is not made coarser."""

NEAR = 1.5
"""Spacings within this factor are alike: along all such axes the grid is made coarser at once."""


@dataclasses.dataclass(frozen=True)
class Transfer:
    """Fields between a grid and the next coarser one.

    - `fine`, `coarse`: the grids.
    """

    fine: Grid
    coarse: Grid

    @functools.cached_property
    def axes(self) -> tuple[tuple[int, AxisTransfer], ...]:
        """The axes along which the grids differ."""
        found: list[tuple[int, AxisTransfer]] = []
        for axis, points in enumerate(self.fine.shape):
            fewer = self.coarse.shape[axis]
            if points != fewer:
                cells, sides = self.fine.centering[axis] == "cell", sides_of(self.fine, axis)
                found.append((axis, AxisTransfer(points, fewer, cells, sides)))
        return tuple(found)

    def prolong(self, field: Array) -> Array:
        """A field of the coarse grid interpolated to the fine one."""
        for axis, transfer in self.axes:
            field = transfer.prolong(field, axis)
        return field

    def restrict(self, field: Array) -> Array:
        """A field of the fine grid averaged over the neighbourhoods of coarse points."""
        for axis, transfer in reversed(self.axes):
            field = transfer.restrict(field, axis)
        return field

    def sample(self, field: Array, axis: int | None = None) -> Array:
        """A coefficient of the fine grid at the coarse points, linearly between fine ones.

        **Arguments:**

        - `field`: of the fine grid's shape or broadcasting to it; along `axis`, on its faces.
        """
        for along, transfer in self.axes:
            size = field.shape[along]
            if size == 1:
                continue
            fine, coarse = transfer.positions(transfer.fine), transfer.positions(transfer.coarse)
            if axis is not None and along == axis:
                grids = (self.fine, self.coarse)
                fine, coarse = (_face_positions(grid, axis) for grid in grids)
            field = _interpolated(field, along, fine, coarse)
        return field


def sides_of(grid: Grid, axis: int) -> tuple[Side, Side]:
    """What the two sides of an axis prescribe."""
    if grid.is_periodic(axis):
        return "wrap", "wrap"
    low, high = grid.boundary[axis]
    return _prescribed(low), _prescribed(high)


def _prescribed(side: Boundary) -> Side:
    return "slope" if side.on_boundary else "value"


def coarse_grid(grid: Grid) -> Grid | None:
    """The grid of half as many intervals along its `strong` axes that have enough.

    **Returns:** `None` where there is no such axis.
    """
    shape = list(grid.shape)
    for axis in strong(grid, [axis for axis in range(grid.ndim) if _is_long(grid, axis)]):
        cells, sides = grid.centering[axis] == "cell", sides_of(grid, axis)
        shape[axis] = coarser(grid.shape[axis], sides, cells=cells)
    if tuple(shape) == grid.shape:
        return None
    return Grid(
        tuple(shape), grid.extent, grid.boundary, grid.centering, grid.origin, grid.dtype
    )  # fmt: skip


def strong(grid: Grid, axes: Sequence[int]) -> tuple[int, ...]:
    """Of some axes those along which points are nearest, to a factor of `NEAR`.

    Along the others neighbours hardly couple, and no smoother that goes from point to point
    smooths there what a coarser grid would need.
    """
    nearest = min((grid.spacing[axis] for axis in axes), default=0.0)
    return tuple(axis for axis in axes if grid.spacing[axis] <= NEAR * nearest)


def _is_long(grid: Grid, axis: int) -> bool:
    cells, sides = grid.centering[axis] == "cell", sides_of(grid, axis)
    return intervals(grid.shape[axis], sides, cells=cells) >= 2 * FEWEST


def coarsen(operator: Operator, transfer: Transfer) -> Operator | None:
    """The operator anew on the coarse grid; `None` for one of another kind.

    Of a stencil the differences of first and second order and what is of order zero are
    told apart, and each is scaled with the spacing as it should be.
    """
    if isinstance(operator, Diffusion):
        return _diffusion(operator, transfer)
    if isinstance(operator, Stencil):
        return _stencil(operator, transfer)
    return None


def _diffusion(operator: Diffusion, transfer: Transfer) -> Operator:
    grid = transfer.coarse
    faces = tuple(
        k if k.ndim == 0 else jnp.broadcast_to(transfer.sample(k, axis), grid.face_shape(axis))
        for axis, k in enumerate(operator.faces)
    )
    at = "points" if all(k.ndim == 0 for k in faces) else "faces"
    if at == "faces":
        faces = tuple(jnp.broadcast_to(k, grid.face_shape(axis)) for axis, k in enumerate(faces))
    coarse: Operator = Diffusion(grid, faces, at=at)
    for piece in operator.reaction:
        sampled = piece if piece.ndim == 0 else transfer.sample(jnp.asarray(piece))
        coarse = coarse + Stencil(grid, {(0,) * grid.ndim: sampled}, symmetric=True)
    return coarse


def _stencil(operator: Stencil, transfer: Transfer) -> Operator:
    # Numbers, lines and fields apart, so that they stay numbers, lines and fields.
    kinds: dict[tuple[int, ...], dict[Offset, Any]] = {}
    for offset, parts in operator.terms.items():
        for piece in folding.join([_inside(operator.grid, part) for part in parts]):
            kinds.setdefault(piece.shape, {})[offset] = piece
    coarse: Any = None
    for kind in kinds.values():
        part = Stencil(transfer.coarse, _rescaled(kind, transfer))
        coarse = part if coarse is None else coarse + part
    return coarse.declared(symmetric=True) if operator.symmetric else coarse


def _rescaled(inner: dict[Offset, Any], transfer: Transfer) -> dict[Offset, Any]:
    """Coefficients for the spacing of the coarse grid, at its points."""
    ratio = [h / H for h, H in zip(transfer.fine.spacing, transfer.coarse.spacing, strict=True)]
    found: dict[Offset, Any] = {}
    for offset, coefficient in inner.items():
        moved = [axis for axis, step in enumerate(offset) if step]
        scale = float(np.prod([ratio[axis] for axis in moved]))
        if len(moved) == 1:
            opposite = inner.get(tuple(-step for step in offset), 0.0 * coefficient)
            second, first = 0.5 * (coefficient + opposite), 0.5 * (coefficient - opposite)
            found[offset] = second * scale**2 + first * scale
        elif moved:
            found[offset] = coefficient * scale
    centre = sum(inner.values()) - sum(found.values())
    coefficients = {(0,) * transfer.fine.ndim: centre, **found}
    return {
        offset: value if np.ndim(value) == 0 else transfer.sample(jnp.asarray(value))
        for offset, value in coefficients.items()
    }


def _inside(grid: Grid, piece: Any) -> Any:
    """A coefficient without what boundary conditions made of its outermost values."""
    for axis in range(grid.ndim):
        if piece.ndim == 0 or grid.is_periodic(axis) or piece.shape[axis] < 3:
            continue
        xp: Any = np if isinstance(piece, np.ndarray) else jnp
        places = np.clip(np.arange(piece.shape[axis]), 1, piece.shape[axis] - 2)
        piece = xp.take(piece, places, axis=axis)
    return piece


def _face_positions(grid: Grid, axis: int) -> np.ndarray:
    with jax.ensure_compile_time_eval():
        coordinates = np.asarray(grid.face_coordinates(axis)[axis], float)
    return (coordinates - grid.origin[axis]) / grid.extent[axis]


def _interpolated(field: Array, axis: int, at: np.ndarray, wanted: np.ndarray) -> Array:
    """A field known at some points of an axis, at others; constant beyond the outermost."""
    right = np.clip(np.searchsorted(at, wanted), 1, len(at) - 1)
    part = np.clip((wanted - at[right - 1]) / (at[right] - at[right - 1]), 0.0, 1.0)
    shape = [len(wanted) if d == axis else 1 for d in range(field.ndim)]
    weight = jnp.asarray(part.reshape(shape), field.dtype)
    low, high = (jnp.take(field, jnp.asarray(places), axis=axis) for places in (right - 1, right))
    return (1.0 - weight) * low + weight * high
