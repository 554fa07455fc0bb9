"""Geometric multigrid."""

from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from bilevel.bound import BoundProblem
from bilevel.solver.base import IncompatibleError
from bilevel_pde.coarsening import Transfer, coarse_grid, coarsen
from bilevel_pde.diffusion import Diffusion
from bilevel_pde.grid import Grid
from bilevel_pde.operator import Operator
from bilevel_pde.smoother import ChebyshevSmoother, Smoother, grid_of
from bilevel_pde.source import grid_operator
from bilevel_pde.stencil import Stencil
from bilevel_pde.weighting import as_discretised, volume_shares, without_mean

Cycle = Literal["V", "W", "F"]

DENSE = 729
"""The most unknowns of the coarsest grid, whose inverse is formed."""


class Multigrid(eqx.Module):
    """One multigrid cycle as a preconditioner, for operators on regular grids.

    `bl.ConjugateGradient(preconditioner=pde.Multigrid())` solves a Poisson problem in a
    number of iterations that does not grow with the grid; as a solver by itself it is
    `bl.Richardson(1.0, preconditioner=pde.Multigrid())`.  For a symmetric operator the cycle
    is symmetric.  The hierarchy is made of the operator in traced code, its coefficients
    included; derivatives never go through a preconditioner.  Constant fields in the kernel
    (periodic or Neumann sides all around) are left out of the coarsest solve.

    **Arguments:**

    - `smoother`: on every level; Chebyshev by default, for all points at once.
    - `cycle`: "V", "W" or "F".
    - `build`: build(grid) -> the operator on a coarser grid, where it is not found by itself
        (a product, or coefficients that must be averaged in a way of their own).
    - `levels`: the most grids, static; `None` for as many as there are.

    **Raises:** `ValueError` for another cycle.

    >>> import jax.numpy as jnp, bilevel as bl, bilevel_pde as pde
    >>> grid = pde.Grid((16, 16))
    >>> problem = bl.LinearSystem(-pde.laplacian(grid), jnp.ones(grid.shape))
    >>> solver = bl.ConjugateGradient(preconditioner=pde.Multigrid(levels=2))
    >>> solution = bl.solve(
    ...     problem, None, jnp.zeros(grid.shape), solver=solver, budget=bl.Budget(50, rtol=1e-4)
    ... )
    >>> int(solution.iterations) <= 6
    True
    """

    smoother: Smoother = ChebyshevSmoother()
    cycle: Cycle = eqx.field(static=True, default="V")
    build: Callable[[Grid], Operator] | None = eqx.field(static=True, default=None)
    levels: int | None = eqx.field(static=True, default=None)

    def __check_init__(self) -> None:
        """Validate the options."""
        if self.cycle not in {"V", "W", "F"}:
            msg = f"Multigrid: cycle must be 'V', 'W' or 'F', got {self.cycle!r}."
            raise ValueError(msg)
        if self.levels is not None and self.levels < 1:
            msg = f"Multigrid: levels must be at least 1, got {self.levels}."
            raise ValueError(msg)

    def at(self, problem: BoundProblem, x: Array) -> Callable[[Array], Array]:
        """V -> M⁻¹ v for the problem's operator.

        **Raises:** `IncompatibleError` for an operator that is not on a grid, or whose
        coarsest grid is too large.
        """
        del x
        return as_discretised(grid_operator(problem, "Multigrid"), self._inverse)

    def _inverse(self, operator: Stencil | Diffusion) -> Callable[[Array], Array]:
        """The cycle of an operator as it was discretised."""
        hierarchy = self.hierarchy(operator)
        coarsest = _inverse(hierarchy[-1][0], singular=operator.singular)
        visits = 1 if self.cycle == "V" else 2

        def cycle(v: Array) -> Array:
            if not operator.singular:
                return self._cycle(hierarchy, coarsest, 0, v, visits)
            # Rounding would leave more and more of the kernel in what is without it.
            v = without_mean(operator.grid, v)
            v = self._cycle(hierarchy, coarsest, 0, v, visits)
            return without_mean(operator.grid, v)

        return cycle

    def hierarchy(self, operator: Operator) -> list[tuple[Operator, Transfer | None]]:
        """The operators from the finest grid to the coarsest, with the transfers between them."""
        found: list[tuple[Operator, Transfer | None]] = []
        while True:
            grid = grid_of(operator)
            below = coarse_grid(grid)
            if below is None or (self.levels is not None and len(found) + 1 >= self.levels):
                break
            transfer = Transfer(grid, below)
            coarse = coarsen(operator, transfer) if self.build is None else self.build(below)
            if coarse is None:
                break
            found.append((operator, transfer))
            operator = coarse
        size = grid_of(operator).size
        if size > DENSE:
            msg = (
                f"Multigrid: the coarsest grid {grid_of(operator).shape} has {size} points, more "
                f"than the {DENSE} that are solved at once. Raise levels, or take numbers of "
                "intervals that can be halved."
            )
            raise IncompatibleError(msg)
        return [*found, (operator, None)]

    def _cycle(
        self,
        hierarchy: list[tuple[Operator, Transfer | None]],
        coarsest: Float[Array, "n n"],
        level: int,
        b: Array,
        visits: Int[Array, ""] | int,
    ) -> Array:
        operator, transfer = hierarchy[level]
        if transfer is None:
            solved: Any = coarsest.astype(b.dtype) @ b.reshape(-1)
            return solved.reshape(b.shape)
        x = self.smoother.sweep(operator, None, b, backward=False)
        coarse = transfer.restrict(b - operator.matvec(x))
        below, deeper = hierarchy[level + 1]

        def correct(visit: Int[Array, ""] | int, correction: Array | None) -> Array:
            # Of an F cycle's two visits below, the second is a V cycle.
            again = visits if self.cycle == "W" else jnp.where(visit == 0, visits, 1)
            if correction is None:
                return self._cycle(hierarchy, coarsest, level + 1, coarse, again)
            left = coarse - below.matvec(correction)
            return correction + self._cycle(hierarchy, coarsest, level + 1, left, again)

        if self.cycle == "V" or deeper is None:
            correction = correct(0, None)
        else:
            # A loop, so that what is compiled grows with the levels and not with the visits.
            correction = jax.lax.fori_loop(0, visits, correct, jnp.zeros_like(coarse))
        x = x + transfer.prolong(correction)
        return self.smoother.sweep(operator, x, b, backward=True)


def _inverse(operator: Operator, *, singular: bool) -> Float[Array, "n n"]:
    """The inverse on the coarsest grid; of a singular operator, on fields without a mean."""
    grid = grid_of(operator)
    identity = jnp.eye(grid.size, dtype=grid.dtype)
    matrix = jax.vmap(operator.matvec)(identity.reshape(grid.size, *grid.shape))
    matrix = matrix.reshape(grid.size, grid.size).T
    if singular:
        # Constants become an eigenvector of an eigenvalue like the others.
        mean = jnp.asarray(volume_shares(grid).reshape(1, -1), grid.dtype)
        matrix = matrix + jnp.trace(matrix) / grid.size * mean
    inverse = jnp.linalg.inv(matrix)
    return 0.5 * (inverse + inverse.T) if operator.symmetric else inverse
