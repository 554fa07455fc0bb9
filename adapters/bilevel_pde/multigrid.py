"""Geometric multigrid."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from bilevel.bound import BoundProblem
from bilevel.solver.base import IncompatibleError
from bilevel.solver.parameter import whole
from bilevel_pde.coarsening import NEAR, Transfer, coarse_grid, coarsen, strong
from bilevel_pde.diffusion import Diffusion
from bilevel_pde.galerkin import FEWEST, galerkin
from bilevel_pde.grid import Grid
from bilevel_pde.materialise import materialise
from bilevel_pde.mean_shift import shifted_operator, with_mean
from bilevel_pde.operator import Operator
from bilevel_pde.smoother import ChebyshevSmoother, GaussSeidel, Smoother, grid_of
from bilevel_pde.source import own_way
from bilevel_pde.stencil import Stencil
from bilevel_pde.weighting import as_discretised, volume_shares, without_mean

Cycle = Literal["V", "W", "F"]
Coarse = Literal["rediscretised", "galerkin"]
Levels = list[tuple[Any, Any]]
"""Operators from the finest grid to the coarsest, each with its transfer to the next one."""
Descent = Callable[["Multigrid", Smoother, Stencil | Diffusion], Callable[[Array], Array]]
"""What makes the bare cycle of an operator as it was discretised."""

DENSE = 729
"""The most unknowns of the coarsest grid, whose inverse is formed."""

FEW = 256
"""Galerkin operators of so few unknowns are not made coarser: each level takes compiling."""


class Multigrid(eqx.Module):
    """One multigrid cycle as a preconditioner, for operators on regular grids.

    `bl.ConjugateGradient(preconditioner=pde.Multigrid())` solves a Poisson problem in a
    number of iterations that does not grow with the grid; as a solver by itself it is
    `bl.Richardson(1.0, preconditioner=pde.Multigrid())`.  For a symmetric operator the cycle
    is symmetric.  The hierarchy is made of the operator in traced code, its coefficients
    included; derivatives never go through a preconditioner.  Constant fields in the kernel
    (periodic or Neumann sides all around) are left out of the coarsest solve; an operator
    plus a multiple of [`Mean`][] is taken, too.

    Where spacings differ, only the axes of the smallest ones are made coarser at first.

    **Arguments:**

    - `smoother`: on every level. `None` takes [`ChebyshevSmoother`][], for all points at once,
        where the operator is known to be symmetric, and [`GaussSeidel`][] for others.
    - `cycle`: "V", "W" or "F".
    - `coarse`: operators on coarser grids: "rediscretised", the same differences with larger
        spacing and coefficients averaged; or "galerkin", Pᵀ A P with an interpolation P that
        follows the coefficients, for such as jump.  It takes longer to set up, and stencils
        that reach one point.
    - `build`: build(grid) -> the operator on a coarser grid, where it is not found by itself
        (a product, or coefficients that must be averaged in a way of their own).
    - `levels`: the most grids, static; `None` for as many as there are.

    **Raises:** `ValueError` for another cycle, other coarse operators, and levels that are
    not a positive integer; `TypeError` for what is no smoother.

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

    smoother: Smoother | None = None
    cycle: Cycle = eqx.field(static=True, default="V")
    build: Callable[[Grid], Operator] | None = eqx.field(static=True, default=None)
    levels: int | None = eqx.field(static=True, default=None)
    coarse: Coarse = eqx.field(static=True, default="rediscretised")

    def __check_init__(self) -> None:
        """Validate the options."""
        given: Any = self.smoother
        if given is not None and not isinstance(given, Smoother):
            msg = (
                "Multigrid: smoother should be one of this adapter, such as pde.GaussSeidel() or "
                f"pde.WeightedJacobi(), got {type(given).__name__}."
            )
            raise TypeError(msg)
        if isinstance(given, GaussSeidel) and given.colours is not None:
            msg = "Multigrid: GaussSeidel with colours= is for one matrix; leave them to the grids."
            raise ValueError(msg)
        if self.cycle not in {"V", "W", "F"}:
            msg = f"Multigrid: cycle must be 'V', 'W' or 'F', got {self.cycle!r}."
            raise ValueError(msg)
        if self.coarse not in {"rediscretised", "galerkin"}:
            msg = f"Multigrid: coarse must be 'rediscretised' or 'galerkin', got {self.coarse!r}."
            raise ValueError(msg)
        if self.coarse == "galerkin" and self.build is not None:
            msg = "Multigrid: build= makes the coarse operators, so coarse='galerkin' cannot."
            raise ValueError(msg)
        if self.levels is not None:
            whole("Multigrid", "levels", self.levels)

    def at(self, problem: BoundProblem, x: Array) -> Callable[[Array], Array]:
        """V -> M⁻¹ v for the problem's operator.

        **Raises:** `IncompatibleError` for an operator that is not on a grid, or whose
        coarsest grid is too large.
        """
        del x
        inverse_of = own_way(problem, "multigrid_inverse")
        if inverse_of is not None:
            return inverse_of(self, problem)
        operator, factor = shifted_operator(problem, "Multigrid")
        inverse = self.inverse(operator)
        return inverse if factor is None else with_mean(operator, factor, inverse)

    def inverse(
        self, operator: Stencil | Diffusion, descent: Descent | None = None
    ) -> Callable[[Array], Array]:
        """The cycle of an operator, v -> M⁻¹ v.

        **Arguments:**

        - `descent`: descent(multigrid, smoother, operator) -> the bare cycle v -> M⁻¹ v of an
            operator as it was discretised; by default that of this grid's `levels_of`.
        """
        symmetric = operator.symmetric is True
        found = _descent if descent is None else descent
        return as_discretised(operator, partial(self._inverse, found, symmetric=symmetric))

    def levels_of(self, operator: Stencil | Diffusion) -> tuple[Levels, Float[Array, "n n"]]:
        """The hierarchy of an operator, and the inverse on its coarsest grid."""
        hierarchy = self.hierarchy(operator)
        return hierarchy, _inverse(hierarchy[-1][0], singular=operator.singular)

    def _inverse(
        self, descent: Descent, operator: Stencil | Diffusion, *, symmetric: bool
    ) -> Callable[[Array], Array]:
        """The cycle of an operator as it was discretised."""
        smoother = self.smoother
        if smoother is None:
            even = symmetric or _is_self_adjoint(operator)
            smoother = ChebyshevSmoother() if even else GaussSeidel()
        bare = descent(self, smoother, operator)
        grid = operator.grid
        volumes = grid.weights() if self.coarse == "galerkin" else ()

        def cycle(v: Array) -> Array:
            # Rounding would leave more and more of the kernel in what is without it.
            v = without_mean(grid, v) if operator.singular else v
            for volume in volumes:
                v = v if np.all(volume == 1) else v * volume.astype(v.dtype)
            v = bare(v)
            return without_mean(grid, v) if operator.singular else v

        return cycle

    def descend(
        self, smoother: Smoother, hierarchy: Levels, coarsest: Float[Array, "n n"], b: Array
    ) -> Array:
        """One cycle for A x = b, started at zero.

        **Arguments:**

        - `hierarchy`: from the finest grid to the coarsest operators, and what has `restrict` and
            `prolong` between the fields of each and of the next.
        - `coarsest`: the inverse on the coarsest grid.
        """
        visits = 1 if self.cycle == "V" else 2
        return self._cycle(smoother, hierarchy, coarsest, 0, b, visits)

    def hierarchy(self, operator: Stencil | Diffusion) -> Levels:
        """The operators from the finest grid to the coarsest, with the transfers between them.

        For Galerkin operators all of them are multiplied with control volumes.
        """
        by_products = self.coarse == "galerkin"
        found = self._by_products(operator) if by_products else self._anew(operator)
        grid = grid_of(found[-1][0])
        if grid.size > DENSE:
            msg = (
                f"Multigrid: the coarsest grid {grid.shape} has {grid.size} points, more "
                f"than the {DENSE} that are solved at once. Raise levels, or take numbers of "
                "intervals that can be halved."
            )
            raise IncompatibleError(msg)
        return found

    def _anew(self, operator: Operator) -> list[tuple[Operator, Any]]:
        found: list[tuple[Operator, Any]] = []
        while True:
            grid = grid_of(operator)
            below = coarse_grid(grid)
            if below is None:
                break
            axes = [d for d, size in enumerate(below.shape) if size != grid.shape[d]]
            if self._suffices(grid, axes, len(found)):
                break
            transfer = Transfer(grid, below)
            coarse = coarsen(operator, transfer) if self.build is None else self.build(below)
            if coarse is None:
                break
            found.append((operator, transfer))
            operator = coarse
        return [*found, (operator, None)]

    def _by_products(self, operator: Stencil | Diffusion) -> list[tuple[Operator, Any]]:
        found: list[tuple[Operator, Any]] = []
        if any(not np.all(weight == 1) for weight in operator.grid.weights()):
            operator = operator.weighted()
        while True:
            grid = operator.grid
            axes = strong(grid, [d for d, points in enumerate(grid.shape) if points >= FEWEST])
            if not axes or grid.size <= FEW or self._suffices(grid, axes, len(found)):
                break
            stencil = operator.stencil() if isinstance(operator, Diffusion) else operator
            coarse, transfer = galerkin(stencil, axes)
            found.append((operator, transfer))
            operator = coarse
        return [*found, (operator, None)]

    def _suffices(self, grid: Grid, axes: Sequence[int], above: int) -> bool:
        """Whether a grid with so many above it need not be made coarser along some axes."""
        if self.levels is not None and above + 1 >= self.levels:
            return True
        # Where points are nearest along another axis, smoothing does not help along these.
        nearest = min(grid.spacing[axis] for axis in axes)
        return grid.size <= DENSE and nearest > NEAR * min(grid.spacing)

    def _cycle(
        self,
        smoother: Smoother,
        hierarchy: Levels,
        coarsest: Float[Array, "n n"],
        level: int,
        b: Array,
        visits: Int[Array, ""] | int,
    ) -> Array:
        operator, transfer = hierarchy[level]
        if transfer is None:
            solved: Any = coarsest.astype(b.dtype) @ b.reshape(-1)
            return solved.reshape(b.shape)
        x = materialise(smoother.sweep(operator, None, b, backward=False))
        coarse = materialise(transfer.restrict(materialise(b - operator.matvec(x))))
        below, deeper = hierarchy[level + 1]

        def correct(visit: Int[Array, ""] | int, correction: Array | None) -> Array:
            # Of an F cycle's two visits below, the second is a V cycle.
            again = visits if self.cycle == "W" else jnp.where(visit == 0, visits, 1)
            if correction is None:
                return self._cycle(smoother, hierarchy, coarsest, level + 1, coarse, again)
            left = materialise(coarse - below.matvec(correction))
            return correction + self._cycle(smoother, hierarchy, coarsest, level + 1, left, again)

        if self.cycle == "V" or deeper is None:
            correction = correct(0, None)
        else:
            # A loop, so that what is compiled grows with the levels and not with the visits.
            correction = jax.lax.fori_loop(0, visits, correct, jnp.zeros_like(coarse))
        x = materialise(x + transfer.prolong(correction))
        return materialise(smoother.sweep(operator, x, b, backward=True))


def _descent(
    multigrid: Multigrid, smoother: Smoother, operator: Stencil | Diffusion
) -> Callable[[Array], Array]:
    hierarchy, coarsest = multigrid.levels_of(operator)
    return partial(multigrid.descend, smoother, hierarchy, coarsest)


def _is_self_adjoint(operator: Stencil | Diffusion) -> bool:
    """Whether A, as it was discretised, is known to be with respect to control volumes."""
    if isinstance(operator, Diffusion) or operator.symmetric:
        return True
    uniform = all(bool(np.all(weight == 1)) for weight in operator.grid.weights())
    return not uniform and operator.weighted().symmetric is True


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
