"""Programs on several devices: simulated ones in one process, or one each in several processes."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PROGRAM = Path(__file__).with_name("mesh_program.py")


def on_devices(what: str, devices: int, *arguments: str, timeout: float = 2000) -> dict[str, Any]:
    """What the program prints, as JSON in its last line, with so many simulated devices."""
    return _finished([_started([what, *arguments], devices)], timeout)[0]


def in_processes(what: str, processes: int, timeout: float = 2000) -> list[dict[str, Any]]:
    """What each of several processes prints, of one device each, that run the program together.

    None is left behind: when one fails, or time is up, the others are killed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    return _finished(
        [_started([what, address, str(processes), str(k)], 1) for k in range(processes)], timeout
    )


def _started(words: list[str], devices: int) -> "subprocess.Popen[str]":
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    environment = {
        **os.environ,
        "XLA_FLAGS": flags,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    return subprocess.Popen(
        [sys.executable, str(PROGRAM), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def _finished(running: list["subprocess.Popen[str]"], timeout: float) -> list[dict[str, Any]]:
    end = time.monotonic() + timeout
    outputs: list[dict[str, Any]] = []
    try:
        for process in running:
            out, err = process.communicate(timeout=max(end - time.monotonic(), 0.1))
            assert process.returncode == 0, err[-4000:]
            outputs.append(json.loads(out.splitlines()[-1]))
    finally:
        for process in running:
            if process.poll() is None:
                process.kill()
                process.communicate()
    return outputs
