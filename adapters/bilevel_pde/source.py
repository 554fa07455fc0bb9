"""Source: the operator of this adapter that a problem was made of."""

from typing import Any

import equinox as eqx

from bilevel.bound import BoundProblem
from bilevel.solver.base import IncompatibleError
from bilevel_pde.diffusion import Diffusion
from bilevel_pde.operator import Operator
from bilevel_pde.stencil import Stencil


class Near(eqx.Module):
    """An operator of this adapter that is near a problem's own, for preconditioners only.

    **Arguments:**

    - `operator`: such as the matrix of a linearisation, whose Jacobian has other terms.
    - `exact`: the problem's own, such as this Jacobian, for who can do with its entries.
    """

    operator: Operator
    exact: Operator | None = None

    def transposed(self) -> "Near":
        """What is near the transpose."""
        exact = None if self.exact is None else self.exact.transposed()
        return Near(self.operator.transposed(), exact)


def exact_source(source: Any) -> Any:
    """What an operator was made of, or where that is only near it, what it is."""
    return source.exact if isinstance(source, Near) else source


def own_way(problem: BoundProblem, name: str) -> Any:
    """The method of a problem's operator that does a preconditioner's work in a way of its own.

    An operator whose fields are cut into blocks on several devices has
    `multigrid_inverse(multigrid, problem)`, which returns v -> M⁻¹ v, and `smoothed(smoother, v)`.

    **Returns:** `None` where there is none.
    """
    source = None if problem.operator is None else problem.operator.source
    found = getattr(source, name, None)
    return found if isinstance(source, Operator) and callable(found) else None


def source_operator(problem: BoundProblem, name: str) -> Operator:
    """The operator that the problem's linear system was given, or one near it.

    **Arguments:**

    - `name`: of the solver or preconditioner that asks, for the message.

    **Raises:** `IncompatibleError` where there is none of this adapter.
    """
    source = None if problem.operator is None else problem.operator.source
    if isinstance(source, Near):
        return source.operator
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
