"""Problems that turn out to be linear systems."""

import dataclasses
from typing import Any

from jaxtyping import PyTree

from bilevel import vector
from bilevel.bound import BoundProblem
from bilevel.dependence import is_affine
from bilevel.problem import InnerProblem
from bilevel.solver.base import InnerSolver


class AffineProblem(InnerProblem):
    """A problem whose residual is affine in x, seen as the linear system it is.

    A quadratic objective, for one: its Hessian is the same everywhere, so conjugate
    gradients apply, and a factorisation made once serves the solve and its adjoint.
    """

    problem: InnerProblem
    zero: PyTree

    def residual(self, x: PyTree, theta: PyTree) -> PyTree:
        """The residual of the problem itself."""
        return self.problem.residual(x, theta)

    def at(self, theta: PyTree) -> BoundProblem:
        """The problem at one θ, with its operator and right-hand side."""
        bound = self.problem.at(theta)
        return dataclasses.replace(
            bound, operator=bound.linearize(self.zero), rhs=bound.residual(self.zero)
        )


def as_linear(problem: InnerProblem, theta: Any, x0: PyTree, solver: Any) -> InnerProblem:
    """The problem, as a linear system where that is certain and of use.

    It is of use to a solver that needs an operator, and to the choice of a default one.
    """
    bound = problem.at(theta)
    if bound.operator is not None or bound.proximal is not None:
        return problem
    wanted = solver is None or (isinstance(solver, InnerSolver) and "operator" in solver.requires)
    if not wanted or not is_affine(bound.residual, x0):
        return problem
    return AffineProblem(problem, vector.zeros_like(x0))
