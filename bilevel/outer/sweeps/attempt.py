"""Attempt: what a run's folder says of how far the run came, and of why it failed."""

import dataclasses
import json
import os
import socket
import time
import traceback
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from bilevel.outer.checkpoints.durable import write_file
from bilevel.outer.run import COMPLETED, NONFINITE, STOPPED, SUMMARY_FILE

FAILURE_FILE = "failure.json"
TRACEBACK_FILE = "traceback.txt"
ATTEMPT_FILE = "attempt.json"

ENDED = (COMPLETED, STOPPED, NONFINITE)
"""Statuses of runs that are not run again."""


@dataclasses.dataclass(frozen=True)
class Failure:
    """Why a run came to nothing.

    - `cause`: the error, in a line.
    - `directory`: of the run; `traceback.txt` in it tells where it came up, where there is one.
    """

    cause: str
    directory: Path

    @property
    def traceback(self) -> Path | None:
        """The file that tells where it came up."""
        path = self.directory / TRACEBACK_FILE
        return path if path.is_file() else None


def finished(directory: Path) -> bool:
    """Whether the run of a directory came to its end, and is not to be run again."""
    try:
        stored: Any = json.loads((directory / SUMMARY_FILE).read_text(encoding="utf-8"))
        return stored["status"] in ENDED and not (directory / FAILURE_FILE).exists()
    except (OSError, ValueError, KeyError, TypeError):
        return False


def failure_of(directory: Path) -> Failure | None:
    """Why the run of a directory failed; `None` where none did."""
    try:
        stored: Any = json.loads((directory / FAILURE_FILE).read_text(encoding="utf-8"))
        return Failure(str(stored["cause"]), directory)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        return Failure(f"{FAILURE_FILE} cannot be read: {error}", directory)


def note_failure(directory: Path, error: BaseException) -> Failure:
    """Write down why a run failed, and where that came up."""
    lines = str(error).strip().splitlines()
    kind = type(error).__name__
    failure = Failure(f"{kind}: {lines[0]}" if lines else kind, directory)
    stored = {"cause": failure.cause, "host": socket.gethostname(), "time": time.time()}
    # A full disk fails the run, and takes no word of it: the parent is told all the same.
    with suppress(OSError):
        directory.mkdir(parents=True, exist_ok=True)
        told = "".join(traceback.format_exception(error))
        write_file(directory / TRACEBACK_FILE, told.encode())
        write_file(directory / FAILURE_FILE, json.dumps(stored).encode())
    return failure


def forget_failure(directory: Path) -> None:
    """A run that is begun again has not failed yet."""
    for name in (FAILURE_FILE, TRACEBACK_FILE):
        (directory / name).unlink(missing_ok=True)


@contextmanager
def under_way(directory: Path) -> Generator[None]:
    """Mark a run as begun: what is left of the mark tells of a process that died with it."""
    path = directory / ATTEMPT_FILE
    stored = {"process": os.getpid(), "host": socket.gethostname()}
    write_file(path, json.dumps(stored).encode())
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def was_under_way(directory: Path) -> bool:
    """Whether a process died with the run of a directory, or still has it."""
    return (directory / ATTEMPT_FILE).exists()
