"""Diffusion: −∇·(k∇u) from the coefficient on the faces between points."""

from collections.abc import Sequence
from typing import Any, Literal, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse as sp
from jax.core import Tracer
from jaxtyping import Array, Float

from bilevel_pde import folding
from bilevel_pde.boundary import Ghost, Robin
from bilevel_pde.boundary_values import BoundaryValues, insert
from bilevel_pde.definiteness import Definiteness
from bilevel_pde.faces import Mean, above, below, to_faces
from bilevel_pde.grid import Grid, Side
from bilevel_pde.operator import Operator, is_factor
from bilevel_pde.shift import shift
from bilevel_pde.stencil import Stencil
from bilevel_pde.triangle import Part

Pieces = tuple[Any, ...]


class Diffusion(Operator):
    """−∇·(k∇u) + c u by fluxes through faces, of second order.

    It stores and reads k on faces only, one array for each axis, so that derivatives with
    respect to k are as long as that.  Multiples of it, and sums with one another and with
    multiples of the identity, stay what they are; sums with other stencils are stencils.

    **Arguments:**

    - `grid`: where the unknowns are.
    - `coefficient`: k > 0, a number or a field, traced or not; a tuple of one for each axis
        where it depends on the direction.
    - `at`: `"points"` for k of the grid's shape, or `"faces"` for a tuple of fields of
        `grid.face_shape(axis)`, whose outermost values belong to the sides.
    - `mean`: of points to faces. `"arithmetic"` is for a smooth k; on a side without a point
        it is continued linearly, to no less than half of the outermost value, where the
        derivative has a kink. `"harmonic"` is for jumps: k is constant around each point, up
        to the side, and the flux through layers is exact.
    - `reaction`: c, a number or a field.

    It is exactly symmetric unless a vertex is on a Neumann or Robin side, where `weighted()`
    is.  It is positive definite if k > 0, which is taken for granted of a traced k, and a
    side is Dirichlet or Robin.

    **Raises:** `ValueError` for k of wrong shape, negative or not finite.

    >>> import jax.numpy as jnp
    >>> operator = Diffusion(Grid(3, extent=4.0), jnp.array([1.0, 1.0, 3.0]))
    >>> [float(v) for v in operator @ jnp.array([1.0, 1.0, 1.0])]
    [1.0, 0.0, 4.0]
    >>> operator.positive_definite
    True
    """

    grid: Grid = eqx.field(static=True)
    faces: Pieces
    points: Pieces | None
    mean: Mean = eqx.field(static=True)
    reaction: Pieces
    row_weights: bool = eqx.field(static=True)
    definiteness: Definiteness = eqx.field(static=True)

    def __init__(
        self,
        grid: Grid,
        coefficient: Any,
        *,
        at: Literal["points", "faces"] = "points",
        mean: Mean = "arithmetic",
        reaction: Any = None,
    ):
        if at not in {"points", "faces"} or mean not in {"arithmetic", "harmonic"}:
            msg = (
                "Diffusion: at should be 'points' or 'faces' and mean 'arithmetic' or 'harmonic', "
                f"got at={at!r}, mean={mean!r}."
            )
            raise ValueError(msg)
        given = _by_axis(grid, coefficient)
        known = _definiteness(grid, given)
        self.grid = grid
        self.faces = tuple(
            _on_faces(grid, k, axis, at=at, mean=mean) for axis, k in enumerate(given)
        )
        # Who cuts the grid into blocks makes the faces of each from the points of its neighbours.
        self.points = None
        if at == "points":
            self.points = tuple(folding.piece(grid, k, f"of axis {a}") for a, k in enumerate(given))
        self.mean = mean
        self.row_weights = False
        self.reaction = ()
        if reaction is not None:
            centre = Stencil(grid, {(0,) * grid.ndim: reaction}, symmetric=True)
            self.reaction = centre.coefficients[0]
            known = known.plus(centre.definiteness)
        self.definiteness = known

    def _with(
        self,
        faces: Pieces,
        reaction: Pieces,
        definiteness: Definiteness,
        *,
        points: Pieces | None = None,
        row_weights: bool | None = None,
    ) -> "Diffusion":
        made = object.__new__(Diffusion)
        values = {
            "grid": self.grid,
            "faces": faces,
            "points": points,
            "mean": self.mean,
            "reaction": folding.merge(self.grid, reaction) if reaction else (),
            "row_weights": self.row_weights if row_weights is None else row_weights,
            "definiteness": definiteness,
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
        """Whether A = Aᵀ."""
        return self.definiteness.symmetric

    @property
    def positive_definite(self) -> bool | None:
        """Whether A is symmetric positive definite; `None` for unknown."""
        return self.definiteness.positive_definite

    @property
    def singular(self) -> bool:
        """Whether constant fields are known to be in the kernel."""
        return self.definiteness.singular is True

    def matvec(self, v: Array) -> Array:
        """A v, like v."""
        return self._apply(folding.checked(self.grid, v), transpose=False)

    def rmatvec(self, v: Array) -> Array:
        """Aᵀ v, like v."""
        return self._apply(folding.checked(self.grid, v), transpose=True)

    def _apply(self, v: Array, *, transpose: bool) -> Array:
        dtype = jnp.finfo(v.dtype).dtype
        total = jnp.zeros_like(v)
        for piece in self.reaction:
            total += piece.astype(dtype) * v
        for axis in range(self.grid.ndim):
            scale = self.row_scale(axis)
            field = v if scale is None or not transpose else scale.astype(dtype) * v
            low, high = (k.astype(dtype) for k in self._conductances(axis))
            flux = low * (field - self._moved(field, axis, -1))
            flux += high * (field - self._moved(field, axis, 1))
            total += flux if scale is None or transpose else scale.astype(dtype) * flux
        return total

    def transposed(self) -> Operator:
        """Aᵀ, itself where it is symmetric."""
        return self if self.symmetric else self.stencil().transposed()

    def diagonal(self) -> Float[Array, "..."]:
        """The diagonal, of the grid's shape."""
        total = jnp.zeros(self.grid.shape, self.grid.dtype)
        for piece in self.reaction:
            total += piece
        for axis in range(self.grid.ndim):
            scale = self.row_scale(axis)
            low, high = self._conductances(axis)
            total += low + high if scale is None else scale * (low + high)
        return total

    def to_scipy(self) -> sp.csr_array:
        """The matrix, for fields in C order."""
        return self.stencil().to_scipy()

    def entries(self) -> tuple[Any, Any, Array]:
        """Those of the stencil."""
        return self.stencil().entries()

    def triangle(self, part: Part, *, diagonal: bool) -> Stencil:
        """That of the stencil."""
        return self.stencil().triangle(part, diagonal=diagonal)

    def norm_bound(self) -> Float[Array, ""]:
        """A bound of ‖A‖₂, see [`Stencil.norm_bound`][]."""
        return self.stencil().norm_bound()

    def boundary_term(self, values: BoundaryValues) -> Float[Array, "..."]:
        """What boundary values add to A u; a problem is A u = f less this.

        **Arguments:**

        - `values`: by side, (axis, 0) or (axis, 1): a number, or an array of the side's
            shape. On a Dirichlet side u; on a Neumann side the slope ∂u/∂n, not the flux
            k ∂u/∂n; on a Robin side what its combination equals. Sides left out have zero.

        **Returns:** of the grid's shape, differentiable in the values and in k.
        """
        return insert(self.grid, self._sources(), values)

    def stencil(self) -> Stencil:
        """The same operator by coefficients of neighbours, an array for each."""
        grid = self.grid
        centre = (0,) * grid.ndim
        terms: dict[tuple[int, ...], Pieces] = {centre: self.reaction}
        for axis in range(grid.ndim):
            scale = self.row_scale(axis)
            for step, k in zip((-1, 1), self._conductances(axis), strict=True):
                coupling = k if scale is None else k * scale
                terms[centre] = (*terms[centre], coupling)
                terms[tuple(step * int(d == axis) for d in range(grid.ndim))] = (-coupling,)
        form = "weighted" if self.row_weights else "plain"
        return Stencil.folded(grid, terms, self._sources(), self.definiteness, form)

    def weighted(self) -> "Diffusion":
        """W A, symmetric, with the control volumes W of `grid.weights()`."""
        if self.row_weights:
            return self
        reaction = self.reaction
        for weight in self.grid.weights():
            reaction = tuple(piece * weight for piece in reaction)
        known = self.definiteness
        if not known.symmetric:
            known = Definiteness(True, _sign_by_sides(self.grid), known.singular)
            known = known if not reaction and self._is_positive() else known._replace(sign=None)
        return self._with(self.faces, reaction, known, points=self.points, row_weights=True)

    def unweighted(self) -> "Diffusion":
        """A of W A, as `weighted()` made it."""
        if not self.row_weights:
            return self
        reaction = self.reaction
        for weight in self.grid.weights():
            reaction = tuple(piece / weight for piece in reaction)
        uniform = all(bool(np.all(weight == 1)) for weight in self.grid.weights())
        known = self.definiteness
        known = known if uniform else Definiteness(False, None, known.singular)
        return self._with(self.faces, reaction, known, points=self.points, row_weights=False)

    def _is_positive(self) -> bool:
        """Whether no face is known to be negative; a traced one is taken to be positive."""
        return all(isinstance(k, Tracer) or bool(np.all(np.asarray(k) > 0)) for k in self.faces)

    def __add__(self, other: Operator) -> Operator:
        """A + B, of its own kind with another diffusion or a multiple of the identity."""
        if isinstance(other, Diffusion) and other.grid == self.grid:
            if other.row_weights == self.row_weights:
                faces = tuple(a + b for a, b in zip(self.faces, other.faces, strict=True))
                definiteness = self.definiteness.plus(other.definiteness)
                return self._with(faces, self.reaction + other.reaction, definiteness)
            return self.stencil() + other.stencil()
        if isinstance(other, Stencil) and other.grid == self.grid:
            if not other.sides and other.offsets == ((0,) * self.grid.ndim,):
                definiteness = self.definiteness.plus(other.definiteness)
                reaction = self.reaction + other.coefficients[0]
                return self._with(self.faces, reaction, definiteness, points=self.points)
            return self.stencil() + other
        return super().__add__(other)

    def __mul__(self, factor: Array | float) -> Operator:
        """C A for a number c."""
        if not is_factor(self, factor):
            return NotImplemented
        number = folding.number(self.grid, factor)
        return self._with(
            tuple(k * number for k in self.faces),
            tuple(piece * number for piece in self.reaction),
            self.definiteness.scaled(number),
            points=None if self.points is None else tuple(k * number for k in self.points),
        )

    def _moved(self, v: Array, axis: int, step: int) -> Array:
        ndim = self.grid.ndim
        periodic = tuple(self.grid.is_periodic(d) for d in range(ndim))
        return shift(v, tuple(step * int(d == axis) for d in range(ndim)), periodic)

    def face_factors(self, axis: int) -> tuple[Any, Any]:
        """The coefficient on the faces across an axis, and 1/h² with what sides make of it."""
        grid = self.grid
        scale = np.full(grid.face_shape(axis)[axis], grid.spacing[axis] ** -2)
        for side in (0, 1):
            ghost = grid.ghost(axis, side)
            if ghost is not None:
                scale[-side] *= ghost.conductance
        return self.faces[axis], grid.line(axis, scale)

    def _conductances(self, axis: int) -> tuple[Any, Any]:
        """For each point k/h² of the faces below and above, that of sides by their condition."""
        grid = self.grid
        k, line = self.face_factors(axis)
        return (
            below(grid, k, axis) * below(grid, line, axis),
            above(grid, k, axis) * (line if grid.is_periodic(axis) else above(grid, line, axis)),
        )

    def row_scale(self, axis: int) -> Any:
        """What the fluxes of an axis are multiplied with in each row; `None` for one."""
        weights = self.grid.weights()
        factors = [1.0 / weights[axis]]
        if self.row_weights:
            factors = [weight for d, weight in enumerate(weights) if d != axis]
        factors = [factor for factor in factors if not np.all(factor == 1)]
        if not factors:
            return None
        return factors[0] if len(factors) == 1 else factors[0] * factors[1]

    def _sources(self) -> dict[tuple[int, int], Pieces]:
        grid = self.grid
        sources: dict[tuple[int, int], Pieces] = {}
        sides: list[tuple[int, Side]] = [(axis, s) for axis in range(grid.ndim) for s in (0, 1)]
        for axis, side in sides:
            if grid.is_periodic(axis):
                continue
            ghost = cast("Ghost", grid.ghost(axis, side))

            def outermost(array: Any, axis: int = axis, side: int = side) -> Any:
                if array.ndim == 0 or array.shape[axis] == 1:
                    return array
                rows = slice(-1, None) if side else slice(0, 1)
                return array[(slice(None),) * axis + (rows,)]

            factor = np.asarray(-ghost.flux_source / grid.spacing[axis] ** 2, grid.dtype)
            scale = self.row_scale(axis)
            if scale is not None:
                factor = factor * outermost(scale)
            sources[axis, side] = (outermost(self.faces[axis]) * factor,)
        return sources


def _by_axis(grid: Grid, coefficient: Any) -> tuple[Any, ...]:
    if isinstance(coefficient, Sequence):
        given = tuple(cast("Sequence[Any]", coefficient))
        if len(given) != grid.ndim:
            msg = (
                f"Diffusion: a tuple of coefficients should have one for each of {grid.ndim} axes, "
                f"got {len(given)}."
            )
            raise ValueError(msg)
        return given
    return (coefficient,) * grid.ndim


def _on_faces(grid: Grid, k: Any, axis: int, *, at: str, mean: Mean) -> Any:
    if np.ndim(k) == 0:
        return folding.number(grid, k)
    expected = grid.shape if at == "points" else grid.face_shape(axis)
    if np.shape(k) != expected:
        msg = (
            f"Diffusion: the coefficient at {at} of axis {axis} should be a number or of shape "
            f"{expected}, got {np.shape(k)}."
        )
        raise ValueError(msg)
    if at == "faces":
        return jnp.asarray(k, grid.dtype)
    return to_faces(grid, k, axis, mean, positive=True)


def _definiteness(grid: Grid, given: tuple[Any, ...]) -> Definiteness:
    """What is known of −∇·(k∇u); k is positive where it is traced."""
    sign = _sign_by_sides(grid)
    for k in given:
        if jnp.issubdtype(jnp.result_type(k), jnp.complexfloating):
            msg = "Diffusion: the coefficient should be real, got a complex one."
            raise TypeError(msg)
        if isinstance(k, Tracer):
            continue
        with np.errstate(over="ignore"):
            numbers = np.asarray(k).astype(grid.dtype)
        finite = np.isfinite(numbers)
        if not finite.all():
            bad = numbers[~finite].flat[0]
            msg = f"Diffusion: the coefficient should be finite, got {bad} somewhere."
            raise ValueError(msg)
        least = float(np.min(numbers))
        if not least >= 0:
            msg = f"Diffusion: the coefficient should be positive, got {least} somewhere."
            raise ValueError(msg)
        if least == 0 and sign == "positive":
            sign = "nonnegative"
    singular = all(
        ghost is None or ghost.conductance == 0
        for axis in range(grid.ndim)
        for ghost in (grid.ghost(axis, 0), grid.ghost(axis, 1))
    )
    symmetric = all(bool(np.all(weight == 1)) for weight in grid.weights())
    return Definiteness(symmetric, sign if symmetric else None, singular or None)


def _sign_by_sides(grid: Grid) -> Literal["positive", "nonnegative"] | None:
    """The sign by the conditions: each side adds k (c u₀)², c being its conductance."""
    held = False
    for axis in range(grid.ndim):
        for side in grid.boundary[axis]:
            if isinstance(side, Robin) and side.value * side.slope < 0:
                return None
        ghosts = (grid.ghost(axis, 0), grid.ghost(axis, 1))
        held = held or any(ghost is not None and ghost.conductance > 0 for ghost in ghosts)
    return "positive" if held else "nonnegative"
