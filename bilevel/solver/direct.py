"""Dense factorisation."""

import dataclasses
from typing import Any, ClassVar

import jax
from jaxtyping import PyTree

from bilevel import vector
from bilevel.bound import BoundProblem
from bilevel.budget import Budget
from bilevel.operator import LinearOperator
from bilevel.solver.base import InnerSolver
from bilevel.solver.dense import coordinates, dense_matrix


class Direct(InnerSolver):
    """Dense factorisation: Cholesky where the operator is declared positive definite, else LU.

    The factors are made once; an iteration solves with them and adds the correction, so
    that a second iteration is one of iterative refinement.  The matrix is taken from the
    problem where it came as one, and otherwise made column by column: memory n², time n³.
    A singular matrix, or an indefinite one under Cholesky, ends as `NONFINITE` or
    `BREAKDOWN`.

    >>> import jax.numpy as jnp, bilevel as bl
    >>> problem = bl.LinearSystem(jnp.array([[0.0, 2.0], [1.0, 0.0]]), jnp.array([2.0, 3.0]))
    >>> solution = bl.solve(problem, None, jnp.zeros(2), solver=bl.Direct())
    >>> [float(v) for v in solution.value]
    [3.0, 1.0]
    """

    requires: ClassVar[frozenset[str]] = frozenset({"operator"})
    instead: ClassVar[str] = "Newton(linear=Direct())"
    linear_adjoint: ClassVar[bool] = True

    def prepare(self, problem: BoundProblem, x: PyTree) -> BoundProblem:
        """Factorise."""
        assert problem.operator is not None
        return dataclasses.replace(problem, precondition=factorize(problem.operator, x))

    def init(self, problem: BoundProblem, x: PyTree) -> PyTree:
        """The iterate is all there is."""
        del problem
        return x

    def step(self, problem: BoundProblem, state: PyTree, residual: PyTree) -> PyTree:
        """Solve for the correction and add it."""
        assert problem.precondition is not None
        return vector.add(state, problem.precondition(residual))

    def value(self, state: PyTree) -> Any:
        """The state itself."""
        return state

    def default_budget(self, x0: PyTree) -> Budget:
        """A few steps of iterative refinement at most."""
        return Budget(iterations=5, rtol=super().default_budget(x0).rtol)


def factorize(operator: LinearOperator, like: PyTree) -> Any:
    """v -> A⁻¹v by a dense factorisation made here, once."""
    flatten, unflatten = coordinates(like, real=operator.matrix is None)
    matrix = dense_matrix(operator, like)
    if operator.symmetric and operator.positive_definite:
        factors = jax.scipy.linalg.cho_factor(matrix, lower=True)
        return lambda v: unflatten(jax.scipy.linalg.cho_solve(factors, flatten(v)))
    pivoted = jax.scipy.linalg.lu_factor(matrix)
    return lambda v: unflatten(jax.scipy.linalg.lu_solve(pivoted, flatten(v)))
