"""Conformance of an estimator: is its hypergradient what it says it is."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from bilevel import vector
from bilevel.budget import Budget
from bilevel.estimator.base import Estimator
from bilevel.forward_only import has_forward_only
from bilevel.inner_solve import as_vector, solve
from bilevel.probe import Probe
from bilevel.problem import as_inner_problem
from bilevel.reverse_only import has_reverse_only
from bilevel.solver.base import InnerSolver
from bilevel.solver.default import default_solver
from bilevel.testing.captured_problem import CapturedProblem
from bilevel.testing.conformance import Checklist, flat_norm, relative_error
from bilevel.testing.counting import CountedProblem, TraceCounter
from bilevel.testing.inner_problem import bilinear, depends_on_theta, number, rounding
from bilevel.testing.precision import check_single_precision
from bilevel.testing.sample import (
    all_nan,
    inexact,
    random_like,
    stack,
    with_inexact,
)
from bilevel.testing.subject import Subject
from bilevel.testing.taylor import taylor_test
from bilevel.testing.user_code import require_instance

SCALE = 2.0**-30
"""Factor on the outer loss, about 1e-9, exact in binary: the gradient must follow it exactly."""


def check_estimator(
    estimator: Estimator,
    problem: object,
    theta: PyTree,
    x0: PyTree,
    *,
    solver: InnerSolver | None = None,
    budget: Budget | None = None,
    adjoint_budget: Budget | None = None,
    outer_loss: Callable[[Any, Any], Array] | None = None,
    gradient: PyTree | None = None,
    exact: bool = True,
    tolerance: float | None = None,
) -> tuple[str, ...]:
    """Check an estimator of your own, or one with a solver of your own.

    In order, as far as each applies (an estimator of forward mode alone is checked in
    that mode):

    1. *gradient like theta*: structure, shapes and dtypes of θ, and finite.
    2. *gradient right*: as given, to `tolerance`.
    3. *derivative of the loss*: with the budgets given, it passes [`taylor_test`][] on the
        loss (`exact` estimators).
    4. *same outside jit*.
    5. *forward mode is the transpose of reverse mode*: ⟨∇L, v⟩ = DL v where there are both.
    6. *report*: a [`Probe`][] counts one solve and the primal's iterations.
    7. *one compile for all budgets*.
    8. *scale of the loss*: a loss 2⁻³⁰ times as large has a gradient 2⁻³⁰ times as large,
        after as many iterations.
    9. *no adjoint budget*: with no adjoint iterations allowed the gradient does not come out
        as a zero that it is not.
    10. *NaN in theta*: the gradient is not finite.
    11. *same under vmap*: the gradients of a batch are those of its samples.
    12. *captured theta*: a θ that the problem's functions capture gives the same gradient as
        one that is passed.
    13. *float32 stays float32*, where the problem does not hold double-precision data itself.

    **Arguments:**

    - `estimator`: what is checked.
    - `problem`, `theta`, `x0`, `solver`: the inner solve; a default solver if `None`.
    - `budget`, `adjoint_budget`: large enough that the estimator should be right to
        `tolerance`; those of the solver and estimator if `None`.
    - `outer_loss`: outer_loss(x, theta) -> real scalar; by default Σ sin |x - 1/4| over all
        entries, squared where complex.
    - `gradient`: the hypergradient, where it is known.
    - `exact`: whether the estimator is exact at these budgets. If not, its gradient is
        only compared with `gradient`, to `tolerance`.
    - `tolerance`: relative; 1e-8 in double precision, 1e-3 in single.

    **Returns:** the names of the properties that were checked.

    **Raises:** `ConformanceError` for the first property that does not hold.

    >>> import bilevel as bl
    >>> from bilevel.testing import check_estimator
    >>> problem = bl.Minimization(lambda x, theta: (x - theta) ** 2)
    >>> "derivative of the loss" in check_estimator(bl.Implicit(), problem, 3.0, 0.0)
    True
    """
    require_instance("check_estimator", "estimator", estimator, Estimator)
    problem = as_inner_problem(problem)
    theta = jax.tree.map(jnp.asarray, theta)
    x0 = as_vector("x0", x0)
    chosen = default_solver(problem.at(theta), x0) if solver is None else solver
    counter = TraceCounter()
    subject = Subject(
        estimator=estimator,
        problem=CountedProblem(problem, counter),
        counter=counter,
        solver=chosen,
        theta=theta,
        x0=x0,
        budget=chosen.default_budget(x0) if budget is None else budget,
        adjoint_budget=adjoint_budget,
        loss=_default_loss if outer_loss is None else outer_loss,
    )
    if tolerance is None:
        tolerance = 1e-8 if vector.epsilon(x0) < 1e-10 else 1e-3
    checklist = Checklist(type(estimator).__name__)
    if _has_reverse_mode(subject):
        _check_reverse(checklist, subject, gradient, exact=exact, tolerance=tolerance)
    else:
        _check_forward(checklist, subject, gradient, exact=exact, tolerance=tolerance)
    return tuple(checklist.held)


def _default_loss(x: Any, theta: Any) -> Array:
    del theta
    terms = [
        jnp.sum(jnp.sin((leaf - 0.25).real ** 2 + leaf.imag**2))
        if jnp.iscomplexobj(leaf)
        else jnp.sum(jnp.sin(leaf - 0.25))
        for leaf in jax.tree.leaves(x)
    ]
    return jnp.sum(jnp.stack(terms))


def _has_reverse_mode(subject: Subject) -> bool:
    try:
        jax.eval_shape(
            lambda m: subject.gradient(m, subject.x0, subject.budget, subject.adjoint_budget)[1],
            inexact(subject.theta),
        )
    except (TypeError, ValueError) as error:
        if not has_forward_only(error):
            raise
        return False
    return True


def _loss(subject: Subject) -> Callable[[Any], Array]:
    def loss(moving: Any) -> Array:
        return subject.value(moving, subject.x0, subject.budget, subject.adjoint_budget)

    return loss


def _check_forward(
    checklist: Checklist, subject: Subject, known: PyTree, *, exact: bool, tolerance: float
) -> None:
    moving = inexact(subject.theta)
    derivative = jax.jit(jax.jacfwd(_loss(subject)))(moving)
    _check_gradient(checklist, subject, derivative, known, exact=exact, tolerance=tolerance)


def _check_reverse(
    checklist: Checklist, subject: Subject, known: PyTree, *, exact: bool, tolerance: float
) -> None:
    moving, adjoint_budget = inexact(subject.theta), subject.adjoint_budget
    budget = Budget(subject.budget.iterations, subject.budget.rtol, subject.budget.atol)
    compiled = jax.jit(subject.gradient)
    _, gradient, report = compiled(moving, subject.x0, budget, adjoint_budget, 1.0)
    _check_gradient(checklist, subject, gradient, known, exact=exact, tolerance=tolerance)
    eager = subject.gradient(moving, subject.x0, budget, adjoint_budget)[1]
    advice = "Compute with jax.numpy and jax.lax, and keep no state on the estimator."
    # An iteration that stops on its tolerance may do one step more or less.
    checklist.require_close("same outside jit", gradient, eager, tolerance, advice)
    checklist.hold("same outside jit")
    _duality(checklist, subject, gradient, tolerance)
    _report(checklist, subject, report)
    _budgets(checklist, subject, compiled)
    _scale(checklist, compiled, (moving, subject.x0, budget, adjoint_budget), gradient, report)
    _no_adjoint(checklist, subject, gradient, report)
    if depends_on_theta(subject.problem, subject.theta, subject.x0):
        poisoned = compiled(
            inexact(all_nan(subject.theta)), subject.x0, budget, adjoint_budget, 1.0
        )[1]
        checklist.require(
            "NaN in theta",
            not np.isfinite(flat_norm(poisoned)),
            "a gradient that is not finite",
            f"one of norm {flat_norm(poisoned):.3g}",
            "Multiply by NaN where a solve failed: a failure must never look like a gradient.",
        )
        checklist.hold("NaN in theta")
    _vmapped(checklist, subject, compiled, tolerance)
    _captured(checklist, subject, gradient, tolerance)
    check_single_precision(checklist, subject)


def _check_gradient(
    checklist: Checklist,
    subject: Subject,
    gradient: PyTree,
    known: PyTree,
    *,
    exact: bool,
    tolerance: float,
) -> None:
    name = "gradient like theta"
    moving = inexact(subject.theta)
    checklist.require_like(name, moving, gradient, "Return a cotangent for every leaf of theta.")
    size = flat_norm(gradient)
    checklist.require(
        name,
        np.isfinite(size),
        "a finite gradient",
        size,
        "Look at the status of both solves; give larger budgets or another solver.",
    )
    checklist.hold(name)
    if known is not None:
        known = inexact(known)
        checklist.require_close(
            "gradient right",
            known,
            gradient,
            tolerance,
            "Give budget= and adjoint_budget= enough iterations; exact=False and tolerance= for an "
            "approximation.",
        )
        checklist.hold("gradient right")
    if exact:
        result = taylor_test(jax.jit(_loss(subject)), moving, derivative=gradient)
        checklist.require(
            "derivative of the loss",
            result.slope >= (1.9 if vector.epsilon(subject.x0) < 1e-10 else 1.5),
            "a Taylor remainder of second order",
            f"one of order {result.slope:.2f}",
            "Give budget= and adjoint_budget= enough iterations; exact=False if it is an "
            "approximation; otherwise look for a part of the derivative that is missing.",
        )
        checklist.hold("derivative of the loss")


def _duality(checklist: Checklist, subject: Subject, gradient: PyTree, tolerance: float) -> None:
    name = "forward mode is the transpose of reverse mode"
    moving = inexact(subject.theta)
    direction = random_like(moving, seed=2)
    try:
        forward = jax.jit(lambda m, v: jax.jvp(_loss(subject), (m,), (v,))[1])(moving, direction)
    except TypeError as error:
        if not has_reverse_only(error):
            raise
        return  # of reverse mode alone, as unrolling is
    left, right = bilinear(gradient, direction), complex(forward)
    checklist.require(
        name,
        abs(left - right) <= tolerance * flat_norm(gradient) * flat_norm(direction),
        f"⟨∇L, v⟩ = {number(left)}",
        f"DL v = {number(right)}",
        "Give the adjoint and the tangent solve the same operator, one transposed.",
    )
    checklist.hold(name)


def _report(checklist: Checklist, subject: Subject, report: Probe) -> None:
    solution = solve(
        subject.problem,
        subject.theta,
        subject.x0,
        solver=subject.solver,
        estimator=subject.estimator,
        budget=subject.budget,
        adjoint_budget=subject.adjoint_budget,
    )
    expected = (1, int(solution.iterations))
    got = (int(report.solves), int(report.primal_iterations))
    checklist.require(
        "report",
        # Compiled together with its derivative, the last iteration may tip.
        got[0] == expected[0] and abs(got[1] - expected[1]) <= 1,
        f"{expected[0]} solve and {expected[1]} primal iterations in the probe",
        f"{got[0]} and {got[1]}",
        "Return record.filled(primal, adjoint, residual) as the cotangent of the record.",
    )
    checklist.hold("report")


def _budgets(checklist: Checklist, subject: Subject, compiled: Any) -> None:
    before = subject.counter.count
    moving = inexact(subject.theta)
    for cap in (1, 3):
        adjoint_budget = subject.adjoint_budget
        if adjoint_budget is not None:
            adjoint_budget = Budget(cap, adjoint_budget.rtol, adjoint_budget.atol)
        budget = Budget(cap, subject.budget.rtol, subject.budget.atol)
        compiled(moving, subject.x0, budget, adjoint_budget, 1.0)
    checklist.require(
        "one compile for all budgets",
        subject.counter.count == before,
        "no trace after the first budget",
        f"{subject.counter.count - before} more",
        "Keep the budget's numbers traced: no int(), no Python loop, no static field.",
    )
    checklist.hold("one compile for all budgets")


def _scale(
    checklist: Checklist, compiled: Any, arguments: Any, gradient: PyTree, report: Probe
) -> None:
    name = "scale of the loss"
    _, small, counted = compiled(*arguments, SCALE)
    advice = "Make the adjoint's tolerance relative to its own right-hand side."
    expected = vector.scale(SCALE, gradient)
    checklist.require_close(name, expected, small, rounding(gradient), advice)
    counts = (int(report.adjoint_iterations), int(counted.adjoint_iterations))
    checklist.require(
        name, counts[0] == counts[1], f"{counts[0]} adjoint iterations", counts[1], advice
    )
    checklist.hold(name)


def _no_adjoint(checklist: Checklist, subject: Subject, gradient: PyTree, report: Probe) -> None:
    if flat_norm(gradient) == 0 or int(report.adjoint_iterations) == 0:
        return
    name = "no adjoint budget"
    none = subject.gradient(
        inexact(subject.theta), subject.x0, subject.budget, Budget(iterations=0)
    )[1]
    checklist.require(
        name,
        not np.isfinite(flat_norm(none)) or relative_error(gradient, none) < 1,
        "NaN, for the gradient is unknown",
        f"a gradient of norm {flat_norm(none):.3g}",
        "Return NaN where the adjoint did not start.",
    )
    checklist.hold(name)


def _vmapped(checklist: Checklist, subject: Subject, compiled: Any, tolerance: float) -> None:
    moving = inexact(subject.theta)
    moved = jax.tree.map(lambda leaf: 0.97 * leaf, moving)

    def of_theta(moving: Any) -> Any:
        budgets = (subject.budget, subject.adjoint_budget)
        return subject.gradient(moving, subject.x0, *budgets)[1]

    batch = jax.jit(jax.vmap(of_theta))(stack([moving, moved]))
    alone = [
        compiled(m, subject.x0, subject.budget, subject.adjoint_budget, 1.0)[1]
        for m in (moving, moved)
    ]
    advice = "Let nothing enter a custom derivative rule through a closure: pass it as an argument."
    checklist.require_close("same under vmap", stack(alone), batch, tolerance, advice)
    checklist.hold("same under vmap")


def _captured(checklist: Checklist, subject: Subject, gradient: PyTree, tolerance: float) -> None:
    def loss(moving: Any) -> Array:
        theta = with_inexact(subject.theta, moving)
        captured = CapturedProblem(lambda: subject.problem.at(theta))
        other = dataclasses.replace(subject, problem=captured, theta=None)
        solution = solve(
            other.problem,
            None,
            other.x0,
            solver=other.solver,
            estimator=other.estimator,
            budget=other.budget,
            adjoint_budget=other.adjoint_budget,
        )
        return other.loss(solution.value, theta)

    got = jax.jit(jax.grad(loss))(inexact(subject.theta))
    advice = (
        "Bring what the problem captures into the open (bilevel.closed.close) before a custom "
        "derivative rule: the rule sees its arguments only."
    )
    checklist.require_close("captured theta", gradient, got, tolerance, advice)
    checklist.hold("captured theta")
