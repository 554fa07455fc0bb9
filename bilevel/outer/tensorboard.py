"""TensorBoard: a run's numbers as event files."""

import importlib
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bilevel.outer.callbacks import Callback, Event
from bilevel.outer.run import Run
from bilevel.outer.tracking import parameters_of, scalars


class TensorBoard(Callback):
    """Writes a run's numbers for TensorBoard, an epoch a step; with tensorboardX, no TensorFlow.

    A resumed run goes on with its series: what an earlier part wrote after the checkpoint is
    taken back. Where nothing can be written, that is said once, and the run goes on.

    **Arguments:**

    - `directory`: of the event files, one directory a run; made if it does not exist.
    - `parameters`: what the run is of, shown as a table.

    **Raises:** `ImportError` saying how to install it.

    >>> import bilevel as bl, optax, tempfile
    >>> task = bl.Task(1.0, lambda theta, batch, fidelity: theta**2, full=bl.Budget(1))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     board = bl.TensorBoard(folder, {"rate": 0.1})
    ...     run = bl.optimize(task, optax.sgd(0.1), epochs=2, callbacks=board, progress=False)
    ...     len(list(Path(folder).glob("events.out.*")))
    1
    """

    def __init__(
        self, directory: str | os.PathLike[str], parameters: Mapping[str, Any] | None = None
    ):
        try:
            importlib.import_module("tensorboardX")
        except ImportError as error:
            msg = "TensorBoard: needs tensorboardX: pip install tensorboardX."
            raise ImportError(msg) from error
        # Absolute: a run outlives a change of the working directory.
        self.directory = Path(directory).absolute()
        self.parameters = dict(parameters or {})
        self._writer: Any = None
        self._complained = False

    def start(self, event: Event) -> None:
        """Open a file of events, and take back what is later than this."""
        from tensorboardX import SummaryWriter  # noqa: PLC0415

        self._close()
        self._complained = False
        try:
            self._writer = SummaryWriter(
                str(self.directory), purge_step=event.epoch + 1 if event.epoch else None
            )
            if not event.epoch:
                rows = parameters_of(event, self.parameters).items()
                table = ["| name | value |", "| :-- | :-- |", *(f"| {k} | {v} |" for k, v in rows)]
                self._writer.add_text("configuration", "\n".join(table))
        except OSError as error:
            self._complain(error)
        if not event.epoch:
            self.epoch(event)

    def epoch(self, event: Event) -> None:
        """Write the numbers of the epoch."""
        if self._writer is None:
            return
        try:
            for name, value in scalars(event.record).items():
                self._writer.add_scalar(name, value, event.epoch)
        except OSError as error:
            self._complain(error)

    def end(self, run: Run) -> None:
        """Write what is left, and close the file."""
        del run
        self._close()

    def _close(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            try:
                writer.close()
            except OSError as error:
                self._complain(error)

    def _complain(self, error: OSError) -> None:
        self._writer = None
        if not self._complained:
            self._complained = True
            warnings.warn(
                f"TensorBoard: cannot write to {self.directory}, and stops to try: "
                f"{error.strerror or error}",
                RuntimeWarning,
                stacklevel=2,
            )
