"""The incompressible Navier–Stokes equations."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, PyTree

from bilevel.budget import Budget
from bilevel.solution import Solution
from bilevel.solver.base import InnerSolver
from bilevel.solver.gmres import GMRES
from bilevel.status import Status
from bilevel_pde.advection_diffusion import Differences, checked_differences
from bilevel_pde.block import Block, block_diagonal
from bilevel_pde.convection_operator import convection
from bilevel_pde.diffusion import Diffusion
from bilevel_pde.laplace_operator import identity
from bilevel_pde.linearization import (
    Derivative,
    Linearization,
    as_outer_budget,
    check_linearization,
    chosen_estimator,
    solve_linearised,
)
from bilevel_pde.mean_operator import Mean
from bilevel_pde.operator import Operator
from bilevel_pde.pressure_schur import PressureSchur
from bilevel_pde.quasilinear import Quasilinear
from bilevel_pde.staggered import Divergence, Gradient, Staggered, Velocity
from bilevel_pde.stepper import (
    Effort,
    Stepper,
    as_state,
    field_or_number,
    positive,
    side_values,
    with_status,
)

LEAST = 3
"""Cells along an axis that the default solvers need."""

State = tuple[Velocity, Array]
"""Velocity and pressure."""


class NavierStokes(Stepper):
    """∂u/∂t + u·∇u + ∇p = ν Δu + f, ∇·u = 0 on a staggered grid, by implicit Euler.

    In two or three dimensions, periodic or between walls.  A step solves

        (1/dt + w·∇ - νΔ) w + ∇p = u/dt + f,  ∇·w = 0

    for velocity and pressure together, a saddle point: by Picard's iteration, which lags the
    advecting velocity, or by Newton's.  The state is `(velocity, pressure)`, made by
    `stepper.state(velocity)`; the pressure before a step is a guess and nothing else.  Its mean
    is zero.

    **Arguments:**

    - `staggered`: where velocity and pressure are, and which sides are walls.
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
    - `conservative`: ∇·(w ·) in place of w·∇, which is the same for a w without divergence, so
        that momentum changes by what passes the walls only.
    - `solver`: of the linear systems; by default flexible [`bilevel.GMRES`][] in cycles of 20,
        preconditioned with [`PressureSchur`][].
    - `adjoint_solver`: of those of the derivative; by default the same.
    - `forcing`: f, a tuple of a number or a field for each component.
    - `boundary_values`: a tuple of one mapping for each component, from sides (axis, 0 or 1)
        to its value there, or `None`: how walls move, and what flows through them.

    **Raises:** `ValueError` for values of wrong shape or sign, unknown names, pairings that there
    are not, and walls through which more flows in than out.

    >>> import bilevel_pde as pde
    >>> box = pde.Staggered((16, 16), boundary=pde.Periodic())
    >>> stepper = NavierStokes(box, 0.01, 0.05, differences="central", outer_budget=1)
    >>> (u, v), p = stepper.step(pde.taylor_green(box))
    >>> bool(0.9 < jnp.max(u) < 1.0)
    True
    """

    parameters: ClassVar[tuple[str, ...]] = ("viscosity", "dt", "forcing", "boundary_values")

    staggered: Staggered = eqx.field(static=True)
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
        staggered: Staggered,
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
        if not isinstance(staggered, Staggered):
            msg = (
                f"NavierStokes: staggered should be a Staggered grid, got {staggered!r}. Write "
                "pde.Staggered(shape, extent, boundary)."
            )
            raise TypeError(msg)
        check_linearization("NavierStokes", linearization, derivative)
        if (solver is None or adjoint_solver is None) and min(staggered.cells.shape) < LEAST:
            msg = (
                f"NavierStokes: staggered should have at least {LEAST} cells along each axis for "
                f"the default solvers, got {staggered.cells.shape}. Take more, or give both solver "
                "and adjoint_solver, such as pde.SparseDirect()."
            )
            raise ValueError(msg)
        default = GMRES(restart=20, preconditioner=PressureSchur(), flexible=True)
        self.staggered = staggered
        self.grid = staggered.cells
        self.linearization = linearization
        self.derivative = derivative
        self.differences = checked_differences("NavierStokes", differences)
        self.conservative = bool(conservative)
        self.solver = default if solver is None else solver
        self.outer_budget = as_outer_budget("NavierStokes", outer_budget)
        self.estimator = chosen_estimator(
            "NavierStokes", derivative, self.outer_budget, adjoint_solver, default
        )
        self.viscosity = self._checked("viscosity", viscosity)
        self.dt = self._checked("dt", dt)
        self.forcing = self._checked("forcing", forcing)
        self.boundary_values = self._checked("boundary_values", boundary_values)

    @property
    def like(self) -> PyTree:
        """Velocity and pressure."""
        return self.staggered.like, self.grid.like

    @property
    def state_kind(self) -> str:
        """What a state is, in words."""
        return "a state (velocity, pressure), velocity a tuple, see stepper.state(velocity)"

    def state(self, velocity: Any, pressure: Any = None) -> State:
        """A state of a velocity, with a guess of the pressure, zero by default.

        **Raises:** `ValueError` for another shape, `TypeError` for another dtype.
        """
        if pressure is None:
            pressure = jnp.zeros(self.grid.shape, self.grid.dtype)
        return (
            as_state("velocity", tuple(velocity), self.staggered.like, self._velocity_kind),
            as_state("pressure", pressure, self.grid.like, "a field of a number for each cell"),
        )

    @property
    def _velocity_kind(self) -> str:
        shapes = ", ".join(str(grid.shape) for grid in self.staggered.components)
        return f"a tuple of fields of shapes {shapes}"

    def problem(self) -> Quasilinear:
        """The saddle point of a step; its θ is (stepper, state)."""
        return Quasilinear(_system, frozen=self.derivative == "frozen")

    def transport(self, w: Velocity) -> Block:
        """w·∇ - νΔ, of each component."""
        parts: list[Operator] = []
        for component, grid in enumerate(self.staggered.components):
            carried = convection(
                self.staggered,
                w,
                component,
                self.differences,
                conservative=self.conservative,
                walls=self.boundary_values,
            )
            parts.append(Diffusion(grid, self.viscosity).stencil() + carried)
        return block_diagonal(*parts)

    def matrix(self, w: Velocity) -> Block:
        """The saddle point at an advecting velocity: what each linearisation solves with."""
        return _saddle(self, self.transport(w))

    def outermost(self, effort: Effort) -> Budget | None:
        """The budget of the linearisations."""
        del effort
        return self.outer_budget

    def solved(self, u: PyTree, guess: PyTree, effort: Effort) -> Solution:
        """The inner solve of a step, started at a guess.

        Its status is `INCONSISTENT` where more flows in through the walls than out.
        """
        solution = solve_linearised(
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
        # The pressure's mean would take up what no flow can.
        _, unbalanced = _net_outflow(self.staggered, jax.lax.stop_gradient(self.boundary_values))
        return with_status(solution, unbalanced, Status.INCONSISTENT)

    def check_controls(self, controls: Mapping[str, Any]) -> None:
        """Refuse parameters of several steps that no step can be done with."""
        super().check_controls(controls)
        values = controls.get("boundary_values")
        if values is None or any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(values)):
            return

        def look(part: Any) -> tuple[Array, Array]:
            return _net_outflow(self.staggered, self._by_component("boundary_values", part))

        for net, unbalanced in zip(*jax.vmap(look)(values), strict=True):
            _check_balance(net, unbalanced=unbalanced)

    def _checked(self, name: str, value: Any) -> Any:
        if name in {"viscosity", "dt"}:
            if getattr(value, "shape", ()) != ():
                msg = f"NavierStokes: {name} should be a number, got shape {value.shape}."
                raise ValueError(msg)
            return positive("NavierStokes", name, value, self.grid.dtype)
        if value is None and name == "forcing":
            return None
        parts = zip(self.staggered.components, self._by_component(name, value), strict=True)
        if name == "forcing":
            return tuple(field_or_number("NavierStokes", name, part, grid) for grid, part in parts)
        values = tuple(side_values("NavierStokes", grid, part) for grid, part in parts)
        net, unbalanced = _net_outflow(self.staggered, values)
        _check_balance(net, unbalanced=unbalanced)
        return values

    def _by_component(self, name: str, value: Any) -> tuple[Any, ...]:
        ndim = self.staggered.ndim
        if value is None:
            return (None,) * ndim
        if not isinstance(value, tuple | list) or len(value) != ndim:
            found = len(value) if isinstance(value, tuple | list) else type(value).__name__
            msg = (
                f"NavierStokes: {name} should be a tuple of one part for each of {ndim} "
                f"components, got {found}."
            )
            raise ValueError(msg)
        return tuple(value)


def lid_driven_cavity(
    cells: int, viscosity: Any, dt: Any, *, lid: Any = 1.0, dtype: Any = None, **options: Any
) -> NavierStokes:
    """A square cavity of side 1 whose upper wall moves along; a stepper.

    **Arguments:**

    - `cells`: along each side, at least 3.
    - `viscosity`: ν = lid / Reynolds number.
    - `lid`: the speed of the wall y = 1 in direction of x, a number or one for each face.
    - `dtype`: of the grid.
    - `options`: further arguments of [`NavierStokes`][].

    >>> lid_driven_cavity(8, 0.01, dt=0.1).like[0][0].shape
    (7, 8)
    """
    walls = ({(1, 1): lid}, None)
    return NavierStokes(
        Staggered((cells, cells), dtype=dtype), viscosity, dt, boundary_values=walls, **options
    )


def _system(x: State, theta: tuple[NavierStokes, State]) -> tuple[Block, State]:
    """The matrix at x and the right-hand side of a step."""
    stepper, (before, _) = theta
    transport = stepper.transport(x[0])
    walls = stepper.boundary_values
    lost = transport.boundary_term(walls)
    rhs: list[Array] = []
    for index, (start, through) in enumerate(zip(before, lost, strict=True)):
        force = start / stepper.dt - through
        rhs.append(force if stepper.forcing is None else force + stepper.forcing[index])
    mass = -Divergence(stepper.staggered).boundary_term(walls)
    return _saddle(stepper, transport), (tuple(rhs), mass)


def _saddle(stepper: NavierStokes, transport: Block) -> Block:
    staggered = stepper.staggered
    inertia = block_diagonal(*(identity(grid) / stepper.dt for grid in staggered.components))
    velocity = inertia + transport
    rows = [[velocity, Gradient(staggered)], [Divergence(staggered), Mean(staggered.cells)]]
    return Block(rows, symmetric=False)


def _net_outflow(staggered: Staggered, values: Any) -> tuple[Array, Array]:
    """What flows out through walls and not in, and whether that is more than rounding."""
    through = Divergence(staggered).boundary_term(values)
    net, size = jnp.sum(through), jnp.sum(jnp.abs(through))
    unbalanced = jnp.abs(net) > 1e3 * jnp.finfo(through.dtype).eps * size
    return net * math.prod(staggered.cells.spacing), unbalanced


def _check_balance(net: Array, *, unbalanced: Array) -> None:
    """Refuse walls through which more flows in than out."""
    if not isinstance(unbalanced, Tracer) and bool(unbalanced):
        msg = (
            "NavierStokes: boundary_values should let out of the domain what they let in, got a "
            f"net outflow of {float(net):.3g}. Correct them by their mean."
        )
        raise ValueError(msg)
