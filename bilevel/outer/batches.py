"""Batches: those of a run's epochs, each where the devices need it."""

import itertools
from collections.abc import Iterator
from typing import Any

import jax
from jaxtyping import PRNGKeyArray

from bilevel.outer.devices import Placement
from bilevel.outer.progress import batches_in
from bilevel.outer.task import Task


class Batches:
    """Draws the batches of an epoch and puts them in their place.

    - `count`: how many an epoch has, where that is known.

    **Arguments:**

    - `task`: whose they are.
    - `placement`: where they go.
    - `seed`: of the run.
    """

    def __init__(self, task: Task, placement: Placement, seed: int):
        self._task, self._placement, self._seed = task, placement, seed
        self.count = batches_in(task.batches)
        self._begun: tuple[int, Iterator[Any]] | None = None

    def check(self) -> None:
        """See that the devices divide them: all that are listed, or the first that is made.

        **Raises:** `DevicesError` naming size and devices.
        """
        if not self._placement.splits:
            return
        made = callable(self._task.batches)
        for batch in [next(self._drawn(1))] if made else self._drawn(1):
            self._placement.check(batch)

    def first(self, epoch: int) -> Any:
        """The first of an epoch; `of` will not make it again."""
        batches = self._drawn(epoch)
        first = next(batches)
        self._begun = epoch, itertools.chain([first], batches)
        return self._placement.batch(first)

    def of(self, epoch: int, after: int = 0) -> Iterator[Any]:
        """Those of an epoch.

        **Arguments:**

        - `epoch`: its number, from 1.
        - `after`: how many to leave out.
        """
        begun, self._begun = self._begun, None
        batches = begun[1] if begun is not None and begun[0] == epoch else self._drawn(epoch)
        return map(self._placement.batch, itertools.islice(batches, after, None))

    def _drawn(self, epoch: int) -> Iterator[Any]:
        return self._task.epoch_batches(epoch, self._key)

    def _key(self, epoch: int) -> PRNGKeyArray:
        # A key of its own for every epoch: a resumed run draws what it would have drawn.
        return jax.random.fold_in(jax.random.key(self._seed), epoch)
