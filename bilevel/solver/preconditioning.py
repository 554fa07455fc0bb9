"""Preconditioners: how one gets into a solver, and those that come ready made."""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, TypeAlias, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from bilevel.bound import BoundProblem
from bilevel.closed import stopped
from bilevel.solver.base import IncompatibleError, InnerSolver
from bilevel.solver.examination import require_diagonal

Solver = TypeVar("Solver", bound=InnerSolver)
"""A kind of solver."""


class HasAt(Protocol):
    """A preconditioner that looks at the operator before it works.

    It may have two members more: an attribute `symmetric`, whose `False` lets conjugate
    gradients and MINRES refuse it; and a method `examine(operator)`, called before anything is
    traced with a constant operator as the user gave it, to raise `ValueError` for numbers that
    it cannot work with.
    """

    def at(self, problem: BoundProblem, x: Any) -> Callable[[Any], Any]:
        """V -> M⁻¹v for the problem, set up once before the loop."""
        ...


Preconditioner: TypeAlias = Callable[[Any], Any] | HasAt
"""v -> M⁻¹v, or an object with `at(problem, x)` that returns such a function."""


class JacobiPreconditioner(eqx.Module):
    """Division by the diagonal of the operator: M = D.

    For an operator that is declared symmetric M = |D|, which is positive definite as
    conjugate gradients and MINRES need it, and the same thing where the operator is.
    It undoes a bad scaling of the unknowns and does little else.  A zero on the diagonal is
    refused where the matrix is not traced, and otherwise makes the iterate non-finite, which
    the status says.

    Refuses an operator without a diagonal: a matrix has one, and so does an operator object
    with a `diagonal` method; a bare matvec function and the Hessian of an objective have
    none.

    >>> import jax.numpy as jnp, bilevel as bl
    >>> problem = bl.LinearSystem(jnp.diag(jnp.array([1.0, 1e4])), jnp.ones(2))
    >>> solver = bl.ConjugateGradient(preconditioner=bl.JacobiPreconditioner())
    >>> int(bl.solve(problem, None, jnp.zeros(2), solver=solver).iterations)
    1
    """

    def at(self, problem: BoundProblem, x: PyTree) -> Callable[[Any], Any]:
        """V -> D⁻¹v.

        **Raises:** `IncompatibleError` where the operator has no diagonal.
        """
        del x
        operator = problem.operator
        if operator is None or operator.diagonal is None:
            msg = (
                f"JacobiPreconditioner cannot precondition this {problem.name}: its operator has "
                "no diagonal. Give the operator as a matrix or as an object with a diagonal "
                "method, or write the preconditioner as a function v -> M⁻¹v."
            )
            raise IncompatibleError(msg)
        diagonal = operator.diagonal
        if operator.symmetric:
            diagonal = jax.tree.map(jnp.abs, diagonal)
        return lambda v: divide(v, diagonal)

    def examine(self, operator: object) -> None:
        """Refuse a matrix with a zero on its diagonal.

        **Raises:** `ValueError`.
        """
        require_diagonal("JacobiPreconditioner", operator)


def divide(v: PyTree, diagonal: PyTree) -> PyTree:
    """D⁻¹v, in the dtypes of v; a diagonal of fewer axes divides along the leading ones.

    So it goes with a matrix A and several right-hand sides, of shapes (n, n) and (n, k).

    **Raises:** `ValueError` for a diagonal that does not fit v.
    """

    def quotient(leaf: Array, entries: Array) -> Array:
        entries = jnp.asarray(entries)
        if entries.shape != leaf.shape[: entries.ndim]:
            msg = (
                f"the operator's diagonal has a part of shape {entries.shape} for an unknown of "
                f"shape {leaf.shape}: it must be like the unknown."
            )
            raise ValueError(msg)
        entries = entries.reshape(*entries.shape, *([1] * (leaf.ndim - entries.ndim)))
        return (leaf / entries).astype(leaf.dtype)

    expected, got = jax.tree.structure(v), jax.tree.structure(diagonal)
    if expected != got:
        msg = (
            f"the operator's diagonal has the structure {got}, the unknown {expected}: it must be "
            "like the unknown."
        )
        raise ValueError(msg)
    return jax.tree.map(quotient, v, diagonal)


def prepare_preconditioner(
    problem: BoundProblem, preconditioner: object, x: PyTree
) -> BoundProblem:
    """Put a preconditioner into the problem, set up once before the loop.

    **Arguments:**

    - `preconditioner`: v -> M⁻¹v; or an object with `at(problem, x)` returning such a
        function, for those that look at the operator; or `None`.

    **Raises:** `TypeError` for anything else, or if M⁻¹v is not like v.
    """
    if preconditioner is None:
        return problem
    if isinstance(preconditioner, type):
        msg = (
            f"preconditioner must be an instance, got the class {preconditioner.__name__}. "
            f"Write preconditioner={preconditioner.__name__}()."
        )
        raise TypeError(msg)
    setup: Any = getattr(preconditioner, "at", None)
    apply: Any = setup(problem, x) if callable(setup) else preconditioner
    if not callable(apply):
        msg = (
            "preconditioner must be a function v -> M⁻¹v or an object whose at(problem, x) "
            f"returns one, got {preconditioner!r}."
        )
        raise TypeError(msg)
    outcome = jax.eval_shape(apply, x)
    expected, got = (jax.tree.map(_kind, tree) for tree in (x, outcome))
    if expected != got:
        msg = f"preconditioner must return a vector like its argument, {expected}, got {got}."
        raise TypeError(msg)
    return dataclasses.replace(problem, precondition=apply)


def precondition(problem: BoundProblem, v: PyTree) -> PyTree:
    """M⁻¹v; v itself without a preconditioner."""
    return v if problem.precondition is None else problem.precondition(v)


def with_closed_preconditioner(solver: Solver, x: PyTree) -> Solver:
    """The solver, with what the preconditioner captured made an argument and a constant.

    A preconditioner may be made of θ.  It changes how fast a system is solved, never its
    solution, so no derivative goes through it; and a rule of differentiation must get it
    as an argument, for captured tracers are another transformation's.
    """
    function = getattr(solver, "preconditioner", None)
    if function is None or not callable(function) or callable(getattr(function, "at", None)):
        return solver
    closed = stopped(eqx.filter_closure_convert(function, x))
    return eqx.tree_at(lambda s: s.preconditioner, solver, closed, is_leaf=lambda f: f is function)


def _kind(leaf: Any) -> tuple[tuple[int, ...], str]:
    return tuple(leaf.shape), jnp.dtype(leaf.dtype).name
