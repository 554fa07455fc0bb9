"""Generalised minimal residuals, restarted."""

from typing import Any, NamedTuple

import numpy as np
import scipy.linalg
from jaxtyping import PyTree

from bilevel.bound import BoundProblem
from bilevel.solver.arnoldi import NEGLIGIBLE, REPEAT
from bilevel.status import Status
from bilevel_arrays.space import Rows
from bilevel_arrays.stepping import Stepping


class State(NamedTuple):
    """Iterate, the true residual there, operator applications in cycles, and the status."""

    x: PyTree
    residual: PyTree
    done: int
    status: int


class GMRESSteps(Stepping):
    """One step is one restart cycle, preconditioned from the right."""

    def init(self, problem: BoundProblem, x: PyTree) -> State:
        """Evaluate the residual."""
        return State(x, problem.residual(x), 0, Status.CONVERGED)

    def step(self, problem: BoundProblem, state: State, residual: PyTree) -> State:
        """One restart cycle."""
        space = self.space
        before = space.norm(residual)
        target: Any = 0.0 if problem.target is None else problem.target
        basis, kept, hessenberg, count = self._arnoldi(problem, residual, before, float(target))
        weights = _least_squares(hessenberg, before, count)
        if kept is None:
            correction = self.precondition(problem, basis.combine(weights))
        else:
            correction = kept.combine(weights)
        x = space.add(state.x, correction)
        after = problem.residual(x)
        gained_nothing = space.norm(after) >= before * (1.0 - 4.0 * space.epsilon)
        if not gained_nothing:
            return State(x, after, state.done + count, Status.CONVERGED)
        reference = before if problem.rhs is None else (space.norm(problem.rhs) or before)
        small = before <= space.epsilon**0.5 * reference
        status = Status.ROUNDING if small else Status.BREAKDOWN
        return State(state.x, residual, state.done + count, status)

    def residual(self, problem: BoundProblem, state: State) -> PyTree:
        """The true residual, evaluated at the end of the cycle."""
        del problem
        return state.residual

    def failure(self, state: State) -> int:
        """`BREAKDOWN` or `ROUNDING` once a cycle gained nothing."""
        return state.status

    def applications(self, state: State, iterations: int) -> int:
        """The steps of all cycles, a true residual after each, and the first residual."""
        return state.done + iterations + 1

    def _arnoldi(
        self, problem: BoundProblem, v: PyTree, norm: float, floor: float
    ) -> tuple[Rows, Rows | None, np.ndarray, int]:
        """Classical Gram–Schmidt with a second pass where the first one cancelled."""
        assert problem.operator is not None
        space = self.space
        steps = min(self.solver.restart, space.size())
        basis = Rows(space, steps + 1)
        kept = Rows(space, steps) if self.solver.flexible else None
        hessenberg, null = np.zeros((steps + 1, steps)), np.zeros(steps + 1)
        null[0] = 1.0
        floor = max(floor, space.epsilon * norm)
        basis.write(0, space.scale(1.0 / norm if norm > 0 else 1.0, v))
        count, left, exhausted = 0, norm, False
        while count < steps and not exhausted and (count == 0 or left > floor):
            z = self.precondition(problem, basis.read(count))
            w = problem.operator.matvec(z)
            length = space.norm(w)
            h, w, rest = self._orthogonalised(basis, w, length)
            exhausted = rest <= NEGLIGIBLE * space.epsilon * length
            divisor = 1.0 if exhausted else rest
            # The row vector with null H = 0 and a leading 1.
            null[count + 1] = -float(null @ h) / divisor
            left = norm / float(np.linalg.norm(null))
            h[count + 1] = 0.0 if exhausted else rest
            hessenberg[:, count] = h
            basis.write(count + 1, space.scale(0.0 if exhausted else 1.0 / divisor, w))
            if kept is not None:
                kept.write(count, z)
            count += 1
        return basis, kept, hessenberg, count

    def _orthogonalised(
        self, basis: Rows, w: PyTree, length: float
    ) -> tuple[np.ndarray, PyTree, float]:
        h = basis.project(w)
        w = self.space.subtract(w, basis.combine(h))
        rest = self.space.norm(w)
        if rest < REPEAT * length:
            more = basis.project(w)
            w = self.space.subtract(w, basis.combine(more))
            return h + more, w, self.space.norm(w)
        return h, w, rest


def _least_squares(hessenberg: np.ndarray, norm: float, count: int) -> np.ndarray:
    """The y of `count` entries that minimises |norm e₁ - H y|.

    A last column that adds nothing to the others, as a singular operator gives, is left out.
    """
    block = hessenberg[: count + 1, :count]
    if not np.all(np.isfinite(block)):
        return np.full(count, np.nan)
    orthogonal, triangular = np.linalg.qr(block)
    pivots = np.abs(np.diagonal(triangular))
    dropped = pivots <= NEGLIGIBLE * np.finfo(float).eps * np.max(pivots, initial=0.0)
    np.fill_diagonal(triangular, np.where(dropped, 1.0, np.diagonal(triangular)))
    projected = np.where(dropped, 0.0, norm * orthogonal[0])
    return scipy.linalg.solve_triangular(triangular, projected)
