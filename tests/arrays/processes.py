"""Programs on several devices: simulated ones in one process, or one each in several processes."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

PROGRAM = Path(__file__).with_name("mesh_program.py")


class Running(NamedTuple):
    process: "subprocess.Popen[str]"
    # Files and no pipes: one that is full would stop a process that the others wait for.
    out: Any
    err: Any


def on_devices(what: str, devices: int, timeout: float = 900) -> dict[str, Any]:
    """What the program prints, as JSON in its last line, with so many simulated devices."""
    return _finished([_started([what], devices)], timeout)[0]


def in_processes(what: str, processes: int, timeout: float = 900) -> list[dict[str, Any]]:
    """What each of several processes prints, of one device each, that run the program together.

    None is left behind: when one fails, or time is up, the others are killed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    return _finished(
        [_started([what, address, str(processes), str(k)], 1) for k in range(processes)], timeout
    )


def _started(words: list[str], devices: int) -> Running:
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    environment = {
        **os.environ,
        "XLA_FLAGS": flags,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    out, err = (tempfile.TemporaryFile("w+", encoding="utf-8") for _ in range(2))  # noqa: SIM115
    command = [sys.executable, str(PROGRAM), *words]
    return Running(subprocess.Popen(command, stdout=out, stderr=err, env=environment), out, err)


def _finished(running: list[Running], timeout: float) -> list[dict[str, Any]]:
    end = time.monotonic() + timeout
    try:
        while any(one.process.poll() is None for one in running):
            failed = [one for one in running if one.process.poll() not in (None, 0)]
            if failed or time.monotonic() > end:
                break
            time.sleep(0.1)
        codes = [one.process.poll() for one in running]
        assert codes == [0] * len(running), "\n".join(_read(one.err)[-4000:] for one in running)
        return [json.loads(_read(one.out).splitlines()[-1]) for one in running]
    finally:
        for one in running:
            if one.process.poll() is None:
                one.process.kill()
                one.process.wait()
            one.out.close()
            one.err.close()


def _read(file: Any) -> str:
    file.seek(0)
    return file.read()
