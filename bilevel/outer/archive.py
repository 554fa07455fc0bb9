"""Archive: the directory that a run keeps itself in while it goes on."""

import json
import time
from pathlib import Path

import numpy as np
from jaxtyping import PyTree

from bilevel.outer.checkpoint import fitted, read_arrays, save_arrays
from bilevel.outer.fingerprint import differences, some
from bilevel.outer.history import History, HistoryWriter, Record
from bilevel.outer.run import (
    CHECKPOINT_FILE,
    HISTORY_FILE,
    SUMMARY_FILE,
    THETA_FILE,
    Run,
)

_SECONDS_BETWEEN_CHECKPOINTS = 60.0


_FINGERPRINT = "begun_with"


class ResumeError(ValueError):
    """A run cannot be gone on with: its files are damaged, or it is a run of something else."""


class Archive:
    """Keeps a run: each record at once, a checkpoint every minute and at the end.

    **Arguments:**

    - `directory`: made if it does not exist; `None` keeps nothing.
    - `begun_with`: fingerprint of the run, kept with every checkpoint.
    """

    def __init__(self, directory: Path | None, begun_with: dict[str, str]):
        self.directory = directory
        self._begun_with = begun_with
        self._writer: HistoryWriter | None = None
        self._state: PyTree = None
        self._saved = time.monotonic()

    def open(self, history: History) -> None:
        """Begin, with the records of an earlier part of the run or none."""
        if self.directory is None:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        if not history:
            # What was there would outlive a run that ends before it saves, and look like it.
            for name in (THETA_FILE, SUMMARY_FILE, CHECKPOINT_FILE):
                (self.directory / name).unlink(missing_ok=True)
        self._writer = HistoryWriter(self.directory / HISTORY_FILE, history)

    def add(self, record: Record, state: PyTree) -> None:
        """Keep a record and, now and then, the state it was left in.

        **Arguments:**

        - `record`: of the epoch.
        - `state`: pytree of arrays from which training can go on after this epoch.
        """
        if self._writer is None:
            return
        self._writer.write(record)
        self._state = state
        if time.monotonic() - self._saved >= _SECONDS_BETWEEN_CHECKPOINTS:
            self._save_checkpoint()

    def close(self, run: Run) -> None:
        """Keep the run as it ended."""
        if self._writer is None or self.directory is None:
            return
        self._writer.close()
        run.save(self.directory)
        self._save_checkpoint()

    def restore(self, like: PyTree) -> tuple[PyTree, History]:
        """The last checkpoint, and the records up to it.

        **Arguments:**

        - `like`: a state of the same structure, with an `epoch`.

        **Raises:** [`ResumeError`][] if the run was begun with something else, so far as
        that can be seen, or if its files cannot be read.
        """
        assert self.directory is not None
        try:
            arrays = read_arrays(self.directory / CHECKPOINT_FILE)
            self._compare(arrays.pop(_FINGERPRINT, None))
            state = fitted(self.directory / CHECKPOINT_FILE, arrays, like)
            history = History.read(self.directory / HISTORY_FILE)
        except ResumeError:
            raise
        except (OSError, ValueError) as error:
            msg = f"optimize: cannot go on with the run in {self.directory}: {error}"
            raise ResumeError(msg) from error
        kept, epoch = history[: int(state["epoch"]) + 1], int(state["epoch"])
        if not kept or kept[-1].epoch != epoch:
            msg = (
                f"optimize: cannot go on with the run in {self.directory}: its checkpoint is of "
                f"epoch {epoch}, which its {HISTORY_FILE} does not hold."
            )
            raise ResumeError(msg)
        return state, kept

    def _compare(self, stored: np.ndarray | None) -> None:
        if stored is None:
            different = [f"{CHECKPOINT_FILE} does not say what the run was begun with"]
        else:
            different = differences(json.loads(stored.tobytes()), self._begun_with)
        if different:
            msg = (
                f"optimize: {self.directory} holds a run of something else: {some(different)}. Go "
                "on with what it was begun with, or begin anew in another directory."
            )
            raise ResumeError(msg)

    def _save_checkpoint(self) -> None:
        if self.directory is not None and self._state is not None:
            begun_with = np.frombuffer(json.dumps(self._begun_with).encode(), np.uint8)
            # One file, so that a state is never read with the fingerprint of another run.
            save_arrays(self.directory / CHECKPOINT_FILE, {**self._state, _FINGERPRINT: begun_with})
            self._saved = time.monotonic()
