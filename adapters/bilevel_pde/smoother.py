"""Smoothers: cheap iterations that take out what changes from point to point."""

import abc
import itertools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from bilevel.bound import BoundProblem
from bilevel.solver.base import IncompatibleError
from bilevel.solver.parameter import positive, whole
from bilevel_pde.grid import Grid
from bilevel_pde.operator import Operator
from bilevel_pde.source import grid_operator, source_operator
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

        **Raises:** `IncompatibleError` for an operator that is not on a grid.
        """
        del x
        operator = self._operator(problem)
        return lambda v: self.sweep(operator, None, v, backward=False)

    def _operator(self, problem: BoundProblem) -> Operator:
        return grid_operator(problem, type(self).__name__)


IN_LINE = 4
"""Sweeps that are written out one after another."""


class WeightedJacobi(Smoother):
    """X ← x + ω D⁻¹ (b - A x).

    **Arguments:**

    - `weight`: ω > 0; `None` takes 2/3, 4/5 and 6/7 in one, two and three dimensions.
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

    def sweep(
        self, operator: Operator, x: Array | None, b: Array, *, backward: bool
    ) -> Float[Array, "..."]:
        """All points at once."""
        del backward
        weight = 2.0 * b.ndim / (2.0 * b.ndim + 1.0) if self.weight is None else self.weight
        step = (weight / diagonal_of(operator)).astype(b.dtype)

        def again(_: Any, x: Array) -> Array:
            return x + step * (b - operator.matvec(x))

        done = int(x is None)
        x = step * b if x is None else x
        # Few in line, for XLA to fuse; of many a loop compiles one.
        if self.sweeps > IN_LINE:
            return jax.lax.fori_loop(done, self.sweeps, again, x)
        for k in range(done, self.sweeps):
            x = again(k, x)
        return x


class GaussSeidel(Smoother):
    """Gauss-Seidel in the order of colours: red before black, so that each colour is one step.

    Points of a colour do not see one another: two colours for a stencil along the axes, and
    2ᵈ in d dimensions for one that reaches across corners.  Of a matrix that is on no grid,
    [`colouring`][] finds colours; with its order `"natural"` a sweep is a solve with the lower
    triangle, and a backward one with the upper.

    **Arguments:**

    - `weight`: ω of successive over-relaxation, 0 < ω < 2; 1 for plain Gauss-Seidel.
    - `sweeps`: how often, static.
    - `symmetric`: whether each sweep goes forth and back (SSOR), which conjugate gradients
        need of a preconditioner. Within a multigrid cycle it is symmetric anyway.
    - `colours`: an integer for each unknown, shape (n,), as [`colouring`][] makes them; `None`
        for those of the grid.

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
            self._count = 1 + int(np.max(np.asarray(self.colours), initial=-1))

    def __check_init__(self) -> None:
        """Validate the parameters where they are concrete."""
        positive("GaussSeidel", "weight", self.weight)
        whole("GaussSeidel", "sweeps", self.sweeps)
        if self.colours is not None and (
            np.ndim(self.colours) != 1 or not jnp.issubdtype(self.colours.dtype, jnp.integer)
        ):
            msg = (
                "GaussSeidel: colours should be an integer for each unknown, shape (n,), got "
                f"{self.colours.dtype} of shape {self.colours.shape}."
            )
            raise ValueError(msg)

    def _operator(self, problem: BoundProblem) -> Operator:
        if self.colours is None:
            return super()._operator(problem)
        operator = source_operator(problem, "GaussSeidel")
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
        count = self._count if self.colours is not None else _count_of(operator, b)
        order = list(range(count))[:: -1 if backward else 1]
        if self.symmetric:
            order += order[::-1]
        diagonal = diagonal_of(operator)
        # Of an operator on vectors b may have several columns.
        diagonal = diagonal.reshape(*diagonal.shape, *[1] * (b.ndim - diagonal.ndim))
        step = (self.weight / diagonal).astype(b.dtype)

        def updated(x: Array | None, colour: Array) -> Array:
            part = jnp.where(colour, step * (b if x is None else b - operator.matvec(x)), 0.0)
            return part if x is None else x + part

        if self.colours is None:
            masks = list(_colours(operator, b))
            for colour in order * self.sweeps:
                x = updated(x, masks[colour])
            assert x is not None
            return x
        shape = b.shape if b.size == self.colours.shape[0] else (-1, *[1] * (b.ndim - 1))
        colours = jnp.asarray(self.colours).reshape(shape)
        # There may be many: a loop compiles one of them.
        start = jnp.zeros_like(b) if x is None else x
        every = jnp.asarray(order * self.sweeps, colours.dtype)
        return jax.lax.scan(lambda x, k: (updated(x, colours == k), None), start, every)[0]


class ChebyshevSmoother(Smoother):
    """The Chebyshev polynomial of D⁻¹A that is small on the upper part of its spectrum.

    As strong as Gauss-Seidel, and all points at once.

    **Arguments:**

    - `degree`: applications of the operator, static.
    - `upper`: largest eigenvalue of D⁻¹A; 2 bounds it for a diagonally dominant A.
    - `part`: the polynomial is small from `part * upper` on.

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

    def sweep(
        self, operator: Operator, x: Array | None, b: Array, *, backward: bool
    ) -> Float[Array, "..."]:
        """The three-term recurrence (Saad, Iterative methods, algorithm 12.1)."""
        del backward
        inverse = (1.0 / diagonal_of(operator)).astype(b.dtype)
        centre, radius = 0.5 * (1 + self.part) * self.upper, 0.5 * (1 - self.part) * self.upper
        ratio = centre / radius
        rho = 1.0 / ratio
        residual = b if x is None else b - operator.matvec(x)
        direction = inverse * residual / centre
        found = direction if x is None else x + direction
        for _ in range(self.degree - 1):
            residual = residual - operator.matvec(direction)
            following = 1.0 / (2.0 * ratio - rho)
            direction = following * rho * direction + 2.0 * following / radius * inverse * residual
            found, rho = found + direction, following
        return found


def _count_of(operator: Operator, like: Array) -> int:
    return 2**like.ndim if _is_oblique(operator) else 2


def _is_oblique(operator: Operator) -> bool:
    return isinstance(operator, Stencil) and any(
        sum(step != 0 for step in offset) > 1 for offset in operator.offsets
    )


def _colours(operator: Operator, like: Array) -> Any:
    """Masks of points that do not see one another."""
    parities = [
        (np.arange(size) % 2).reshape([-1 if d == axis else 1 for d in range(like.ndim)])
        for axis, size in enumerate(like.shape)
    ]
    if not _is_oblique(operator):
        parity = sum(parities) % 2
        return (jnp.asarray(parity == colour) for colour in (0, 1))
    corners = itertools.product((0, 1), repeat=like.ndim)
    return (jnp.asarray(_all_equal(parities, corner)) for corner in corners)


def _all_equal(parities: list[np.ndarray], corner: tuple[int, ...]) -> np.ndarray:
    equal = [parity == wanted for parity, wanted in zip(parities, corner, strict=True)]
    return np.logical_and.reduce(np.broadcast_arrays(*equal))


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
