"""Agreement: all processes of a run do something at the same update."""

import contextlib
import os
import secrets
import signal
import threading
import time
from collections.abc import Generator
from types import FrameType

from bilevel.outer.processes.client import Client, client
from bilevel.outer.processes.shared import several, shared
from bilevel.outer.shield import WAITING

_EVERY = 0.25
"""Seconds between two looks at whether something is asked for."""

_PATIENCE = 5.0
"""Seconds that the end waits for the thread that looks."""

_SAVE = "save"


class Alone:
    """What there is to agree on in a single process: nothing."""

    def ask_to_save(self) -> None:
        """Nobody has to be asked."""

    def hearing(self) -> contextlib.AbstractContextManager[None]:
        """Signals do what they did."""
        return contextlib.nullcontext()

    def saves(self) -> bool:
        """Not because of others."""
        return False

    def close(self, *, together: bool) -> None:
        """There is nothing to end."""


class Agreement:
    """Carries what one process asks for to all, and has them do it at the same update.

    A thread of each process tells the others which update its process has come to; none goes on
    to another meanwhile, and the first that none of them has begun is the one. The thread
    answers while its process waits for the others' devices, so nobody waits for ever.

    All processes have to make one at the same time, and to [`close`][] it.
    """

    def __init__(self) -> None:
        self._client: Client = client()
        self._name = f"bilevel/agreement/{shared(secrets.token_hex(8))}"
        self._lock = threading.Lock()
        self._round = 0
        self._passed = 0
        self._found: tuple[int, str] | None = None
        self._heard: str | None = None
        self._late = False
        self._open = True
        self._thread = threading.Thread(target=self._listen, name="bilevel-agree", daemon=True)
        self._thread.start()

    def ask_to_save(self) -> None:
        """Have all save, soon."""
        self._late = self._found is None

    @contextlib.contextmanager
    def hearing(self) -> Generator[None]:
        """Let the signals that end a run reach all processes, and end none of them before.

        A second Ctrl-C ends this one at once, and the others when they miss it.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        heard: list[int] = []

        def ask(number: int, frame: FrameType | None) -> None:
            del frame
            heard.append(number)
            if heard.count(signal.SIGINT) > 1:
                os.write(2, b"\nbilevel: left without saving.\n")
                os._exit(128 + number)
            self._heard = signal.Signals(number).name

        before = {number: signal.getsignal(number) for number in WAITING}
        ours = [number for number, kept in before.items() if callable(kept)]
        for number in ours:
            signal.signal(number, ask)
        try:
            yield
        except _Told as told:
            for number in ours:
                signal.signal(number, before[number])
            number = signal.Signals[told.name]
            if number in ours:
                signal.raise_signal(number)
            msg = f"by {told.name} in another process"
            raise KeyboardInterrupt(msg) from None
        finally:
            for number in ours:
                signal.signal(number, before[number])

    def saves(self) -> bool:
        """Before an update: whether all save now.

        **Raises:** what the signal raises that a process has heard, in all of them.
        """
        # Held while a round goes on: no further update is begun then.
        with self._lock:
            self._passed += 1
            if self._found is None or self._passed < self._found[0]:
                return False
            _, what = self._found
            self._found, self._late = None, False
            self._round += 1
        if what == _SAVE:
            return True
        raise _Told(what)

    def close(self, *, together: bool) -> None:
        """End.

        **Arguments:**

        - `together`: whether all processes do, at the same time; who leaves by itself, for
            something has gone wrong, waits for nobody.
        """
        if together:
            self._client.meet(f"{self._name}/end")
        self._open = False
        # Else the end of the interpreter may tear it out of compiled code, which aborts all.
        self._thread.join(timeout=_PATIENCE)

    def _listen(self) -> None:
        while self._open:
            time.sleep(_EVERY)
            try:
                self._look()
            except RuntimeError:
                return  # the runtime has gone, and with it the run

    def _look(self) -> None:
        number = self._round
        key = f"{self._name}/{number}"
        # A signal is asked for until the run ends by it, and a save until there was one.
        asked = self._heard or (_SAVE if self._late else None)
        if asked is not None and self._found is None:
            self._client.offer(f"{key}/what", asked)
        if self._found is not None:
            return
        what = self._client.find(f"{key}/what")
        if what is None:
            return
        with self._lock:
            if number != self._round:
                return  # it has been done meanwhile
            self._client.tell(f"{key}/at/{self._client.index}", str(self._passed))
            while len(places := self._client.entries(f"{key}/at/")) < self._client.count:
                if not self._open:
                    return
                time.sleep(0.02)
            self._found = max(int(place) for place in places.values()) + 1, what


def agreement() -> Agreement | Alone:
    """For a run of this process, or of all that JAX has connected."""
    return Agreement() if several() else Alone()


class _Told(BaseException):
    def __init__(self, name: str):
        super().__init__(name)
        self.name = name
