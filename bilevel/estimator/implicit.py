"""Implicit differentiation: the adjoint is an inner problem too, under its own budget."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from bilevel import vector
from bilevel.bound import BoundProblem
from bilevel.budget import Budget
from bilevel.closed import close, stopped
from bilevel.estimator.base import Estimator, Record, Setting
from bilevel.perturbation import along, is_zero, perturbed
from bilevel.solution import Solution
from bilevel.solver.base import IncompatibleError, InnerSolver
from bilevel.solver.default_linear import default_linear_solver
from bilevel.solver.linear import solve_linear, trusted
from bilevel.solver.loop import run
from bilevel.solver.preconditioning import with_closed_preconditioner
from bilevel.status import Status


class Implicit(Estimator):
    """The derivative of the solution, by the implicit function theorem.

    Differentiates x*(θ), not the iteration that found it: with N = the Hessian, Jacobian,
    I - T' or A at the final iterate, a backward pass solves Nᵀλ = ∂ₓf and returns
    λᵀ∂_θ r; a forward pass solves N ẋ = ∂_θ r θ̇.  Both are inner solves of their own,
    under `adjoint_budget`, with a tolerance relative to their own right-hand side.  Any
    order and mode of differentiation works.

    The gradient is exact for an exact primal and adjoint; `bl.hypergradient` estimates
    what stopping each of them early cost.  If either fails, the gradient is NaN.  The formula
    holds at whichever iterate the primal ends with: without any primal iterations it is
    evaluated at the start, and the status `BUDGET` is all that says so.

    **Arguments:**

    - `solver`: any solver for linear systems; `None` picks a dense factorisation, CG,
        MINRES or GMRES from the size and symmetry. A preconditioner is an argument of
        the solver.

    >>> import jax, jax.numpy as jnp, bilevel as bl
    >>> problem = bl.Minimization(lambda x, theta: jnp.sum((x - theta) ** 2))
    >>> def loss(theta):
    ...     solution = bl.solve(problem, theta, jnp.zeros(2), estimator=bl.Implicit())
    ...     return jnp.sum(solution.value)
    >>> [round(float(g), 4) for g in jax.grad(loss)(jnp.ones(2))]
    [1.0, 1.0]
    """

    solver: InnerSolver | None = None

    def __check_init__(self) -> None:
        """Refuse what cannot solve a linear system."""
        require_linear(self.solver, "Implicit")

    def correction_solver(self, problem: BoundProblem, x: PyTree) -> InnerSolver | None:
        """The adjoint's own solver, preconditioner and factors included, unless it is slow."""
        solver = default_linear_solver(problem, x) if self.solver is None else self.solver
        return None if solver.stationary else solver

    def solve(self, setting: Setting, record: Record) -> Solution:
        """The inner solve with the derivative of its solution."""
        return solve_implicitly(setting, record, self.solver)


def require_linear(solver: object, name: str) -> None:
    """Refuse a solver that cannot solve the linear systems of an adjoint.

    **Raises:** `IncompatibleError`.
    """
    if solver is None:
        return
    if not isinstance(solver, InnerSolver):
        hint = f" Write solver={solver.__name__}()." if isinstance(solver, type) else ""
        msg = (
            f"{name}: solver must be a linear solver such as ConjugateGradient(), got {solver!r}."
            f"{hint}"
        )
        raise TypeError(msg)
    if not solver.linear_adjoint:
        msg = (
            f"{name}: {type(solver).__name__} does not solve linear systems, which the adjoint is. "
            "Use ConjugateGradient for a minimisation, GMRES or BiCGStab otherwise, or leave "
            "solver=None."
        )
        raise IncompatibleError(msg)


class _Context(NamedTuple):
    """Everything the derivative rule needs, as one differentiable argument.

    Nothing may come in through a closure: under vmap a closure of a custom rule would
    hold the wrong tracers.
    """

    value: PyTree
    arrays: PyTree
    record: Record
    primal: Solution
    budget: Budget
    guess: PyTree | None


def solve_implicitly(
    setting: Setting, record: Record, adjoint_solver: InnerSolver | None
) -> Solution:
    """Run the primal without a derivative, then attach the implicit one.

    **Arguments:**

    - `adjoint_solver`: for the linear systems of the derivative; `None` for a default.

    **Returns:** the solution; its value differentiates with respect to θ, to `record`,
    and to everything that the problem captured.
    """
    problem, theta = setting.problem, setting.theta
    x0 = jax.lax.stop_gradient(setting.x0)

    def primal(theta: Any, x0: Any) -> Solution:
        bound = problem.at(theta)
        setting.solver.check(bound)
        bound = setting.solver.prepare(bound, x0)
        return run(bound, setting.solver, x0, setting.budget, history=setting.history)

    # Closing over nothing lets a θ captured by the user's functions be seen: it is cut off
    # the iteration here, and differentiated through the closed problem below.
    solution = stopped(eqx.filter_closure_convert(primal, theta, x0))(stopped(theta), x0)
    equation = problem.equation(x0)
    closed = close(equation, theta, x0)
    linear = adjoint_solver
    if linear is None:
        linear = default_linear_solver(equation.at(theta), x0)
    linear = with_closed_preconditioner(linear, x0)
    budget = setting.adjoint_budget
    if budget is None:
        budget = linear.default_budget(x0)
    arrays, static = eqx.partition((closed, linear), eqx.is_array)
    context = _Context(
        value=solution.value,
        arrays=arrays,
        record=record,
        primal=solution,
        budget=budget,
        guess=setting.adjoint_guess,
    )
    value = _attachment(static)(jax.tree.map(jnp.asarray, context))
    return eqx.tree_at(lambda s: s.value, solution, value)


def _attachment(static: Any) -> Any:
    @jax.custom_jvp
    def attach(context: _Context) -> PyTree:
        return context.value

    def rule(primals: Any, tangents: Any) -> Any:
        (context,), (tangent,) = primals, tangents
        # Applied anew, so that a second derivative sees how the solution moves with θ.
        value = attach(context)

        def residual(arrays: Any) -> Any:
            closed, _ = eqx.combine(arrays, static)
            return closed.residual(value)

        forcing = None
        if perturbed(tangent.arrays):
            forcing = along(residual, context.arrays, tangent.arrays)
        record_dot = _linear_record(tangent.record, context.record)
        if forcing is None and record_dot is None:
            return value, vector.zeros_like(value)
        # Where θ does not reach a leaf of the residual, zero is no linear function of anything,
        # and a linear solve can be transposed only if its whole right-hand side is linear.
        anchor = _moving((tangent.arrays, tangent.record))[0]
        nothing = jax.tree.map(lambda leaf: _depending(anchor, leaf), value)
        forcing = nothing if forcing is None else vector.add(forcing, nothing)
        return value, _linear_solve(static, value, context, forcing, record_dot)

    attach.defjvp(rule, symbolic_zeros=True)
    return attach


def _moving(tangents: Any) -> list[Any]:
    leaves = jax.tree.leaves(tangents, is_leaf=is_zero)
    return [leaf for leaf in leaves if not is_zero(leaf)]


def _linear_record(tangent: Record, record: Record) -> Record | None:
    """The record's tangent, every leaf of it linear; `None` where it is not perturbed."""
    moving = _moving(tangent)
    if not moving:
        return None
    anchor = moving[0]
    return jax.tree.map(
        lambda direction, leaf: _depending(anchor, leaf) if is_zero(direction) else direction,
        tangent,
        record,
        is_leaf=is_zero,
    )


def _depending(anchor: Array, like: Array) -> Array:
    """Zeros that depend linearly on the anchor, with a transpose that is zero even for NaN."""
    none = jnp.where(False, jnp.sum(anchor).real, 0.0)
    return jnp.broadcast_to(none, like.shape).astype(like.dtype)


def _linear_solve(
    static: Any, value: Any, context: _Context, forcing: Any, record_dot: Record | None
) -> Any:
    """Solve N ẋ = forcing, transposable into Nᵀλ = cotangent, reporting through the record."""
    closed, solver = eqx.combine(context.arrays, static)
    operator = closed.operator(value)
    poison = jnp.where(context.primal.status >= Status.DIVERGED, jnp.nan, 1.0)

    def matvec(augmented: Any) -> Any:
        v, record = augmented
        # In a second derivative what is reported moves with the operator, as zero, for the value
        # does: a linear solve can be transposed only if its whole right-hand side is linear.
        for leaf in jax.tree.leaves(record):
            v = jax.tree.map(lambda t, leaf=leaf: t + _depending(leaf, t), v)
        return operator.matvec(v), record

    def forward(_: Any, augmented: Any) -> Any:
        rhs, record = augmented
        return trusted(solve_linear(operator, rhs, solver, context.budget)[0]), record

    def backward(_: Any, augmented: Any) -> Any:
        cotangent, _ = augmented
        transposed = operator.transposed(value)
        adjoint, left = solve_linear(transposed, cotangent, solver, context.budget, context.guess)
        if record_dot is None:
            return trusted(adjoint), None
        return trusted(adjoint), context.record.filled(context.primal, adjoint, left)

    tangent, reported = jax.lax.custom_linear_solve(
        matvec, (forcing, record_dot), forward, transpose_solve=backward
    )
    # In a second derivative every part of the right-hand side has to move, or none: the
    # cotangent of what is reported is made to come from that of the value, as zero.
    for leaf in jax.tree.leaves(reported):
        tangent = jax.tree.map(lambda t, leaf=leaf: t + _depending(leaf, t), tangent)
    return vector.scale(poison, tangent)
