"""Smoothers: cheap iterations that take out what changes from point to point."""

import abc
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from bilevel.bound import BoundProblem
from bilevel.solver.base import IncompatibleError
from bilevel.solver.examination import is_concrete, require_diagonal
from bilevel.solver.parameter import number, positive, whole
from bilevel_pde.diffusion import Diffusion
from bilevel_pde.grid import Grid
from bilevel_pde.grid_colours import grid_colours
from bilevel_pde.materialise import materialise
from bilevel_pde.operator import Operator
from bilevel_pde.source import grid_operator, own_way, source_operator
from bilevel_pde.stencil import Stencil


class Smoother(eqx.Module):
    """Some sweeps of an iteration for A x = b.

    A smoother is a preconditioner as it stands, and with `bl.Richardson(1.0,
    preconditioner=smoother)` a solver; a multigrid cycle uses it on every level.  The
    sweeps after the coarse correction run backwards, so that the cycle stays symmetric.
    """

    @abc.abstractmethod
    def sweep(
        self, operator: Operator, x: Array | None, b: Array, *, backward: bool
    ) -> Float[Array, "..."]:
        """Improve x, `None` for zero, by this smoother's sweeps."""

    def at(self, problem: BoundProblem, x: Array) -> Any:
        """V -> M⁻¹ v for the problem's operator.

        **Raises:** `IncompatibleError` for an operator that this smoother cannot work on,
        `ValueError` for one with a zero on its diagonal, where that can be seen.
        """
        del x
        smoothed = own_way(problem, "smoothed")
        if smoothed is not None and getattr(self, "colours", None) is None:
            return partial(smoothed, self)
        operator = self._operator(problem)
        self.examine(operator)
        return lambda v: self.sweep(operator, None, v, backward=False)

    def examine(self, operator: object) -> None:
        """Refuse an operator whose numbers are there to be looked at, and will not do.

        **Raises:** `ValueError` for a zero on the diagonal, which smoothing divides by.
        """
        require_diagonal(type(self).__name__, operator)

    def _operator(self, problem: BoundProblem) -> Operator:
        return grid_operator(problem, type(self).__name__)


IN_LINE = 4
"""Sweeps that are written out one after another."""


class WeightedJacobi(Smoother):
    """X ← x + ω D⁻¹ (b - A x), for any operator of this adapter that has a diagonal.

    **Arguments:**

    - `weight`: ω > 0; `None` takes 2/3, 4/5 and 6/7 on grids of one, two and three dimensions,
        and 2/3 for a matrix.
    - `sweeps`: how often, static.

    >>> WeightedJacobi(sweeps=2).sweeps
    2
    """

    weight: Float[Array, ""] | float | None = None
    sweeps: int = eqx.field(static=True, default=2)

    def __check_init__(self) -> None:
        """Validate the parameters where they are concrete."""
        if self.weight is not None:
            positive("WeightedJacobi", "weight", self.weight)
        whole("WeightedJacobi", "sweeps", self.sweeps)

    def _operator(self, problem: BoundProblem) -> Operator:
        operator = source_operator(problem, "WeightedJacobi")
        _require_one_array("WeightedJacobi", operator)
        return operator

    def sweep(
        self, operator: Operator, x: Array | None, b: Array, *, backward: bool
    ) -> Float[Array, "..."]:
        """All points at once."""
        del backward
        scale = _scale_of(operator)
        weight = self.weight
        if weight is None:
            weight = 2.0 * scale.ndim / (2.0 * scale.ndim + 1.0)
        # Of an operator on vectors b may have several columns.
        scale = scale.reshape(*scale.shape, *[1] * (b.ndim - scale.ndim))
        step = (weight / scale).astype(b.dtype)

        def again(_: Any, x: Array) -> Array:
            return x + step * (b - operator.matvec(x))

        done = int(x is None)
        x = step * b if x is None else x
        # Few in line, of many a loop compiles one.
        if self.sweeps > IN_LINE:
            return jax.lax.fori_loop(done, self.sweeps, again, x)
        for k in range(done, self.sweeps):
            x = again(k, materialise(x) if k else x)
        return x


MOST_STEPS = 32
"""Steps of Gauss-Seidel on a grid that are written out one after another."""


class GaussSeidel(Smoother):
    """Gauss-Seidel in the order of colours: red before black, so that each colour is one step.

    Points of a colour do not see one another: two colours for a stencil along the axes, three
    where a periodic axis has an odd number of points, 2ᵈ in d dimensions for a stencil that
    reaches across corners, and more for one that reaches further.  So for a symmetric positive
    definite operator it converges with every weight, and the symmetric one is positive definite.
    Of a matrix that is on no grid, [`colouring`][] finds colours; with its order `"natural"` a
    sweep is a solve with the lower triangle, and a backward one with the upper.

    **Arguments:**

    - `weight`: ω of successive over-relaxation, 0 < ω < 2; 1 for plain Gauss-Seidel.
    - `sweeps`: how often, static.
    - `symmetric`: whether each sweep goes forth and back (SSOR), which conjugate gradients
        need of a preconditioner. Within a multigrid cycle it is symmetric anyway.
    - `colours`: an integer for each unknown, shape (n,), as [`colouring`][] makes them; `None`
        for those of the grid. Where the entries are not traced, colours that an entry
        contradicts are refused.

    **Raises:** `ValueError` for a weight out of (0, 2), no sweeps, and colours that are no
    integers.

    >>> GaussSeidel(symmetric=True).weight
    1.0
    """

    weight: Float[Array, ""] | float = 1.0
    sweeps: int = eqx.field(static=True, default=1)
    symmetric: bool = eqx.field(static=True, default=False)
    colours: Int[Array, " n"] | np.ndarray | None = None
    _count: int = eqx.field(static=True, init=False, default=0)

    def __post_init__(self) -> None:
        """How many colours there are tells how many steps a sweep has."""
        if self.colours is not None:
            if not isinstance(self.colours, jax.Array):
                self.colours = np.asarray(self.colours)
            self._count = 1 + int(np.max(np.asarray(self.colours), initial=-1))

    def __check_init__(self) -> None:
        """Validate the parameters where they are concrete."""
        positive("GaussSeidel", "weight", self.weight)
        weight = number("GaussSeidel", "weight", self.weight)
        if weight is not None and weight >= 2:
            msg = (
                f"GaussSeidel: weight must be below 2, got {weight}: over-relaxation by 2 or more "
                "makes errors grow. 1 is plain Gauss-Seidel."
            )
            raise ValueError(msg)
        whole("GaussSeidel", "sweeps", self.sweeps)
        if self.colours is None:
            return
        if np.ndim(self.colours) != 1 or not jnp.issubdtype(self.colours.dtype, jnp.integer):
            msg = (
                "GaussSeidel: colours should be an integer for each unknown, shape (n,), got "
                f"{self.colours.dtype} of shape {self.colours.shape}."
            )
            raise ValueError(msg)
        if np.min(np.asarray(self.colours), initial=0) < 0:
            msg = (
                f"GaussSeidel: colours should count from 0, got {np.min(np.asarray(self.colours))}."
            )
            raise ValueError(msg)

    def examine(self, operator: object) -> None:
        """Refuse an operator whose numbers are there to be looked at, and will not do.

        **Raises:** `ValueError` for a zero on the diagonal, which smoothing divides by, and
        for an entry that joins unknowns of one colour.
        """
        super().examine(operator)
        if self.colours is None or not isinstance(operator, Operator):
            return
        if operator.shape[0] == self.colours.shape[0] and is_concrete((self, operator)):
            _require_apart(operator, self.colours)

    def _operator(self, problem: BoundProblem) -> Operator:
        operator = source_operator(problem, "GaussSeidel")
        if self.colours is None:
            if isinstance(operator, Stencil | Diffusion):
                return operator
            msg = (
                f"GaussSeidel cannot work on a {type(operator).__name__} without colours: it knows "
                "those of operators on a regular grid, a Stencil or a Diffusion. Give "
                "colours=pde.colouring(matrix), or use pde.AlgebraicMultigrid or pde.SparseDirect."
            )
            raise IncompatibleError(msg)
        _require_one_array("GaussSeidel", operator)
        if operator.shape[0] != self.colours.shape[0]:
            msg = (
                f"GaussSeidel: {self.colours.shape[0]} colours do not fit an operator with "
                f"{operator.shape[0]} unknowns. Make them of its matrix with pde.colouring."
            )
            raise IncompatibleError(msg)
        return operator

    def sweep(
        self, operator: Operator, x: Array | None, b: Array, *, backward: bool
    ) -> Float[Array, "..."]:
        """Colour after colour."""
        if self.colours is None:
            colours, count = _colours(operator)
        else:
            shape = b.shape if b.size == self.colours.shape[0] else (-1, *[1] * (b.ndim - 1))
            colours, count = self.colours.reshape(shape), self._count
        order = list(range(count))[:: -1 if backward else 1]
        if self.symmetric:
            order += order[::-1]
        order *= self.sweeps
        diagonal = diagonal_of(operator)
        # Of an operator on vectors b may have several columns.
        diagonal = diagonal.reshape(*diagonal.shape, *[1] * (b.ndim - diagonal.ndim))
        step = (self.weight / diagonal).astype(b.dtype)

        def updated(x: Array | None, colour: Array) -> Array:
            part = jnp.where(colour, step * (b if x is None else b - operator.matvec(x)), 0.0)
            return part if x is None else x + part

        if self.colours is None and len(order) <= MOST_STEPS:
            masks = [jnp.asarray(colours == colour) for colour in range(count)]
            for k, colour in enumerate(order):
                x = updated(materialise(x) if k and x is not None else x, masks[colour])
            assert x is not None
            return x
        # There may be many: a loop compiles one of them.
        numbers = jnp.asarray(colours)
        start = jnp.zeros_like(b) if x is None else x
        every = jnp.asarray(order, numbers.dtype)
        return jax.lax.scan(lambda x, k: (updated(x, numbers == k), None), start, every)[0]


class ChebyshevSmoother(Smoother):
    """The Chebyshev polynomial of D⁻¹A that is small on the upper part of its spectrum.

    As strong as Gauss-Seidel, and all points at once.

    **Arguments:**

    - `degree`: applications of the operator, static.
    - `upper`: largest eigenvalue of D⁻¹A; 2 bounds it for a diagonally dominant A.
    - `part`: the polynomial is small from `part * upper` on; below 1.

    D is the diagonal; of a stencil that reaches across corners at least half of the sum of
    sizes along the row, so that 2 is a bound for it as well.

    **Raises:** `ValueError` for numbers out of their range.

    >>> ChebyshevSmoother().degree
    3
    """

    degree: int = eqx.field(static=True, default=3)
    upper: Float[Array, ""] | float = 2.0
    part: float = eqx.field(static=True, default=0.25)

    def __check_init__(self) -> None:
        """Validate the parameters where they are concrete."""
        whole("ChebyshevSmoother", "degree", self.degree)
        positive("ChebyshevSmoother", "upper", self.upper)
        positive("ChebyshevSmoother", "part", self.part)
        if not self.part < 1:
            msg = (
                f"ChebyshevSmoother: part must be below 1, got {self.part}: the polynomial is "
                "small on the upper part of the spectrum, from part * upper to upper."
            )
            raise ValueError(msg)

    def sweep(
        self, operator: Operator, x: Array | None, b: Array, *, backward: bool
    ) -> Float[Array, "..."]:
        """The three-term recurrence (Saad, Iterative methods, algorithm 12.1)."""
        del backward
        inverse = (1.0 / _scale_of(operator)).astype(b.dtype)
        centre, radius = 0.5 * (1 + self.part) * self.upper, 0.5 * (1 - self.part) * self.upper
        ratio = centre / radius
        rho = 1.0 / ratio
        residual = b if x is None else materialise(b - operator.matvec(x))
        direction = inverse * residual / centre
        found = direction if x is None else x + direction
        for _ in range(self.degree - 1):
            direction = materialise(direction)
            residual = residual - operator.matvec(direction)
            following = 1.0 / (2.0 * ratio - rho)
            direction = following * rho * direction + 2.0 * following / radius * inverse * residual
            found, rho = found + direction, following
        return found


def _colours(operator: Operator) -> tuple[Any, int]:
    """Colours of the points of an operator on a grid, and how many."""
    own: Any = getattr(operator, "colours", None)
    if callable(own):
        found: Any = own()
        return found
    grid = grid_of(operator)
    axes = range(grid.ndim)
    if isinstance(operator, Stencil):
        offsets = operator.offsets
    else:
        offsets = tuple(tuple(int(d == axis) for d in axes) for axis in axes)
    periodic = tuple(grid.is_periodic(axis) for axis in axes)
    return grid_colours(grid.shape, periodic, offsets)


def _scale_of(operator: Operator) -> Array:
    """A diagonal D such that D⁻¹A has eigenvalues of at most 2, for smoothers that need it."""
    diagonal = diagonal_of(operator)
    stencil: Any = operator
    has_coefficients = callable(getattr(operator, "coefficient", None))
    offsets: tuple[tuple[int, ...], ...] = stencil.offsets if has_coefficients else ()
    if all(sum(step != 0 for step in offset) <= 1 for offset in offsets):
        # Along the axes differences are as large as their diagonal.
        return diagonal
    sizes = sum(jnp.abs(stencil.coefficient(offset)) for offset in offsets)
    return jnp.sign(diagonal) * jnp.maximum(jnp.abs(diagonal), 0.5 * sizes)


def _require_one_array(name: str, operator: Operator) -> None:
    if isinstance(operator.like, jax.ShapeDtypeStruct) and operator.diagonal() is not None:
        return
    msg = (
        f"{name} cannot work on a {type(operator).__name__}: it needs an operator on one array "
        "that knows its diagonal. Use pde.from_scipy(operator.to_scipy()), or pde.SparseDirect."
    )
    raise IncompatibleError(msg)


def _require_apart(operator: Operator, colours: Any) -> None:
    """Refuse colours of which one has two unknowns that an entry joins."""
    try:
        with jax.ensure_compile_time_eval():
            rows, columns, values = (np.asarray(part) for part in operator.entries())
    except (IncompatibleError, jax.errors.TracerArrayConversionError):
        return
    numbers = np.asarray(colours)
    joined = (numbers[rows] == numbers[columns]) & (rows != columns) & (values != 0)
    if not joined.any():
        return
    first = int(np.argmax(joined))
    row, column = int(rows[first]), int(columns[first])
    msg = (
        f"GaussSeidel: unknowns {row} and {column} have the same colour, "
        f"{numbers[row]}, and an entry joins them: updated at once they would not see one "
        "another. Make the colours of this matrix, with pde.colouring."
    )
    raise ValueError(msg)


def diagonal_of(operator: Operator) -> Array:
    """The diagonal, which every operator on a grid has."""
    diagonal: Any = operator.diagonal()
    assert diagonal is not None
    return diagonal


def grid_of(operator: Operator) -> Grid:
    """The grid of an operator that has one."""
    grid: Any = getattr(operator, "grid", None)
    assert isinstance(grid, Grid)
    return grid
