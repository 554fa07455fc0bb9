"""Iterated: a few iterations of a solver as a preconditioner."""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
from jaxtyping import PyTree

from bilevel import vector
from bilevel.bound import BoundProblem
from bilevel.budget import Budget
from bilevel.solver.base import IncompatibleError, InnerSolver
from bilevel.solver.loop import run


class Iterated(eqx.Module):
    """M⁻¹v by a solver of linear systems, started at zero, to a budget of its own.

    Krylov solvers and tolerances make it nonlinear: give it to `bl.GMRES(flexible=True)` or
    to [`PressureSchur`][] within.  With [`bilevel.Jacobi`][] and a number of iterations it is
    linear.

    **Arguments:**

    - `solver`: a solver of linear systems, itself with a preconditioner or without.
    - `budget`: iterations and tolerances, traced.

    **Raises:** `IncompatibleError` for a solver that solves no linear systems.

    >>> import jax.numpy as jnp, bilevel as bl, bilevel_pde as pde
    >>> grid = pde.Grid((16, 16))
    >>> problem = bl.LinearSystem(-pde.laplacian(grid), jnp.ones(grid.shape))
    >>> inner = pde.Iterated(bl.ConjugateGradient(), bl.Budget(iterations=5))
    >>> solver = bl.GMRES(preconditioner=inner, flexible=True)
    >>> int(bl.solve(problem, None, jnp.zeros(grid.shape), solver=solver).status)
    0
    """

    solver: InnerSolver
    budget: Budget

    def __check_init__(self) -> None:
        """Refuse what cannot solve a linear system."""
        if not isinstance(self.budget, Budget):
            msg = f"Iterated: budget should be a Budget, got {self.budget!r}."
            raise TypeError(msg)
        if not isinstance(self.solver, InnerSolver) or not self.solver.linear_adjoint:
            msg = (
                f"Iterated: solver should be one of linear systems such as bl.BiCGStab(), got "
                f"{self.solver!r}."
            )
            raise IncompatibleError(msg)

    def at(self, problem: BoundProblem, x: PyTree) -> Callable[[Any], Any]:
        """V -> M⁻¹v for the problem's operator."""
        operator = problem.operator
        if operator is None:
            msg = f"Iterated cannot precondition this {problem.name}: it has no operator."
            raise IncompatibleError(msg)
        bare = dataclasses.replace(problem, precondition=None)
        self.solver.check(bare)
        prepared = self.solver.prepare(bare, x)

        def apply(v: Any) -> Any:
            start = vector.zeros_like(v)

            def residual(y: Any) -> Any:
                return v if y is start else vector.subtract(v, operator.matvec(y))

            bound = dataclasses.replace(prepared, residual=residual, rhs=v)
            return run(bound, self.solver, start, self.budget, minimum=1).value

        return apply
