"""Callbacks: what happens besides training, once an epoch."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

from jaxtyping import PyTree

from bilevel.outer.history import History, Record
from bilevel.outer.run import Run
from bilevel.outer.task import Task
from bilevel.refinement.fidelity import Fidelity


@dataclasses.dataclass
class Event:
    """What a callback sees.

    - `task`: what is trained.
    - `epoch`, `epochs`: finished so far, and wanted.
    - `theta`: the parameters now.
    - `fidelity`: of the next epoch.
    - `history`: so far; its last record is `record`.
    - `stop_reason`: set by `stop`; training ends after this epoch.

    >>> def far_enough(event):
    ...     if event.record.loss < 1e-3:
    ...         event.stop("the loss is small")
    """

    task: Task
    epoch: int
    epochs: int
    theta: PyTree
    fidelity: Fidelity
    history: History
    stop_reason: str | None = None

    @property
    def record(self) -> Record:
        """The last epoch; epoch 0 is the state before training."""
        return self.history[-1]

    def stop(self, reason: str) -> None:
        """End training after this epoch.

        **Arguments:**

        - `reason`: in words, for the summary.
        """
        self.stop_reason = reason


class Callback:
    """Base of callbacks: override what is needed.

    A callback that keeps state across epochs should reset it in `start`, for one object
    may serve several runs. With `state` and `restore` a run that is broken off and resumed
    goes on as if it had not been.

    >>> import bilevel as bl, optax
    >>> class Watch(Callback):
    ...     def epoch(self, event):
    ...         print(event.epoch, event.record.loss)
    >>> task = bl.Task(1.0, lambda theta, batch, fidelity: theta**2, full=bl.Budget(1))
    >>> run = bl.optimize(task, optax.sgd(0.25), epochs=2, callbacks=[Watch()], progress=False)
    1 1.0
    2 0.25
    """

    def start(self, event: Event) -> None:
        """Before the first update, when the first metric is known."""

    def epoch(self, event: Event) -> None:
        """After every epoch."""

    def state(self) -> Any:
        """What to keep with every checkpoint, asked for after every epoch; nothing by default.

        Plain data, as JSON has it: numbers, text, lists, and dictionaries by text; a tuple
        comes back as a list.
        """
        return None

    def restore(self, state: Any) -> None:
        """Go on from what `state` gave; called after `start` when a run is resumed."""

    def end(self, run: Run) -> None:
        """When training is over, however it ended; the run is complete but not yet saved."""


AnyCallback: TypeAlias = Callback | Callable[[Event], object]
"""A callback, or a function called with the event after every epoch."""


class Target(Callback):
    """Stops when the metric is at most a target.

    **Arguments:**

    - `metric`: the target, in the units of the metric.

    >>> Target(1e-3).metric
    0.001
    """

    def __init__(self, metric: float):
        if math.isnan(metric):
            msg = "Target: metric should be a number, got NaN."
            raise ValueError(msg)
        self.metric = metric

    def start(self, event: Event) -> None:
        """Check the metric before training too."""
        self.epoch(event)

    def epoch(self, event: Event) -> None:
        """Check the metric."""
        metric = event.record.metric
        if metric is not None and metric <= self.metric:
            event.stop(f"{event.task.metric_name} reached {self.metric:g}")


class Patience(Callback):
    """Stops when the metric has not improved for a number of epochs.

    **Arguments:**

    - `epochs`: to wait for an improvement, >= 1.
    - `improvement`: how much lower, relative to the best, a metric must be to count.

    A plateau is what progressive refinement answers by refining, so give it more epochs
    than a few refinements take.

    >>> Patience(20).epochs
    20
    """

    def __init__(self, epochs: int, improvement: float = 0.0):
        if epochs < 1 or not 0 <= improvement < 1:
            msg = (
                "Patience: epochs should be at least 1 and improvement in [0, 1), got "
                f"{epochs} and {improvement}."
            )
            raise ValueError(msg)
        self.epochs = epochs
        self.improvement = improvement
        self._best = math.inf
        self._since = 0

    def start(self, event: Event) -> None:
        """Begin with the metrics so far: that before training, or all of a resumed run."""
        self._best, self._since = math.inf, -1
        for record in event.history:
            self._look(record.metric)
        self._end(event)

    def epoch(self, event: Event) -> None:
        """Compare with the best metric so far."""
        self._look(event.record.metric)
        self._end(event)

    def _look(self, metric: float | None) -> None:
        self._since += 1
        if metric is None:
            return
        if metric < self._best - self.improvement * abs(self._best) or math.isinf(self._best):
            self._best, self._since = metric, 0

    def _end(self, event: Event) -> None:
        if event.record.metric is not None and self._since >= self.epochs:
            event.stop(f"{event.task.metric_name} has not improved for {self.epochs} epochs")


class TimeLimit(Callback):
    """Stops after the epoch in which a wall time is over.

    **Arguments:**

    - `seconds`: since the start of the run, compilation included.

    >>> TimeLimit(60.0).seconds
    60.0
    """

    def __init__(self, seconds: float):
        if not seconds > 0:
            msg = f"TimeLimit: seconds should be positive, got {seconds}."
            raise ValueError(msg)
        self.seconds = seconds
        self._start = 0.0

    def start(self, event: Event) -> None:
        """Start the clock at what has passed already."""
        self._start = time.perf_counter() - event.record.elapsed

    def epoch(self, event: Event) -> None:
        """Look at the clock."""
        if time.perf_counter() - self._start >= self.seconds:
            event.stop(f"the time limit of {self.seconds:g} s is over")


class _Function(Callback):
    def __init__(self, function: Callable[[Event], object]):
        self.function = function

    def epoch(self, event: Event) -> None:
        self.function(event)


def as_callbacks(callbacks: AnyCallback | Sequence[AnyCallback]) -> list[Callback]:
    """Callbacks, with functions wrapped; a single one stands for a list of one.

    **Raises:** `TypeError` for what is neither, or for a class instead of an object.
    """
    if isinstance(callbacks, Callback) or not isinstance(callbacks, Iterable):
        callbacks = [callbacks]
    listed: list[Callback] = []
    for entry in callbacks:
        if isinstance(entry, Callback):
            listed.append(entry)
        elif callable(entry) and not isinstance(entry, type):
            listed.append(_Function(entry))
        else:
            msg = (
                "optimize: callbacks should be Callback objects or functions of one event, got "
                f"{entry!r}."
            )
            if isinstance(entry, type):
                msg += f" Write {entry.__name__}(...)."
            raise TypeError(msg)
    return listed
