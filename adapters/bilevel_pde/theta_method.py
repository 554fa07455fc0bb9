"""The θ-method: linear evolution equations, stepped implicitly."""

import abc
from collections.abc import Callable
from typing import Any, ClassVar, Literal, Self

import equinox as eqx
from jaxtyping import Array

from bilevel.estimator.base import Estimator
from bilevel.estimator.implicit import Implicit
from bilevel.problem import LinearSystem
from bilevel.solver.base import InnerSolver
from bilevel_pde.boundary_values import BoundaryValues
from bilevel_pde.diffusion import Diffusion
from bilevel_pde.grid import Grid
from bilevel_pde.laplace_operator import identity
from bilevel_pde.operator import Operator
from bilevel_pde.stencil import Stencil
from bilevel_pde.stepper import Stepper, field_or_number, positive, side_values

Scheme = Literal["implicit_euler", "crank_nicolson"]


class ThetaMethod(Stepper):
    """∂u/∂t + L u = f by implicit Euler or Crank–Nicolson, one linear solve a step.

    (I + s dt L) u' = u - (1 - s) dt L u + dt f, with s = 1 or 1/2. A subclass says what L is.
    """

    parameters: ClassVar[tuple[str, ...]] = ("dt", "forcing", "boundary_values")

    scheme: Scheme = eqx.field(static=True)
    forcing: Array | None
    boundary_values: dict[tuple[int, int], Array]
    arrangement: Callable[[Operator], Operator] | None = eqx.field(static=True)

    def __init__(
        self,
        grid: Grid,
        dt: Any,
        scheme: Scheme,
        solver: InnerSolver,
        estimator: Estimator | None,
        forcing: Any,
        boundary_values: BoundaryValues | None,
    ):
        owner = type(self).__name__
        if not isinstance(grid, Grid):
            msg = f"{owner}: grid should be a Grid, got {grid!r}."
            raise TypeError(msg)
        if scheme not in {"implicit_euler", "crank_nicolson"}:
            msg = f"{owner}: scheme should be 'implicit_euler' or 'crank_nicolson', got {scheme!r}."
            raise ValueError(msg)
        self.grid = grid
        self.scheme = scheme
        self.arrangement = None
        self.solver = solver
        self.estimator = default_estimator(solver) if estimator is None else estimator
        self.dt = self._checked("dt", dt)
        self.forcing = self._checked("forcing", forcing)
        self.boundary_values = self._checked("boundary_values", boundary_values)

    @abc.abstractmethod
    def spatial(self) -> Stencil | Diffusion:
        """L."""

    def matrix(self) -> Operator:
        """I + s dt L, what a step solves with."""
        system = identity(self.grid) + self._share * self.dt * self.spatial()
        system = system.weighted() if self._is_weighted else system  # pyright: ignore[reportAttributeAccessIssue]
        return system if self.arrangement is None else self.arrangement(system)

    def arranged(self, arrangement: Callable[[Operator], Operator]) -> Self:
        """The stepper with operators that something is made of, such as blocks on many devices.

        **Arguments:**

        - `arrangement`: operator -> operator, hashable; it changes where numbers are, not what
            they are.
        """
        return self._with(arrangement=arrangement)

    def problem(self) -> LinearSystem:
        """The linear system of a step; its θ is (stepper, u)."""
        return LinearSystem(matrix_of, right_hand_side_of)

    @property
    def _is_weighted(self) -> bool:
        """Whether rows are multiplied with their control volumes, which makes them symmetric."""
        return False

    @property
    def _share(self) -> float:
        return 1.0 if self.scheme == "implicit_euler" else 0.5

    def _checked(self, name: str, value: Any) -> Any:
        owner = type(self).__name__
        if name == "dt":
            if getattr(value, "shape", ()) != ():
                msg = f"{owner}: dt should be a number, got shape {value.shape}."
                raise ValueError(msg)
            return positive(owner, name, value, self.grid.dtype)
        if name == "forcing":
            return None if value is None else field_or_number(owner, name, value, self.grid)
        return side_values(owner, self.grid, value)

    def right_hand_side(self, u: Array) -> Array:
        """u - (1 - s) dt L u + dt f, boundary values and control volumes in."""
        spatial = self.spatial()
        change = -spatial.boundary_term(self.boundary_values)
        if self.forcing is not None:
            change += self.forcing
        if self.scheme == "crank_nicolson":
            arranged = spatial if self.arrangement is None else self.arrangement(spatial)
            change -= 0.5 * arranged.matvec(u)
        total = u + self.dt * change
        if self._is_weighted:
            for weight in self.grid.weights():
                total *= weight
        return total


def default_estimator(solver: InnerSolver) -> Implicit:
    """Implicit differentiation, with the solver itself for the adjoint where it can."""
    return Implicit(solver if solver.linear_adjoint else None)


def matrix_of(theta: tuple[ThetaMethod, Array]) -> Operator:
    """The operator of a step."""
    return theta[0].matrix()


def right_hand_side_of(theta: tuple[ThetaMethod, Array]) -> Array:
    """The right-hand side of a step."""
    stepper, u = theta
    return stepper.right_hand_side(u)
