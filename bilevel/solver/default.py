"""Which solver is used where the user names none."""

from jaxtyping import PyTree

from bilevel import vector
from bilevel.bound import BoundProblem
from bilevel.solver.anderson import Anderson
from bilevel.solver.base import InnerSolver
from bilevel.solver.default_linear import DENSE_SIZE, default_linear_solver
from bilevel.solver.direct import Direct
from bilevel.solver.gmres import GMRES
from bilevel.solver.lbfgs import LBFGS
from bilevel.solver.newton import Newton
from bilevel.solver.proximal_gradient import ProximalGradient


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
