"""PressureSchur: a preconditioner for the saddle points of incompressible flow."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from bilevel import vector
from bilevel.bound import BoundProblem
from bilevel.budget import Budget
from bilevel.operator import LinearOperator, as_operator
from bilevel.solver.base import IncompatibleError
from bilevel.solver.bicgstab import BiCGStab
from bilevel.solver.preconditioning import Preconditioner, precondition, prepare_preconditioner
from bilevel_pde.block import Block
from bilevel_pde.fast_solver import FastSolver
from bilevel_pde.iterated import Iterated
from bilevel_pde.laplace_operator import laplacian
from bilevel_pde.mean_operator import Mean
from bilevel_pde.operator import Operator
from bilevel_pde.scaled import Scaled
from bilevel_pde.source import source_operator
from bilevel_pde.staggered import Divergence, Gradient, Staggered

SWEEPS = Iterated(BiCGStab(), Budget(iterations=50, rtol=0.1))
"""What solves with the block of a velocity where nothing else is said."""


class PressureSchur(eqx.Module):
    """The block-triangular preconditioner of a saddle point, with S⁻¹ from two Poisson solves.

    For [[F, ∇], [∇·, P]] with F the block of the velocity it solves with [[F, ∇], [0, S]].
    The Schur complement S = -∇·F⁻¹∇ of the pressure is inverted approximately:

    - S⁻¹ ≈ -Δ⁻¹ (∇·F∇) Δ⁻¹, the least-squares commutator (Elman, Howle, Shadid, Shuttleworth
        & Tuminaro 2006, https://doi.org/10.1137/040608817), for any F; exact where F and ∇
        commute.
    - S⁻¹ ≈ ν - r Δ⁻¹ (Cahouet & Chabard 1988, https://doi.org/10.1002/fld.1650080802), where
        `rate` and `viscosity` are given: for F = r - νΔ, one Poisson solve, exact but
        for walls. Where advection is strong it takes several times the iterations.

    Δ⁻¹ is a [`FastSolver`][].  The mean of the pressure goes by the block P, a multiple of
    [`Mean`][], and is left out where there is none.  The transpose of a saddle point is one as
    well, so the same object preconditions an adjoint.  Without a Krylov solver that allows it,
    `bl.GMRES(flexible=True)`, `velocity` must be linear.

    **Arguments:**

    - `velocity`: F⁻¹ approximately, for each component: a preconditioner for operators on
        grids, such as [`Multigrid`][] where viscosity dominates, or [`Iterated`][]; by default
        BiCGStab to a tenth.
    - `rate`, `viscosity`: r, ν of Cahouet and Chabard's form, both or none.

    **Raises:** `ValueError` for one of the two without the other.

    >>> import jax.numpy as jnp, bilevel as bl, bilevel_pde as pde
    >>> cavity = pde.Staggered((8, 8))
    >>> F = pde.block_diagonal(*(pde.identity(g) - pde.laplacian(g) for g in cavity.components))
    >>> saddle = pde.Block([[F, pde.Gradient(cavity)], [pde.Divergence(cavity), None]])
    >>> rhs = ((jnp.ones((7, 8)), jnp.zeros((8, 7))), jnp.zeros((8, 8)))
    >>> solver = bl.GMRES(preconditioner=PressureSchur(), flexible=True)
    >>> guess = bl.vector.zeros_like(rhs)
    >>> solution = bl.solve(
    ...     bl.LinearSystem(saddle, rhs), None, guess, solver=solver, budget=bl.Budget(3, rtol=1e-3)
    ... )
    >>> int(solution.iterations)
    1
    """

    velocity: Preconditioner | None = None
    rate: Float[Array, ""] | float | None = None
    viscosity: Float[Array, ""] | float | None = None

    def __check_init__(self) -> None:
        """Refuse half of a form."""
        if (self.rate is None) != (self.viscosity is None):
            msg = (
                "PressureSchur: rate and viscosity belong together, got "
                f"rate={self.rate}, viscosity={self.viscosity}. Give both, or none."
            )
            raise ValueError(msg)

    def at(self, problem: BoundProblem, x: PyTree) -> Callable[[Any], Any]:
        """V -> M⁻¹ v for the problem's operator.

        **Raises:** `IncompatibleError` for an operator that is no saddle point on a staggered
        grid.
        """
        parts = saddle_point(source_operator(problem, "PressureSchur"))
        divergence, gradient = Divergence(parts.staggered), Gradient(parts.staggered)
        poisson = FastSolver(laplacian(parts.staggered.cells)).at(problem, x[1])
        blocks = [
            self._block(block, like)
            for block, like in zip(_diagonal(parts.velocity), x[0], strict=True)
        ]

        def schur(g: Array) -> Array:
            inner = poisson(g)
            if self.rate is not None and self.viscosity is not None:
                found = self.rate * inner - self.viscosity * (g - jnp.mean(g))
            else:
                found = poisson(divergence.matvec(parts.velocity.matvec(gradient.matvec(inner))))
            found = -found / (parts.gradient * parts.divergence)
            if parts.mean is not None:
                found = found + jnp.mean(g) / parts.mean
            return found.astype(g.dtype)

        def apply(v: Any) -> Any:
            force, mass = v
            pressure = schur(mass)
            pushed = vector.scale(parts.gradient, gradient.matvec(pressure))
            force = vector.subtract(force, pushed)
            solved = tuple(block(part) for block, part in zip(blocks, force, strict=True))
            return solved, pressure

        return apply

    def _block(self, block: Operator, like: Array) -> Callable[[Any], Any]:
        """What solves with the block of one component."""
        operator = as_operator(block)
        bound = BoundProblem(
            name="velocity block",
            residual=lambda v: vector.negative(operator.matvec(v)),
            operator=operator,
            symmetric=operator.symmetric,
            positive_definite=operator.positive_definite,
        )
        velocity = SWEEPS if self.velocity is None else self.velocity
        prepared = prepare_preconditioner(bound, velocity, like)
        return lambda v: precondition(prepared, v)


class SaddlePoint(NamedTuple):
    """[[F, s ∇], [t ∇·, c P]].

    - `velocity`: F; `gradient`, `divergence`, `mean`: s, t and c, which is `None` without P.
    """

    velocity: Block
    gradient: Any
    divergence: Any
    mean: Any
    staggered: Staggered


def saddle_point(operator: Operator | LinearOperator) -> SaddlePoint:
    """The parts of a saddle point, or of its transpose.

    **Raises:** `IncompatibleError` for what is none.
    """
    found = _parts(operator) if isinstance(operator, Block) else None
    if found is None:
        msg = (
            f"PressureSchur cannot work on this {type(operator).__name__}: it needs a saddle point "
            "pde.Block([[F, pde.Gradient(staggered)], [pde.Divergence(staggered), None]]) with F "
            "made by pde.block_diagonal, one block for each component. Use pde.SparseDirect."
        )
        raise IncompatibleError(msg)
    return found


def _parts(operator: Block) -> SaddlePoint | None:
    if len(operator.rows) != 2 or len(operator.rows[0]) != 2:
        return None
    (velocity, upper), (lower, corner) = operator.rows
    (s, gradient), (t, divergence), (c, mean) = map(_unscaled, (upper, lower, corner))
    if not isinstance(gradient, Gradient) or not isinstance(divergence, Divergence):
        return None
    staggered = gradient.staggered
    if not isinstance(velocity, Block) or velocity.like != staggered.like:
        return None
    if any(row[i] is None for i, row in enumerate(velocity.rows)):
        return None
    if mean is not None and not isinstance(mean, Mean):
        return None
    return SaddlePoint(velocity, s, t, None if mean is None else c, staggered)


def _unscaled(operator: Operator | None) -> tuple[Any, Operator | None]:
    """The factor in front of an operator, and the operator."""
    factor: Any = 1.0
    while isinstance(operator, Scaled):
        factor, operator = factor * operator.factor, operator.operator
    return factor, operator


def _diagonal(velocity: Block) -> list[Operator]:
    blocks = [row[i] for i, row in enumerate(velocity.rows)]
    return [block for block in blocks if block is not None]
