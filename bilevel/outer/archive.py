"""Archive: the directory that a run keeps itself in while it goes on."""

import json
import time
from pathlib import Path

from jaxtyping import PyTree

from bilevel.outer.checkpoint import load_arrays, save_arrays
from bilevel.outer.history import History, HistoryWriter, Record
from bilevel.outer.run import (
    CHECKPOINT_FILE,
    HISTORY_FILE,
    SUMMARY_FILE,
    THETA_FILE,
    Run,
)

_SECONDS_BETWEEN_CHECKPOINTS = 60.0


class Archive:
    """Keeps a run: each record at once, a checkpoint every minute and at the end.

    **Arguments:**

    - `directory`: made if it does not exist; `None` keeps nothing.
    """

    def __init__(self, directory: Path | None):
        self.directory = directory
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

    def restore(self, like: PyTree, seed: int) -> tuple[PyTree, History]:
        """The last checkpoint, and the records up to it.

        **Arguments:**

        - `like`: a state of the same structure, with an `epoch`.
        - `seed`: that the run goes on with.

        **Raises:** `ValueError` if the checkpoint is of another task, optimizer, controller
        or seed.
        """
        assert self.directory is not None
        summary = self.directory / SUMMARY_FILE
        if summary.is_file():
            earlier = json.loads(summary.read_text(encoding="utf-8")).get("seed", seed)
            if earlier != seed:
                msg = f"optimize: {self.directory} was begun with seed={earlier}, got seed={seed}."
                raise ValueError(msg)
        state = load_arrays(self.directory / CHECKPOINT_FILE, like)
        history = History.read(self.directory / HISTORY_FILE)
        return state, history[: int(state["epoch"]) + 1]

    def _save_checkpoint(self) -> None:
        if self.directory is not None and self._state is not None:
            save_arrays(self.directory / CHECKPOINT_FILE, self._state)
            self._saved = time.monotonic()
