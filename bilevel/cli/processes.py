"""Several processes: to be one of them, or to start all of them on this machine."""

import argparse
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Generator, Sequence
from types import FrameType

import jax

from bilevel.cli.failure import DONE, MISUSED, UsageError
from bilevel.cli.output import say
from bilevel.outer.processes.connection import connected_processes, speaks
from bilevel.outer.processes.shared import first
from bilevel.outer.processes.watch import LOST
from bilevel.outer.shield import WAITING

_HOST = "127.0.0.1"
_LONGER = 10.0
"""Seconds beyond the silence that the others have to leave when one has ended badly."""


def check_processes(options: argparse.Namespace) -> None:
    """See that the options fit together.

    **Raises:** `UsageError`.
    """
    if options.coordinator is not None and not isinstance(options.process, tuple):
        msg = "--coordinator needs --process I/N, the number of this process and of all."
        raise UsageError(msg)
    if not isinstance(options.process, tuple):
        return
    if options.coordinator is None:
        msg = "--process I/N needs --coordinator HOST:PORT, the same in all processes."
        raise UsageError(msg)
    if options.processes not in (None, options.process[1]):
        msg = (
            f"--process {options.process[0]}/{options.process[1]} is one of {options.process[1]}, "
            f"and --processes says {options.processes}; leave --processes out."
        )
        raise UsageError(msg)


def check_devices(options: argparse.Namespace) -> None:
    """See that there are as many devices as are asked for, and say which are simulated.

    **Raises:** `UsageError`.
    """
    count = options.devices
    if count is None:
        return
    own = jax.local_devices()
    if len(own) < count:
        kind = own[0].platform
        msg = (
            f"--devices {count}: there are {len(own)} here ({kind}); ask for as many as there are."
        )
        raise UsageError(msg)
    if own[0].platform == "cpu" and count > 1 and not options.quiet and first():
        say(f"{count} devices are simulated on the CPU: for trying things out, not for speed.")


@contextlib.contextmanager
def joined(options: argparse.Namespace) -> Generator[None]:
    """Be what the options say: one process by itself, or one of several, until all have ended.

    **Raises:** `UsageError` where the others cannot be reached.
    """
    _simulate(options.devices)
    if options.process is None:
        yield
        return
    if "JAX_LOGGING_LEVEL" not in os.environ:
        # That processes may be lost, which JAX warns of, is what the watch is for.
        jax.config.update("jax_logging_level", "ERROR")
    coordinator, process, processes = options.coordinator, None, None
    if isinstance(options.process, tuple):
        process, processes = options.process
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(
                connected_processes(coordinator, process, processes, silence=options.silence)
            )
        except (ValueError, RuntimeError) as error:
            what = " ".join(str(error).split()).removeprefix("connected_processes: ")
            msg = f"--process: {what}"
            raise UsageError(msg) from error
        stack.enter_context(_own_output(shows_others=first() and not options.quiet))
        try:
            yield
        except UsageError as error:
            if speaks(error):
                raise
            raise SystemExit(MISUSED) from None


def _simulate(count: int | None) -> None:
    if count is None or "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    # Where JAX is in use already, there are as many as there are.
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", count)


@contextlib.contextmanager
def _own_output(*, shows_others: bool) -> Generator[None]:
    """Keep standard output for what is printed in Python: gloo tells of its connections there.

    **Arguments:**

    - `shows_others`: whether that is seen at all, on standard error.
    """
    sys.stdout.flush()
    before, kept = sys.stdout, os.dup(1)
    elsewhere = os.dup(2) if shows_others else os.open(os.devnull, os.O_WRONLY)
    os.dup2(elsewhere, 1)
    os.close(elsewhere)
    with os.fdopen(kept, "w", encoding="utf-8") as own:
        sys.stdout = own
        try:
            yield
        finally:
            own.flush()
            sys.stdout = before
            os.dup2(kept, 1)


def start(options: argparse.Namespace, words: Sequence[str]) -> int:
    """Start all processes of a run on this machine, and wait for them.

    **Returns:** the exit code: what all have ended with, or what one of them has failed with; 75
    where one was lost.
    """
    count, each = options.processes, options.devices or 1
    coordinator = f"{_HOST}:{_free_port()}"
    # Of accelerators, each process has its own; on the CPU this means nothing.
    devices = [",".join(str(n) for n in range(i * each, (i + 1) * each)) for i in range(count)]
    common = {**os.environ, "JAX_COORDINATOR_BIND_ADDRESS": coordinator}
    children = [
        subprocess.Popen(  # noqa: S603
            [
                *(sys.executable, "-m", "bilevel", *words),
                *("--process", f"{number}/{count}", "--coordinator", coordinator),
            ],
            env={**common, "JAX_LOCAL_DEVICE_IDS": devices[number]},
            stdin=subprocess.DEVNULL,
            # A terminal's Ctrl-C goes to this process alone, which hands it on once.
            start_new_session=True,
        )
        for number in range(count)
    ]
    with _handed_on(children):
        return _outcome(children, options.silence + _LONGER)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind((_HOST, 0))
        return int(free.getsockname()[1])


@contextlib.contextmanager
def _handed_on(children: Sequence[subprocess.Popen[bytes]]) -> Generator[None]:
    """Signals reach one of the processes, which carries them to all."""

    def hand_on(number: int, frame: FrameType | None) -> None:
        del frame
        for child in children:
            if child.poll() is None:
                child.send_signal(number)
                return

    before = {number: signal.signal(number, hand_on) for number in WAITING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for child in children:
            child.kill()
            child.wait()


def _outcome(children: Sequence[subprocess.Popen[bytes]], patience: float) -> int:
    """Wait for all, and no longer than they need to leave when one has ended badly."""
    cause: int | None = None
    until = float("inf")
    while any(child.poll() is None for child in children) and time.monotonic() < until:
        time.sleep(0.05)
        bad = [number for number, child in enumerate(children) if child.poll()]
        if bad and cause is None:
            cause, until = bad[0], time.monotonic() + patience
    codes = [child.poll() for child in children]
    if cause is None:
        cause = next((number for number, code in enumerate(codes) if code), None)
    if cause is None:
        return DONE
    code = codes[cause] or LOST
    if code < 0:
        say(
            f"process {cause} of {len(children)} was ended by {signal.Signals(-code).name}, and "
            "the others have left. --resume goes on from the last checkpoint."
        )
        return LOST
    # What one has failed with says more than that the others have left because of it.
    return next((other for other in codes if other not in (None, DONE, LOST) and other > 0), code)
