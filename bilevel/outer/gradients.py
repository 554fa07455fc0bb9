"""Gradients: compared at several levels, for controllers that go by their differences."""

import math
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import PyTree

from bilevel.outer.control import Control
from bilevel.outer.limits import limits
from bilevel.outer.tally import Tally
from bilevel.outer.update import Gradient, State
from bilevel.outer.updater import PartedUpdate, compares, norm_of, report_of
from bilevel.refinement.automatic import Differences
from bilevel.refinement.error_controlled import MeasuredError
from bilevel.refinement.fidelity import Fidelity

_MOST_REPEATS = 12
"""Of a gradient that its controller does not accept: 4,096 times the first budget."""

_PART = 15
"""An error is measured every so many updates, in which that is a fifth of the work."""


class Place(NamedTuple):
    """Where a gradient was computed: in which state, on which batch, how well."""

    state: State
    batch: Any
    fidelity: Fidelity


class GradientComparison:
    """Computes an update's gradient again, at other levels, and tells how far apart they are.

    **Arguments:**

    - `controller`: with `due` and `compared`, or with `finer`.
    - `update`: of the run.
    - `tally`: counts the work of gradients that nothing is done with.
    """

    def __init__(self, controller: Any, update: PartedUpdate, tally: Tally):
        self._controller = controller
        self._compares = compares(controller)
        self._update = update
        self._tally = tally

    def found(self, control: Control, state: State, batch: Any) -> tuple[Gradient, Place]:
        """The gradient to make a step with, and where it was computed.

        A controller that compares is told of it. One that does not accept it gets another, at
        the fidelity that it then asks for.
        """
        place = Place(state, batch, control.fidelity)
        found = self._update.found(*place)
        for _ in range(_MOST_REPEATS if self._compares else 0):
            differences = None
            if np.isfinite(norm_of(found)):
                differences = self.differences(control.state, place, found.gradient)
            control.take(norm_of(found), differences)
            if bool(getattr(control.state, "accepted", True)):
                break
            if _same(control.fidelity, place.fidelity):
                continue
            self._tally.spend(report_of(found))
            place = Place(state, batch, control.fidelity)
            found = self._update.found(*place)
        return found, place

    def differences(self, state: PyTree, place: Place, gradient: PyTree) -> Differences | None:
        """How far gradients at other levels are from one, if that is due.

        **Arguments:**

        - `state`: of the controller, before the update.
        - `place`: where the gradient was computed.
        """
        if not bool(self._controller.due(state)):
            return None
        coarse, middle, fine = (
            self._at(level, place, gradient) for level in self._controller.compared(state)
        )
        # Two batches lie √2 of their noise apart; what θ moved between them is small.
        noise = np.float32(np.nan)
        if place.state.previous is not None:
            noise = self._distance(gradient, place.state.previous) / np.float32(math.sqrt(2))
        return Differences(self._distance(coarse, middle), self._distance(middle, fine), noise)

    def error(self, state: PyTree, place: Place, gradient: PyTree) -> MeasuredError:
        """A gradient's distance from those of solves that go twice as far."""
        primal, adjoint = (
            self._distance(gradient, self._at(level, place, gradient))
            for level in self._controller.finer(state)
        )
        return MeasuredError(primal, adjoint, primal + adjoint)

    def measures(self, state: PyTree, epoch: int, updates: int, norm: float) -> bool:
        """Whether an error is measured at the end of an epoch of so many updates."""
        overdue = getattr(self._controller, "overdue", None)
        return measured_in(epoch, updates) or (overdue is not None and bool(overdue(state, norm)))

    def _at(self, level: Fidelity, place: Place, gradient: PyTree) -> PyTree:
        if _same(level, place.fidelity):
            return gradient
        found = self._update.found(place.state, place.batch, level)
        self._tally.spend(report_of(found))
        return found.gradient

    def _distance(self, first: PyTree, second: PyTree) -> Any:
        if first is second:
            return np.float32(0.0)
        return np.asarray(self._update.distance(first, second))[()]


def _same(first: Fidelity, second: Fidelity) -> bool:
    return first.static == second.static and limits(first) == limits(second)


def measured_in(epoch: int, updates: int) -> bool:
    """Whether it is an error's turn to be measured at the end of an epoch of so many updates."""
    return epoch % max(1, math.ceil(_PART / max(updates, 1))) == 0
