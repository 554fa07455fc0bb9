"""Gradients: compared at several levels, for controllers that go by their differences."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import PyTree

from bilevel.outer.limits import limits
from bilevel.outer.update import Report
from bilevel.outer.updater import PartedUpdate
from bilevel.refinement.automatic import Differences
from bilevel.refinement.error_controlled import MeasuredError
from bilevel.refinement.fidelity import Fidelity

_PART = 15
"""An error is measured no more often than every so many updates: a fifth of their work."""


class GradientComparison:
    """Computes an update's gradient again, at other levels, and tells how far apart they are.

    **Arguments:**

    - `controller`: with `due` and `compared`, or with `finer`.
    - `update`: of the run.
    - `spend`: takes the reports of gradients that nothing is done with.
    """

    def __init__(self, controller: Any, update: PartedUpdate, spend: Callable[[Report], None]):
        self._controller = controller
        self._update = update
        self._spend = spend
        self._previous: PyTree = None

    def begin(self) -> None:
        """Begin an epoch: what was before it is not looked at, so that a run can be resumed."""
        self._previous = None

    def differences(
        self, state: PyTree, fidelity: Fidelity, trained: PyTree, batch: Any
    ) -> Differences | None:
        """What the last update's gradient would have been at other levels, if that is due.

        **Arguments:**

        - `state`: of the controller, before the update.
        - `fidelity`, `trained`, `batch`: of the last update, before it.
        """
        here, previous = self._update.latest, self._previous
        self._previous = here
        if not bool(self._controller.due(state)):
            return None
        coarse, middle, fine = (
            self._at(level, fidelity, trained, batch) for level in self._controller.compared(state)
        )
        # Two batches lie √2 of their noise apart; what θ moved between them is small.
        noise = np.float32(math.nan) if previous is None else self._distance(here, previous) / np.float32(math.sqrt(2))
        return Differences(self._distance(coarse, middle), self._distance(middle, fine), noise)

    def error(
        self, state: PyTree, fidelity: Fidelity, trained: PyTree, batch: Any
    ) -> MeasuredError:
        """The last gradient's distance from those of solves that go twice as far."""
        finer = self._controller.finer(state)
        primal, adjoint = (
            self._distance(self._update.latest, self._at(level, fidelity, trained, batch))
            for level in finer
        )
        return MeasuredError(primal, adjoint, primal + adjoint)

    def _at(self, level: Fidelity, fidelity: Fidelity, trained: PyTree, batch: Any) -> PyTree:
        if level.static == fidelity.static and limits(level) == limits(fidelity):
            return self._update.latest
        gradient, report = self._update.gradient(trained, batch, level)
        self._spend(report)
        return gradient

    def _distance(self, first: PyTree, second: PyTree) -> np.floating[Any]:
        if first is second:
            return np.float32(0.0)
        return np.asarray(self._update.distance(first, second))[()]


def measured_in(epoch: int, updates: int) -> bool:
    """Whether an error is measured at the end of an epoch of so many updates."""
    return epoch % max(1, math.ceil(_PART / max(updates, 1))) == 0
