"""MLflow: a run's numbers on a tracking server, which may die without taking the run along."""

import contextlib
import importlib
import queue
import threading
import time
import warnings
from collections.abc import Mapping
from typing import Any

from bilevel.outer.callbacks import Callback, Event
from bilevel.outer.history import Record
from bilevel.outer.run import COMPLETED, INTERRUPTED, STOPPED, Run
from bilevel.outer.tracking import parameters_of, scalars

_MOST_WAITING = 100_000
_MOST_METRICS = 1000
"""That the server takes at once."""

_MOST_PARAMETERS = 100
_MOST_TEXT = 500
_STATUS = {COMPLETED: "FINISHED", STOPPED: "FINISHED", INTERRUPTED: "KILLED"}


class MLflow(Callback):
    """Logs a run's numbers with MLflow, an epoch a step.

    A thread of its own talks to the server, so that a slow one does not hold up training. Where
    it cannot be reached, that is said once, and the run goes on without. A resumed run goes on
    with the same MLflow run, and no step is logged twice.

    **Arguments:**

    - `uri`: of the tracking server or store, such as ``"http://localhost:5000"``.
    - `experiment`: its name; made if it does not exist.
    - `name`: of the run; the task's by default.
    - `parameters`: what the run is of, besides what it knows itself.
    - `patience`: seconds to wait at the end for what is not logged yet.

    **Raises:** `ImportError` saying how to install it.

    >>> import bilevel as bl
    >>> def logged(task, optimizer):
    ...     tracker = bl.MLflow("http://localhost:5000", experiment="poisson")
    ...     return bl.optimize(task, optimizer, callbacks=[tracker])
    """

    def __init__(
        self,
        uri: str,
        experiment: str = "bilevel",
        name: str | None = None,
        parameters: Mapping[str, Any] | None = None,
        patience: float = 30.0,
    ):
        try:
            importlib.import_module("mlflow")
        except ImportError as error:
            msg = "MLflow: needs mlflow-skinny: pip install mlflow-skinny."
            raise ImportError(msg) from error
        self.uri, self.experiment, self.name = uri, experiment, name
        self.parameters = dict(parameters or {})
        self.patience = patience
        self._run: str | None = None
        self._link: _Link | None = None

    def start(self, event: Event) -> None:
        """Begin a run; `restore` says which, where it is one that goes on."""
        self._run = None
        name = self.name or event.task.name
        parameters = parameters_of(event, self.parameters)
        self._link = _Link(self.uri, self.experiment, name, parameters)
        if not event.epoch:
            self.epoch(event)

    def epoch(self, event: Event) -> None:
        """Have the numbers of the epoch logged."""
        if self._link is not None:
            self._link.log(event.record, self._run)

    def state(self) -> Any:
        """Which of MLflow's runs it is."""
        return self._run or (None if self._link is None else self._link.run)

    def restore(self, state: Any) -> None:
        """Go on with it."""
        self._run = state if isinstance(state, str) else None

    def end(self, run: Run) -> None:
        """Wait a while for what is not logged yet, and close the run there."""
        link, self._link = self._link, None
        if link is not None:
            link.close(_STATUS.get(run.status, "FAILED"), self.patience)


class _Link:
    """The thread that talks to a server; ends at the first thing that goes wrong."""

    def __init__(self, uri: str, experiment: str, name: str, parameters: Mapping[str, str]):
        self.run: str | None = None
        self._uri, self._experiment, self._name = uri, experiment, name
        self._parameters = parameters
        self._waiting: queue.Queue[tuple[Record, int, str | None] | str] = queue.Queue(
            _MOST_WAITING
        )
        self._failure: Exception | None = None
        self._complained = False
        self._thread = threading.Thread(target=self._work, name="bilevel-mlflow", daemon=True)
        self._thread.start()

    def log(self, record: Record, run: str | None) -> None:
        """Have it logged, in the run that goes on or a new one."""
        self._complain()
        if self._failure is None and not self._waiting.full():
            self._waiting.put((record, round(time.time() * 1000), run))

    def close(self, status: str, patience: float) -> None:
        """Say how the run ended, and wait for all to be logged."""
        if self._failure is None:
            with contextlib.suppress(queue.Full):
                self._waiting.put(status, timeout=patience)
            self._thread.join(patience)
            if self._thread.is_alive() and self._failure is None:
                self._failure = TimeoutError(f"not everything was logged within {patience:g} s")
        self._complain()

    def _complain(self) -> None:
        if self._failure is not None and not self._complained:
            self._complained = True
            cause = (str(self._failure).splitlines() or [type(self._failure).__name__])[0]
            warnings.warn(
                f"MLflow: {self._uri} is not logged to any more: {cause}",
                RuntimeWarning,
                stacklevel=4,
            )

    def _work(self) -> None:
        try:
            self._talk()
        except Exception as error:  # noqa: BLE001
            self._failure = error

    def _talk(self) -> None:
        from mlflow import MlflowClient  # noqa: PLC0415
        from mlflow.entities import Metric  # noqa: PLC0415

        client = MlflowClient(tracking_uri=self._uri)
        logged = -1
        while True:
            entries = [self._waiting.get()]
            # Many at once where the server is slower than the run.
            while len(entries) < _MOST_METRICS // 25 and not self._waiting.empty():
                entries.append(self._waiting.get())
            metrics: list[Any] = []
            status: str | None = None
            for entry in entries:
                if isinstance(entry, str):
                    status = entry
                    continue
                record, stamp, run = entry
                if self.run is None:
                    self.run, logged = self._begun(client, run)
                if record.epoch > logged:
                    metrics += [
                        Metric(name, value, stamp, record.epoch)
                        for name, value in scalars(record).items()
                    ]
                    logged = record.epoch
            if metrics and self.run is not None:
                client.log_batch(self.run, metrics=metrics)
            if status is not None:
                if self.run is not None:
                    client.set_terminated(self.run, status)
                return

    def _begun(self, client: Any, run: str | None) -> tuple[str, int]:
        """The run to log to, and the last epoch that is logged in it."""
        if run is not None:
            client.update_run(run, "RUNNING")
            # The budget's or the loss's may be missing: of no series is it known to be there.
            steps = [
                metric.step
                for name in client.get_run(run).data.metrics
                for metric in client.get_metric_history(run, name)
            ]
            return run, max(steps, default=-1)
        found = client.get_experiment_by_name(self._experiment)
        number = (
            client.create_experiment(self._experiment) if found is None else found.experiment_id
        )
        made = client.create_run(number, run_name=self._name).info.run_id
        self._log_parameters(client, made)
        return made, -1

    def _log_parameters(self, client: Any, run: str) -> None:
        from mlflow.entities import Param  # noqa: PLC0415

        listed = [Param(_key(k), v[:_MOST_TEXT]) for k, v in self._parameters.items()]
        for first in range(0, len(listed), _MOST_PARAMETERS):
            client.log_batch(run, params=listed[first : first + _MOST_PARAMETERS])


def _key(name: str) -> str:
    """As MLflow allows it."""
    kept = "".join(c if c.isalnum() or c in "_-. /" else "_" for c in name)
    return kept[:250] or "_"
