"""`main`: from the words of a command line to an exit code."""

import argparse
import os
import sys
from collections.abc import Sequence

from bilevel.cli.failure import DONE, FAILED, INTERRUPTED, MISUSED, TaskError, UsageError
from bilevel.cli.output import put, say
from bilevel.cli.parser import parse


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    **Arguments:**

    - `argv`: the words after the program's name; `sys.argv` by default.

    **Returns:** the exit code: 0 done, 1 the run or the user's file failed or could not be kept,
    2 misused, 130 interrupted by Ctrl-C, 143 by SIGTERM, 138 by SIGUSR1; what was done so far is
    saved then.

    >>> main(["--version"])
    bilevel ...
    0
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if words == ["--version"]:
        import bilevel

        put(f"bilevel {bilevel.__version__}")
        return DONE
    try:
        return _main(words)
    except UsageError as error:
        say(str(error))
        return MISUSED
    except TaskError:
        return FAILED
    except KeyboardInterrupt as told:
        say(" ".join(["interrupted", *map(str, told.args)]) + ".")
        return getattr(told, "code", INTERRUPTED)
    except BrokenPipeError:
        # Whoever read the output has left; the interpreter must not trip over it at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED


def _train(options: argparse.Namespace, words: list[str]) -> int:
    from bilevel.cli.configuration import located
    from bilevel.outer.archive import NotKeptError
    from bilevel.outer.checkpoints.owner import DirectoryInUseError

    try:
        if options.command == "run":
            from bilevel.cli.run import run

            return run(options, words)
        if options.command == "sweep":
            from bilevel.cli.sweep import sweep

            return sweep(options, words)
        from bilevel.cli.compare import compare

        return compare(options, words)
    except UsageError as error:
        raise UsageError(located(str(error), options)) from error
    except DirectoryInUseError as error:
        raise UsageError(str(error)) from error
    except NotKeptError as error:
        say(str(error))
        return FAILED


def _main(words: list[str]) -> int:
    try:
        options = parse(words)
    except SystemExit as leave:  # argparse has printed its help
        return int(leave.code or DONE)
    # Each command imports what it needs: help and errors come at once.
    if options.command in ("run", "compare", "sweep"):
        return _train(options, words)
    if options.command == "plot":
        from bilevel.cli.plot import plot

        return plot(options)
    if options.command == "report":
        from bilevel.cli.report import report

        return report(options)
    if options.command == "schema":
        from bilevel.cli.configuration import schema

        put(schema(options.of))
        return DONE
    from bilevel.cli.info import info

    return info(options)
