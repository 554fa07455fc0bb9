"""Service: JAX's coordination service in a process of its own, which outlives process 0.

Where the service ends, JAX ends every process that it serves at once. Beside process 0, as JAX
starts it, it would take the others down without a word of who was lost.
"""

import contextlib
import importlib
import os
import subprocess
import sys
import time
from collections.abc import Generator
from typing import Any

import jax

_BYE = b"bye"
_LONGER = 3.0
"""Seconds that it outlives the silence after which the others miss process 0."""


@contextlib.contextmanager
def coordination(address: str, processes: int, silence: float) -> Generator[None]:
    """Have the service run until this ends, or for a while after this process does.

    **Arguments:**

    - `address`: where it listens; of a name, at all addresses of this machine, unless
        `JAX_COORDINATOR_BIND_ADDRESS` says otherwise.
    - `processes`: how many it serves.
    - `silence`: seconds without a heartbeat after which one is lost.
    """
    everywhere = f"[::]:{address.rpartition(':')[2]}"
    where = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS", everywhere)
    words = [sys.executable, "-m", __name__, where, str(processes), str(silence)]
    served = subprocess.Popen(  # noqa: S603
        words,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        # What ends a terminal's processes is not meant for it.
        start_new_session=True,
    )
    assert served.stdin is not None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            served.stdin.write(_BYE)
            served.stdin.close()
        served.wait()


def serve(address: str, processes: int, silence: float) -> None:
    """Serve until the process that has started this one says so, or has ended."""
    jax.config.update("jax_logging_level", "ERROR")
    # What jax.distributed.initialize calls beside process 0; it has no public name.
    runtime: Any = importlib.import_module("jax._src.lib")
    service = runtime._jax.get_distributed_runtime_service(  # noqa: SLF001
        address,
        processes,
        heartbeat_timeout=round(silence),
        shutdown_timeout=round(silence),
        recoverable=True,
    )
    if sys.stdin.buffer.read() != _BYE:
        time.sleep(silence + _LONGER)
    service.shutdown()


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
