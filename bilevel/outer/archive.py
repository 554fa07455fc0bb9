"""Archive: the directory that a run keeps itself in while it goes on."""

import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from jaxtyping import PyTree

from bilevel.outer.checkpoints.durable import naming, sweep
from bilevel.outer.checkpoints.owner import Owner
from bilevel.outer.checkpoints.settings import Checkpoints
from bilevel.outer.checkpoints.store import Moment, OtherRunError, Store
from bilevel.outer.history import History, Record, line_of
from bilevel.outer.run import HISTORY_FILE, SUMMARY_FILE, THETA_FILE, Run


class ResumeError(ValueError):
    """A run cannot be gone on with: its files are damaged, or it is a run of something else.

    >>> import bilevel as bl, optax, tempfile
    >>> task = bl.Task(1.0, lambda theta, batch, fidelity: theta**2, full=bl.Budget(1))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     run = bl.optimize(task, optax.sgd(0.1), epochs=1, directory=folder, progress=False)
    ...     try:
    ...         bl.optimize(task, optax.sgd(0.2), epochs=2, directory=folder, resume=True)
    ...     except bl.ResumeError as error:
    ...         print("step_size was -0.1, is -0.2" in str(error))
    True
    """


class NotKeptError(OSError):
    """A run could not be written to its directory when it ended.

    - `run`: what was done, in memory.

    >>> import bilevel as bl
    >>> def kept(**arguments):
    ...     try:
    ...         return bl.optimize(**arguments)
    ...     except bl.NotKeptError as error:
    ...         print(error)
    ...         return error.run  # and save it elsewhere: run.save("another/directory")
    """

    def __init__(self, message: str, run: Run):
        super().__init__(message)
        self.run = run


class Mark(NamedTuple):
    """A moment from which training can go on.

    - `place`: epochs finished, and updates made in the one under way.
    - `state`: makes the pytree of arrays to keep; called where it is needed.
    - `metric`: after the last finished epoch.
    - `records`: bytes of history that belong to it.
    """

    place: Moment
    state: Callable[[], PyTree]
    metric: float | None
    records: int = 0


class Archive:
    """Keeps a run: each record at once, and checkpoints as often as is asked for.

    What cannot be written while the run goes on is said, and tried again: only at the end is it
    an error.

    **Arguments:**

    - `directory`: made if it does not exist; `None` keeps nothing.
    - `begun_with`: fingerprint of the run, kept with every checkpoint.
    - `checkpoints`: how often, and how many.
    """

    def __init__(
        self, directory: Path | None, begun_with: dict[str, str], checkpoints: Checkpoints
    ):
        # Absolute: a run outlives a change of the working directory.
        self.directory = None if directory is None else directory.absolute()
        self._settings = checkpoints
        self._store = (
            None if directory is None else Store(directory.absolute(), begun_with, checkpoints.last)
        )
        self._owner: Owner | None = None
        self._history: int | None = None
        self._lines = bytearray()
        self._flushed = 0
        self._saved = time.monotonic()
        self._best: tuple[float, Moment] | None = None
        self._better: Mark | None = None
        self._say: Callable[[str], None] = _warn
        self._complained = False
        self._damage: list[str] = []

    def claim(self) -> None:
        """Own the directory until `release`.

        **Raises:** `DirectoryInUseError`.
        """
        if self.directory is not None:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._owner = Owner(self.directory)

    def release(self) -> None:
        """Leave the directory to others."""
        if self._history is not None:
            os.close(self._history)
            self._history = None
        if self._owner is not None:
            self._owner.release()
            self._owner = None

    def open(self, history: History, say: Callable[[str], None]) -> None:
        """Begin, with the records of an earlier part of the run or none.

        **Arguments:**

        - `history`: of the earlier part.
        - `say`: tells what must not be missed.
        """
        if self.directory is None or self._store is None:
            return
        self._say = say
        sweep(self.directory)
        for line in self._damage:
            say(line)
        if history:
            self._store.set_aside()
            self._best = self._store.best()
        else:
            # What was there would outlive a run that ends before it saves, and look like it.
            for name in (THETA_FILE, SUMMARY_FILE, HISTORY_FILE):
                (self.directory / name).unlink(missing_ok=True)
            self._store.clear()
        self._lines = bytearray(b"".join(line_of(record) for record in history))
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        self._history = os.open(self.directory / HISTORY_FILE, flags, 0o644)
        self._flush()

    @property
    def due(self) -> bool:
        """Whether it is time for a checkpoint."""
        waited = time.monotonic() - self._saved
        return self._history is not None and waited >= self._settings.seconds

    @property
    def records(self) -> int:
        """Bytes of history so far."""
        return len(self._lines)

    def add(self, record: Record) -> None:
        """Keep a record."""
        if self._history is not None:
            self._lines += line_of(record)
            self._flush()

    def ended_epoch(self, mark: Mark) -> None:
        """Look whether an epoch ended better than all before it, and save if that is due."""
        if self._history is None:
            return
        if self._settings.best and mark.metric is not None and mark.metric == mark.metric:
            lowest = self._better.metric if self._better is not None else None
            if lowest is None and self._best is not None:
                lowest = self._best[0]
            if lowest is None or mark.metric < lowest:
                # Kept in memory until a checkpoint is due: a metric may fall in every epoch.
                self._better = mark._replace(state=_once(mark.state))
        if self.due:
            self.save(mark)

    def save(self, mark: Mark) -> None:
        """Write a checkpoint; what goes wrong is said."""
        try:
            self._save(mark)
        except OSError as error:
            self._say(f"a checkpoint could not be written, and is tried again: {in_words(error)}")
        # Also where it failed: a full disk should not be tried at every update.
        self._saved = time.monotonic()

    def close(self, run: Run, mark: Mark | None) -> None:
        """Keep the run as it ended, and the moment from which it can go on, if there is one.

        **Raises:** [`NotKeptError`][] naming file and cause.
        """
        if self._history is None or self.directory is None:
            return
        failures: list[OSError] = []
        parts = [self._write, lambda: run.save_result(self.directory or Path())]
        if mark is not None:
            parts.append(lambda: self._save(mark))
        # Each for itself: where one file cannot be written, another may.
        for part in parts:
            try:
                part()
            except OSError as error:
                failures.append(error)
        os.close(self._history)
        self._history = None
        if failures:
            msg = f"the run could not be kept: {in_words(failures[0])}"
            raise NotKeptError(msg, run) from failures[0]

    def restore(self, like: Callable[[Moment], PyTree]) -> tuple[Moment, PyTree, History]:
        """The newest checkpoint that is whole, and the records up to it.

        **Arguments:**

        - `like`: from a place to a state of the same structure.

        **Raises:** [`ResumeError`][] if the run was begun with something else, so far as
        that can be seen, or if its files cannot be read.
        """
        assert self._store is not None
        try:
            found = self._store.newest(like, strict=self._settings.strict)
            history = _ending_with(found.place.epoch, found.history)
        except OtherRunError as error:
            msg = (
                f"optimize: {self.directory} holds a run of something else: {error}. Go on with "
                "what it was begun with, or begin anew in another directory."
            )
            raise ResumeError(msg) from None
        except (OSError, ValueError) as error:
            msg = f"optimize: cannot go on with the run in {self.directory}: {error}"
            raise ResumeError(msg) from error
        self._damage = [f"{line}; the one before is taken" for line in found.damaged]
        return found.place, found.state, history

    def _save(self, mark: Mark) -> None:
        assert self._store is not None
        better = self._better
        if better is not None and better.place != mark.place:
            self._keep(better)
        self._keep(mark)
        if better is not None and better.metric is not None:
            self._best, self._better = (better.metric, better.place), None
        self._complained = False
        try:
            self._store.prune(self._best[1] if self._best and self._settings.best else None)
        except OSError as error:
            self._say(f"an old checkpoint could not be removed: {in_words(error)}")

    def _keep(self, mark: Mark) -> None:
        assert self._store is not None
        lines = bytes(self._lines[: mark.records])
        self._store.save(mark.place, mark.state(), lines, mark.metric)

    def _flush(self) -> None:
        try:
            self._write()
        except OSError as error:
            if not self._complained:
                self._say(
                    f"the history could not be written, and is tried again: {in_words(error)}"
                )
            self._complained = True

    def _write(self) -> None:
        """Append what is not on disk yet; what a failed write left there is written over."""
        assert self._history is not None
        while self._flushed < len(self._lines):
            rest = self._lines[self._flushed :]
            try:
                self._flushed += os.pwrite(self._history, rest, self._flushed)
            except OSError as error:
                raise naming(error, (self.directory or Path()) / HISTORY_FILE) from None


def _ending_with(epoch: int, lines: bytes) -> History:
    history = History.decode(lines, HISTORY_FILE)
    if not history or history[-1].epoch != epoch:
        msg = f"the checkpoint's history does not end with epoch {epoch}"
        raise ValueError(msg)
    return history


def _once(make: Callable[[], Any]) -> Callable[[], Any]:
    made = make()
    return lambda: made


def in_words(error: OSError) -> str:
    """File and cause."""
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or error}"


def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)
