"""Failures of a command, and what they look like."""

import sys
import traceback
from pathlib import Path
from types import TracebackType

from bilevel.cli.output import say

DONE = 0
FAILED = 1
MISUSED = 2
INTERRUPTED = 130


class UsageError(Exception):
    """The command was given something it cannot take; the message is one line."""


class TaskError(Exception):
    """The user's file raised; the cause is what it raised."""


def reason(error: Exception) -> str:
    """What the system refused, in words.

    >>> reason(PermissionError(13, "Permission denied", "runs"))
    'Permission denied'
    """
    return (error.strerror if isinstance(error, OSError) else None) or str(error).rstrip(".")


def in_one_line(error: BaseException, file: Path) -> str:
    """An error of the user's file with where in the file it came up."""
    line = None
    if isinstance(error, SyntaxError):
        file, line = Path(error.filename or file), error.lineno
        what = error.msg
    else:
        what = next(iter(str(error).strip().splitlines()), "no message")
        trace = _from_file(error.__traceback__, file.resolve())
        while trace is not None:
            line = trace.tb_lineno
            trace = _from_file(trace.tb_next, file.resolve())
    place = f"{file}" if line is None else f"{file}, line {line}"
    return f"{place}: {type(error).__name__}: {what}"


def say_in_one_line(error: BaseException, file: Path) -> None:
    """Print an error of the user's file, and how to see more of it."""
    say(f"{in_one_line(error, file)} (--traceback shows where it came up)")


def show_traceback(error: BaseException, file: Path, *, whole: bool = False) -> None:
    """Print a traceback from the first frame in the user's file on, or all of it.

    Where no frame is in the user's file a traceback would tell of none of their lines, and
    the error alone is shown.
    """
    trace = error.__traceback__ if whole else _from_file(error.__traceback__, file.resolve())
    if trace is None:
        say_in_one_line(error, file)
        return
    lines = traceback.format_exception(type(error), error, trace)
    sys.stderr.write("".join(lines))


def _from_file(trace: TracebackType | None, file: Path) -> TracebackType | None:
    while trace is not None:
        if Path(trace.tb_frame.f_code.co_filename).resolve() == file:
            return trace
        trace = trace.tb_next
    return None
