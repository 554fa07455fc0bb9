"""Anderson acceleration."""

from typing import NamedTuple

import numpy as np
from jaxtyping import PyTree

from bilevel.bound import BoundProblem
from bilevel.solver.anderson import REGULARISATION
from bilevel_arrays.space import Rows
from bilevel_arrays.stepping import Stepping


class State(NamedTuple):
    """Iterate, residual before it, the last differences of both, and how many there were.

    `gram` holds the inner products of the changes with one another.
    """

    x: PyTree
    previous: PyTree
    steps: Rows
    changes: Rows
    gram: np.ndarray
    number: int


class AndersonSteps(Stepping):
    """Type II, by normal equations of columns scaled to one."""

    def init(self, problem: BoundProblem, x: PyTree) -> State:
        """Start without differences."""
        del problem
        memory = self.solver.memory
        steps, changes = Rows(self.space, memory), Rows(self.space, memory)
        gram = np.zeros((memory, memory))
        return State(x, self.space.zeros(), steps, changes, gram, 0)

    def step(self, problem: BoundProblem, state: State, residual: PyTree) -> State:
        """Combine the last differences, and mix."""
        del problem
        space, memory = self.space, self.solver.memory
        if state.number > 0:
            place = (state.number - 1) % memory
            change = space.subtract(residual, state.previous)
            state.changes.write(place, change)
            products = state.changes.project(change)
            state.gram[place, :] = state.gram[:, place] = products
        weights = self._least_squares(state.gram, state.changes.project(residual))
        mixed = space.subtract(residual, state.changes.combine(weights))
        step = space.scale(float(self.solver.mixing), mixed)
        step = space.subtract(step, state.steps.combine(weights))
        state.steps.write(state.number % memory, step)
        x = space.add(state.x, step)
        return state._replace(x=x, previous=residual, number=state.number + 1)

    def _least_squares(self, gram: np.ndarray, projections: np.ndarray) -> np.ndarray:
        regularisation = self.solver.regularisation
        if regularisation is None:
            regularisation = REGULARISATION * self.space.epsilon
        squares = np.diagonal(gram)
        some = squares > 0
        lengths = np.sqrt(np.where(some, squares, 1.0))
        scaled = gram / (lengths[:, None] * lengths[None, :])
        extra = np.diag(np.where(some, float(regularisation), 1.0))
        if not np.all(np.isfinite(scaled)):
            return np.full(len(projections), np.nan)
        return np.linalg.solve(scaled + extra, projections / lengths) / lengths
