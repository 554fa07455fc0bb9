"""Watch: a process that is lost makes the others leave, instead of waiting for ever."""

import os
import sys
import threading
import time

from bilevel.outer.processes.client import Client

LOST = 75
"""Exit code of a process that left because another was lost: `EX_TEMPFAIL`, "try again"."""

FAILED = "bilevel/failed/"
"""Keys of processes that have raised, with what they have raised."""

_EVERY = 1.0
"""Seconds between two looks."""

_TICK = 0.5
LATER = 5.0
"""Seconds beyond the silence after which nobody can have been lost: the cause is another."""

_NOTICED = 3.0
"""Seconds beyond the silence in which a loss is noticed."""

_ANSWERED = 0.7
"""Part of the silence after which the service is lost: after nearly all of it JAX aborts."""


class Watch:
    """Looks after the other processes from threads of its own, until it is told to stop.

    Who is alive JAX's coordination service knows from heartbeats that no lock of Python's and no
    long step delays. A process that has raised by itself, and whose error is not that of all,
    is left behind as well, a while later.

    **Arguments:**

    - `client`: of this process.
    - `silence`: seconds without a heartbeat after which a process is lost.
    """

    def __init__(self, client: Client, silence: float):
        self._client, self._silence = client, silence
        self._stopped = threading.Event()
        self._answers = 0
        self._raised = float("inf")
        self._threads = [
            threading.Thread(target=target, name="bilevel-watch", daemon=True)
            for target in (self._look_after_all, self._ask, self._look_after_service)
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Look no longer."""
        self._stopped.set()

    def wait(self, seconds: float) -> None:
        """Wait until its threads have ended, after `stop`.

        One that is still asking when the interpreter ends would be torn out of compiled code,
        which aborts the process.
        """
        until = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(until - time.monotonic(), 0.0))

    def _look_after_all(self) -> None:
        while not self._stopped.is_set():
            try:
                living = self._client.living()
            except RuntimeError:
                return  # the service is gone: who asks it sees that
            lost = sorted(set(range(self._client.count)) - living)
            # Long after this one has raised by itself, the others have left because of it.
            if lost and time.monotonic() - self._raised < self._silence + _NOTICED:
                self._leave(
                    f"process {lost[0]} does not answer any more: killed, frozen or cut off"
                )
            self._stopped.wait(_EVERY)

    def _ask(self) -> None:
        """Ask the service, which answers at once if it is there, who has raised."""
        seen: dict[str, float] = {}
        while not self._stopped.is_set():
            try:
                failed = self._client.entries(FAILED)
            except RuntimeError:
                self._leave(_SERVICE)
                return
            self._answers += 1
            now = time.monotonic()
            if str(self._client.index) in failed:
                self._raised = min(self._raised, now)
            else:
                for name, what in failed.items():
                    # Later than a lost process is: that one is the cause of what others raise.
                    if now - seen.setdefault(name, now) > self._silence + LATER:
                        self._leave(f"process {name} has failed: {what}")
            self._stopped.wait(_EVERY)

    def _look_after_service(self) -> None:
        """Count seconds in which this process ran, and the service did not answer."""
        ticks, answers = 0, -1
        while not self._stopped.wait(_TICK):
            ticks = ticks + 1 if answers == self._answers else 0
            answers = self._answers
            if ticks * _TICK > _ANSWERED * self._silence:
                self._leave(_SERVICE)

    def _leave(self, why: str) -> None:
        """End this process from a thread: its own is in a collective that nothing interrupts."""
        if self._stopped.is_set():
            return
        own = f"process {self._client.index} of {self._client.count}"
        sys.stderr.write(
            f"bilevel: {why}. This one, {own}, leaves, too; the run can be resumed from its last "
            "checkpoint.\n"
        )
        sys.stderr.flush()
        os._exit(LOST)


_SERVICE = (
    "the coordination service does not answer any more: process 0, or its machine, is cut off"
)
