"""The loop of `bilevel.solver.loop`, eagerly: the same stops, statuses and counts on any arrays."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import PyTree

from bilevel.bound import BoundProblem
from bilevel.budget import Budget
from bilevel.solution import Solution
from bilevel.solver.iteration import _FINE as FINE  # pyright: ignore[reportPrivateUsage]
from bilevel.solver.iteration import _ROUNDINGS as ROUNDINGS  # pyright: ignore[reportPrivateUsage]
from bilevel.solver.loop import BLOW_UP, GROWN, MOST_ROUNDING, PATIENCE
from bilevel.solver.symmetry import APPLICATIONS, ROUNDING_ERRORS, needs_look
from bilevel.status import Status
from bilevel_arrays.space import Space
from bilevel_arrays.stepping import Stepping


@dataclasses.dataclass
class Progress:
    """Where the loop is; residual norms are in units."""

    norm: float
    mark: float
    count: int = 0

    def advance(self, norm: float) -> None:
        """Note the residual norm after one more iteration."""
        if self.count >= 2 and self.count & (self.count - 1) == 0:
            self.mark = self.norm
        self.count += 1
        self.norm = norm

    def rate(self) -> float:
        """Residual reduction an iteration over the second half."""
        before = self.count - 1
        steps = self.count - (1 << (before.bit_length() - 1) if before >= 2 else 0)
        if steps <= 0 or not self.mark > 0:
            return math.nan
        return float((self.norm / self.mark) ** (1.0 / steps))


@dataclasses.dataclass(frozen=True)
class Limits:
    """When to stop; residual norms are in units."""

    iterations: int
    minimum: int
    tolerance: float
    start: float
    reference: float


class Drive:
    """One solver on one problem, from one start, to one budget.

    **Arguments:**

    - `problem`: bound to its θ. `stepping`: how a step is made.
    - `minimum`: iterations done however good the start is, unless its residual is zero.
    - `history`: how many residual norms to keep.
    """

    def __init__(
        self,
        space: Space,
        problem: BoundProblem,
        stepping: Stepping,
        x0: PyTree,
        budget: Budget,
        *,
        minimum: int = 0,
        history: int = 0,
    ):
        self.space = space
        self.stepping = stepping
        self.state = stepping.init(problem, x0)
        self.residual = stepping.residual(problem, self.state)
        norm = space.robust_norm(self.residual)
        self.scale = self._scale(problem, x0, norm)
        asked: Any = max(float(budget.rtol) * self.scale, float(budget.atol))
        # Nobody can ask for less than rounding leaves.
        asked = math.nan if math.isnan(self.scale) else max(asked, space.epsilon * self.scale)
        self.problem = dataclasses.replace(problem, target=asked)
        reference = _largest(norm, self.scale)
        self.unit = space.unit(reference)
        self.noise = self._noise(norm, reference, x0)
        self.flaw = self._flaw()
        self.limits = Limits(
            iterations=int(budget.iterations),
            minimum=minimum,
            tolerance=asked / self.unit,
            start=self.measured(self.residual),
            reference=_largest(self.measured(self.residual), self.scale / self.unit),
        )
        self.progress = Progress(self.limits.start, self.limits.start)
        self.history = None if history == 0 else np.full(history, math.nan)
        self._note()

    def run(self) -> Solution:
        """Go on until the budget, the tolerance or a failure stops it."""
        if self.stepping.recursive:
            true_norm, applications, failure = self._confirmed()
        else:
            self._sweep()
            applications = self.stepping.applications(self.state, self.progress.count)
            failure, true_norm = self._failure(), self.progress.norm
        value = self.stepping.value(self.state)
        before = (0 if self.flaw is None else APPLICATIONS) + int(self.problem.rhs is None)
        real = np.float32 if self.space.narrow else np.float64
        numbers: dict[str, Any] = {
            "status": np.int32(self._status(failure, true_norm, value)),
            "residual_norm": real(self.unit * true_norm),
            "iterations": np.int32(self.progress.count),
            "inner_iterations": np.int32(self.progress.count),
            "tolerance": real(self.unit * self.limits.tolerance),
            "scale": real(self.scale),
            "rate": real(self.progress.rate()),
            "applications": np.int32(applications + before),
            "history": self.history,
        }
        return Solution(value=value, **numbers)

    def measured(self, residual: PyTree) -> float:
        """The norm of a residual, in units."""
        if self.unit == 1.0:
            return self.space.norm(residual)
        return self.space.norm(self.space.scale(1.0 / self.unit, residual))

    def _note(self) -> None:
        if self.history is not None and self.progress.count < len(self.history):
            self.history[self.progress.count] = self.unit * self.progress.norm

    def _failure(self) -> int:
        failure = self.stepping.failure(self.state)
        return self.flaw or failure

    def _sweep(self) -> None:
        progress, limits = self.progress, self.limits
        while (
            (progress.norm > limits.tolerance)
            or (progress.count < limits.minimum and progress.norm > 0)
        ) and (
            progress.count < limits.iterations
            and progress.norm <= BLOW_UP * limits.reference
            and self._failure() == Status.CONVERGED
        ):
            self.state = self.stepping.step(self.problem, self.state, self.residual)
            self.residual = self.stepping.residual(self.problem, self.state)
            progress.advance(self.measured(self.residual))
            self._note()

    def _confirmed(self) -> tuple[float, int, int]:
        """Sweep, and go on from the true residual while that helps and the budget lasts."""
        norm, applications = self.progress.norm, 0
        while True:
            before, start = norm, self.progress.count
            self.progress.norm = norm
            self._sweep()
            applications += self.stepping.applications(self.state, self.progress.count - start)
            failure = self._failure()
            self.state = self.stepping.init(self.problem, self.stepping.value(self.state))
            self.residual = self.stepping.residual(self.problem, self.state)
            norm = self.measured(self.residual)
            if not (
                norm < 0.5 * before
                and norm > self.limits.tolerance
                and self.progress.norm <= self.limits.tolerance
                and self.progress.count < self.limits.iterations
                and failure == Status.CONVERGED
            ):
                return norm, applications + 1, failure

    def _status(self, failure: int, true_norm: float, value: PyTree) -> int:
        progress, limits = self.progress, self.limits
        finite = math.isfinite(true_norm) and math.isfinite(progress.norm)
        if not finite or math.isnan(limits.tolerance):
            return Status.NONFINITE
        if true_norm <= limits.tolerance:
            return Status.CONVERGED
        level = max(self.space.epsilon**0.5 * limits.reference, 10.0 * limits.tolerance)
        level = self._attainable(level, true_norm, value)
        if failure != Status.CONVERGED:
            told = failure in {Status.BREAKDOWN, Status.INCONSISTENT}
            return Status.ROUNDING if told and true_norm <= level else failure
        # A recursion that lost touch with the truth is no iteration that ran out of budget.
        lost = self.stepping.recursive and true_norm > 10.0 * progress.norm + level
        result = Status.BREAKDOWN if true_norm > level else Status.ROUNDING
        if progress.count >= limits.iterations and not lost:
            result = Status.BUDGET
        return Status.DIVERGED if self._diverged(true_norm) else result

    def _diverged(self, true_norm: float) -> bool:
        progress, limits = self.progress, self.limits
        ceiling = BLOW_UP * limits.reference
        if true_norm > ceiling or progress.norm > ceiling:
            return True
        patient = progress.count >= PATIENCE
        if self.stepping.stationary:
            grown = progress.norm >= limits.start and progress.norm > self.noise / self.unit
            return patient and grown and progress.rate() >= 1.0
        if not self.stepping.recursive:
            return patient and progress.norm > GROWN * limits.reference and progress.rate() > 1.0
        return False

    def _attainable(self, level: float, true_norm: float, value: PyTree) -> float:
        """The level below which a residual may be rounding, of a large solution."""
        operator, space = self.problem.operator, self.space
        if operator is None or space.epsilon < FINE or not true_norm > level:
            return level
        rough = space.arbitrary(1)
        stretch = space.norm(operator.matvec(rough)) / space.norm(rough)
        found = ROUNDINGS * space.epsilon * stretch * space.norm(value) / self.unit
        return max(level, found) if found <= MOST_ROUNDING * self.limits.reference else level

    def _scale(self, problem: BoundProblem, x0: PyTree, norm: float) -> float:
        """The norm that relative tolerances refer to; see `bilevel.solver.iteration`."""
        space = self.space
        if problem.rhs is not None:
            return space.robust_norm(problem.rhs) or norm
        step = 2.0 ** round(math.log2(space.epsilon) / 2)
        change = space.subtract(problem.residual(space.scale(1.0 + step, x0)), self.residual)
        at_zero = space.robust_norm(space.add_scaled(self.residual, -1.0 / step, change))
        return _largest(norm, at_zero) if math.isfinite(at_zero) else norm

    def _noise(self, norm: float, reference: float, x0: PyTree) -> float:
        rounding = 1e3 * self.space.epsilon
        if self.problem.mapping is not None:
            reference = _largest(reference, self.space.norm(x0))
        elif self.problem.rhs is None:
            return _largest(4.0 * norm, rounding * self.scale)
        return rounding * reference

    def _flaw(self) -> int | None:
        """Whether an operator that should be symmetric is; `None` where nothing was looked at."""
        if not needs_look(self.problem, self.stepping.requires):
            return None
        space, operator = self.space, self.problem.operator
        assert operator is not None
        u, v = space.arbitrary(1), space.arbitrary(2)
        left, right = operator.matvec(u), operator.matvec(v)
        defect = abs(space.dot(left, v) - space.dot(u, right))
        size = space.norm(left) * space.norm(v) + space.norm(u) * space.norm(right)
        flawed = defect > ROUNDING_ERRORS * space.epsilon * size
        return Status.NOT_SYMMETRIC if flawed else Status.CONVERGED


def run(
    space: Space,
    problem: BoundProblem,
    make: Callable[[], Stepping],
    x0: PyTree,
    budget: Budget,
    *,
    minimum: int = 0,
    history: int = 0,
) -> Solution:
    """Run a solver until its budget, its tolerance, or a failure stops it.

    In single precision a linear system is solved in units of its right-hand side, whose squares
    neither overflow nor vanish.
    """
    unit = 1.0
    if problem.rhs is not None and problem.operator is not None:
        unit = space.unit(space.robust_norm(problem.rhs))
    if unit == 1.0:
        return Drive(space, problem, make(), x0, budget, minimum=minimum, history=history).run()
    matvec, rhs = problem.operator.matvec, space.scale(1.0 / unit, problem.rhs)  # pyright: ignore[reportOptionalMemberAccess]
    scaled = dataclasses.replace(
        problem, residual=lambda x: space.subtract(rhs, matvec(x)), rhs=rhs
    )
    within = Budget(budget.iterations, budget.rtol, float(budget.atol) / unit)
    start = space.scale(1.0 / unit, x0)
    solution = Drive(space, scaled, make(), start, within, minimum=minimum, history=history).run()
    sizes: dict[str, Any] = {
        name: None if (size := getattr(solution, name)) is None else unit * size
        for name in ("residual_norm", "tolerance", "scale", "history")
    }
    return dataclasses.replace(solution, value=space.scale(unit, solution.value), **sizes)


def _largest(one: float, other: float) -> float:
    """The larger number, NaN where one is, as arrays have it."""
    return math.nan if math.isnan(one) or math.isnan(other) else max(one, other)
