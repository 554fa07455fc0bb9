"""Shield: signals wait while something is being saved."""

import contextlib
import signal
import threading
from collections.abc import Generator
from types import FrameType

TOLD = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))
"""Besides Ctrl-C: what schedulers send before they kill."""

WAITING = (signal.SIGINT, *TOLD)


@contextlib.contextmanager
def shielded() -> Generator[None]:
    """Let what goes on inside come to its end; the first signal meanwhile is heard after it.

    A second Ctrl-C ends it all the same: a disk may hang. Threads besides the main one get no
    signals, and are not touched.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard: list[int] = []

    def wait(number: int, frame: FrameType | None) -> None:
        del frame
        heard.append(number)
        if heard.count(signal.SIGINT) > 1:
            raise KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in WAITING}
    # A handler that Python did not install cannot be put back, so it stays; what is ignored, too.
    ours = [number for number, kept in before.items() if kept not in (None, signal.SIG_IGN)]
    for number in ours:
        signal.signal(number, wait)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, before[number])
        if heard:
            signal.raise_signal(heard[0])
