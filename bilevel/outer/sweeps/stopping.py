"""Stopping: how every run of a sweep, wherever it is, comes to know that it should end."""

import os
import signal
import socket
import threading
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, Self

from bilevel.outer.callbacks import Callback, Event
from bilevel.outer.shield import WAITING

_STOP_FILE = ".stop"
_EVERY = 0.25
"""Seconds between two looks at whether to stop."""

_AGAIN = 20
"""Looks after which it is said again: what is raised at a bad moment may be lost."""


class Process(NamedTuple):
    """A process on a host."""

    host: str
    number: int

    @classmethod
    def this(cls) -> Self:
        """The one that asks."""
        return cls(socket.gethostname(), os.getpid())


class Stop:
    """A file in the sweep's directory that says: save what there is, and begin nothing.

    Runs may be in other processes and on other hosts; what they share is the directory.
    """

    def __init__(self, directory: Path):
        self._path = directory / _STOP_FILE

    @property
    def said(self) -> bool:
        """Whether it is there."""
        return self._path.exists()

    def say(self) -> None:
        """Have all runs end."""
        with suppress(OSError):
            self._path.touch()

    def unsay(self) -> None:
        """Let runs begin."""
        self._path.unlink(missing_ok=True)


class StopBetweenEpochs(Callback):
    """Ends a run after an epoch where the sweep is told to stop.

    For threads, and for hosts that no signal reaches.
    """

    def __init__(self, stop: Stop):
        self._stop = stop

    def epoch(self, event: Event) -> None:
        """Look."""
        del event
        if self._stop.said:
            raise KeyboardInterrupt


@contextmanager
def interruptible(stop: Stop, parent: Process) -> Generator[None]:
    """Interrupt what goes on inside when the sweep is told to stop, or its process has died.

    In a process that the parent started, and in its main thread; elsewhere the parent's own
    handlers, or [`StopBetweenEpochs`][], do.
    """
    here = Process.this()
    main = threading.current_thread() is threading.main_thread()
    if here.host != parent.host or here == parent or not main:
        yield
        return

    def told(number: int, frame: FrameType | None) -> None:
        del number, frame
        raise KeyboardInterrupt

    over = threading.Event()
    first = os.getppid()

    def alone() -> bool:
        return os.getppid() != first or not _alive(parent.number)

    def watch() -> None:
        looks = 0
        while not over.wait(_EVERY):
            if stop.said or alone():
                if looks % _AGAIN == 0:
                    os.kill(here.number, signal.SIGTERM)
                looks += 1

    before = {number: signal.signal(number, told) for number in (signal.SIGINT, signal.SIGTERM)}
    watcher = threading.Thread(target=watch, name="bilevel-stop", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()
        for number, handler in before.items():
            signal.signal(number, handler)
        if alone():
            os._exit(1)  # what there was to save is saved, and nobody takes the results


def _alive(number: int) -> bool:
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


class Told:
    """Signals to the process of the sweep: the first has the runs saved, the second is final.

    - `said`: whether there was one.
    - `here`: whether the runs are in this process, so that what a signal raises reaches them.
    """

    def __init__(self, stop: Stop):
        self._stop = stop
        self._before: dict[int, Any] = {}
        self.said = False
        self.here = False

    def __enter__(self) -> Self:
        """Take over the signals that Python handles already."""
        if threading.current_thread() is threading.main_thread():
            for number in WAITING:
                handler = signal.getsignal(number)
                if callable(handler):
                    self._before[number] = handler
                    signal.signal(number, self._hear)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        again, self.said = self.said, True
        self._stop.say()
        if again or self.here:
            self._before[number](number, frame)
            raise KeyboardInterrupt
        # Whoever asked for the signal hears of it, but what they raise would end the wait.
        with suppress(KeyboardInterrupt):
            self._before[number](number, frame)
