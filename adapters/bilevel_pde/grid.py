"""Grid: where the unknowns of a regular grid stand, and what holds on its sides."""

import dataclasses
import math
import operator
from collections.abc import Sequence
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from bilevel_pde.boundary import Boundary, Centering, Dirichlet, Ghost, Periodic

Side = Literal[0, 1]
Pair = tuple[Boundary, Boundary]
T = TypeVar("T")


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, init=False)
class Grid:
    """A regular grid of unknowns in one, two or three dimensions.

    Fields have the shape of the grid; axis 0 is x, axis 1 is y, axis 2 is z ('ij' order).

    **Arguments:**

    - `shape`: unknowns along each axis, integers; one for one dimension.
    - `extent`: length of the domain along each axis, or one for all.
    - `boundary`: [`Dirichlet`][] (default), [`Neumann`][], [`Robin`][] or [`Periodic`][] for all
        sides; or a list of one for each axis, each a condition or a pair (low, high).
    - `centering`: `"vertex"` (default) or `"cell"`, for all axes or one each. Vertices of a
        Dirichlet side start one spacing inside, those of another side on the boundary; cells
        start half a spacing inside.
    - `origin`: coordinate where the domain starts along each axis, or one for all.
    - `dtype`: of coefficients and fields, float32 or float64; by default JAX's default floating
        type.

    **Raises:** `ValueError` for a shape, length or pairing of conditions that makes no grid,
    `TypeError` for a shape that is not of integers and another dtype.

    The grid of the published Poisson problem has 30 inner points, 1/31 apart:

    >>> grid = Grid(30)
    >>> round(1 / grid.spacing[0], 6)
    31.0
    >>> Grid((4, 6), boundary=[(Dirichlet(), Dirichlet()), Periodic()]).spacing
    (0.2, 0.16666666666666666)
    """

    shape: tuple[int, ...]
    extent: tuple[float, ...]
    boundary: tuple[Pair, ...]
    centering: tuple[Centering, ...]
    origin: tuple[float, ...]
    dtype: np.dtype[Any]

    def __init__(
        self,
        shape: int | Sequence[int],
        extent: float | Sequence[float] = 1.0,
        boundary: Boundary | Sequence[Boundary | Sequence[Boundary]] = Dirichlet(),  # noqa: B008
        centering: Centering | Sequence[Centering] = "vertex",
        origin: float | Sequence[float] = 0.0,
        dtype: Any = None,
    ):
        def put(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        put("shape", _shape(shape))
        count = len(self.shape)
        put("extent", _numbers("extent", extent, count))
        put("origin", _numbers("origin", origin, count))
        put("centering", _each("centering", centering, count))
        put("boundary", _pairs(boundary, count))
        put("dtype", _dtype(dtype))
        for length in self.extent:
            if length <= 0:
                msg = f"Grid: extent should be positive lengths, got {extent!r}."
                raise ValueError(msg)
        for centered in self.centering:
            if centered not in {"vertex", "cell"}:
                msg = f"Grid: centering should be 'vertex' or 'cell', got {centering!r}."
                raise ValueError(msg)
        for axis in range(count):
            self._check_points(axis)

    def _check_points(self, axis: int) -> None:
        least = 1
        if self.is_periodic(axis):
            least = 3
        elif self.centering[axis] == "vertex" and any(s.on_boundary for s in self.boundary[axis]):
            least = 2
        if self.shape[axis] < least:
            low, high = (type(side).__name__ for side in self.boundary[axis])
            msg = (
                f"Grid: axis {axis}, {self.centering[axis]}-centred between {low} and {high}, "
                f"takes at least {least} points, got {self.shape[axis]}."
            )
            raise ValueError(msg)

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of unknowns."""
        return math.prod(self.shape)

    @property
    def like(self) -> jax.ShapeDtypeStruct:
        """Shape and dtype of a field."""
        return jax.ShapeDtypeStruct(self.shape, self.dtype)

    @property
    def spacing(self) -> tuple[float, ...]:
        """Distance of neighbours along each axis."""
        return tuple(length / self._intervals(axis) for axis, length in enumerate(self.extent))

    def _intervals(self, axis: int) -> int:
        points = self.shape[axis]
        if self.centering[axis] == "cell" or self.is_periodic(axis):
            return points
        return points + 1 - sum(side.on_boundary for side in self.boundary[axis])

    def is_periodic(self, axis: int) -> bool:
        """Whether the axis closes on itself."""
        return isinstance(self.boundary[axis][0], Periodic)

    def ghost(self, axis: int, side: Side) -> Ghost | None:
        """The value one spacing outside of a side; `None` on a periodic axis."""
        return self.boundary[axis][side].ghost(self.centering[axis], self.spacing[axis])

    def coincides(self, other: "Grid") -> bool:
        """Whether the points are the same, whatever holds on the sides."""
        if (self.shape, self.origin) != (other.shape, other.origin):
            return False
        starts = all(
            self._offset(axis) == other._offset(axis)  # noqa: SLF001
            for axis in range(self.ndim)
        )
        return starts and np.allclose(self.spacing, other.spacing, rtol=1e-6)

    def coordinates(self) -> tuple[Float[Array, "..."], ...]:
        """Coordinates of the points, a 1-D array for each axis.

        >>> [float(x) for x in Grid(3).coordinates()[0]]
        [0.25, 0.5, 0.75]
        """
        return tuple(self._along(axis, self._offset(axis)) for axis in range(self.ndim))

    def mesh(self) -> tuple[Float[Array, "..."], ...]:
        """Coordinates of the points, an array of the grid's shape for each axis."""
        return tuple(jnp.meshgrid(*self.coordinates(), indexing="ij"))

    def _offset(self, axis: int) -> float:
        """Spacings between the boundary and the first point."""
        if self.centering[axis] == "cell":
            return 0.5
        low = self.boundary[axis][0]
        return 0.0 if self.is_periodic(axis) or low.on_boundary else 1.0

    def _along(self, axis: int, offset: float, extra: int = 0) -> Float[Array, "..."]:
        steps = np.arange(self.shape[axis] + extra) + offset
        return jnp.asarray(self.origin[axis] + self.spacing[axis] * steps, self.dtype)

    def face_shape(self, axis: int) -> tuple[int, ...]:
        """Shape of a field on the faces between neighbours along an axis.

        One face more than points, those on the two sides included; on a periodic axis as many
        as points, face i being below point i.

        >>> Grid((4, 6)).face_shape(1)
        (4, 7)
        """
        extra = 0 if self.is_periodic(axis) else 1
        return tuple(n + extra * (d == axis) for d, n in enumerate(self.shape))

    def face_coordinates(self, axis: int) -> tuple[Float[Array, "..."], ...]:
        """Coordinates of the faces across an axis, a 1-D array for each axis.

        Faces lie midway between points, and the outermost ones half a spacing further, but for
        a vertex on the boundary, whose outer face is the boundary itself.
        """
        coordinates = list(self.coordinates())
        extra = 0 if self.is_periodic(axis) else 1
        faces = np.array(self._along(axis, self._offset(axis) - 0.5, extra))
        if self.centering[axis] == "vertex":
            for side, end in ((0, self.origin[axis]), (1, self.origin[axis] + self.extent[axis])):
                if self.boundary[axis][side].on_boundary:
                    faces[-side] = end
        coordinates[axis] = jnp.asarray(faces, self.dtype)
        return tuple(coordinates)

    def weights(self) -> tuple[np.ndarray[Any, Any], ...]:
        """Length of each point's control volume over the spacing: 1, or 1/2 on the boundary.

        One array for each axis, of the grid's dimensions, to be multiplied with each other.
        """
        weights: list[np.ndarray[Any, Any]] = []
        for axis, points in enumerate(self.shape):
            weight = np.ones(points, self.dtype)
            if self.centering[axis] == "vertex":
                for side in (0, 1):
                    if self.boundary[axis][side].on_boundary:
                        weight[-side] = 0.5
            weights.append(self.line(axis, weight))
        return tuple(weights)

    def line(self, axis: int, values: Any) -> np.ndarray[Any, Any]:
        """A 1-D array along an axis, with the grid's number of dimensions."""
        shape = tuple(-1 if d == axis else 1 for d in range(self.ndim))
        return np.asarray(values, self.dtype).reshape(shape)


def _shape(shape: Any) -> tuple[int, ...]:
    given: tuple[Any, ...] = tuple(shape) if _is_list(shape) else (shape,)
    try:
        if any(isinstance(n, bool | np.bool_) for n in given):
            raise TypeError  # noqa: TRY301
        points = tuple(operator.index(n) for n in given)
    except (TypeError, jax.errors.ConcretizationTypeError):
        msg = f"Grid: shape should be integers, one for each axis, got {shape!r}."
        raise TypeError(msg) from None
    if not 1 <= len(points) <= 3 or min(points) < 1:
        msg = f"Grid: shape should be one to three positive integers, got {shape!r}."
        raise ValueError(msg)
    return points


def _is_list(value: Any) -> bool:
    """Whether it is one thing for each axis: a sequence, or an array of one dimension."""
    if isinstance(value, np.ndarray | jax.Array):
        return value.ndim == 1
    return isinstance(value, Sequence) and not isinstance(value, str)


def _each(name: str, value: T | Sequence[T], count: int) -> tuple[T, ...]:
    given: Any = value
    values: tuple[Any, ...] = tuple(given) if _is_list(given) else (given,) * count
    if len(values) != count:
        msg = (
            f"Grid: {name} should be one for all axes or one for each of {count}, "
            f"got {len(values)}: {value!r}."
        )
        raise ValueError(msg)
    return values


def _numbers(name: str, value: float | Sequence[float], count: int) -> tuple[float, ...]:
    numbers = _each(name, value, count)
    try:
        floats = tuple(float(number) for number in numbers)
    except (TypeError, jax.errors.ConcretizationTypeError):
        msg = (
            f"Grid: {name} should be numbers known before tracing, got {value!r}. To "
            "differentiate with respect to a length, scale the operator instead."
        )
        raise TypeError(msg) from None
    if not all(math.isfinite(number) for number in floats):
        msg = f"Grid: {name} should be finite, got {value!r}."
        raise ValueError(msg)
    return floats


def _pairs(
    boundary: Boundary | Sequence[Boundary | Sequence[Boundary]], count: int
) -> tuple[Pair, ...]:
    given: Any = boundary
    if (
        count == 1
        and isinstance(given, Sequence)
        and len(given) == 2
        and all(isinstance(side, Boundary) for side in given)
    ):
        given = [tuple(given)]
    pairs: list[Pair] = []
    for axis, sides in enumerate(_each("boundary", given, count)):
        pair: tuple[Any, ...] = tuple(sides) if isinstance(sides, Sequence) else (sides, sides)
        if len(pair) != 2 or not all(isinstance(side, Boundary) for side in pair):
            msg = (
                f"Grid: boundary of axis {axis} should be a condition such as Dirichlet() or a "
                f"pair (low, high) of them, got {sides!r}."
            )
            raise ValueError(msg)
        if sum(isinstance(side, Periodic) for side in pair) == 1:
            msg = (
                f"Grid: axis {axis} is periodic on both sides or on none, got "
                f"({type(pair[0]).__name__}, {type(pair[1]).__name__})."
            )
            raise ValueError(msg)
        pairs.append((pair[0], pair[1]))
    return tuple(pairs)


def _dtype(dtype: Any) -> np.dtype[Any]:
    try:
        chosen = np.dtype(jax.dtypes.canonicalize_dtype(float if dtype is None else dtype))
    except TypeError:
        msg = f"Grid: dtype should be float32 or float64, got {dtype!r}."
        raise TypeError(msg) from None
    if chosen not in {np.dtype(np.float32), np.dtype(np.float64)}:
        msg = f"Grid: dtype should be float32 or float64, got {chosen}."
        if jnp.issubdtype(chosen, jnp.floating):
            msg += " In less no tolerance holds: convert the fields that come out."
        raise TypeError(msg)
    return chosen
