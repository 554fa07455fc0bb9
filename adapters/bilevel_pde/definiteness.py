"""Definiteness: what is known of a stencil's matrix, and how it is found out."""

import functools
import itertools
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
from jax.core import Tracer

from bilevel_pde.grid import Grid

Offset = tuple[int, ...]
Coefficients = Mapping[Offset, tuple[Any, ...]]
Sign = Literal["positive", "nonnegative", "nonpositive", "negative", "indefinite"]

ROUNDINGS = 4
"""Units of rounding of a row's entries that its sum may be away from zero, and be zero.

Few, or a small number beside large ones, as in u - dt Δu on a fine grid, would not be seen.
"""

_OPPOSITE: dict[Sign, Sign] = {
    "positive": "negative",
    "nonnegative": "nonpositive",
    "nonpositive": "nonnegative",
    "negative": "positive",
    "indefinite": "indefinite",
}

_STRICT = ("positive", "negative")


class Definiteness(NamedTuple):
    """What is known of a matrix; `None` says that nothing is.

    **Arguments:**

    - `symmetric`: whether A = Aᵀ.
    - `sign`: bound of the eigenvalues of a symmetric A.
    - `singular`: whether constant fields are in the kernel.
    """

    symmetric: bool | None = None
    sign: Sign | None = None
    singular: bool | None = None

    @property
    def positive_definite(self) -> bool | None:
        """What is known of it."""
        if self.sign == "positive":
            return True
        if self.sign in {"negative", "nonpositive", "indefinite"}:
            return False
        return False if self.symmetric is False or self.singular else None

    def scaled(self, factor: Any) -> "Definiteness":
        """Of the matrix times a number."""
        if isinstance(factor, Tracer):
            # It may be zero.
            return self._replace(sign=None, singular=self.singular or None)
        number = float(factor)
        if number == 0:
            return Definiteness(symmetric=True, sign="nonnegative", singular=True)
        if self.sign is None or number > 0:
            return self
        return self._replace(sign=_OPPOSITE[self.sign])

    def plus(self, other: "Definiteness") -> "Definiteness":
        """Of the sum of two matrices."""
        symmetric = None
        if self.symmetric is not None and other.symmetric is not None:
            both = self.symmetric and other.symmetric
            symmetric = both if self.symmetric or other.symmetric else None
        sign: Sign | None = None
        pairs: tuple[tuple[Sign, Sign], ...] = (
            ("positive", "nonnegative"),
            ("negative", "nonpositive"),
        )
        for strict, weak in pairs:
            if {self.sign, other.sign} <= {strict, weak}:
                sign = strict if strict in {self.sign, other.sign} else weak
        known = {self.singular, other.singular}
        # What two regular ones make of constants may cancel.
        singular = None if None in known or known == {False} else known == {True}
        return Definiteness(symmetric, sign, False if sign in _STRICT else singular)

    def completed(self, seen: "Definiteness | None") -> "Definiteness":
        """With what a look at the numbers says of what is not known.

        Numbers are rounded, and what is known is not: a definite matrix with terms of very
        different size looks like a singular one.
        """
        if seen is None:
            return self
        symmetric = seen.symmetric if self.symmetric is None else self.symmetric
        singular = seen.singular if self.singular is None else self.singular
        if self.sign in _STRICT:
            return Definiteness(symmetric, self.sign, singular=False)
        sign = self.sign if seen.sign is None else seen.sign
        if singular and sign in _STRICT:
            sign = self.sign
        return Definiteness(symmetric, sign if symmetric else None, singular)


def examine(grid: Grid, coefficients: Coefficients) -> Definiteness | None:
    """What the numbers say; `None` where some are traced.

    Symmetry by comparing entries, the sign by diagonal dominance: a symmetric matrix with
    aᵢᵢ ≥ Σⱼ|aᵢⱼ| has no negative eigenvalue, and none that is zero if it is irreducible and
    one row is strict (Horn & Johnson, Matrix Analysis, section 6.2).  Where coefficients vary
    along axes one at a time, it looks at one row of each kind.
    """
    pieces = [piece for parts in coefficients.values() for piece in parts]
    if any(isinstance(piece, Tracer) for piece in pieces):
        return None
    table = {o: [np.asarray(piece) for piece in parts] for o, parts in coefficients.items()}
    rows = _distinct_rows(grid, table)
    shape = tuple(len(r) for r in rows)
    centre = table.get((0,) * grid.ndim, [])
    diagonal = np.broadcast_to(_values(centre, rows), shape).astype(float)
    others, total, symmetric, connected = np.zeros(shape), diagonal.copy(), True, True
    size = sum(max(float(np.max(np.abs(p))) for p in parts) for parts in table.values() if parts)
    tolerance = 8 * float(np.finfo(grid.dtype).eps) * size
    for offset, moved, inside in _neighbours(grid, table, rows):
        entry = np.where(inside, _values(table[offset], rows), 0.0)
        others += np.abs(entry)
        total += entry
        opposite = tuple(-o for o in offset)
        # Of two opposite offsets one look is enough.
        if symmetric and (offset < opposite or opposite not in table):
            back = np.where(inside, _values(table.get(opposite, []), moved), 0.0)
            symmetric = bool(np.all(np.abs(entry - back) <= tolerance))
    for axis, points in enumerate(grid.shape):
        step = tuple(int(d == axis) for d in range(grid.ndim))
        connected = connected and (points == 1 or _reaches(grid, table, rows, step))
    # Each row has its own: beside the largest entry of a matrix a whole row may be small.
    rounding = ROUNDINGS * float(np.finfo(grid.dtype).eps) * (np.abs(diagonal) + others)
    singular = bool(np.all(np.abs(total) <= rounding))
    sign: Sign | None = None
    if symmetric:
        sign = _sign(diagonal - others, rounding, connected=connected)
        if sign is None:
            below = _sign(-diagonal - others, rounding, connected=connected)
            sign = None if below is None else _OPPOSITE[below]
    return Definiteness(symmetric, sign, singular)


def is_varied(piece: Any) -> bool:
    """Whether a coefficient varies along several axes at a time."""
    return sum(size > 1 for size in piece.shape) > 1


def _sign(excess: Any, tolerance: Any, *, connected: bool) -> Sign | None:
    if np.any(excess < -tolerance) or not np.all(np.isfinite(excess)):
        return None
    strict = excess > tolerance
    return "positive" if np.all(strict) or (connected and np.any(strict)) else "nonnegative"


def _reaches(grid: Grid, table: Any, rows: list[Any], step: Offset) -> bool:
    """Whether every point is coupled to its next neighbour along an axis."""
    for offset, _, inside in _neighbours(grid, table, rows):
        if offset == step:
            entry = np.broadcast_to(_values(table[offset], rows), inside.shape)
            return bool(np.all(entry[inside] != 0))
    return False


def _neighbours(
    grid: Grid, table: Any, rows: list[Any]
) -> Iterator[tuple[Offset, list[Any], np.ndarray[Any, Any]]]:
    """Each offset but the centre's, where it leads from the rows, and whether that is inside."""
    for offset in table:
        if not any(offset):
            continue
        moved: list[Any] = []
        inside: list[Any] = []
        for axis, (o, points) in enumerate(zip(offset, grid.shape, strict=True)):
            target = rows[axis] + o
            ok = (target >= 0) & (target < points)
            if grid.is_periodic(axis):
                target, ok = target % points, np.ones_like(ok)
            moved.append(np.clip(target, 0, points - 1))
            inside.append(ok)
        yield offset, moved, functools.reduce(np.logical_and, np.meshgrid(*inside, indexing="ij"))


def _values(parts: list[Any], rows: list[Any]) -> Any:
    """The sum of a coefficient's pieces at some rows."""
    total: Any = np.zeros(())
    for whole in parts:
        piece = whole
        for axis, (index, size) in enumerate(zip(rows, whole.shape, strict=bool(whole.ndim))):
            if size > 1 and not np.array_equal(index, np.arange(size)):
                piece = np.take(piece, index, axis)
        total = total + piece
    return total


def _distinct_rows(grid: Grid, table: Any) -> list[Any]:
    """Indices along each axis that stand for all: one of each kind of surroundings."""
    pieces = [piece for parts in table.values() for piece in parts]
    if any(is_varied(piece) for piece in pieces):
        return [np.arange(points) for points in grid.shape]
    reach = max(max(map(abs, offset)) for offset in table)
    rows: list[Any] = []
    for axis, points in enumerate(grid.shape):
        index = np.arange(points)
        # How near the ends are tells which neighbours are inside.
        kinds: list[Any] = [np.minimum(index, reach), np.minimum(index[::-1], reach)]
        lines = [p.reshape(-1) for p in pieces if p.ndim and p.shape[axis] > 1]
        kinds += [
            np.roll(p, move) for p, move in itertools.product(lines, range(-reach, reach + 1))
        ]
        _, first = np.unique(np.stack(kinds, axis=1), axis=0, return_index=True)
        rows.append(np.sort(first))
    return rows
