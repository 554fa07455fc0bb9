"""Transfer: fields between a grid and the next coarser one, axis by axis."""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

Side = Literal["value", "slope", "wrap"]
"""What a side prescribes: the field's value, its slope (Robin counts as one), or nothing."""


@dataclasses.dataclass(frozen=True)
class AxisTransfer:
    """Linear interpolation along one axis, and its adjoint.

    - `fine`, `coarse`: numbers of points.
    - `cells`: whether points are centres of cells, rather than vertices.
    - `sides`: what the lower and the upper side prescribe.

    Where the coarse points are a regular part of the fine ones every fine point takes a
    few fixed weights, and everything fuses into one kernel; otherwise a table of two
    neighbours and their weights a point is looked up.
    """

    fine: int
    coarse: int
    cells: bool
    sides: tuple[Side, Side]

    def prolong(self, coarse: Array, axis: int) -> Array:
        """Interpolate a coarse field to the fine points of the axis."""
        if self.nested is None:
            return _looked_up(coarse, *self._table, axis)
        return self.spread(self._extended(coarse, axis), axis)

    def spread(self, extended: Array, axis: int) -> Array:
        """Interpolate a coarse field that has one point more on either side, if `nested`."""
        assert self.nested is not None
        total: Array | None = None
        for shift, weight in self.nested:
            # A coarse point j sits at the fine one 2 j + shift; the first is j = -1.
            low = shift - 2
            high = self.fine - (2 * self.coarse + 3) - low
            part = weight * _pad(extended, axis, low, high, 1)
            total = part if total is None else total + part
        assert total is not None
        return total

    def restrict(self, fine: Array, axis: int) -> Array:
        """The adjoint of `prolong`, scaled so that a constant stays one: full weighting."""
        weights = self.weights(self.fine)
        if weights is not None:
            fine = _times(fine, weights, axis)
        if self.nested is None:
            coarse = 0.5 * _looked_up(fine, *self._transposed_table, axis)
        else:
            coarse = 0.5 * self._gathered(fine, axis)
        weights = self.weights(self.coarse)
        return coarse if weights is None else _times(coarse, 1.0 / weights, axis)

    @property
    def nested(self) -> tuple[tuple[int, float], ...] | None:
        """(s, w): a fine point 2 j + s takes the part w of coarse point j; `None` for a table."""
        if self.intervals % 2:
            return None
        if self.cells:
            return ((-1, 0.25), (0, 0.75), (1, 0.75), (2, 0.25))
        centre = 1 if self.sides[0] == "value" else 0
        return ((centre - 1, 0.5), (centre, 1.0), (centre + 1, 0.5))

    @property
    def intervals(self) -> int:
        """Intervals between fine points, or cells, that the axis has."""
        return intervals(self.fine, self.sides, cells=self.cells)

    def matrix(self) -> np.ndarray:
        """The interpolation as a dense matrix (fine, coarse), on the host."""
        indices, weights = self._table
        found = np.zeros((self.fine, self.coarse))
        np.add.at(found, (np.arange(self.fine)[:, None], indices), weights)
        return found

    def _gathered(self, fine: Array, axis: int) -> Array:
        """Pᵀ f along the axis."""
        assert self.nested is not None
        count = self.coarse + 2
        total: Array | None = None
        for shift, weight in self.nested:
            low = 2 - shift
            length = 2 * count - 1
            part = weight * _pad(fine, axis, low, length - self.fine - low, 0)
            part = jax.lax.slice_in_dim(part, 0, length, 2, axis)
            total = part if total is None else total + part
        assert total is not None
        inner = jax.lax.slice_in_dim(total, 1, count - 1, 1, axis)
        low = jax.lax.slice_in_dim(total, 0, 1, 1, axis)
        high = jax.lax.slice_in_dim(total, count - 1, count, 1, axis)
        rest = self.coarse - 1
        if "wrap" in self.sides:
            return inner + _pad(high, axis, 0, rest, 0) + _pad(low, axis, rest, 0, 0)
        for part, index, place in ((low, 0, 0), (high, 1, rest)):
            factor = self.reflection(self.sides[index])
            if factor:
                inner = inner + factor * _pad(part, axis, place, rest - place, 0)
        return inner

    def _extended(self, coarse: Array, axis: int) -> Array:
        """The coarse field with one point more on either side."""
        first = jax.lax.slice_in_dim(coarse, 0, 1, 1, axis)
        last = jax.lax.slice_in_dim(coarse, self.coarse - 1, self.coarse, 1, axis)
        if "wrap" in self.sides:
            low, high = last, first
        else:
            low = self.reflection(self.sides[0]) * first
            high = self.reflection(self.sides[1]) * last
        return jnp.concatenate([low, coarse, high], axis)

    def reflection(self, side: Side) -> float:
        """What a point beyond the side is, as a part of the last one before it."""
        if not self.cells:
            return 0.0
        return -1.0 if side == "value" else 1.0

    def weights(self, count: int) -> np.ndarray | None:
        """Shares of a cell that points stand for: half at a vertex on the boundary."""
        if self.cells or "slope" not in self.sides:
            return None
        weights = np.ones(count)
        for side, place in zip(self.sides, (0, -1), strict=True):
            if side == "slope":
                weights[place] = 0.5
        return weights

    def positions(self, count: int) -> np.ndarray:
        """Where `count` points of the axis lie, in (0, 1)."""
        cells = intervals(count, self.sides, cells=self.cells)
        first = 0.5 if self.cells else float(self.sides[0] == "value")
        return (np.arange(count) + first) / cells

    def tables(self) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
        """Indices and weights, a row a point, by which `prolong` and `restrict` look up fields."""
        indices, weights = self._transposed_table
        factor = np.full(self.coarse, 0.5)
        of_fine, of_coarse = self.weights(self.fine), self.weights(self.coarse)
        if of_fine is not None and of_coarse is not None:
            weights, factor = weights * of_fine[indices], factor / of_coarse
        return self._table, (indices, weights * factor[:, None])

    @property
    def _table(self) -> tuple[np.ndarray, np.ndarray]:
        """For every fine point two coarse ones and their weights."""
        at, points = self.positions(self.fine), self.positions(self.coarse)
        spacing = 1.0 / intervals(self.coarse, self.sides, cells=self.cells)
        left = np.floor((at - points[0]) / spacing + 1e-9).astype(int)
        part = (at - points[0]) / spacing - left
        indices = np.stack([left, left + 1], axis=1)
        weights = np.stack([1.0 - part, part], axis=1)
        if "wrap" in self.sides:
            return indices % self.coarse, weights
        for index, outside, last in (
            (0, indices < 0, 0),
            (1, indices >= self.coarse, self.coarse - 1),
        ):
            reflection = self.reflection(self.sides[index])
            weights = np.where(outside, reflection * weights, weights)
            indices = np.where(outside, last, indices)
        return indices, weights

    @property
    def _transposed_table(self) -> tuple[np.ndarray, np.ndarray]:
        """For every coarse point the fine ones that it is part of, and their weights."""
        matrix = self.matrix()
        width = int(np.count_nonzero(matrix, axis=0).max())
        indices = np.argsort(matrix == 0, axis=0, kind="stable")[:width].T
        return indices, np.take_along_axis(matrix.T, indices, axis=1)


def intervals(count: int, sides: tuple[Side, Side], *, cells: bool) -> int:
    """Intervals between points, or cells, of an axis with `count` unknown points."""
    if cells or "wrap" in sides:
        return count
    # A prescribed value is no unknown; a vertex where the slope is prescribed is one.
    return count - 1 + sum(side == "value" for side in sides)


def coarser(count: int, sides: tuple[Side, Side], *, cells: bool) -> int:
    """Points of the axis of the next coarser grid, of half as many intervals."""
    fewer = math.ceil(intervals(count, sides, cells=cells) / 2)
    if cells or "wrap" in sides:
        return fewer
    return fewer + 1 - sum(side == "value" for side in sides)


def _pad(field: Array, axis: int, low: int, high: int, interior: int) -> Array:
    widths = [(low, high, interior) if a == axis else (0, 0, 0) for a in range(field.ndim)]
    return jax.lax.pad(field, jnp.zeros((), field.dtype), widths)


def _times(field: Array, weights: np.ndarray, axis: int) -> Array:
    return field * _along(weights, field, axis)


def _along(values: np.ndarray, field: Array, axis: int) -> Array:
    shape = [len(values) if a == axis else 1 for a in range(field.ndim)]
    return jnp.asarray(values.reshape(shape), field.dtype)


def _looked_up(field: Array, indices: np.ndarray, weights: np.ndarray, axis: int) -> Array:
    columns = zip(indices.T, weights.T, strict=True)
    return sum(  # pyright: ignore[reportReturnType]
        _times(jnp.take(field, jnp.asarray(places), axis=axis), part, axis)
        for places, part in columns
    )
