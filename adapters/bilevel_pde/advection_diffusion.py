"""The advection–diffusion equation."""

from typing import Any, ClassVar, Literal

import equinox as eqx
from jaxtyping import Array

from bilevel.estimator.base import Estimator
from bilevel.solver.base import InnerSolver
from bilevel.solver.bicgstab import BiCGStab
from bilevel_pde.advection_operator import advection
from bilevel_pde.boundary_values import BoundaryValues
from bilevel_pde.diffusion import Diffusion
from bilevel_pde.faces import Mean
from bilevel_pde.grid import Grid
from bilevel_pde.heat import checked_diffusivity, checked_mean
from bilevel_pde.stencil import Stencil
from bilevel_pde.stepper import field_or_number
from bilevel_pde.theta_method import Scheme, ThetaMethod

Differences = Literal["upwind", "central"]


class AdvectionDiffusion(ThetaMethod):
    """∂u/∂t + v·∇u = ∇·(k∇u) + f in one, two or three dimensions, one linear solve a step.

    **Arguments:**

    - `grid`: where the unknowns are, and what holds on the sides.
    - `velocity`: v (length / time), for each axis a number or a field; in one dimension also
        the component itself.
    - `diffusivity`: k >= 0, as of [`Heat`][].
    - `dt`: the time step.
    - `scheme`: in time, `"implicit_euler"` or `"crank_nicolson"`.
    - `differences`: of v·∇u, `"upwind"`, of first order and without oscillations, or
        `"central"`, of second.
    - `conservative`: ∇·(v u) in place of v·∇u.
    - `solver`: of the linear system; [`bilevel.BiCGStab`][] by default.
    - `estimator`, `forcing`, `boundary_values`, `mean`: as of [`Heat`][].

    **Raises:** `ValueError` for values of wrong shape or sign, or unknown names.

    >>> import jax.numpy as jnp, bilevel_pde as pde
    >>> grid = pde.Grid(16, boundary=pde.Periodic())
    >>> stepper = AdvectionDiffusion(grid, 1.0, 0.01, dt=0.1)
    >>> u = jnp.arange(16.0)
    >>> bool(jnp.isclose(jnp.sum(stepper.step(u)), jnp.sum(u)))
    True
    """

    parameters: ClassVar[tuple[str, ...]] = ("velocity", "diffusivity", *ThetaMethod.parameters)
    zero: ClassVar[tuple[str, ...]] = ("diffusivity",)

    velocity: tuple[Array, ...]
    diffusivity: Array | tuple[Array, ...]
    differences: Differences = eqx.field(static=True)
    conservative: bool = eqx.field(static=True)
    mean: Mean = eqx.field(static=True)

    def __init__(
        self,
        grid: Grid,
        velocity: Any,
        diffusivity: Any,
        dt: Any,
        *,
        scheme: Scheme = "implicit_euler",
        differences: Differences = "upwind",
        conservative: bool = False,
        solver: InnerSolver | None = None,
        estimator: Estimator | None = None,
        forcing: Any = None,
        boundary_values: BoundaryValues | None = None,
        mean: Mean = "arithmetic",
    ):
        solver = BiCGStab() if solver is None else solver
        super().__init__(grid, dt, scheme, solver, estimator, forcing, boundary_values)
        self.differences = checked_differences("AdvectionDiffusion", differences)
        self.conservative = bool(conservative)
        self.mean = checked_mean("AdvectionDiffusion", mean)
        self.velocity = self._checked("velocity", velocity)
        self.diffusivity = self._checked("diffusivity", diffusivity)

    def spatial(self) -> Stencil:
        """v·∇ - ∇·(k∇·)."""
        spread = Diffusion(self.grid, self.diffusivity, mean=self.mean).stencil()
        carried = advection(
            self.grid, self.velocity, self.differences, conservative=self.conservative
        )
        total = spread + carried
        assert isinstance(total, Stencil)
        return total

    def _checked(self, name: str, value: Any) -> Any:
        owner = type(self).__name__
        if name == "velocity":
            given = tuple(value) if isinstance(value, tuple | list) else (value,)
            if len(given) != self.grid.ndim:
                msg = (
                    f"{owner}: velocity should have one component for each of {self.grid.ndim} "
                    f"axes, got {len(given)}. Give a tuple of numbers or fields."
                )
                raise ValueError(msg)
            return tuple(field_or_number(owner, "velocity", v, self.grid) for v in given)
        if name == "diffusivity":
            return checked_diffusivity(owner, self.grid, value)
        return super()._checked(name, value)


def checked_differences(owner: str, differences: Differences) -> Differences:
    """Known differences.

    **Raises:** `ValueError` for others.
    """
    if differences not in {"upwind", "central"}:
        msg = f"{owner}: differences should be 'upwind' or 'central', got {differences!r}."
        raise ValueError(msg)
    return differences
