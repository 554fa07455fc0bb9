"""Connection: this process becomes one of several that compute together."""

import contextlib
import os
import time
import warnings
from collections.abc import Generator

import jax

from bilevel.outer.processes.client import Client, client
from bilevel.outer.processes.service import coordination
from bilevel.outer.processes.watch import FAILED, LATER, Watch

_MOST_TEXT = 300

_SILENCE = "bilevel/silence"
_ALONE = "bilevel/alone/"
"""Keys of processes that have waited for others to fail, too, in vain."""

_THREADS = 5.0
"""Seconds that this process waits for its own threads."""

_MARGIN = 3.0
"""Seconds that others may take longer to leave than they should."""


@contextlib.contextmanager
def connected_processes(
    coordinator: str | None = None,
    process: int | None = None,
    processes: int | None = None,
    *,
    silence: float = 15.0,
    patience: float = 120.0,
) -> Generator[None]:
    """Connect this process with others by JAX's distributed runtime, and look after them.

    To be entered before JAX is used, and once. Inside, `jax.devices()` are those of all
    processes, and [`optimize`][] trains with all of them, as docs/processes.md tells. On the CPU,
    collectives go over gloo.

    A process that is killed, frozen or cut off makes all others end, process 0 as any other: with
    a line on standard error and exit code 75, within 3 seconds after `silence` is over.

    **Arguments:**

    - `coordinator`: ``host:port`` of process 0, the same in all; `None` asks what has started the
        processes: Slurm, Open MPI, Kubernetes, a TPU pod.
    - `process`: number of this one, from 0; `None` likewise.
    - `processes`: how many there are; `None` likewise.
    - `silence`: seconds without a heartbeat after which a process is lost, from 3 to 20.
    - `patience`: seconds to wait for the others to come.

    **Raises:** `ValueError` naming the argument, or where nothing is found that has started
    several processes; `RuntimeError` where JAX has been used already or the others do not come.

    >>> with connected_processes("127.0.0.1:65500", 3, 2):
    ...     pass
    Traceback (most recent call last):
    ValueError: connected_processes: process should be from 0 to 1, got 3.
    """
    _check(process, processes, silence)
    coordinator, process, processes = _started(coordinator, process, processes, patience)
    with contextlib.ExitStack() as stack:
        if process == 0:
            stack.enter_context(coordination(coordinator, processes, silence))
        _connect(coordinator, process, processes, silence, patience)
        own = client()
        own.tell(_SILENCE, str(silence))
        watch = Watch(own, silence)
        try:
            yield
        except BaseException as error:
            # SystemExit and KeyboardInterrupt included: who leaves is missed by the others.
            if failed_together(error):
                _leave(own, watch)
            else:
                watch.stop()
                watch.wait(_THREADS)
            raise
        _leave(own, watch)


def failed_together(error: BaseException) -> bool:
    """Tell the other processes that this one has raised, and whether all of them have.

    Waits as long as they need to leave if they have not. If another is lost, this ends the
    process; see `Watch`.

    **Arguments:**

    - `error`: what was raised.
    """
    try:
        own = client()
    except RuntimeError:
        return True  # there are no others
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    try:
        own.offer(f"{FAILED}{own.index}", text[:_MOST_TEXT])
        until = time.monotonic() + float(own.find(_SILENCE) or 0.0) + LATER + _MARGIN
        while len(own.entries(FAILED)) < own.count:
            if time.monotonic() > until or own.find(f"{_ALONE}{own.index}") is not None:
                own.tell(f"{_ALONE}{own.index}", "")
                return False
            time.sleep(0.1)
    except RuntimeError:
        return False
    return True


def speaks(error: BaseException) -> bool:
    """Whether it is for this process to say what was raised: where all raise, process 0 does.

    **Arguments:**

    - `error`: what was raised.
    """
    return not failed_together(error) or _index() == 0


def _index() -> int:
    try:
        return client().index
    except RuntimeError:
        return 0


def _check(process: int | None, processes: int | None, silence: float) -> None:
    if processes is not None and processes < 1:
        msg = f"connected_processes: processes should be 1 or more, got {processes}."
        raise ValueError(msg)
    if process is not None and not 0 <= process < (processes or process + 1):
        most = (processes or 1) - 1
        msg = f"connected_processes: process should be from 0 to {most}, got {process}."
        raise ValueError(msg)
    if not 3.0 <= silence <= 20.0:
        msg = f"connected_processes: silence should be from 3 to 20 seconds, got {silence}."
        raise ValueError(msg)


def _started(
    coordinator: str | None, process: int | None, processes: int | None, patience: float
) -> tuple[str, int, int]:
    """What was given, and for the rest what has started this process."""
    if coordinator is not None and process is not None and processes is not None:
        return coordinator, process, processes
    # As jax.distributed.initialize does, which would not tell before it has connected.
    from jax._src.clusters import ClusterEnv  # noqa: PLC0415

    address, count, index, devices = ClusterEnv.auto_detect_unset_distributed_params(
        coordinator, processes, process, None, None, round(patience)
    )
    if address is None or count is None or index is None:
        msg = (
            "connected_processes: nothing that starts several processes was found. Give "
            "coordinator, process and processes; Slurm, Open MPI and Kubernetes tell them by "
            "themselves."
        )
        raise ValueError(msg)
    if devices is not None:
        os.environ.setdefault("JAX_LOCAL_DEVICE_IDS", ",".join(map(str, devices)))
    return address, index, count


def _connect(
    coordinator: str, process: int, processes: int, silence: float, patience: float
) -> None:
    # It would take SIGTERM for itself.
    jax.config.update("jax_enable_preemption_service", False)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        coordinator,
        processes,
        process,
        cluster_detection_method="deactivate",
        initialization_timeout=round(patience),
        heartbeat_timeout_seconds=round(silence),
        shutdown_timeout_seconds=round(silence),
        # Process 0 starts a service in any case: one that nobody asks, at any free port.
        coordinator_bind_address="127.0.0.1:0",
    )


def _leave(own: Client, watch: Watch) -> None:
    """Leave together: process 0 last, for with it goes what tells the others that all is well."""
    try:
        own.meet("bilevel/leaving")
        watch.stop()
        if own.index == 0:
            until = time.monotonic() + 10.0
            while time.monotonic() < until and own.living() != {0}:
                time.sleep(0.05)
        jax.distributed.shutdown()
    except RuntimeError as error:
        warnings.warn(f"processes did not leave together: {error}", RuntimeWarning, stacklevel=2)
    finally:
        watch.stop()
        watch.wait(_THREADS)
