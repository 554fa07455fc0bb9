"""Progress: what a person sees while a run goes on."""

import time
from collections.abc import Iterable, Sized
from typing import Protocol

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from bilevel.outer import text
from bilevel.outer.history import Record


class Reporter(Protocol):
    """Shows a run while it goes on."""

    def start(self, title: str, epochs: int, metric_name: str, done: int = 0) -> None:
        """Begin a run of so many epochs, `done` of which are finished already."""
        ...

    def batch(self, number: int, batches: int | None) -> None:
        """Before an update: its number in the epoch, from 1, and how many there are."""
        ...

    def epoch(self, record: Record, work: int | None) -> None:
        """After an epoch; `work` is the sum of all iterations so far."""
        ...

    def note(self, message: str) -> None:
        """Say something that must not be missed."""
        ...

    def stop(self) -> None:
        """End, however the run ended."""
        ...


class Silence:
    """Shows nothing."""

    def start(self, title: str, epochs: int, metric_name: str, done: int = 0) -> None:
        """Show nothing."""

    def batch(self, number: int, batches: int | None) -> None:
        """Show nothing."""

    def epoch(self, record: Record, work: int | None) -> None:
        """Show nothing."""

    def note(self, message: str) -> None:
        """Show nothing."""

    def stop(self) -> None:
        """Show nothing."""


class Lines:
    """Plain lines, for logs and pipes: the first epochs, then one every few seconds.

    **Arguments:**

    - `console`: where to; standard error by default.
    - `interval`: seconds between lines; 0 prints every epoch.
    """

    def __init__(self, console: Console | None = None, interval: float = 2.0):
        self._console = console or Console(stderr=True)
        self._interval = interval
        self._last = 0.0
        self._title = self._metric = ""
        self._epochs = 0
        self._left = _TimeLeft()

    def start(self, title: str, epochs: int, metric_name: str, done: int = 0) -> None:
        """Say what runs."""
        self._title, self._metric, self._epochs = title, metric_name, epochs
        self._last = -self._interval
        self._left = _TimeLeft()
        resumed = f", resumed after epoch {done}" if done else ""
        self._print(f"{title}: {epochs} epochs{resumed}")

    def batch(self, number: int, batches: int | None) -> None:
        """Say where a long epoch is."""
        if number > 1 and time.monotonic() - self._last >= 10 * max(self._interval, 1.0):
            self._last = time.monotonic()
            self._print(f"  update {number}{f' of {batches}' if batches else ''}")

    def epoch(self, record: Record, work: int | None) -> None:
        """Print a line if the last one is long enough ago, or this is the last epoch."""
        now = time.monotonic()
        left = self._left.after(record.epoch, self._epochs, now)
        if now - self._last < self._interval and record.epoch < self._epochs:
            return
        self._last = now
        remaining = "" if left is None else f", {text.seconds(left)} s left"
        self._print(f"  {_line(record, self._epochs, self._metric, work)}{remaining}")

    def note(self, message: str) -> None:
        """Print it."""
        self._print(f"{self._title}: {message}")

    def stop(self) -> None:
        """Nothing to end."""

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


class _TimeLeft:
    """How long the epochs that are left take, if they take as long as those since the first."""

    def __init__(self) -> None:
        self._first: tuple[int, float] | None = None

    def after(self, epoch: int, epochs: int, now: float) -> float | None:
        """Seconds; `None` before two epochs can be told apart, and when all are over."""
        if self._first is None:
            # The first holds compilation.
            self._first = (epoch, now) if epoch else None
            return None
        first, then = self._first
        return (now - then) / (epoch - first) * (epochs - epoch) if first < epoch < epochs else None


class Live:
    """A bar that moves, with the numbers of the last epoch under it, for terminals.

    **Arguments:**

    - `console`: where to; standard error by default.
    """

    def __init__(self, console: Console | None = None):
        self._console = console or Console(stderr=True)
        self._progress: _Display | None = None
        self._bar = TaskID(0)
        self._title = self._metric = self._numbers = ""
        self._epochs = 0

    def start(self, title: str, epochs: int, metric_name: str, done: int = 0) -> None:
        """Show the bar."""
        self._title, self._metric, self._epochs = title, metric_name, epochs
        self._numbers = "compiling"
        self._progress = _Display(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._progress.below = self._numbers
        self._bar = self._progress.add_task(title, total=epochs, completed=done)
        self._progress.start()

    def batch(self, number: int, batches: int | None) -> None:
        """Show where in the epoch it is."""
        if self._progress is not None and number > 1:
            of = f" of {batches}" if batches else ""
            self._progress.below = f"{self._numbers}  update {number}{of}"

    def epoch(self, record: Record, work: int | None) -> None:
        """Move the bar."""
        if self._progress is not None:
            self._numbers = _numbers(record, self._metric, work)
            self._progress.below = self._numbers
            self._progress.update(self._bar, completed=record.epoch)

    def note(self, message: str) -> None:
        """Print it above the bar."""
        console = self._console if self._progress is None else self._progress.console
        console.print(f"{self._title}: {message}", markup=False, highlight=False)

    def stop(self) -> None:
        """Leave the bar as it is."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


class _Display(Progress):
    """A bar with a line of text below it, cut where the terminal ends."""

    below = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        yield Text(f"  {self.below}", no_wrap=True, overflow="ellipsis")


def reporter(progress: "bool | Reporter", console: Console | None = None) -> Reporter:
    """The reporter for a setting.

    **Arguments:**

    - `progress`: `False` for silence; `True` for a moving bar on a terminal or in a
        notebook and plain lines elsewhere; or a reporter of your own.
    - `console`: where to; standard error by default.

    >>> type(reporter(False)).__name__
    'Silence'
    """
    if progress is False:
        return Silence()
    if progress is not True:
        return progress
    console = console or Console(stderr=True)
    if console.is_terminal or console.is_jupyter:
        return Live(console)
    return Lines(console)


def batches_in(batches: object) -> int | None:
    """How many batches an epoch has, where that is known beforehand."""
    if batches is None:
        return 1
    return len(batches) if isinstance(batches, Sized) else None


def _line(record: Record, epochs: int, metric_name: str, work: int | None) -> str:
    numbers = _numbers(record, metric_name, work)
    return f"epoch {record.epoch}/{epochs}  {numbers}  {text.seconds(record.elapsed)} s"


def _numbers(record: Record, metric_name: str, work: int | None) -> str:
    parts = [f"{metric_name} {text.number(record.metric)}"]
    if record.loss is not None:
        parts.append(f"loss {text.number(record.loss)}")
    if record.gradient_norm is not None:
        # An error as large as the gradient leaves nothing of its direction.
        error = "" if record.error is None else f" ± {text.number(record.error)}"
        parts.append(f"gradient {text.number(record.gradient_norm)}{error}")
    if record.budget_iterations is not None:
        budget = text.budget(record.budget_iterations, record.budget_rtol, record.budget_atol)
        level = "" if record.level is None else f"level {record.level}, "
        parts.append(f"{level}budget {budget}")
    if work is not None:
        parts.append(f"Σ {work:,} iterations")
        spent = f"primal {text.count(record.primal_iterations)}"
        parts.append(f"{spent}, adjoint {text.count(record.adjoint_iterations)} in this epoch")
    if record.nonfinite:
        updates = "update" if record.nonfinite == 1 else "updates"
        parts.append(f"{record.nonfinite} {updates} skipped (not finite)")
    if record.failures:
        parts.append(f"{record.failures} solves failed")
    return "  ".join(parts)
