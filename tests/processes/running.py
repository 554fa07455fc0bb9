"""Command lines in several real processes of this machine."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).parents[2]
TASK = str(Path(__file__).with_name("task.py"))


def environment(**more: str) -> dict[str, str]:
    """Of a process of ours, each on one thread: there are more of them than cores."""
    paths = [str(ROOT), str(ROOT / "adapters"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **more}


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "bilevel", "run", TASK, "--x64", *words]


def run(*words: str, **more: str) -> "subprocess.CompletedProcess[str]":
    """To its end, by itself or with the processes that it starts."""
    return subprocess.run(
        command(*words),
        env=environment(**more),
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def free_address() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


class Group:
    """One run in several processes, as a scheduler starts them, with what they say."""

    def __init__(self, folder: Path, count: int, *words: str):
        address = free_address()
        self.directory = folder / "run"
        self._said = [folder / f"said-{number}" for number in range(count)]
        self.processes: list[subprocess.Popen[bytes]] = []
        for number, said in enumerate(self._said):
            more = ["--process", f"{number}/{count}", "--coordinator", address]
            with said.open("wb") as out:
                self.processes.append(
                    subprocess.Popen(
                        command("--directory", str(self.directory), *more, *words),
                        env=environment(JAX_COORDINATOR_BIND_ADDRESS=address),
                        stdout=out,
                        stderr=subprocess.STDOUT,
                    )
                )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def said(self, number: int) -> str:
        return self._said[number].read_text(errors="replace")

    def wait_until_connected(self) -> None:
        """All have the directory: what follows is compiling and training."""
        self.wait_for((self.directory / "owner.json").exists)

    def wait_for_epochs(self, count: int) -> None:
        history = self.directory / "history.jsonl"
        self.wait_for(lambda: history.exists() and history.read_text().count("\n") > count)

    def wait_for(self, condition: Any, seconds: float = 120.0) -> None:
        until = time.monotonic() + seconds
        while not condition():
            ended = [process.poll() for process in self.processes]
            assert ended == [None] * len(ended), (ended, [*map(self.said, range(len(ended)))])
            assert time.monotonic() < until, [*map(self.said, range(len(ended)))]
            time.sleep(0.05)

    def send(self, number: int, what: signal.Signals) -> None:
        self.processes[number].send_signal(what)

    def codes(self, *but: int, seconds: float = 120.0) -> dict[int, tuple[int | None, float]]:
        """How all others end, and after how many seconds; `None` who does not."""
        began = time.monotonic()
        ended: dict[int, tuple[int | None, float]] = {}
        others = [number for number in range(len(self.processes)) if number not in but]
        while len(ended) < len(others) and time.monotonic() - began < seconds:
            for number in others:
                code = self.processes[number].poll()
                if number not in ended and code is not None:
                    ended[number] = code, time.monotonic() - began
            time.sleep(0.02)
        return {number: ended.get(number, (None, seconds)) for number in others}
