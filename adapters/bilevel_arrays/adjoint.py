"""Adjoint: the linear system of the derivative, an inner problem with a budget of its own."""

import dataclasses
import math
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from bilevel.bound import BoundProblem
from bilevel.budget import Budget
from bilevel.estimator.base import Estimator
from bilevel.estimator.implicit import Implicit
from bilevel.estimator.neumann import Neumann
from bilevel.operator import LinearOperator
from bilevel.solution import Solution
from bilevel.solver.base import IncompatibleError, InnerSolver
from bilevel.solver.richardson import Richardson
from bilevel.status import Status
from bilevel_arrays.choice import default_linear_solver, prepared, stepping_of
from bilevel_arrays.loop import run
from bilevel_arrays.pullback import Pullback
from bilevel_arrays.space import Space


@dataclasses.dataclass(frozen=True)
class Adjoint:
    """How adjoints of a problem are solved.

    - `solver`: of the linear system. `budget`: of it; `None` for the solver's own default.
    - `guess`: where it starts; `None` for zero.
    """

    solver: InnerSolver
    budget: Budget | None
    guess: PyTree | None

    def solve(
        self, problem: BoundProblem, pullback: Pullback, cotangent: PyTree, space: Space
    ) -> Solution:
        """Solve Nᵀλ = cotangent.

        A non-zero cotangent gets at least one iteration, or the status `NOT_STARTED`.
        """
        diagonal = None if problem.operator is None else problem.operator.diagonal
        operator = LinearOperator(
            pullback.of_x,
            diagonal=diagonal,
            symmetric=problem.symmetric,
            positive_definite=problem.positive_definite,
        )
        bound = BoundProblem(
            name="adjoint system",
            residual=lambda v: space.subtract(cotangent, pullback.of_x(v)),
            operator=operator,
            rhs=cotangent,
            symmetric=operator.symmetric,
            positive_definite=operator.positive_definite,
        )
        self.solver.check(bound)
        start = space.zeros() if self.guess is None else self.guess
        bound = prepared(bound, self.solver, start, space)
        budget = (
            self.solver.default_budget(default_like(space)) if self.budget is None else self.budget
        )
        solution = run(space, bound, stepping_of(self.solver, space), start, budget, minimum=1)
        idle = int(solution.iterations) == 0 and float(solution.residual_norm) > 0
        if idle and not Status(int(solution.status)).failed and not space.norm(start) > 0:
            started: Any = np.int32(Status.NOT_STARTED)
            solution = dataclasses.replace(solution, status=started)
        return solution


def adjoint_of(
    estimator: Estimator | None,
    problem: BoundProblem,
    solver: InnerSolver,
    budget: Budget | None,
    guess: PyTree | None,
    *,
    chosen: bool,
) -> Adjoint:
    """How an estimator solves adjoints.

    **Arguments:**

    - `solver`: of the primal solve; `chosen`: whether the user named it.

    **Raises:** `IncompatibleError` for an estimator that differentiates the iteration, `TypeError`
    for what is none.
    """
    if estimator is None:
        same = chosen and problem.operator is not None and not solver.stationary
        linear = solver if same and solver.linear_adjoint else default_linear_solver(problem)
        return Adjoint(linear, budget, guess)
    if isinstance(estimator, Implicit):
        linear = estimator.solver or default_linear_solver(problem)
        return Adjoint(linear, budget, guess)
    if isinstance(estimator, Neumann):
        step_size: Any = estimator.step_size
        if step_size is None:
            step_size = 1.0 if problem.mapping is not None else getattr(solver, "step_size", None)
        if step_size is None:
            msg = (
                f"Neumann: the primal solver {type(solver).__name__} has no step size that it "
                "could take. Give bl.Neumann(step_size=...)."
            )
            raise TypeError(msg)
        return Adjoint(Richardson(step_size=step_size), budget, guess)
    if isinstance(estimator, Estimator):
        msg = (
            f"{type(estimator).__name__} runs on JAX's arrays alone. Use bl.Implicit or "
            "bl.Neumann; or write the problem in JAX and call it from PyTorch by "
            "bilevel_arrays.torch.function."
        )
        raise IncompatibleError(msg)
    msg = f"estimator must be bl.Implicit(...) or bl.Neumann(...), got {estimator!r}."
    raise TypeError(msg)


def default_like(space: Space) -> Any:
    """What default budgets are told of the unknown: an array of its size and precision."""
    return np.empty(space.size(), np.float32 if space.narrow else np.float64)


def trusted(tree: PyTree, *solves: Solution) -> PyTree:
    """The tree, NaN where a solve failed: a failure must never look like a gradient."""
    if not any(Status(int(solve.status)).failed for solve in solves):
        return tree
    return jax.tree.map(lambda leaf: leaf * math.nan, tree)
