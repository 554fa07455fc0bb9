"""Linearisation: how a nonlinear step is iterated, and what of it is differentiated."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from bilevel.budget import Budget
from bilevel.closed import stopped
from bilevel.estimator.base import Estimator
from bilevel.estimator.implicit import Implicit
from bilevel.estimator.unrolled import Unrolled
from bilevel.inner_solve import solve
from bilevel.solution import Solution
from bilevel.solver.base import InnerSolver
from bilevel.solver.newton import Newton
from bilevel_pde.quasilinear import Picard, Quasilinear
from bilevel_pde.stepper import Effort, traced

Linearization = Literal["picard", "newton"]
Derivative = Literal["implicit", "unrolled", "frozen", "detached"]

UNROLLED = 64
"""Iterations that unrolling has room for where the number is not known beforehand."""


def check_linearization(owner: str, linearization: str, derivative: str) -> None:
    """Refuse unknown names.

    **Raises:** `ValueError`.
    """
    if linearization not in {"picard", "newton"}:
        msg = f"{owner}: linearization should be 'picard' or 'newton', got {linearization!r}."
        raise ValueError(msg)
    if derivative not in {"implicit", "unrolled", "frozen", "detached"}:
        msg = (
            f"{owner}: derivative should be 'implicit', 'unrolled', 'frozen' or 'detached', got "
            f"{derivative!r}."
        )
        raise ValueError(msg)


def as_outer_budget(owner: str, given: Budget | Array | int | None) -> Budget | None:
    """A budget of linearisations, of one or of a number of them.

    **Raises:** `TypeError` for anything else.
    """
    if given is None or isinstance(given, Budget):
        return traced(given)
    if isinstance(given, bool) or not jnp.issubdtype(jnp.result_type(given), jnp.integer):
        msg = f"{owner}: outer_budget should be a Budget or a whole number, got {given!r}."
        raise TypeError(msg)
    return traced(Budget(iterations=given))


def chosen_estimator(
    owner: str,
    derivative: Derivative,
    outer_budget: Budget | None,
    adjoint_solver: InnerSolver | None,
    default: InnerSolver,
) -> Estimator:
    """The estimator of a way to differentiate.

    **Raises:** `ValueError` for an adjoint's solver that would not be used.
    """
    if derivative != "unrolled":
        return Implicit(default if adjoint_solver is None else adjoint_solver)
    if adjoint_solver is not None:
        msg = (
            f"{owner}: derivative='unrolled' solves backwards with the solver itself. Leave out "
            "adjoint_solver, or use derivative='implicit'."
        )
        raise ValueError(msg)
    known = 0 if outer_budget is None else outer_budget.concrete_iterations
    return Unrolled(max_iterations=known if 0 < known <= 16 * UNROLLED else UNROLLED)


def solve_linearised(
    problem: Quasilinear,
    theta: tuple[Any, PyTree],
    guess: PyTree,
    effort: Effort,
    *,
    linear: InnerSolver,
    estimator: Estimator,
    outer_budget: Budget | None,
    linearization: Linearization,
    derivative: Derivative,
) -> Solution:
    """The inner solve of a nonlinear step.

    **Arguments:**

    - `theta`: (stepper, state before).
    - `effort`: of each linear solve within.
    - `linear`: what solves the linear systems.
    """
    solver: InnerSolver
    adjoint_budget = effort.adjoint_budget
    guess = jax.tree.map(jnp.asarray, guess)
    back = adjoint_budget if derivative == "unrolled" else None
    if linearization == "picard":
        solver = Picard(linear, effort.budget, back)
    else:
        budget = effort.budget
        if derivative == "unrolled":
            # Newton's own default leaves 1e-4 of each linear solve, and so of a derivative.
            exact = linear.default_budget(guess)
            budget = exact if budget is None else budget
            back = exact if back is None else back
        solver = Newton(linear=linear, linear_budget=budget, adjoint_budget=back)
    if derivative == "unrolled":
        adjoint_budget = None
    if derivative == "detached":
        theta, guess, solver = stopped((theta, guess, solver))
    return solve(
        problem,
        theta,
        guess,
        solver=solver,
        estimator=estimator,
        budget=outer_budget,
        adjoint_budget=adjoint_budget,
        probe=effort.probe,
    )
