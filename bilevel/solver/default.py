"""Which solver is used where the user names none."""

from jaxtyping import PyTree

from bilevel import vector
from bilevel.bound import BoundProblem
from bilevel.solver.base import InnerSolver
from bilevel.solver.conjugate_gradient import ConjugateGradient
from bilevel.solver.direct import Direct
from bilevel.solver.gmres import GMRES
from bilevel.solver.minres import MINRES
from bilevel.solver.newton import Newton

DENSE_SIZE = 1500
"""Below so many unknowns a dense factorisation beats every iteration."""


def default_solver(problem: BoundProblem, x0: PyTree) -> InnerSolver:
    """The solver for a problem of this kind and size."""
    if problem.operator is not None:
        return default_linear_solver(problem, x0)
    if problem.proximal is not None:
        return ProximalGradient()
    if problem.mapping is not None:
        return Anderson()
    if vector.size(x0) <= DENSE_SIZE:
        return Newton(linear=Direct())
    if problem.objective is not None:
        return LBFGS()
    return Newton(linear=GMRES())


def default_linear_solver(problem: BoundProblem, x0: PyTree) -> InnerSolver:
    """The solver for the linear systems of a problem: its own, or its derivative's.

    A linear system is never made dense unless it came as a matrix; a Hessian or Jacobian
    of small size is, column by column.
    """
    if not problem.matrix_free and vector.size(x0) <= DENSE_SIZE:
        return Direct()
    if problem.symmetric and problem.positive_definite:
        return ConjugateGradient()
    if problem.symmetric:
        return MINRES()
    return GMRES()
