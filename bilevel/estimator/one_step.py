"""One-step differentiation."""

from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from bilevel import vector
from bilevel.closed import stopped
from bilevel.estimator.base import Estimator, Record, Setting, no_adjoint
from bilevel.once_only import once_only
from bilevel.perturbation import with_derivative_of
from bilevel.solution import Solution
from bilevel.solver.base import IncompatibleError, InnerSolver
from bilevel.solver.iteration import begin
from bilevel.solver.loop import run
from bilevel.status import Status


class OneStep(Estimator):
    """The derivative of one more solver step at the final iterate, taken as constant.

    Bolte, Pauwels and Vaiter 2023.  It costs a single step and needs no adjoint; its error
    is of the order of the step's contraction factor, so it is good for Newton's method
    and multigrid. Not for plain gradient descent: there it is the first term of a Neumann
    series, a fraction of the gradient, whose sign alone may be right; take [`Neumann`][] or
    [`Implicit`][]. The error estimate says which.

    It means something only where the step is the same map at every residual, a contraction or
    Newton's.  Krylov methods, line searches, Anderson's acceleration and optax make of the
    residual how far they go, and at the solution that is noise: they are refused with
    `IncompatibleError`.  The gradient is NaN where the budget allows no step and the start is
    no solution.  First derivatives only: a second one would take the iterate as constant, too,
    and be far from that of the solution even after Newton's method, so it raises `TypeError`; use
    [`Implicit`][] there.

    >>> import jax, bilevel as bl
    >>> problem = bl.RootFinding(lambda x, theta: x * x - theta)
    >>> def value(theta):
    ...     return bl.solve(problem, theta, 1.0, solver=bl.Newton(), estimator=bl.OneStep()).value
    >>> round(float(jax.grad(value)(4.0)), 4)
    0.25
    """

    solves_adjoint: ClassVar[bool] = False

    def solve(self, setting: Setting, record: Record) -> Solution:
        """The inner solve with the derivative of its last step."""
        solver, problem = setting.solver, setting.problem
        _require_same_map(solver)

        def primal(theta: Any, x0: Any) -> Solution:
            bound = problem.at(theta)
            solver.check(bound)
            bound = solver.prepare(bound, x0)
            return run(bound, solver, x0, setting.budget, history=setting.history)

        closed = eqx.filter_closure_convert(primal, setting.theta, setting.x0)
        solution = stopped(stopped(closed)(stopped(setting.theta), stopped(setting.x0)))
        start = _reporting(solution, record)
        bound = solver.prepare(problem.at(once_only(setting.theta, _ONCE)), start)
        iteration, state, residual = begin(bound, solver, start)
        moved = solver.value(iteration.update(state, residual))
        failed = (solution.status >= Status.DIVERGED) | _idle(solution)
        trust = jnp.where(failed, jnp.nan, 1.0)
        value = with_derivative_of(solution.value, moved, trust)
        return eqx.tree_at(lambda s: s.value, solution, value)


_ONCE = (
    "OneStep has no second derivative: the derivative of its derivative would take the iterate as "
    "constant, and be far from that of the solution. Use Implicit."
)


def _require_same_map(solver: InnerSolver) -> None:
    if solver.black_box:
        msg = (
            f"OneStep differentiates one step, and {type(solver).__name__} is a black box: a whole "
            "run of somebody else's code, which no derivative goes through. Use Implicit."
        )
        raise IncompatibleError(msg)
    if not (solver.recursive or solver.divides_by_residual or solver.adaptive):
        return
    name = type(solver).__name__
    msg = (
        f"OneStep differentiates one step made afresh at the solution, and how far {name} steps "
        "depends on the residual, which is noise there. Use Implicit, or a solver whose step is "
        "the same map everywhere: Newton, Direct, GradientDescent, FixedPointIteration, "
        "Richardson."
    )
    raise IncompatibleError(msg)


def _idle(solution: Solution) -> Array:
    """Whether the budget allowed no step, and the start is no solution."""
    return (solution.iterations == 0) & (solution.status != Status.CONVERGED)


def _reporting(solution: Solution, record: Record) -> PyTree:
    """The final iterate, whose cotangent goes into the record and nowhere else."""
    if not jax.tree.leaves(record):
        return solution.value
    value = solution.value
    anchor = sum(jnp.sum(leaf).real for leaf in jax.tree.leaves(record))
    nothing = jax.tree.map(
        lambda leaf: jnp.broadcast_to(jnp.where(False, anchor, 0.0), leaf.shape).astype(leaf.dtype),
        value,
    )

    def identity(augmented: Any) -> Any:
        return augmented

    def forward(_: Any, augmented: Any) -> Any:
        return augmented

    def backward(_: Any, augmented: Any) -> Any:
        cotangent, _ = augmented
        adjoint = no_adjoint(cotangent, jnp.int32(1), idle=_idle(solution))
        return cotangent, record.filled(solution, adjoint, adjoint.value)

    # A linear map by name only: its transpose is what brings the report out.
    shift, _ = jax.lax.custom_linear_solve(
        identity, (nothing, record), forward, transpose_solve=backward
    )
    return vector.add(value, shift)
