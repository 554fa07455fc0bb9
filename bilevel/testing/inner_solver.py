"""Conformance of an inner solver: does it do on a problem what the loop relies on."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from bilevel import vector
from bilevel.budget import Budget
from bilevel.inner_solve import as_vector, solve
from bilevel.problem import InnerProblem, as_inner_problem
from bilevel.solution import Solution
from bilevel.solver.base import InnerSolver, default_tolerance
from bilevel.status import Status
from bilevel.testing.conformance import Checklist, flat_norm, relative_error
from bilevel.testing.counting import CountedProblem, TraceCounter
from bilevel.testing.inner_problem import depends_on_theta, rounding
from bilevel.testing.sample import (
    all_nan,
    random_like,
    sample_problem,
    single_precision,
    stack,
    stays_single,
)

FEW = (0, 1, 2, 5)
"""Budgets at which the count of iterations is looked at."""


@dataclasses.dataclass(frozen=True)
class _Subject:
    """What is checked, with one compiled solve for all of it."""

    solver: InnerSolver
    problem: InnerProblem
    theta: PyTree
    x0: PyTree
    budget: Budget
    solve: Callable[..., Solution]
    counter: TraceCounter

    def residual_norm(self, theta: PyTree, x: PyTree) -> float:
        """The true one."""
        return flat_norm(self.problem.at(theta).residual(x))


def check_inner_solver(
    solver: InnerSolver,
    problem: object | None = None,
    theta: PyTree = None,
    x0: PyTree = None,
    *,
    solution: PyTree | None = None,
    budget: Budget | None = None,
) -> tuple[str, ...]:
    """Check an inner solver of your own on a problem that it should solve.

    How to write one, and which sign its residual has: docs/custom.md.

    In order:

    1. *state*: a step keeps its structure, shapes and dtypes, and the value is like x0.
    2. *start*: no iteration is done before the loop asks for one.
    3. *same under jit*: two steps outside jit and inside give the same.
    4. *converged means within tolerance*: `CONVERGED` within the budget, with a true
        residual norm that is at most the tolerance, and `solution` reached.
    5. *budget respected*: 0, 1, 2, 5 iterations at most, and no fewer unless it stopped for
        another reason.
    6. *residual reported is true*: `residual_norm` is that of the problem at `value`, at
        every budget.
    7. *one compile for all budgets*: no value of a budget traces the problem anew.
    8. *warm start*: at the solution no step is taken.
    9. *NaN in theta*: ends as `NONFINITE` where the problem depends on θ.
    10. *same under vmap*: a batch of starts gives what each start gives, with its own
        iteration count and status.
    11. *float32 stays float32*: where the problem does not hold double-precision data itself.

    **Arguments:**

    - `solver`: with its settings chosen so that it converges on the problem.
    - `problem`, `theta`, `x0`: an inner problem that the solver suits, a θ, and a start that
        is not the solution. By default a well-conditioned one of three unknowns.
    - `solution`: x*(θ), where it is known.
    - `budget`: in which the solver should converge; the solver's default budget if `None`.

    **Returns:** the names of the properties that were checked.

    **Raises:** `ConformanceError` for the first property that does not hold;
    `IncompatibleError` where the solver refuses the problem.

    >>> import bilevel as bl
    >>> from bilevel.testing import check_inner_solver
    >>> "warm start" in check_inner_solver(bl.Richardson(step_size=0.5))
    True
    """
    if problem is None:
        problem, theta, x0 = sample_problem(solver)
    problem = as_inner_problem(problem)
    theta = jax.tree.map(jnp.asarray, theta)
    x0 = as_vector("x0", x0)
    solver.check(problem.at(theta))
    checklist = Checklist(type(solver).__name__)
    _state(checklist, solver, problem, theta, x0)
    subject = _subject(solver, problem, theta, x0, budget)
    solved = _converged(checklist, subject, solution)
    _budgets(checklist, subject)
    _warm_start(checklist, subject, solved)
    if depends_on_theta(problem, theta, x0):
        _not_a_number(checklist, subject)
    _vmapped(checklist, subject, solved)
    _single_precision(checklist, subject)
    return tuple(checklist.held)


def _subject(
    solver: InnerSolver, problem: InnerProblem, theta: PyTree, x0: PyTree, budget: Budget | None
) -> _Subject:
    counter = TraceCounter()
    counted = CountedProblem(problem, counter)
    budget = solver.default_budget(x0) if budget is None else budget

    def run(theta: PyTree, x0: PyTree, budget: Budget) -> Solution:
        return solve(counted, theta, x0, solver=solver, budget=budget)

    return _Subject(solver, problem, theta, x0, budget, run, counter)


def _state(
    checklist: Checklist, solver: InnerSolver, problem: InnerProblem, theta: PyTree, x0: PyTree
) -> None:
    def steps(theta: Any, x: Any) -> tuple[Any, Any, Any]:
        bound = solver.prepare(problem.at(theta), x)
        first = solver.init(bound, x)
        second = solver.step(bound, first, solver.residual(bound, first))
        third = solver.step(bound, second, solver.residual(bound, second))
        return first, second, third

    first, second, third = steps(theta, x0)
    advice = "Let init make what step returns: same leaves, shapes and dtypes (jnp.asarray counts)."
    checklist.require_like("state", first, second, advice)
    checklist.require_like("state", first, third, advice)
    value = solver.value(third)
    checklist.require_like("state", x0, value, "Let value return the iterate, like x0.")
    checklist.hold("state")
    start = solver.value(first)
    advice = "Let init place the start into the state as it is, and leave the steps to step."
    checklist.require_close("start", x0, start, 0.0, advice)
    checklist.hold("start")
    compiled = jax.jit(steps)(theta, x0)[2]
    advice = "Compute with jax.numpy and jax.lax, and keep no state on the solver."
    checklist.require_close(
        "same under jit", value, solver.value(compiled), 10 * rounding(x0), advice
    )
    checklist.hold("same under jit")


def _converged(checklist: Checklist, subject: _Subject, solution: PyTree | None) -> Solution:
    name = "converged means within tolerance"
    solved = subject.solve(subject.theta, subject.x0, subject.budget)
    checklist.require_like(name, subject.x0, solved.value, "Let value return the iterate, like x0.")
    checklist.require(
        name,
        int(solved.status) == Status.CONVERGED,
        "the status CONVERGED",
        f"{solved.diagnosis} (after {int(solved.iterations)} iterations, with a residual norm of "
        f"{float(solved.residual_norm):.1e} for a tolerance of {float(solved.tolerance):.1e})",
        _advice(subject, solved),
    )
    true_norm = subject.residual_norm(subject.theta, solved.value)
    # Another order of summation moves a residual that is all rounding.
    tolerance = float(solved.tolerance) * (1 + 1e-3) + _noise(subject, solved)
    checklist.require(
        name,
        true_norm <= tolerance,
        f"a true residual norm of at most {float(solved.tolerance):.1e}",
        f"{true_norm:.1e}",
        "Declare recursive = True if the solver keeps its own residual, or override point.",
    )
    if solution is not None:
        error = relative_error(solution, solved.value)
        allowed = 1e3 * default_tolerance(subject.x0)
        advice = "Compare the solution given with the problem's residual there."
        checklist.require(
            name, error <= allowed, f"the solution to {allowed:.1e}", f"{error:.1e}", advice
        )
    checklist.hold(name)
    return solved


def _advice(subject: _Subject, solved: Solution) -> str:
    """What to look at where a solve did not converge."""
    few = Budget(iterations=FEW[-1])
    after = float(subject.solve(subject.theta, subject.x0, few).residual_norm)
    first = subject.residual_norm(subject.theta, subject.x0)
    if int(solved.status) == Status.DIVERGED or after > first:
        return (
            f"The residual norm grew, from {first:.1e} to {after:.1e} in {FEW[-1]} iterations: the "
            "step may be too long, or have the wrong sign. The residual that step gets, and "
            "problem.residual, point downhill: x + α·residual with a small α > 0 moves towards "
            "the solution."
        )
    return "Give a problem that the solver suits, settings that suit the problem, or budget=."


def _noise(subject: _Subject, solved: Solution) -> float:
    first = subject.residual_norm(subject.theta, subject.x0)
    scale = max(first, float(solved.residual_norm))
    return 10 * vector.epsilon(subject.x0) * scale


def _budgets(checklist: Checklist, subject: _Subject) -> None:
    traces = 0
    for number, cap in enumerate(FEW):
        solved = subject.solve(subject.theta, subject.x0, Budget(iterations=cap))
        count, status = int(solved.iterations), Status(int(solved.status))
        checklist.require(
            "budget respected",
            count <= cap and (count == cap or status != Status.BUDGET),
            f"{cap} iterations, or fewer with another status than BUDGET",
            f"{count} iterations and the status {status.name}",
            "Let step make one step, and leave stopping to the loop.",
        )
        if cap == 0:
            advice = "Let value(init(problem, x)) be x."
            checklist.require_close("budget respected", subject.x0, solved.value, 0.0, advice)
        true_norm = subject.residual_norm(subject.theta, solved.value)
        reported = float(solved.residual_norm)
        checklist.require(
            "residual reported is true",
            abs(true_norm - reported)
            <= rounding(subject.x0) * max(true_norm, reported) + _noise(subject, solved),
            f"the problem's residual norm at the value, {true_norm:.6g}, after {count} iterations",
            f"{reported:.6g}",
            "Let residual(problem, state) be the problem's at point(state), or declare "
            "recursive = True.",
        )
        if number == 0:
            traces = subject.counter.count
    checklist.hold("budget respected")
    checklist.hold("residual reported is true")
    checklist.require(
        "one compile for all budgets",
        subject.counter.count == traces,
        "no trace after the first budget",
        f"{subject.counter.count - traces} more",
        "Make the solver hashable and equal to itself: no fresh functions in its fields.",
    )
    checklist.hold("one compile for all budgets")


def _warm_start(checklist: Checklist, subject: _Subject, solved: Solution) -> None:
    # Relative to the solved problem's own tolerance: a start there has next to no residual.
    budget = Budget(iterations=subject.budget.iterations, atol=1.01 * float(solved.tolerance))
    again = subject.solve(subject.theta, solved.value, budget)
    checklist.require(
        "warm start",
        int(again.iterations) == 0 and int(again.status) == Status.CONVERGED,
        "no iteration from the solution, and CONVERGED",
        f"{int(again.iterations)} and {Status(int(again.status)).name}",
        "Let init keep x, and the first residual be the true one there.",
    )
    checklist.hold("warm start")


def _not_a_number(checklist: Checklist, subject: _Subject) -> None:
    solved = subject.solve(all_nan(subject.theta), subject.x0, subject.budget)
    checklist.require(
        "NaN in theta",
        int(solved.status) == Status.NONFINITE,
        "the status NONFINITE",
        Status(int(solved.status)).name,
        "Let NaN flow from the problem into the residual: compare so that NaN is not taken for "
        "success or for a breakdown.",
    )
    checklist.hold("NaN in theta")


def _vmapped(checklist: Checklist, subject: _Subject, solved: Solution) -> None:
    name = "same under vmap"
    advice = "Keep what belongs to one sample in the state, as arrays, and branch with jnp.where."
    offset = vector.scale(0.1 * (flat_norm(solved.value) or 1.0), random_like(subject.x0, seed=1))
    starts = [subject.x0, solved.value, vector.add(solved.value, offset)]
    budget = Budget(iterations=subject.budget.iterations, atol=1.01 * float(solved.tolerance))

    def of_start(start: Any) -> Solution:
        return subject.solve(subject.theta, start, budget)

    batch = jax.vmap(of_start)(stack(starts))
    for index, start in enumerate(starts):
        alone = of_start(start)
        counts = (int(alone.iterations), int(batch.iterations[index]))
        statuses = (Status(int(alone.status)), Status(int(batch.status[index])))
        checklist.require(
            name,
            # Batched sums round in another order, which may tip the last iteration.
            abs(counts[0] - counts[1]) <= 1 and statuses[0] == statuses[1],
            f"{counts[0]} iterations and {statuses[0].name} for sample {index}, as alone",
            f"{counts[1]} and {statuses[1].name}",
            advice,
        )
        value = jax.tree.map(lambda leaf, i=index: leaf[i], batch.value)
        tolerance = 1e3 * default_tolerance(subject.x0)
        checklist.require_close(name, alone.value, value, tolerance, advice)
    checklist.require(
        name,
        int(batch.iterations[1]) == 0,
        "no iteration for the sample that starts at the solution, whatever the others need",
        int(batch.iterations[1]),
        advice,
    )
    checklist.hold(name)


def _single_precision(checklist: Checklist, subject: _Subject) -> None:
    name = "float32 stays float32"
    given = (subject.solver, subject.problem, subject.theta, subject.x0)
    solver, problem, theta, x0 = single_precision(given)
    if not stays_single(problem, theta, x0):
        return
    budget = Budget(
        iterations=subject.budget.iterations,
        rtol=max(float(subject.budget.rtol), 5 * default_tolerance(x0)),
    )
    solved = solve(problem, theta, x0, solver=solver, budget=budget)
    advice = (
        "Make constants of the dtype of x: Python numbers, or jnp.asarray(constant, x.dtype); "
        "jnp.zeros(n) alone is double precision where that is enabled."
    )
    checklist.require_like(name, x0, solved.value, advice)
    wide = [
        str(leaf.dtype)
        for leaf in jax.tree.leaves(solved)
        if leaf.dtype in (jnp.float64, jnp.complex128)
    ]
    checklist.require(name, not wide, "single precision in all of the solution", wide, advice)
    status = Status(int(solved.status))
    checklist.require(
        name,
        status in (Status.CONVERGED, Status.ROUNDING),
        f"CONVERGED with a relative tolerance of {float(budget.rtol):.0e}",
        f"{status.name} with a residual norm of {float(solved.residual_norm):.1e} for "
        f"{float(solved.tolerance):.1e}",
        advice,
    )
    checklist.hold(name)
