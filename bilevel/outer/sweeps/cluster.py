"""Cluster: the runs of a sweep as jobs of Slurm, by submitit."""

import importlib
import os
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bilevel.outer.sweeps.stopping import Told
from bilevel.outer.sweeps.work import Ending, Outcome, Work

SLURM = "slurm"
_LOGS = "slurm"
_LOGGING = "SUBMITIT_LOG_LEVEL"
_EVERY = 0.5
_SAVING = 60.0
"""Seconds that running jobs have for saving, once the sweep is told to stop."""


def run_with_submitit(
    works: Sequence[Work],
    directory: Path,
    workers: int | None,
    parameters: Mapping[str, Any],
    told: Told,
    done: Callable[[Outcome], None],
) -> None:
    """Make runs as jobs.

    A job whose machine Slurm takes away is queued again and goes on from its checkpoints. One that
    dies is recorded as failed. Where the sweep is told to stop, jobs that wait are cancelled, and
    those that run are given a minute to save.

    **Arguments:**

    - `works`: the runs.
    - `directory`: of the sweep; submitit keeps its scripts and the output of jobs in `slurm`.
    - `workers`: jobs at a time; `None` for as many as Slurm gives.
    - `parameters`: of submitit's `update_parameters`, such as ``timeout_min``,
        ``slurm_partition``, ``gpus_per_node``; `cluster` is one of its executors, `slurm` by
        default, `local` for processes on this machine and `debug` for this process.
    - `told`, `done`: as of `run_with_joblib`.

    **Raises:** `ImportError` without submitit; `ValueError` for a parameter that it has not, and
    where there is no Slurm.
    """
    executor, array = _executor(directory, workers, dict(parameters))
    told.here = executor.cluster == "debug"
    waiting, running = deque(works), list[tuple[Work, Any]]()
    if array:
        with executor.batch():
            running = [(work, executor.submit(work)) for work in waiting]
        waiting.clear()
    most = len(works) if array else workers or len(works)
    deadline: float | None = None
    while waiting or running:
        if told.said and deadline is None:
            deadline = time.monotonic() + _SAVING
            _drop(waiting, done)
            for _, job in running:
                if job.state in ("PENDING", "UNKNOWN", "REQUEUED"):
                    job.cancel(check=False)
        while waiting and len(running) < most:
            work = waiting.popleft()
            running.append((work, executor.submit(work)))
        if deadline is not None and time.monotonic() > deadline:
            for _, job in running:
                job.cancel(check=False)
        ended = [pair for pair in running if pair[1].done()]
        running = [pair for pair in running if pair not in ended]
        for work, job in ended:
            done(_outcome(work, job, stopping=deadline is not None))
        if not ended and (waiting or running):
            time.sleep(_EVERY)


def _executor(directory: Path, workers: int | None, parameters: dict[str, Any]) -> tuple[Any, bool]:
    """The executor, and whether it takes all jobs at once."""
    submitit = _submitit()
    cluster = parameters.pop("cluster", SLURM)
    try:
        executor = submitit.AutoExecutor(folder=directory / _LOGS, cluster=cluster)
        array = cluster == SLURM
        if array and workers is not None:
            parameters["slurm_array_parallelism"] = workers
        executor.update_parameters(**{"name": "bilevel-sweep", **parameters})
    except (RuntimeError, NameError, TypeError, ValueError) as error:
        first = next(iter(str(error).splitlines()), "")
        msg = f"sweep: submitit refuses: {first}"
        raise ValueError(msg) from error
    return executor, array


def _submitit() -> Any:
    # Its import would configure logging anew, which closes the handlers of everybody else.
    before = os.environ.get(_LOGGING)
    os.environ[_LOGGING] = before or "NOCONFIG"
    try:
        return importlib.import_module("submitit")
    except ImportError as error:
        msg = "sweep: the backend slurm needs submitit: pip install submitit"
        raise ImportError(msg) from error
    finally:
        if before is None:
            del os.environ[_LOGGING]


def _drop(waiting: "deque[Work]", done: Callable[[Outcome], None]) -> None:
    while waiting:
        done(Outcome(waiting.popleft().place, Ending.NOT_BEGUN))


def _outcome(work: Work, job: Any, *, stopping: bool) -> Outcome:
    error: BaseException | None = job.exception()
    if error is None:
        return job.result()
    if stopping:
        return Outcome(work.place, Ending.INTERRUPTED)
    return work.failed(error)
