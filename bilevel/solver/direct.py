"""Dense factorisation."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from bilevel import vector
from bilevel.bound import BoundProblem
from bilevel.budget import Budget
from bilevel.operator import LinearOperator
from bilevel.solver.base import InnerSolver
from bilevel.solver.dense import coordinates, dense_matrix
from bilevel.status import Status

STALLED = 0.5
"""A step of refinement that leaves more than this share of the residual is the last one."""


class DirectState(eqx.Module):
    """Iterate, the residual norm before the last step, and the status."""

    x: PyTree
    before: Float[Array, ""]
    status: Int[Array, ""]


class Direct(InnerSolver):
    """Dense factorisation: Cholesky where the operator is declared positive definite, else LU.

    The factors are made once; an iteration solves with them and adds the correction, so
    that a second iteration is one of iterative refinement.  The matrix is taken from the
    problem where it came as one, and otherwise made column by column: memory n², time n³.
    Where refinement does not help it stops, with `ROUNDING` if the residual is small and
    `BREAKDOWN` if it is not.  A singular matrix, or an indefinite one under Cholesky, ends
    as `NONFINITE` or `BREAKDOWN`.

    >>> import jax.numpy as jnp, bilevel as bl
    >>> problem = bl.LinearSystem(jnp.array([[0.0, 2.0], [1.0, 0.0]]), jnp.array([2.0, 3.0]))
    >>> solution = bl.solve(problem, None, jnp.zeros(2), solver=bl.Direct())
    >>> [float(v) for v in solution.value]
    [3.0, 1.0]
    """

    requires: ClassVar[frozenset[str]] = frozenset({"operator"})
    linear_adjoint: ClassVar[bool] = True

    def prepare(self, problem: BoundProblem, x: PyTree) -> BoundProblem:
        """Factorise."""
        assert problem.operator is not None
        return dataclasses.replace(problem, precondition=factorize(problem.operator, x))

    def init(self, problem: BoundProblem, x: PyTree) -> DirectState:
        """No step has been made."""
        del problem
        before = jnp.full((), jnp.inf, vector.real_dtype(x))
        return DirectState(x, before, jnp.int32(Status.CONVERGED))

    def step(self, problem: BoundProblem, state: DirectState, residual: PyTree) -> DirectState:
        """Solve for the correction and add it, unless the last one was in vain."""
        assert problem.precondition is not None
        norm = vector.norm(jax.lax.stop_gradient(residual)).astype(state.before.dtype)
        stalled = norm > STALLED * state.before
        small = norm <= vector.epsilon(residual) ** 0.5 * problem.reference(norm)
        reason = jnp.where(small, jnp.int32(Status.ROUNDING), jnp.int32(Status.BREAKDOWN))
        x = vector.add(state.x, problem.precondition(residual))
        return DirectState(
            x=vector.where(stalled, state.x, x),
            before=norm,
            status=jnp.where(stalled, reason, jnp.int32(Status.CONVERGED)),
        )

    def failure(self, state: DirectState) -> Int[Array, ""]:
        """`ROUNDING` or `BREAKDOWN` once a step of refinement was in vain."""
        return state.status

    def default_budget(self, x0: PyTree) -> Budget:
        """A few steps of iterative refinement at most."""
        return Budget(iterations=5, rtol=super().default_budget(x0).rtol)


def factorize(operator: LinearOperator, like: PyTree) -> Callable[[Any], Any]:
    """v -> A⁻¹v by a dense factorisation made here, once."""
    flatten, unflatten = _coordinates(operator, like)
    by_cholesky = bool(operator.symmetric and operator.positive_definite)
    matrix = dense_matrix(operator, like, lower=by_cholesky)
    matrix = matrix.astype(jnp.result_type(matrix, flatten(like)))
    if by_cholesky:
        factors = jax.scipy.linalg.cho_factor(matrix, lower=True)
        return lambda v: unflatten(jax.scipy.linalg.cho_solve(factors, flatten(v)))
    pivoted = jax.scipy.linalg.lu_factor(matrix)
    return lambda v: unflatten(jax.scipy.linalg.lu_solve(pivoted, flatten(v)))


def _coordinates(
    operator: LinearOperator, like: PyTree
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    if operator.matrix is None:
        return coordinates(like, real=True)
    if isinstance(like, jax.Array) and like.ndim == 2 and len(like) == len(operator.matrix):
        # A matrix acts on each column of several right-hand sides.
        return lambda v: v, lambda v: v
    return coordinates(like, real=False)
