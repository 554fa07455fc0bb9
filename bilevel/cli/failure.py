"""Failures of a command, and what they look like."""

import difflib
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

DONE = 0
FAILED = 1
MISUSED = 2
INTERRUPTED = 130


class UsageError(Exception):
    """The command was given something it cannot take; the message is one line."""


class TaskError(Exception):
    """The user's file raised; the cause is what it raised."""


def nearest(name: str, known: Iterable[str]) -> str:
    """The rest of a sentence about an unknown name.

    >>> nearest("--epoch", ["--epochs", "--seed"])
    '; did you mean --epochs?'
    """
    names = sorted(known)
    if near := difflib.get_close_matches(name, names, n=1):
        return f"; did you mean {near[0]}?"
    return f"; there is {', '.join(names)}." if names else "."


def show_traceback(error: BaseException, file: Path) -> None:
    """Print a traceback from the first frame in the user's file on."""
    trace = _from_file(error.__traceback__, file.resolve())
    if trace is None and not isinstance(error, SyntaxError):
        trace = error.__traceback__
    lines = traceback.format_exception(type(error), error, trace)
    sys.stderr.write("".join(lines))


def _from_file(trace: TracebackType | None, file: Path) -> TracebackType | None:
    while trace is not None:
        if Path(trace.tb_frame.f_code.co_filename).resolve() == file:
            return trace
        trace = trace.tb_next
    return None
