"""Jacobi iteration."""

from typing import Any, ClassVar

from jaxtyping import Array, Float, PyTree

from bilevel import vector
from bilevel.bound import BoundProblem
from bilevel.solver.base import InnerSolver
from bilevel.solver.examination import require_diagonal
from bilevel.solver.parameter import positive
from bilevel.solver.preconditioning import divide


class Jacobi(InnerSolver):
    """Weighted Jacobi iteration, x ← x + ω D⁻¹ (b - A x), D the diagonal of A.

    Converges for a strictly diagonally dominant A with ω = 1, and for a symmetric
    positive definite one with ω < 2 / λ_max(D⁻¹A).  A zero on the diagonal is refused where
    the matrix is not traced, and otherwise makes the iterate non-finite, which the status says.

    **Arguments:**

    - `weight`: ω > 0. Traced.

    >>> import jax.numpy as jnp, bilevel as bl
    >>> problem = bl.LinearSystem(jnp.array([[2.0, 1.0], [1.0, 2.0]]), jnp.array([2.0, 4.0]))
    >>> solution = bl.solve(
    ...     problem, None, jnp.zeros(2), solver=bl.Jacobi(), budget=bl.Budget(iterations=1)
    ... )
    >>> [float(v) for v in solution.value]
    [1.0, 2.0]
    """

    requires: ClassVar[frozenset[str]] = frozenset({"operator", "diagonal"})
    stationary: ClassVar[bool] = True
    linear_adjoint: ClassVar[bool] = True

    weight: Float[Array, ""] | float = 1.0

    def __check_init__(self) -> None:
        """Validate the weight where it is concrete."""
        positive("Jacobi", "weight", self.weight)

    def examine(self, operator: object) -> None:
        """Refuse a matrix with a zero on its diagonal.

        **Raises:** `ValueError`.
        """
        require_diagonal("Jacobi", operator)

    def init(self, problem: BoundProblem, x: PyTree) -> PyTree:
        """The iterate is all there is."""
        del problem
        return x

    def step(self, problem: BoundProblem, state: PyTree, residual: PyTree) -> PyTree:
        """One simultaneous correction of all unknowns."""
        assert problem.operator is not None
        correction = divide(residual, problem.operator.diagonal)
        return vector.add_scaled(state, self.weight, correction)

    def value(self, state: PyTree) -> Any:
        """The state itself."""
        return state
