"""Listeners: the callbacks of a run, and what they remember across a break."""

import json
from collections.abc import Sequence
from typing import Any

from bilevel.outer.callbacks import Callback, Event
from bilevel.outer.run import Run

_MOST_BYTES = 2**20
"""That the states of all callbacks may have: a checkpoint is written every minute."""


class Listeners:
    """Calls a run's callbacks, and keeps their states for its checkpoints.

    - `kept`: the states after the last epoch they have seen, a JSON object; empty where no
        callback has one.

    **Arguments:**

    - `callbacks`: in the order in which they are called.
    """

    def __init__(self, callbacks: Sequence[Callback]):
        self._callbacks = list(callbacks)
        self._stateful = [
            callback for callback in callbacks if type(callback).state is not Callback.state
        ]
        self.kept = b""

    def __bool__(self) -> bool:
        return bool(self._callbacks)

    def start(self, event: Event, kept: dict[str, Any]) -> None:
        """Begin, or go on with the states that a checkpoint has kept.

        What it was saved too early for, its callbacks see now.
        """
        for callback in self._callbacks:
            callback.start(event)
        states: dict[str, Any] = kept.get("states", {})
        for name, callback in self._named().items():
            if name in states:
                callback.restore(states[name])
                if kept["epoch"] < event.epoch:
                    callback.epoch(event)
        self._keep(event)

    def epoch(self, event: Event) -> None:
        """Tell of an epoch."""
        for callback in self._callbacks:
            callback.epoch(event)
        self._keep(event)

    def end(self, run: Run) -> None:
        """Tell of the end."""
        for callback in self._callbacks:
            callback.end(run)

    def _keep(self, event: Event) -> None:
        """As text at once: a callback may change what it has given.

        **Raises:** `TypeError` naming the callback whose state is not plain.
        """
        if not self._stateful:
            return
        states: dict[str, str] = {}
        for name, callback in self._named().items():
            try:
                states[name] = json.dumps(callback.state())
            except (TypeError, ValueError) as error:
                msg = (
                    f"{name}.state() should give numbers, text, lists and dictionaries of them "
                    f"alone, as they are kept in JSON: {error}. Of an array give tolist()."
                )
                raise TypeError(msg) from error
        written = ", ".join(f"{json.dumps(name)}: {state}" for name, state in states.items())
        self.kept = f'{{"epoch": {event.epoch}, "states": {{{written}}}}}'.encode()
        if len(self.kept) > _MOST_BYTES:
            largest = max(states, key=lambda name: len(states[name]))
            msg = (
                f"the states of the callbacks have {len(self.kept):,} bytes and may have "
                f"{_MOST_BYTES:,}; that of {largest} is the largest. Keep what is large in a file."
            )
            raise ValueError(msg)

    def _named(self) -> dict[str, Callback]:
        """Those with states, by class; of several of one class, by their order."""
        found: dict[str, Callback] = {}
        for callback in self._stateful:
            name, number = type(callback).__qualname__, 1
            while name in found:
                number += 1
                name = f"{type(callback).__qualname__} {number}"
            found[name] = callback
        return found
