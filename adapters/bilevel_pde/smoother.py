"""Smoothers: cheap iterations that take out what changes from point to point."""

import abc
import itertools
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from bilevel.bound import BoundProblem
from bilevel.solver.parameter import positive, whole
from bilevel_pde.grid import Grid
from bilevel_pde.operator import Operator
from bilevel_pde.source import grid_operator
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
        operator = grid_operator(problem, type(self).__name__)
        return lambda v: self.sweep(operator, None, v, backward=False)


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
        for _ in range(self.sweeps):
            x = step * b if x is None else x + step * (b - operator.matvec(x))
        assert x is not None
        return x


class GaussSeidel(Smoother):
    """Gauss-Seidel in the order of colours: red before black, so that each colour is one step.

    Points of a colour do not see one another: two colours for a stencil along the axes, and
    2ᵈ in d dimensions for one that reaches across corners.

    **Arguments:**

    - `weight`: ω of successive over-relaxation, 0 < ω < 2; 1 for plain Gauss-Seidel.
    - `sweeps`: how often, static.
    - `symmetric`: whether each sweep goes forth and back (SSOR), which conjugate gradients
        need of a preconditioner. Within a multigrid cycle it is symmetric anyway.

    >>> GaussSeidel(symmetric=True).weight
    1.0
    """

    weight: Float[Array, ""] | float = 1.0
    sweeps: int = eqx.field(static=True, default=1)
    symmetric: bool = eqx.field(static=True, default=False)

    def __check_init__(self) -> None:
        """Validate the parameters where they are concrete."""
        positive("GaussSeidel", "weight", self.weight)
        whole("GaussSeidel", "sweeps", self.sweeps)

    def sweep(
        self, operator: Operator, x: Array | None, b: Array, *, backward: bool
    ) -> Float[Array, "..."]:
        """Colour after colour."""
        colours = list(_colours(operator, b))
        order = colours[::-1] if backward else colours
        if self.symmetric:
            order = [*order, *order[::-1]]
        step = (self.weight / diagonal_of(operator)).astype(b.dtype)
        for _ in range(self.sweeps):
            for colour in order:
                change = b if x is None else b - operator.matvec(x)
                part = jnp.where(colour, step * change, 0.0)
                x = part if x is None else x + part
        assert x is not None
        return x


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


def _colours(operator: Operator, like: Array) -> Any:
    """Masks of points that do not see one another."""
    parities = [
        (np.arange(size) % 2).reshape([-1 if d == axis else 1 for d in range(like.ndim)])
        for axis, size in enumerate(like.shape)
    ]
    across = isinstance(operator, Stencil) and any(
        sum(step != 0 for step in offset) > 1 for offset in operator.offsets
    )
    if not across:
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
