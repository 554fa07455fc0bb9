"""Source: the operator of this adapter that a problem was made of."""

from bilevel.bound import BoundProblem
from bilevel.solver.base import IncompatibleError
from bilevel_pde.diffusion import Diffusion
from bilevel_pde.operator import Operator
from bilevel_pde.stencil import Stencil


def source_operator(problem: BoundProblem, name: str) -> Operator:
    """The operator that the problem's linear system was given.

    **Arguments:**

    - `name`: of the solver or preconditioner that asks, for the message.

    **Raises:** `IncompatibleError` where there is none of this adapter.
    """
    source = None if problem.operator is None else problem.operator.source
    if not isinstance(source, Operator):
        msg = (
            f"{name} cannot work on this {problem.name}: its operator is none of bilevel_pde. Give "
            "bl.LinearSystem an operator such as -pde.laplacian(grid) or pde.from_scipy(matrix), "
            "or use bl.JacobiPreconditioner."
        )
        raise IncompatibleError(msg)
    return source


def grid_operator(problem: BoundProblem, name: str) -> Stencil | Diffusion:
    """The operator on a regular grid that the problem's linear system was given.

    **Raises:** `IncompatibleError` where there is none.
    """
    source = source_operator(problem, name)
    if not isinstance(source, Stencil | Diffusion):
        msg = (
            f"{name} cannot work on a {type(source).__name__}: it needs an operator on a regular "
            "grid, a Stencil or a Diffusion. Use pde.AlgebraicMultigrid or pde.SparseDirect."
        )
        raise IncompatibleError(msg)
    return source
