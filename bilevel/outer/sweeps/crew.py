"""Crew: the workers of a sweep, by joblib."""

import contextlib
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager
from pickle import PicklingError
from typing import Any

import jax

from bilevel.outer.sweeps.attempt import was_under_way
from bilevel.outer.sweeps.stopping import Told
from bilevel.outer.sweeps.work import Outcome, Work

_LOST = ("KilledWorker", "ActorDiedError", "WorkerCrashedError")
"""What Dask and Ray raise where a worker has died."""


class DiedError(RuntimeError):
    """The process of a run ended without a word."""


def crew_size(workers: int | None) -> int:
    """How many runs go on at a time on this machine.

    **Arguments:**

    - `workers`: as asked for; `None` for the cores of this machine, or one where JAX has an
        accelerator, whose memory runs would fight for.

    **Raises:** `ImportError` without joblib.
    """
    joblib = _joblib()
    if workers is not None:
        return workers
    return joblib.cpu_count() if jax.default_backend() == "cpu" else 1


def run_with_joblib(
    works: Sequence[Work],
    workers: int | None,
    backend: str | None,
    address: str | None,
    told: Told,
    done: Callable[[Outcome], None],
) -> None:
    """Make runs by joblib, in whatever order they come to their ends.

    A process that dies takes a pool of joblib along. The runs that it may have died of are then
    made one at a time, each in a pool of its own, so that the one that does it is found, and the
    others go on.

    **Arguments:**

    - `works`: the runs.
    - `workers`, `backend`, `address`: as of `sweep`.
    - `told`: whether the sweep was told to stop.
    - `done`: is called with the outcome of each.

    **Raises:** `TypeError` where the task cannot be sent to other processes.
    """
    remaining = {work.place: work for work in works}
    with _context(backend, address):
        size = _size(workers, backend)
        told.here = size == 1
        suspects = _passed(remaining, size, told, done)
        while suspects:
            for place in suspects:
                # A pool of two for one run: for a pool of one joblib would run it right here.
                lost = _passed({place: remaining[place]}, 2, told, done, alone=True)
                if place not in lost:
                    del remaining[place]
            suspects = _passed(remaining, size, told, done) if remaining else []


def _passed(
    remaining: dict[int, Work],
    size: int,
    told: Told,
    done: Callable[[Outcome], None],
    *,
    alone: bool = False,
) -> list[int]:
    """Make runs, and strike off those that ended; the places of those that a process died with."""
    try:
        for outcome in _outcomes(list(remaining.values()), size):
            if not alone:
                del remaining[outcome.place]
            done(outcome)
    except PicklingError as error:
        msg = (
            f"sweep: the task cannot be sent to other processes: {error.__cause__ or error}. "
            "Define it in a file and name that to `bilevel sweep`, or take workers=1."
        )
        raise TypeError(msg) from error
    except Exception as error:
        if not isinstance(error, BrokenProcessPool) and type(error).__name__ not in _LOST:
            raise
        if told.said:  # Ctrl-C reaches every process of a terminal
            return []
        if alone:
            (work,) = remaining.values()
            died = DiedError("its process died: a crash in compiled code, or killed for its memory")
            died.__cause__ = error
            done(work.failed(died))
            return []
        suspects = [place for place, work in remaining.items() if was_under_way(work.directory)]
        if not suspects:
            raise
        return suspects
    return []


def _outcomes(works: Sequence[Work], size: int) -> Iterator[Outcome]:
    joblib = _joblib()
    backend, _ = joblib.parallel.get_active_backend()
    lazily = size == 1 or getattr(backend, "supports_return_generator", False)
    parallel = joblib.Parallel(
        n_jobs=size, batch_size=1, return_as="generator_unordered" if lazily else "list"
    )
    yield from parallel(joblib.delayed(_call)(work) for work in works)


def _call(work: Work) -> Outcome:
    return work()


def _context(backend: str | None, address: str | None) -> AbstractContextManager[Any]:
    """The backend by name; without one that of `joblib.parallel_config` around the sweep."""
    if backend is None:
        return contextlib.nullcontext()
    joblib = _joblib()
    given: Mapping[str, Any] = {}
    if backend == "ray":
        ray: Any = _library("ray", backend)
        importlib.import_module("ray.util.joblib").register_ray()
        if not ray.is_initialized():
            ray.init(address=address)
    elif backend == "dask":
        _library("distributed", backend)
        given = {} if address is None else {"scheduler_host": address}
    elif address is not None:
        msg = f"sweep: address is that of a cluster, for dask or ray; {backend} has none."
        raise ValueError(msg)
    try:
        return joblib.parallel_config(backend=backend, **given)
    except (ValueError, KeyError) as error:
        first = next(iter(str(error).strip("'\"").splitlines()), "")
        msg = f"sweep: joblib has no backend {backend!r}: {first}"
        raise ValueError(msg) from error


def _size(workers: int | None, backend: str | None) -> int:
    joblib = _joblib()
    _, configured = joblib.parallel.get_active_backend()
    if workers is None and backend in ("dask", "ray"):
        return -1  # as many as the cluster has
    if workers is None and configured not in (None, 1):
        return configured
    return crew_size(workers)


def _library(name: str, backend: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        msg = f"sweep: the backend {backend} needs {name}: pip install {name}"
        raise ImportError(msg) from error


def _joblib() -> Any:
    try:
        return importlib.import_module("joblib")
    except ImportError as error:
        msg = "sweep: needs joblib: pip install joblib"
        raise ImportError(msg) from error
