"""Linear systems that come up inside: adjoints, tangents, Newton corrections."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from bilevel import vector
from bilevel.bound import BoundProblem
from bilevel.budget import Budget
from bilevel.operator import LinearOperator
from bilevel.solution import Solution
from bilevel.solver.base import InnerSolver
from bilevel.solver.loop import run
from bilevel.status import Status


def trusted(solution: Solution) -> PyTree:
    """The value, or NaN where the solve failed: a failure must never look like a gradient."""
    poison = jnp.where(solution.status >= Status.DIVERGED, jnp.nan, 1.0)
    return vector.scale(poison, solution.value)


def solve_linear(
    operator: LinearOperator,
    rhs: PyTree,
    solver: InnerSolver,
    budget: Budget,
    guess: PyTree | None = None,
) -> tuple[Solution, PyTree]:
    """Solve a linear system of the derivative as the inner problem it is.

    **Returns:** the solution and the residual vector it left. A non-zero right-hand side
    gets at least one iteration, or the status `NOT_STARTED`: a start at zero, given or not,
    must never pass for a zero gradient.
    """
    start = vector.zeros_like(rhs) if guess is None else guess

    def residual(v: PyTree) -> PyTree:
        # At the zero start the residual is the right-hand side: nothing to apply.
        zero = guess is None and v is start
        return rhs if zero else vector.subtract(rhs, operator.matvec(v))

    bound = BoundProblem(
        name="adjoint system",
        residual=residual,
        operator=operator,
        rhs=rhs,
        symmetric=operator.symmetric,
        positive_definite=operator.positive_definite,
    )
    solver.check(bound)
    bound = solver.prepare(bound, start)
    solution = run(bound, solver, start, budget, minimum=1)
    idle = (solution.iterations == 0) & (solution.residual_norm > 0)
    idle = idle & (solution.status < Status.DIVERGED)
    for leaf in jax.tree.leaves(guess):
        idle = idle & ~jnp.any(leaf != 0)
    status = jnp.where(idle, jnp.int32(Status.NOT_STARTED), solution.status)
    solution = eqx.tree_at(lambda s: s.status, solution, status)
    return solution, bound.residual(solution.value)
