"""Moment: a run between two updates, as a checkpoint needs it."""

from typing import Any, NamedTuple

from jaxtyping import PyTree

from bilevel.outer.archive import Mark
from bilevel.outer.checkpoints.store import Moment
from bilevel.outer.tally import Mark as TallyMark
from bilevel.outer.tally import Tally
from bilevel.outer.update import State

LASTING = ("trained", "optimizer", "memory")
"""What of a state outlives an epoch."""


class Passed(NamedTuple):
    """All parts of a run at one moment: arrays that nobody changes, so keeping it costs nothing.

    - `place`: epochs finished, and updates made in the one under way.
    - `state`, `controller`, `tally`: as they were.
    - `metric`: after the last finished epoch.
    - `records`: how many there were.
    - `callbacks`: their states.
    """

    place: Moment
    state: State
    controller: PyTree
    tally: TallyMark
    metric: Any
    records: int
    callbacks: bytes

    def kept(self) -> PyTree:
        """All that training after this moment depends on, as a pytree of arrays."""
        names = LASTING if self.place.batch == 0 else (*LASTING, "previous")
        tally = Tally()
        tally.return_to(self.tally)
        return {
            **{name: getattr(self.state, name) for name in names},
            "controller": self.controller,
            "tally": tally.arrays(),
        }

    def mark(self) -> Mark:
        """For a checkpoint."""
        metric = None if self.metric is None else float(self.metric)
        return Mark(self.place, self.kept, metric, self.records, self.callbacks)
