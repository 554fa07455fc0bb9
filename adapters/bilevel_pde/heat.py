"""The heat equation."""

from typing import Any, ClassVar

import equinox as eqx
import numpy as np
from jaxtyping import Array

from bilevel.estimator.base import Estimator
from bilevel.problem import LinearSystem
from bilevel.solver.base import InnerSolver
from bilevel.solver.conjugate_gradient import ConjugateGradient
from bilevel_pde.boundary_values import BoundaryValues
from bilevel_pde.diffusion import Diffusion
from bilevel_pde.faces import Mean
from bilevel_pde.grid import Grid
from bilevel_pde.stepper import field_or_number, positive
from bilevel_pde.theta_method import Scheme, ThetaMethod, matrix_of, right_hand_side_of


class Heat(ThetaMethod):
    """∂u/∂t = ∇·(k∇u) + f in one, two or three dimensions, one linear solve a step.

    **Arguments:**

    - `grid`: where the unknowns are, and what holds on the sides.
    - `diffusivity`: k > 0 (length² / time), a number or a field; a tuple of one for each axis
        where it depends on the direction.
    - `dt`: the time step.
    - `scheme`: `"implicit_euler"`, of first order, or `"crank_nicolson"`, of second.
    - `solver`: of the linear system, symmetric positive definite; conjugate gradients by
        default. On fine grids give it `preconditioner=pde.Multigrid()`.
    - `estimator`: how a step is differentiated; by default [`bilevel.Implicit`][] with the
        same solver.
    - `forcing`: f (1 / time), a number or a field; of a step where it varies in time, in its
        middle for Crank–Nicolson.
    - `boundary_values`: for each side (axis, 0 or 1) a number or an array of the side's
        shape, where it is not zero; of the new time for implicit Euler, of the middle of the
        step for Crank–Nicolson.
    - `mean`: of the diffusivity between points, `"arithmetic"` or `"harmonic"`.

    All of diffusivity, dt, forcing and boundary values may be traced and are differentiated;
    `step(theta={...})` replaces them.

    **Raises:** `ValueError` for values of wrong shape or sign, or an unknown scheme.

    The published emulator's step is implicit Euler with Jacobi, started at zero:

    >>> import jax.numpy as jnp, bilevel as bl, bilevel_pde as pde
    >>> stepper = Heat(pde.Grid(30), 1.0, dt=1e-3, solver=bl.Jacobi())
    >>> u = jnp.sin(jnp.pi * pde.Grid(30).coordinates()[0])
    >>> moved = stepper.step(u, budget=bl.Budget(iterations=60), guess=jnp.zeros(30))
    >>> bool(jnp.allclose(moved, u / (1 + 1e-3 * jnp.pi**2), rtol=1e-3))
    True
    """

    parameters: ClassVar[tuple[str, ...]] = ("diffusivity", *ThetaMethod.parameters)

    diffusivity: Array | tuple[Array, ...]
    mean: Mean = eqx.field(static=True)

    def __init__(
        self,
        grid: Grid,
        diffusivity: Any,
        dt: Any,
        *,
        scheme: Scheme = "implicit_euler",
        solver: InnerSolver | None = None,
        estimator: Estimator | None = None,
        forcing: Any = None,
        boundary_values: BoundaryValues | None = None,
        mean: Mean = "arithmetic",
    ):
        solver = ConjugateGradient() if solver is None else solver
        super().__init__(grid, dt, scheme, solver, estimator, forcing, boundary_values)
        self.mean = checked_mean("Heat", mean)
        self.diffusivity = self._checked("diffusivity", diffusivity)

    def spatial(self) -> Diffusion:
        """-∇·(k∇·)."""
        return Diffusion(self.grid, self.diffusivity, mean=self.mean)

    def problem(self) -> LinearSystem:
        """The symmetric positive definite system of a step; its θ is (stepper, u)."""
        # Of traced coefficients only the sides tell, the rest was promised.
        sign = Diffusion(self.grid, 1.0).weighted().definiteness.sign
        definite = True if sign in {"positive", "nonnegative"} else None
        return LinearSystem(
            matrix_of, right_hand_side_of, symmetric=True, positive_definite=definite
        )

    @property
    def _is_weighted(self) -> bool:
        return any(bool(np.any(weight != 1)) for weight in self.grid.weights())

    def _checked(self, name: str, value: Any) -> Any:
        if name == "diffusivity":
            return checked_diffusivity("Heat", self.grid, value)
        return super()._checked(name, value)


def checked_diffusivity(owner: str, grid: Grid, value: Any) -> Any:
    """A positive number or field, or one for each axis.

    **Raises:** `ValueError` for another number of them, other shapes, and negative ones.
    """
    if isinstance(value, tuple | list):
        if len(value) != grid.ndim:
            msg = (
                f"{owner}: diffusivity should be one for all or one for each of {grid.ndim} axes, "
                f"got {len(value)}."
            )
            raise ValueError(msg)
        return tuple(checked_diffusivity(owner, grid, k) for k in value)
    positive(owner, "diffusivity", value, grid.dtype, zero=owner != "Heat")
    return field_or_number(owner, "diffusivity", value, grid)


def checked_mean(owner: str, mean: Mean) -> Mean:
    """A known mean.

    **Raises:** `ValueError` for another.
    """
    if mean not in {"arithmetic", "harmonic"}:
        msg = f"{owner}: mean should be 'arithmetic' or 'harmonic', got {mean!r}."
        raise ValueError(msg)
    return mean
