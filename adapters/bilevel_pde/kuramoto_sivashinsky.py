"""The Kuramoto–Sivashinsky equation."""

from typing import Any, ClassVar, Literal

import equinox as eqx
import jax
from jaxtyping import Array, Float, PyTree

from bilevel.budget import Budget
from bilevel.closed import stopped
from bilevel.estimator.base import Estimator
from bilevel.estimator.implicit import Implicit
from bilevel.inner_solve import solve
from bilevel.problem import InnerProblem, LinearSystem
from bilevel.solution import Solution
from bilevel.solver.base import InnerSolver
from bilevel.solver.bicgstab import BiCGStab
from bilevel_pde.advection_operator import advection
from bilevel_pde.fast_solver import FastSolver
from bilevel_pde.grid import Grid
from bilevel_pde.laplace_operator import biharmonic, identity, laplacian
from bilevel_pde.linearization import (
    Derivative,
    as_outer_budget,
    check_linearization,
    chosen_estimator,
    solve_linearised,
)
from bilevel_pde.operator import Operator
from bilevel_pde.quasilinear import Quasilinear
from bilevel_pde.stepper import Effort, Stepper, field_or_number, positive
from bilevel_pde.theta_method import Scheme

Treatment = Literal["explicit", "picard", "newton"]


class KuramotoSivashinsky(Stepper):
    """∂u/∂t + u ∂u/∂x + ∂²u/∂x² + ν ∂⁴u/∂x⁴ = f on a periodic line, implicit where it is stiff.

    With L = ∂² + ν∂⁴ and the conservative C(v) u = ∂(v u)/∂x / 2, both of second order, a step is

        (I + s dt (L + C(w))) w = u - (1 - s) dt (L u + C(u) u) + dt f

    with s = 1 for implicit Euler and 1/2 for Crank–Nicolson.  The nonlinear term may also stay
    at the old time, which leaves one linear solve with I + s dt L.  Small waves of wavenumber k
    grow like exp((k² - ν k⁴) t); the sum of u changes by the forcing's alone.

    **Arguments:**

    - `grid`: of one dimension and periodic.
    - `dt`: the time step; below 4 ν / s, where I + s dt L is positive definite.
    - `hyperviscosity`: ν > 0.
    - `scheme`: `"implicit_euler"` (default), of first order, or `"crank_nicolson"`, of second
        where the nonlinear term is not explicit.
    - `linearization`: how the nonlinear term is treated: `"explicit"` (default), `"picard"` or
        `"newton"`.
    - `outer_budget`: of the linearisations, a number of them or a [`bilevel.Budget`][], as of
        [`Burgers`][]; an explicit step has none. A step's `fidelity` or `budget` is that of the
        linear solves within.
    - `derivative`: what of a step is differentiated, `"implicit"`, `"unrolled"`, `"frozen"` or
        `"detached"`, as of [`Burgers`][]. Of an explicit step, the first two are the same, and
        `"frozen"` drops how the advecting velocity u moves.
    - `solver`: of the linear systems; by default [`bilevel.BiCGStab`][] with the inverse of
        I + s dt L for a preconditioner, found by FFT, which leaves one iteration to an explicit
        step and few to others.
    - `adjoint_solver`: of those of the derivative; the same by default.
    - `forcing`: f, a number or a field.

    **Raises:** `ValueError` for another grid, values of wrong shape or sign, unknown names, and
    pairings that there are not.

    Kuramoto & Tsuzuki, Prog. Theor. Phys. 55, 1976; Sivashinsky, Acta Astronautica 4, 1977.

    >>> import jax.numpy as jnp, bilevel_pde as pde
    >>> grid = pde.Grid(64, extent=22.0, boundary=pde.Periodic())
    >>> k = 2 * jnp.pi / 22.0
    >>> u = 1e-3 * jnp.cos(2 * k * grid.coordinates()[0])
    >>> moved = pde.rollout(KuramotoSivashinsky(grid, 0.1), u, 10)[-1]
    >>> rate = float(jnp.log(jnp.linalg.norm(moved) / jnp.linalg.norm(u)))
    >>> round(rate, 2), round(float((2 * k) ** 2 - (2 * k) ** 4), 2)
    (0.22, 0.22)
    """

    parameters: ClassVar[tuple[str, ...]] = ("hyperviscosity", "dt", "forcing")

    hyperviscosity: Float[Array, ""]
    forcing: Array | None
    outer_budget: Budget | None
    own_solver: InnerSolver | None
    own_adjoint_solver: InnerSolver | None
    scheme: Scheme = eqx.field(static=True)
    linearization: Treatment = eqx.field(static=True)
    derivative: Derivative = eqx.field(static=True)

    def __init__(
        self,
        grid: Grid,
        dt: Any,
        *,
        hyperviscosity: Any = 1.0,
        scheme: Scheme = "implicit_euler",
        linearization: Treatment = "explicit",
        outer_budget: Budget | Array | int | None = None,
        derivative: Derivative = "implicit",
        solver: InnerSolver | None = None,
        adjoint_solver: InnerSolver | None = None,
        forcing: Any = None,
    ):
        name = type(self).__name__
        if not isinstance(grid, Grid):
            msg = f"{name}: grid should be a Grid, got {grid!r}."
            raise TypeError(msg)
        if grid.ndim != 1 or not grid.is_periodic(0):
            msg = f"{name}: grid should be periodic and of one dimension, got {grid!r}."
            raise ValueError(msg)
        _check_options(name, scheme, linearization, derivative, outer_budget)
        self.grid = grid
        self.scheme = scheme
        self.linearization = linearization
        self.derivative = derivative
        self.outer_budget = as_outer_budget(name, outer_budget)
        self.own_solver, self.own_adjoint_solver = solver, adjoint_solver
        self.solver = BiCGStab() if solver is None else solver
        self.estimator = self._estimator(self.solver)
        self.hyperviscosity = self._checked("hyperviscosity", hyperviscosity)
        self.dt = self._checked("dt", dt)
        self.forcing = self._checked("forcing", forcing)

    def stiff(self) -> Operator:
        """L = ∂² + ν∂⁴."""
        return laplacian(self.grid) + self.hyperviscosity * biharmonic(self.grid)

    def advection(self, w: Array) -> Operator:
        """C(w), with C(u) u = ∂(u²/2)/∂x."""
        return 0.5 * advection(self.grid, w, "central", conservative=True)

    def problem(self) -> InnerProblem:
        """The system of a step; its θ is (stepper, u)."""
        if self.linearization == "explicit":
            return LinearSystem(_matrix, _right_hand_side, symmetric=True)
        return Quasilinear(_system, frozen=self.derivative == "frozen")

    def outermost(self, effort: Effort) -> Budget | None:
        """The budget of the linearisations, or of the only linear solve."""
        return effort.budget if self.linearization == "explicit" else self.outer_budget

    def solved(self, u: PyTree, guess: PyTree, effort: Effort) -> Solution:
        """The inner solve of a step, started at a guess."""
        solver = self._preconditioned() if self.own_solver is None else self.own_solver
        estimator = self.estimator
        if self.own_solver is None and isinstance(estimator, Implicit):
            estimator = self._estimator(solver)
        theta = (self._data(), u)
        if self.linearization != "explicit":
            return solve_linearised(
                self.problem(),  # pyright: ignore[reportArgumentType]
                theta,
                guess,
                effort,
                linear=solver,
                estimator=estimator,
                outer_budget=self.outer_budget,
                linearization=self.linearization,
                derivative=self.derivative,
            )
        if self.derivative == "detached":
            theta, guess = stopped((theta, guess))
        return solve(
            self.problem(),
            theta,
            guess,
            solver=solver,
            estimator=estimator,
            budget=effort.budget,
            adjoint_budget=effort.adjoint_budget,
            probe=effort.probe,
        )

    def _preconditioned(self) -> InnerSolver:
        """The default solver, with the dt of this step."""
        return BiCGStab(preconditioner=FastSolver(_matrix((stopped(self._data()), None))))

    def _estimator(self, default: InnerSolver) -> Estimator:
        derivative: Derivative = self.derivative
        if self.linearization == "explicit" and derivative == "unrolled":
            derivative = "implicit"
        if self.linearization == "explicit" and not default.linear_adjoint:
            default = BiCGStab()
        name, adjoint = type(self).__name__, self.own_adjoint_solver
        return chosen_estimator(name, derivative, self.outer_budget, adjoint, default)

    def _data(self) -> "KuramotoSivashinsky":
        return self._with(solver=None, estimator=None, own_solver=None, own_adjoint_solver=None)

    def _checked(self, name: str, value: Any) -> Any:
        owner, grid = type(self).__name__, self.grid
        if name == "forcing":
            return None if value is None else field_or_number(owner, name, value, grid)
        if getattr(value, "shape", ()) != ():
            msg = f"{owner}: {name} should be a number, got shape {value.shape}."
            raise ValueError(msg)
        return positive(owner, name, value, grid.dtype)

    @property
    def share(self) -> float:
        """The part s of the new time."""
        return 1.0 if self.scheme == "implicit_euler" else 0.5


def _matrix(theta: tuple[KuramotoSivashinsky, Any]) -> Operator:
    """I + s dt L."""
    stepper = theta[0]
    return identity(stepper.grid) + stepper.share * stepper.dt * stepper.stiff()


def _old(stepper: KuramotoSivashinsky, u: Array, *, linear: float, nonlinear: float) -> Array:
    """What the old time adds to the right-hand side."""
    total = u
    if linear:
        total = total - linear * stepper.dt * stepper.stiff().matvec(u)
    if nonlinear:
        held = jax.lax.stop_gradient(u) if stepper.derivative == "frozen" else u
        total = total - nonlinear * stepper.dt * stepper.advection(held).matvec(u)
    return total if stepper.forcing is None else total + stepper.dt * stepper.forcing


def _right_hand_side(theta: tuple[KuramotoSivashinsky, Array]) -> Array:
    stepper, u = theta
    return _old(stepper, u, linear=1.0 - stepper.share, nonlinear=1.0)


def _system(w: Array, theta: tuple[KuramotoSivashinsky, Array]) -> tuple[Operator, Array]:
    """The matrix at w and the right-hand side of a step."""
    stepper, u = theta
    rest = 1.0 - stepper.share
    matrix = _matrix(theta) + stepper.share * stepper.dt * stepper.advection(w)
    return matrix, _old(stepper, u, linear=rest, nonlinear=rest)


def _check_options(
    name: str, scheme: str, linearization: str, derivative: str, outer_budget: Any
) -> None:
    if scheme not in {"implicit_euler", "crank_nicolson"}:
        msg = f"{name}: scheme should be 'implicit_euler' or 'crank_nicolson', got {scheme!r}."
        raise ValueError(msg)
    if linearization not in {"explicit", "picard", "newton"}:
        msg = (
            f"{name}: linearization should be 'explicit', 'picard' or 'newton', got "
            f"{linearization!r}."
        )
        raise ValueError(msg)
    explicit = linearization == "explicit"
    check_linearization(name, "picard" if explicit else linearization, derivative)
    if explicit and outer_budget is not None:
        msg = (
            f"{name}: an explicit nonlinear term has no linearisations to count. Leave out "
            "outer_budget, or use linearization='picard' or 'newton'."
        )
        raise ValueError(msg)
