"""Archive: the directory that a run keeps itself in while it goes on."""

import math
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from jaxtyping import PyTree

from bilevel.outer.checkpoints.durable import naming, sweep
from bilevel.outer.checkpoints.owner import DirectoryInUseError, Owner
from bilevel.outer.checkpoints.settings import Checkpoints
from bilevel.outer.checkpoints.store import Moment, Store, Stored
from bilevel.outer.fingerprint import OtherRunError
from bilevel.outer.history import History
from bilevel.outer.processes.shared import decided, same_everywhere, shared
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
    - `records`: how many records of the history belong to it.
    - `callbacks`: their states, as JSON.
    """

    place: Moment
    state: Callable[[], PyTree]
    metric: float | None
    records: int = 0
    callbacks: bytes = b""


_EVERY = 1.0
"""Seconds between two writes of records."""

_MOST = 1024
"""Records that are written at once."""


class Archive:
    """Keeps a run: its records within a second, and checkpoints as often as is asked for.

    What cannot be written while the run goes on is said, and tried again: only at the end is it
    an error.

    **Arguments:**

    - `directory`: made if it does not exist; `None` keeps nothing.
    - `begun_with`: fingerprint of the run, kept with every checkpoint.
    - `checkpoints`: how often, and how many.
    - `writes`: whether this process does; of several, one.
    - `together`: whether the others have to take part, for each has arrays of its own.
    """

    def __init__(
        self,
        directory: Path | None,
        begun_with: dict[str, str],
        checkpoints: Checkpoints,
        *,
        writes: bool = True,
        together: bool = False,
    ):
        self._writes, self.together = writes, together
        # Absolute: a run outlives a change of the working directory.
        self.directory = None if directory is None else directory.absolute()
        self._settings = checkpoints
        self._store = (
            None
            if directory is None
            else Store(
                directory.absolute(),
                begun_with,
                checkpoints.last,
                orbax=checkpoints.backend == "orbax",
                writes=writes,
                together=together,
            )
        )
        self._opened = False
        self._owner: Owner | None = None
        self._history: int | None = None
        self._records = History()
        self._written = self._bytes = 0  # records on disk, and their length
        self._flushed = 0.0
        self._saved = time.monotonic()
        self._best: tuple[float, Moment] | None = None
        self._better: Mark | None = None
        self._say: Callable[[str], None] = _warn
        self._compilations: Callable[[], tuple[int, int]] = lambda: (0, 0)
        self._complained = False
        self._damage: list[str] = []

    def claim(self) -> None:
        """Own the directory until `release`.

        **Raises:** `DirectoryInUseError`.
        """
        if self.directory is not None:
            decided(self._own, DirectoryInUseError, OSError)

    def _own(self) -> None:
        assert self.directory is not None
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

    def open(
        self,
        history: History,
        say: Callable[[str], None],
        compilations: Callable[[], tuple[int, int]],
    ) -> None:
        """Begin, with the records of an earlier part of the run or none.

        **Arguments:**

        - `history`: of the earlier part; what is appended to it is kept.
        - `say`: tells what must not be missed.
        - `compilations`: how many there were so far, of the update and of all else.
        """
        if not self.keeps:
            return
        self._say, self._compilations = say, compilations
        self._records = history
        if self._writes:
            self._begin()
        if self.together:
            best = shared(self._best)
            self._best = None if best is None else (best[0], Moment(*best[1]))
        self._opened = True

    def _begin(self) -> None:
        assert self.directory is not None
        assert self._store is not None
        sweep(self.directory)
        for line in self._damage:
            self._say(line)
        if self._records:
            self._store.set_aside()
            self._best = self._store.best()
        else:
            # What was there would outlive a run that ends before it saves, and look like it.
            for name in (THETA_FILE, SUMMARY_FILE, HISTORY_FILE):
                (self.directory / name).unlink(missing_ok=True)
            self._store.clear()
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        self._history = os.open(self.directory / HISTORY_FILE, flags, 0o644)
        self._flush()

    @property
    def due(self) -> bool:
        """Whether it is time for a checkpoint, and this process can write it by itself."""
        return self._late and not self.together

    @property
    def overdue(self) -> bool:
        """Whether it is time for one in which all processes have to take part."""
        return self._late and self.together and self._writes

    @property
    def _late(self) -> bool:
        return self._opened and time.monotonic() - self._saved >= self._settings.seconds

    @property
    def keeps(self) -> bool:
        """Whether there is a directory to keep anything in, and this process has a part in it."""
        return self.directory is not None and (self._writes or self.together)

    def grew(self, metric: float | None) -> bool:
        """The history has another record: write it, or let it wait a moment for others.

        **Returns:** whether the end of an epoch with this metric is to be told with a mark.
        """
        # In every epoch, however short: one look at the clock, and comparisons.
        if not self._opened:
            return False
        now = time.monotonic()
        # Those in columns at once: as single ones they would take three times as long.
        if self._records.packed > self._written or now - self._flushed >= _EVERY:
            self._flush()
        late = now - self._saved >= self._settings.seconds
        return (late and not self.together) or self._improves(metric)

    def ended_epoch(self, mark: Mark) -> None:
        """Remember an epoch that ended better than all before it, and save if that is due."""
        if self._improves(mark.metric):
            # Kept in memory until a checkpoint is due: a metric may fall in every epoch.
            self._better = mark
        if self.due:
            self.save(mark)

    def _improves(self, metric: float | None) -> bool:
        if metric is None or not self._settings.best:
            return False
        better = self._better
        if better is not None and better.metric is not None:
            return metric < better.metric
        return not math.isnan(metric) if self._best is None else metric < self._best[0]

    def save(self, mark: Mark) -> None:
        """Write a checkpoint; what goes wrong is said."""
        self._flush()
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
        if not self._opened:
            return
        self._opened = False
        failures: list[OSError] = []
        parts: list[Callable[[], None]] = []
        if self._writes:
            parts = [self._write, lambda: run.save_result(self.directory or Path())]
        if mark is not None:
            parts.append(lambda: self._save(mark))
        # Each for itself: where one file cannot be written, another may.
        for part in parts:
            try:
                part()
            except OSError as error:
                failures.append(error)
        if self._history is not None:
            os.close(self._history)
            self._history = None
        if failures:
            msg = f"the run could not be kept: {in_words(failures[0])}"
            raise NotKeptError(msg, run) from failures[0]

    def restore(self, like: Callable[[Moment], PyTree]) -> Stored:
        """The newest checkpoint that is whole.

        **Arguments:**

        - `like`: from a place to a state of the same structure.

        **Raises:** [`ResumeError`][] if the run was begun with something else, so far as
        that can be seen, or if its files cannot be read.
        """
        assert self._store is not None
        try:
            with same_everywhere() as place:
                found = self._store.newest(like, strict=self._settings.strict)
                _check_end(found.place.epoch, found.history)
                place.append(found.place.name)
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
        return found

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
        if not self.together:
            self._store_one(mark)
            return
        try:
            # Who could not write its part has the others know: what follows is the same for all.
            with same_everywhere() as kept:
                self._store_one(mark)
                kept.append(mark.place.name)
        except ValueError as error:
            raise OSError(0, "another process could not write its part") from error

    def _store_one(self, mark: Mark) -> None:
        assert self._store is not None
        self._store.save(
            mark.place,
            mark.state(),
            self._records,
            mark.metric,
            records=mark.records,
            callbacks=mark.callbacks,
            compilations=self._compilations(),
        )

    def _flush(self) -> None:
        if not self._writes:
            return
        try:
            self._write()
        except OSError as error:
            if not self._complained:
                self._say(
                    f"the history could not be written, and is tried again: {in_words(error)}"
                )
            self._complained = True
        # Also where it failed: a full disk should not be tried at every epoch.
        self._flushed = time.monotonic()

    def _write(self) -> None:
        """Append what is not on disk yet; what a failed write left there is written over."""
        assert self._history is not None
        while self._written < len(self._records):
            last = min(self._written + _MOST, len(self._records))
            rest, place = memoryview(self._records.lines(self._written, last)), self._bytes
            while rest:
                try:
                    count = os.pwrite(self._history, rest, place)
                except OSError as error:
                    raise naming(error, (self.directory or Path()) / HISTORY_FILE) from None
                rest, place = rest[count:], place + count
            self._written, self._bytes = last, place


def _check_end(epoch: int, history: History) -> None:
    if not history or history[-1].epoch != epoch:
        msg = f"the checkpoint's history does not end with epoch {epoch}"
        raise ValueError(msg)


def in_words(error: OSError) -> str:
    """File and cause."""
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or error}"


def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)
