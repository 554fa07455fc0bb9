"""Which solver the linear systems of a problem get where the user names none."""

from jaxtyping import PyTree

from bilevel import vector
from bilevel.bound import BoundProblem
from bilevel.solver.base import InnerSolver
from bilevel.solver.conjugate_gradient import ConjugateGradient
from bilevel.solver.direct import Direct
from bilevel.solver.gmres import GMRES
from bilevel.solver.minres import MINRES

DENSE_SIZE = 1500
"""Below so many unknowns a dense factorisation beats every iteration."""


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
