"""Stencil: an operator that couples each point to neighbours at fixed offsets."""

from collections.abc import Mapping
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse as sp
from jaxtyping import Array, Float

from bilevel_pde import folding
from bilevel_pde.boundary_values import BoundaryValues, insert
from bilevel_pde.definiteness import Coefficients, Definiteness, Offset, examine, is_varied
from bilevel_pde.grid import Grid
from bilevel_pde.operator import Operator, is_factor
from bilevel_pde.shift import shift, shift_piece
from bilevel_pde.triangle import Part, mask

Pieces = tuple[Any, ...]
RowForm = Literal["plain", "weighted", "transposed"]
"""Whether rows are as discretised, multiplied with control volumes, or those of a transpose."""


class Stencil(Operator):
    """(A u)ᵢ = Σₒ cₒᵢ uᵢ₊ₒ, applied in one pass over the field.

    What an offset reads outside of the grid is replaced by what the boundary condition makes
    of it, when the stencil is made; periodic axes close on themselves.  Sums, differences and
    multiples of stencils on one grid are stencils.

    **Arguments:**

    - `grid`: where the unknowns are.
    - `coefficients`: for each offset, a tuple of an integer for each axis, cₒ: a number or an
        array that broadcasts to the grid, traced or not.  Across a side that is not periodic
        offsets reach one point.
    - `symmetric`, `positive_definite`: what is known of the matrix. `None`: found out, if the
        coefficients are not traced; of fields of millions of points, declaring both saves the
        time of looking through them.

    **Raises:** `ValueError` for offsets and coefficients that do not fit the grid, `TypeError`
    for complex ones.

    >>> import jax.numpy as jnp
    >>> slope = Stencil(Grid(3), {(-1,): -2.0, (1,): 2.0})
    >>> [float(v) for v in slope @ jnp.array([1.0, 2.0, 4.0])]
    [4.0, 6.0, -4.0]
    >>> slope.symmetric
    False
    """

    grid: Grid = eqx.field(static=True)
    offsets: tuple[Offset, ...] = eqx.field(static=True)
    coefficients: tuple[Pieces, ...]
    sides: tuple[tuple[int, int], ...] | None = eqx.field(static=True)
    sources: tuple[Pieces, ...]
    definiteness: Definiteness = eqx.field(static=True)
    form: RowForm = eqx.field(static=True)

    def __init__(
        self,
        grid: Grid,
        coefficients: Mapping[Offset, Any],
        *,
        symmetric: bool | None = None,
        positive_definite: bool | None = None,
    ):
        folded = folding.fold(grid, coefficients)
        self.form = "plain"
        self.grid = grid
        self.offsets = tuple(folded.coefficients)
        self.coefficients = tuple(folded.coefficients.values())
        self.sides = None if folded.oblique else tuple(folded.sources)
        self.sources = tuple(folded.sources.values())
        known = None
        if symmetric is None or positive_definite is None:
            known = examine(grid, folded.coefficients)
        known = known or Definiteness()
        if symmetric is not None:
            known = known._replace(symmetric=symmetric)
        if positive_definite is not None:
            known = Definiteness(
                True if positive_definite else known.symmetric,
                "positive" if positive_definite else "indefinite",
                singular=False if positive_definite else known.singular,
            )
        self.definiteness = known

    @classmethod
    def folded(
        cls,
        grid: Grid,
        coefficients: Coefficients,
        sources: Mapping[tuple[int, int], Pieces] | None,
        definiteness: Definiteness,
        form: RowForm = "plain",
    ) -> "Stencil":
        """A stencil whose boundary conditions are in its coefficients already.

        `definiteness` is what is known without looking; a look is taken at the rest where that
        is cheap.
        """
        made = object.__new__(cls)
        merged = {offset: folding.merge(grid, parts) for offset, parts in coefficients.items()}
        if not any(is_varied(piece) for parts in merged.values() for piece in parts):
            definiteness = definiteness.completed(examine(grid, merged))
        values = {
            "grid": grid,
            "offsets": tuple(merged),
            "coefficients": tuple(merged.values()),
            "sides": None if sources is None else tuple(sources),
            "sources": () if sources is None else tuple(sources.values()),
            "definiteness": definiteness,
            "form": form,
        }
        for name, value in values.items():
            object.__setattr__(made, name, value)
        return made

    @property
    def like(self) -> jax.ShapeDtypeStruct:
        """A field on the grid."""
        return self.grid.like

    @property
    def symmetric(self) -> bool | None:
        """Whether A = Aᵀ; `None` for unknown."""
        return self.definiteness.symmetric

    @property
    def positive_definite(self) -> bool | None:
        """Whether A is symmetric positive definite; `None` for unknown."""
        return self.definiteness.positive_definite

    @property
    def singular(self) -> bool:
        """Whether constant fields are known to be in the kernel."""
        return self.definiteness.singular is True

    @property
    def terms(self) -> dict[Offset, Pieces]:
        """For each offset the pieces whose sum is its coefficient, boundary conditions in."""
        return dict(zip(self.offsets, self.coefficients, strict=True))

    def coefficient(self, offset: Offset) -> Float[Array, "..."]:
        """The coefficient of an offset at every point, zero for one that there is not."""
        total = jnp.zeros(self.grid.shape, self.grid.dtype)
        for piece in self.terms.get(offset, ()):
            total += piece
        return total

    def matvec(self, v: Array) -> Array:
        """A v, like v."""
        v = folding.checked(self.grid, v)
        total: Any = None
        for offset, parts in self.terms.items():
            moved = shift(v, offset, self._periodic)
            # Not (a + b) * v: pieces along different axes would be added up into an array of
            # the size of the grid, and that read each time.
            for piece in filter(folding.is_there, parts):
                term = _like(piece, v) * moved
                total = term if total is None else total + term
        return jnp.zeros_like(v) if total is None else total

    def rmatvec(self, v: Array) -> Array:
        """Aᵀ v, like v."""
        v = folding.checked(self.grid, v)
        total: Any = None
        for offset, parts in self.terms.items():
            back = tuple(-o for o in offset)
            for piece in filter(folding.is_there, parts):
                part = _like(piece, v)
                if piece.ndim == 0:
                    term = part * shift(v, back, self._periodic)
                else:
                    term = shift(part * v, back, self._periodic)
                total = term if total is None else total + term
        return jnp.zeros_like(v) if total is None else total

    def transposed(self) -> "Stencil":
        """Aᵀ; it has no boundary values of its own."""
        if self.symmetric:
            return self
        terms: dict[Offset, Pieces] = {}
        for offset, parts in self.terms.items():
            back = tuple(-o for o in offset)
            terms[back] = tuple(shift_piece(piece, back, self._periodic) for piece in parts)
        # (W A)ᵀ = W (W⁻¹ Aᵀ W), which is a weighted one again.
        flipped: dict[RowForm, RowForm] = {"plain": "transposed", "transposed": "plain"}
        form = flipped.get(self.form, self.form)
        return Stencil.folded(self.grid, terms, None, self.definiteness, form)

    def diagonal(self) -> Float[Array, "..."]:
        """The diagonal, of the grid's shape."""
        return self.coefficient((0,) * self.grid.ndim)

    def boundary_term(self, values: BoundaryValues) -> Float[Array, "..."]:
        """What boundary values g add to A u, differentiable in them.

        **Arguments:**

        - `values`: g for each side (axis, 0 or 1) where it is not zero, a number or an array
            of the grid's shape without that axis.

        **Raises:** `ValueError` for sides that are periodic or not there, for values of wrong
        shape, for transposed stencils, and for those with oblique offsets, which would need
        values at corners.

        >>> from bilevel_pde.laplace_operator import laplacian
        >>> [round(float(v), 12) for v in laplacian(Grid(3)).boundary_term({(0, 1): 2.0})]
        [0.0, 0.0, 32.0]
        """
        if self.sides is None:
            msg = (
                "boundary_term: not known for a transposed stencil, nor for oblique offsets next "
                "to a side that is not periodic. Use the stencil itself, or one without them."
            )
            raise ValueError(msg)
        return insert(self.grid, dict(zip(self.sides, self.sources, strict=True)), values)

    def entries(self) -> tuple[Any, Any, Array]:
        """The coefficients offset by offset, without those that lead outside."""
        grid = self.grid
        rows: list[Any] = []
        columns: list[Any] = []
        values: list[Any] = []
        points = np.arange(grid.size, dtype=np.int32).reshape(grid.shape)
        for offset in self.offsets:
            # Slices: indices of millions of points would become part of the program.
            inside, targets = _reach(grid, offset)
            rows.append(points[inside].reshape(-1))
            columns.append(points[targets].reshape(-1))
            values.append(self.coefficient(offset)[inside].reshape(-1))
        return np.concatenate(rows), np.concatenate(columns), jnp.concatenate(values)

    def triangle(self, part: Part, *, diagonal: bool) -> "Stencil":
        """The offsets before or behind a point in C order; masked where an axis closes."""
        terms: dict[Offset, Pieces] = {}
        for offset, parts in self.terms.items():
            kept = mask(self.grid, offset, part, diagonal=diagonal)
            if kept is False:
                continue
            whole = kept is True
            factor = None if whole else np.asarray(kept, self.grid.dtype)
            terms[offset] = tuple(p if factor is None else p * factor for p in parts)
        terms = terms or {(0,) * self.grid.ndim: (np.zeros((), self.grid.dtype),)}
        return Stencil.folded(self.grid, terms, None, Definiteness())

    def to_scipy(self) -> sp.csr_array:
        """The matrix, for fields in C order."""
        grid = self.grid
        points = np.arange(grid.size).reshape(grid.shape)
        index = np.indices(grid.shape)
        rows: list[Any] = []
        columns: list[Any] = []
        entries: list[Any] = []
        for offset, parts in self.terms.items():
            target = np.moveaxis(index, 0, -1) + np.array(offset)
            wrapped = target % np.array(grid.shape)
            wraps = np.array(self._periodic)
            inside = ((target == wrapped) | wraps).all(axis=-1)
            entry = np.zeros(grid.shape, grid.dtype)
            for piece in parts:
                entry = entry + np.asarray(piece)
            rows.append(points[inside])
            columns.append(points[tuple(np.moveaxis(wrapped, -1, 0))][inside])
            entries.append(entry[inside])
        together = np.concatenate
        matrix = sp.coo_array(
            (together(entries), (together(rows), together(columns))), (grid.size, grid.size)
        )
        return sp.csr_array(matrix)

    def norm_bound(self) -> Float[Array, ""]:
        """A bound of ‖A‖₂ from sums of sizes over rows and over columns, after Gershgorin.

        **Returns:** the geometric mean of the largest ones, √(‖A‖₁ ‖A‖∞).
        """
        ones = jnp.ones(self.grid.shape, self.grid.dtype)
        rows, columns = jnp.zeros_like(ones), jnp.zeros_like(ones)
        for offset in self.offsets:
            size = jnp.abs(self.coefficient(offset)) * shift(ones, offset, self._periodic)
            rows += size
            columns += shift(size, tuple(-o for o in offset), self._periodic)
        return jnp.sqrt(jnp.max(rows) * jnp.max(columns))

    def weighted(self) -> "Stencil":
        """W A, with the control volumes W of `grid.weights()`.

        Laplacians and diffusion with vertices on a Neumann or Robin side are symmetric in this
        form: solve W A u = W f.
        """
        parts = dict(self.terms)
        sources = dict(zip(self.sides or (), self.sources, strict=True))
        for axis, weight in enumerate(self.grid.weights()):
            if np.all(weight == 1):
                continue
            parts = {o: tuple(p * weight for p in pieces) for o, pieces in parts.items()}
            for (across, side), pieces in sources.items():
                at = weight[(slice(None),) * axis + (slice(-side, None if side else 1),)]
                factor = at if across == axis else weight
                sources[across, side] = tuple(piece * factor for piece in pieces)
        known = self.definiteness
        if any(np.any(weight != 1) for weight in self.grid.weights()):
            # Volumes are positive: what is in the kernel stays there, and the rest out of it.
            known = Definiteness(singular=known.singular).completed(examine(self.grid, parts))
        kept = None if self.sides is None else sources
        return Stencil.folded(self.grid, parts, kept, known, "weighted")

    def declared(
        self, *, symmetric: bool | None = None, positive_definite: bool | None = None
    ) -> "Stencil":
        """The same stencil with what is known of it but cannot be seen, as of traced numbers."""
        known = self.definiteness
        if symmetric is not None:
            known = known._replace(symmetric=symmetric)
        if positive_definite:
            known = Definiteness(symmetric=True, sign="positive", singular=False)
        made = object.__new__(Stencil)
        for name in ("grid", "offsets", "coefficients", "sides", "sources", "form"):
            object.__setattr__(made, name, getattr(self, name))
        object.__setattr__(made, "definiteness", known)
        return made

    def __add__(self, other: Operator) -> Operator:
        """A + B, a stencil where B is one on the same grid."""
        from bilevel_pde.diffusion import Diffusion  # noqa: PLC0415

        if isinstance(other, Diffusion):
            return other + self
        if not isinstance(other, Stencil) or other.grid != self.grid:
            return super().__add__(other)
        terms = self.terms
        for offset, parts in other.terms.items():
            terms[offset] = terms.get(offset, ()) + parts
        sources = None
        if self.sides is not None and other.sides is not None:
            sources = dict(zip(self.sides, self.sources, strict=True))
            for side, parts in zip(other.sides, other.sources, strict=True):
                sources[side] = folding.join(sources.get(side, ()) + parts)
        # A diagonal is its own transpose.
        form = other.form if len(self.offsets) == 1 and self.form == "plain" else self.form
        known = self.definiteness.plus(other.definiteness)
        return Stencil.folded(self.grid, terms, sources, known, form)

    def __mul__(self, factor: Array | float) -> Operator:
        """C A for a number c, a stencil."""
        if not is_factor(self, factor):
            return NotImplemented
        number = folding.number(self.grid, factor)

        def times(parts: Pieces) -> Pieces:
            return tuple(part * number for part in parts)

        terms = {offset: times(parts) for offset, parts in self.terms.items()}
        sources = None
        if self.sides is not None:
            pairs = zip(self.sides, self.sources, strict=True)
            sources = {side: times(parts) for side, parts in pairs}
        known = self.definiteness.scaled(number)
        return Stencil.folded(self.grid, terms, sources, known, self.form)

    @property
    def _periodic(self) -> tuple[bool, ...]:
        return tuple(self.grid.is_periodic(axis) for axis in range(self.grid.ndim))


def _reach(grid: Grid, offset: Offset) -> tuple[tuple[slice, ...], Any]:
    """The points from which an offset stays on the grid, and where it leads."""
    inside: list[slice] = []
    targets: list[Any] = []
    for axis, (step, size) in enumerate(zip(offset, grid.shape, strict=True)):
        index = np.arange(size)
        if grid.is_periodic(axis):
            inside.append(slice(None))
            targets.append((index + step) % size)
        else:
            first, last = max(0, -step), max(min(size, size - step), 0)
            inside.append(slice(first, max(first, last)))
            targets.append(index[first:last] + step)
    return tuple(inside), np.ix_(*targets)


def _like(piece: Any, v: Array) -> Any:
    """A coefficient in the precision of the field."""
    return piece.astype(jnp.finfo(v.dtype).dtype)
