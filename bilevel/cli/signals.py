"""Signals: being told to leave is to save and leave, with an exit code that says who told."""

import contextlib
import signal
import threading
from collections.abc import Generator
from types import FrameType

from bilevel.cli.failure import INTERRUPTED
from bilevel.outer.shield import TOLD


class Told(KeyboardInterrupt):
    """A signal said to leave: what was done so far is saved, as it is after Ctrl-C.

    - `code`: of the exit.
    """

    def __init__(self, number: int):
        super().__init__(f"by {signal.Signals(number).name}")
        self.code = 128 + number


class Leaving:
    """What said to leave.

    - `code`: of the exit, 128 and the signal's number, as shells have it.
    """

    def __init__(self) -> None:
        self.code = INTERRUPTED


@contextlib.contextmanager
def leaving_on_signals() -> Generator[Leaving]:
    """Let the signals interrupt what goes on inside, as Ctrl-C does."""
    leaving = Leaving()
    if threading.current_thread() is not threading.main_thread():
        yield leaving
        return

    def told(number: int, frame: FrameType | None) -> None:
        del frame
        # Not ignored from here on: Python drops what is raised within a callback of its garbage
        # collector, and then the next one is heard. While a run is being saved they wait.
        asked = Told(number)
        leaving.code = asked.code
        raise asked

    before = {number: signal.signal(number, told) for number in TOLD}
    try:
        yield leaving
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
