"""Conformance of an inner solver: does it do on a problem what the loop relies on."""

import dataclasses
import math
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
from bilevel.solver.base import InnerSolver, default_tolerance, require_traits
from bilevel.status import Status
from bilevel.testing.conformance import Checklist, ConformanceError, flat_norm, relative_error
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
from bilevel.testing.user_code import called, require_instance, require_order, undeclared

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
    4. *converges within the budget*: it ends as `CONVERGED`.
    5. *converged means within tolerance*: the true residual norm is then at most the
        tolerance, and `solution` is reached.
    6. *budget respected*: 0, 1, 2, 5 iterations at most, and no fewer unless it stopped for
        another reason.
    7. *residual reported is true*: `residual_norm` is that of the problem at `value`, at
        every budget.
    8. *one compile for all budgets*: no value of a budget traces the problem anew.
    9. *warm start*: at the solution no step is taken.
    10. *NaN in theta*: ends as `NONFINITE` where the problem depends on θ.
    11. *same under vmap*: a batch of starts gives what each start gives, with its own
        iteration count and status.
    12. *float32 stays float32*: where the problem does not hold double-precision data itself.

    **Arguments:**

    - `solver`: with its settings chosen so that it converges on the problem.
    - `problem`, `theta`, `x0`: an inner problem that the solver suits, a θ, and a start that
        is not the solution. By default a well-conditioned one of three unknowns.
    - `solution`: x*(θ), where it is known.
    - `budget`: in which the solver should converge; the solver's default budget if `None`.

    **Returns:** the names of the properties that were checked.

    **Raises:** `ConformanceError` for the first property that does not hold;
    `IncompatibleError` where the solver refuses the problem, `TypeError` for arguments of
    another kind, or a method that takes its arguments in another order.

    >>> import bilevel as bl
    >>> from bilevel.testing import check_inner_solver
    >>> "warm start" in check_inner_solver(bl.Richardson(step_size=0.5))
    True
    """
    owner, name = "check_inner_solver", type(solver).__name__
    require_instance(owner, "solver", solver, InnerSolver)
    require_traits(name, solver.requires)
    require_order(f"{name}.init", solver.init, ("problem", "x"))
    require_order(f"{name}.step", solver.step, ("problem", "state", "residual"))
    if problem is None:
        problem, theta, x0 = sample_problem(solver)
    elif x0 is None:
        msg = (
            f"{owner}: a problem comes with theta and x0. Write {owner}(solver, problem, theta, "
            "x0)."
        )
        raise TypeError(msg)
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
    def ran(method: str, *arguments: Any) -> Any:
        return called(checklist, "state", method, getattr(solver, method), *arguments)

    def steps(theta: Any, x: Any) -> tuple[Any, Any, Any]:
        bound = ran("prepare", problem.at(theta), x)
        first = ran("init", bound, x)
        advice = (
            "Override value(self, state) to return the iterate, or call that part of the state x "
            "(an attribute, not a key)."
        )
        checklist.require_like("state", x, ran("value", first), advice)
        second = ran("step", bound, first, ran("residual", bound, first))
        third = ran("step", bound, second, ran("residual", bound, second))
        return first, second, third

    try:
        first, second, third = steps(theta, x0)
    except ConformanceError as error:
        advice = undeclared(solver, problem.at(theta)) if error.__context__ else ""
        if advice:
            raise ConformanceError(
                error.subject, error.broken, error.expected, error.got, advice
            ) from error.__context__
        raise
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
    compiled = called(checklist, "same under jit", "step", jax.jit(steps), theta, x0)[2]
    advice = "Compute with jax.numpy and jax.lax, and keep no state on the solver."
    checklist.require_close(
        "same under jit", value, solver.value(compiled), 10 * rounding(x0), advice
    )
    checklist.hold("same under jit")


def _converged(checklist: Checklist, subject: _Subject, solution: PyTree | None) -> Solution:
    name = "converges within the budget"
    solved = subject.solve(subject.theta, subject.x0, subject.budget)
    checklist.require_like(name, subject.x0, solved.value, "Let value return the iterate, like x0.")
    first = subject.residual_norm(subject.theta, subject.x0)
    if int(solved.status) != Status.CONVERGED:
        checklist.fail(
            name,
            f"a residual norm of at most {float(solved.tolerance):.1e} and the status CONVERGED",
            f"{Status(int(solved.status)).name} after {int(solved.iterations)} iterations, with a "
            f"residual norm of {first:.1e} at the start and {float(solved.residual_norm):.1e} at "
            "the end",
            _advice(subject, solved, first),
        )
    checklist.hold(name)
    name = "converged means within tolerance"
    true_norm = subject.residual_norm(subject.theta, solved.value)
    # Another order of summation moves a residual that is all rounding.
    tolerance = float(solved.tolerance) * (1 + 1e-3) + _noise(subject, solved)
    checklist.require(
        name,
        true_norm <= tolerance,
        f"a true residual norm of at most {float(solved.tolerance):.1e}",
        f"{true_norm:.1e}",
        _of_own_residual(subject.solver),
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


def _of_own_residual(solver: InnerSolver) -> str:
    """What to look at where the residual that a solver goes by is not the true one."""
    if solver.recursive:
        return (
            "Let residual(problem, state) be what the recursion keeps of the residual at "
            "value(state): it has drifted from the true one, or belongs to another iterate."
        )
    return (
        "Let residual(problem, state) be the problem's at point(state), or declare "
        "recursive = True if the solver keeps its own."
    )


def _advice(subject: _Subject, solved: Solution, first: float) -> str:
    """What to look at where a solve did not converge."""
    few = Budget(iterations=FEW[-1])
    after = float(subject.solve(subject.theta, subject.x0, few).residual_norm)
    last = float(solved.residual_norm)
    solver = subject.solver
    bound = solver.prepare(subject.problem.at(subject.theta), subject.x0)
    own = flat_norm(solver.residual(bound, solver.init(bound, subject.x0)))
    if abs(own - first) > rounding(subject.x0) * max(own, first):
        return f"The solver takes the first residual norm for {own:.1e}. {_of_own_residual(solver)}"
    if relative_error(subject.x0, solved.value) == 0 or last == first == after:
        return (
            "The residual did not move: step returned the iterate that it was given. Look for a "
            "step of length zero, and for a new state that is not returned."
        )
    if int(solved.status) == Status.DIVERGED or after > first:
        return (
            f"The residual norm grew, from {first:.1e} to {after:.1e} in {FEW[-1]} iterations: the "
            "step may be too long, or have the wrong sign. The residual that step gets, and "
            "problem.residual, point downhill: x + α·residual with a small α > 0 moves towards "
            "the solution."
        )
    rate = (after / first) ** (1 / FEW[-1])
    if int(solved.status) == Status.BUDGET and last < 0.5 * first:
        more = _iterations_needed(solved, first)
        return (
            f"It converges, but slowly. Give budget=Budget(iterations={more}, rtol=...), settings "
            "that suit the problem, or a problem that the solver suits."
        )
    return (
        f"{Status(int(solved.status)).diagnosis} It left {rate:.2g} of the residual in each of the "
        "first steps. Give settings that suit the problem, a problem that the solver suits, or "
        "budget=."
    )


def _iterations_needed(solved: Solution, first: float) -> int:
    """Iterations to the tolerance at the rate of the whole solve, and half as many again."""
    done = math.log(first / float(solved.residual_norm))
    wanted = math.log(first / float(solved.tolerance))
    return math.ceil(1.5 * int(solved.iterations) * wanted / done)


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
            _of_own_residual(subject.solver),
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
