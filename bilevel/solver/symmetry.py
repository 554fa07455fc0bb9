"""A look at whether an operator is symmetric where nobody said, or the adjoint of another."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PyTree

from bilevel import vector
from bilevel.bound import BoundProblem
from bilevel.status import Status

ROUNDING_ERRORS = 1e3
"""Rounding errors by which ⟨A x, y⟩ and ⟨x, A y⟩ may differ."""

APPLICATIONS = 2
"""Of the operator, that the look takes."""


def needs_look(problem: BoundProblem, requires: frozenset[str]) -> bool:
    """Whether a solver needs a symmetric operator and the problem's is of unknown kind."""
    return "symmetric" in requires and problem.operator is not None and problem.symmetric is None


def symmetry_flaw(problem: BoundProblem, x: PyTree) -> Int[Array, ""]:
    """`Status.NOT_SYMMETRIC` where ⟨A u, v⟩ ≠ ⟨u, A v⟩ for two arbitrary vectors u and v.

    A Krylov method for symmetric operators on another one ends anywhere, and its budget
    runs out as it does for a good one: the residual alone does not tell.
    """
    operator = problem.operator
    assert operator is not None
    u, v = vector.arbitrary(x, 1), vector.arbitrary(x, 2)
    left, right = operator.matvec(u), operator.matvec(v)
    defect = jnp.abs(vector.dot(left, v) - vector.dot(u, right))
    size = vector.norm(left) * vector.norm(v) + vector.norm(u) * vector.norm(right)
    # False for NaN, which is the loop's to find.
    flawed: Bool[Array, ""] = defect > ROUNDING_ERRORS * vector.epsilon(x) * size
    flaw = jnp.where(flawed, jnp.int32(Status.NOT_SYMMETRIC), jnp.int32(Status.CONVERGED))
    return jax.lax.stop_gradient(flaw)


def adjoint_flaw(problem: BoundProblem, x: PyTree) -> Int[Array, ""] | None:
    """`Status.NOT_ADJOINT` where ⟨A u, v⟩ ≠ ⟨u, Aᴴ v⟩ for two arbitrary vectors u and v.

    For what a user declared, an `rmatvec` or symmetry, and what a hot path trusts; two
    applications.  Rounding errors are forgiven up to the square root of their unit.

    **Returns:** `None` where the transpose was found by transposing.
    """
    declared = problem.symmetric and problem.objective is None
    operator = problem.linearize(x)
    made = operator.rmatvec is None or operator.matrix is not None
    if made and not declared:
        return None
    adjoint = operator.adjoint_matvec(x)
    u, v = vector.arbitrary(x, 1), vector.arbitrary(x, 2)
    left, right = operator.matvec(u), adjoint(v)
    size = vector.norm(left) * vector.norm(v) + vector.norm(u) * vector.norm(right)
    defect = jnp.abs(vector.dot(left, v) - vector.dot(u, right))
    # False for NaN, which the solve has found.
    flawed: Bool[Array, ""] = defect > vector.epsilon(x) ** 0.5 * size
    flaw = jnp.where(flawed, jnp.int32(Status.NOT_ADJOINT), jnp.int32(Status.CONVERGED))
    return jax.lax.stop_gradient(flaw)
