"""Burgers' equation."""

from typing import Any, ClassVar

import equinox as eqx
from jaxtyping import Array, PyTree

from bilevel.budget import Budget
from bilevel.solution import Solution
from bilevel.solver.base import InnerSolver
from bilevel.solver.bicgstab import BiCGStab
from bilevel_pde.advection_diffusion import Differences, checked_differences
from bilevel_pde.advection_operator import advection
from bilevel_pde.block import block_diagonal
from bilevel_pde.diffusion import Diffusion
from bilevel_pde.grid import Grid
from bilevel_pde.laplace_operator import identity
from bilevel_pde.linearization import (
    Derivative,
    Linearization,
    as_outer_budget,
    check_linearization,
    chosen_estimator,
    solve_linearised,
)
from bilevel_pde.quasilinear import Quasilinear
from bilevel_pde.stencil import Stencil
from bilevel_pde.stepper import Effort, Stepper, field_or_number, positive, side_values


class Burgers(Stepper):
    """∂u/∂t + u·∇u = ν Δu + f in one or two dimensions, by implicit Euler.

    A step solves (I + dt (w·∇ - νΔ)) w = u + dt f for w: by Picard's iteration, which lags the
    advecting velocity, or by Newton's.  The state is a field in one dimension, and a tuple of
    one field for each component in two.

    **Arguments:**

    - `grid`: where the unknowns are, and what holds on the sides, for every component.
    - `viscosity`: ν > 0 (length² / time).
    - `dt`: the time step.
    - `linearization`: `"picard"` or `"newton"`.
    - `outer_budget`: of the linearisations, a number of them or a [`bilevel.Budget`][], traced
        or not; by default to within rounding. With `"picard"` and 1 the step is the
        semi-implicit one of one linear solve. A step's `fidelity` or `budget` is that of the
        linear solves within.
    - `derivative`: what of a step is differentiated:
        - `"implicit"`: all of it, as of a converged w: the adjoint solves with the transposed
          Jacobian. After few linearisations it is the derivative of the implicit step at w,
          and not that of the iterations done.
        - `"unrolled"`: the linearisations that were done, all of them; each linear solve
          implicitly, and how far Newton's steps are shortened held.
        - `"frozen"`: drops how the advecting velocity moves: the adjoint solves with the
          transposed matrix at w.
        - `"detached"`: drops everything: the step is a constant.
    - `differences`: of w·∇, `"upwind"` or `"central"`.
    - `conservative`: ∂(u²/2)/∂x in place of u ∂u/∂x, in one dimension: sums are conserved, and
        shocks move at the right speed.
    - `solver`: of the linear systems; [`bilevel.BiCGStab`][] by default.
    - `adjoint_solver`: of those of the derivative, which have no diagonal; BiCGStab by default.
    - `forcing`: f, a number or a field; in two dimensions a tuple of one for each component.
    - `boundary_values`: as of [`Heat`][]; in two dimensions a tuple of one for each component.

    **Raises:** `ValueError` for values of wrong shape or sign, unknown names, three dimensions,
    and pairings that there are not.

    >>> import jax.numpy as jnp, bilevel_pde as pde
    >>> grid = pde.Grid(32, boundary=pde.Periodic())
    >>> u = jnp.sin(2 * jnp.pi * grid.coordinates()[0])
    >>> stepper = Burgers(grid, 0.01, dt=0.02, linearization="picard", outer_budget=1)
    >>> bool(jnp.max(stepper.step(u)) < jnp.max(u))
    True
    """

    parameters: ClassVar[tuple[str, ...]] = ("viscosity", "dt", "forcing", "boundary_values")

    viscosity: Array
    forcing: tuple[Array, ...] | None
    boundary_values: tuple[dict[tuple[int, int], Array], ...]
    outer_budget: Budget | None
    linearization: Linearization = eqx.field(static=True)
    derivative: Derivative = eqx.field(static=True)
    differences: Differences = eqx.field(static=True)
    conservative: bool = eqx.field(static=True)

    def __init__(
        self,
        grid: Grid,
        viscosity: Any,
        dt: Any,
        *,
        linearization: Linearization = "picard",
        outer_budget: Budget | Array | int | None = None,
        derivative: Derivative = "implicit",
        differences: Differences = "upwind",
        conservative: bool = False,
        solver: InnerSolver | None = None,
        adjoint_solver: InnerSolver | None = None,
        forcing: Any = None,
        boundary_values: Any = None,
    ):
        if not isinstance(grid, Grid):
            msg = f"Burgers: grid should be a Grid, got {grid!r}."
            raise TypeError(msg)
        _check_options(grid, linearization, derivative, conservative=conservative)
        outer = as_outer_budget("Burgers", outer_budget)
        self.grid = grid
        self.linearization = linearization
        self.derivative = derivative
        self.differences = checked_differences("Burgers", differences)
        self.conservative = bool(conservative)
        self.solver = BiCGStab() if solver is None else solver
        self.outer_budget = outer
        self.estimator = chosen_estimator("Burgers", derivative, outer, adjoint_solver, BiCGStab())
        self.viscosity = self._checked("viscosity", viscosity)
        self.dt = self._checked("dt", dt)
        self.forcing = self._checked("forcing", forcing)
        self.boundary_values = self._checked("boundary_values", boundary_values)

    @property
    def like(self) -> PyTree:
        """A field, or one for each component."""
        one = self.grid.like
        return one if self.grid.ndim == 1 else (one,) * self.grid.ndim

    @property
    def state_kind(self) -> str:
        """What a state is, in words."""
        one = super().state_kind
        return one if self.grid.ndim == 1 else f"a tuple (u, v), each {one}"

    def problem(self) -> Quasilinear:
        """The system of a step, M(w) w = u + dt f; its θ is (stepper, u)."""
        return Quasilinear(_system, frozen=self.derivative == "frozen")

    def transport(self, w: tuple[Array, ...]) -> Stencil:
        """w·∇ - νΔ, of one component."""
        carried = advection(self.grid, w, self.differences, conservative=self.conservative)
        carried = 0.5 * carried if self.conservative else carried
        total = Diffusion(self.grid, self.viscosity).stencil() + carried
        assert isinstance(total, Stencil)
        return total

    def outermost(self, effort: Effort) -> Budget | None:
        """The budget of the linearisations."""
        del effort
        return self.outer_budget

    def solved(self, u: PyTree, guess: PyTree, effort: Effort) -> Solution:
        """The inner solve of a step, started at a guess."""
        return solve_linearised(
            self.problem(),
            (self._data(), u),
            guess,
            effort,
            linear=self.solver,
            estimator=self.estimator,
            outer_budget=self.outer_budget,
            linearization=self.linearization,
            derivative=self.derivative,
        )

    def _checked(self, name: str, value: Any) -> Any:
        grid = self.grid
        if name in {"viscosity", "dt"}:
            if getattr(value, "shape", ()) != ():
                msg = f"Burgers: {name} should be a number, got shape {value.shape}."
                raise ValueError(msg)
            return positive("Burgers", name, value, grid.dtype)
        parts = self._by_component(name, value)
        if name == "forcing":
            if value is None:
                return None
            return tuple(field_or_number("Burgers", name, part, grid) for part in parts)
        return tuple(side_values("Burgers", grid, part) for part in parts)

    def _by_component(self, name: str, value: Any) -> tuple[Any, ...]:
        ndim = self.grid.ndim
        if value is None:
            return (None,) * ndim
        if not isinstance(value, tuple | list):
            value = (value,)
        if len(value) != ndim:
            msg = f"Burgers: {name} should have one part for each of {ndim} components, got "
            raise ValueError(msg + f"{len(value)}. Give a tuple of them.")
        return tuple(value)


def _system(w: Any, theta: tuple[Burgers, Any]) -> tuple[Any, Any]:
    """The matrix at w and the right-hand side of a step."""
    stepper, u = theta
    one = stepper.grid.ndim == 1
    components, before = ((w,), (u,)) if one else (w, u)
    transport = stepper.transport(components)
    matrix = identity(stepper.grid) + stepper.dt * transport
    rhs: list[Array] = []
    for index, (start, values) in enumerate(zip(before, stepper.boundary_values, strict=True)):
        change = -transport.boundary_term(values)
        if stepper.forcing is not None:
            change += stepper.forcing[index]
        rhs.append(start + stepper.dt * change)
    if one:
        return matrix, rhs[0]
    return block_diagonal(*[matrix] * len(rhs)), tuple(rhs)


def _check_options(
    grid: Grid, linearization: Linearization, derivative: Derivative, *, conservative: bool
) -> None:
    if grid.ndim > 2:
        msg = f"Burgers: grid should have one or two dimensions, got {grid.ndim}."
        raise ValueError(msg)
    check_linearization("Burgers", linearization, derivative)
    if conservative and grid.ndim > 1:
        msg = (
            "Burgers: conservative=True is for one dimension: u·∇u is no divergence in two. "
            "Leave it out."
        )
        raise ValueError(msg)
