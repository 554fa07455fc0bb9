"""The options of each command."""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from bilevel.cli.failure import UsageError
from bilevel.outer.suggestion import did_you_mean

_POLICIES = """policies:
  full                     the full solve in every step
  fixed=K, fixed=K:M       K primal and M adjoint iterations (M = K if not given)
  best-fixed[=RUNS]        the cheapest constant level that ends where full ends but for the
                           margin, searched among RUNS levels (8); in comparisons only
  schedule=linear:STEP     STEP levels up the ladder every epoch
  schedule=iterations:STEP STEP iterations more every epoch, from its coarsest to its finest
  hoag=SEQUENCE            HOAG's tolerances: exponential, quadratic or cubic
  prdp                     progressive refinement, the published rule
  error                    the gradient's error kept below its norm
  auto                     nothing to set: gradients compared at several levels now and then
  task                     the controller that the task brings
"""

_FILE = """the file:
  holds `task = bl.Task(...)` or `def task(name=default, ...) -> bl.Task`, whose arguments
  --set name=value sets; with several tasks in it, FILE.py:NAME chooses one
"""


_MOST_SEEDS = 10_000

_CONFIGURED = ("run", "compare", "sweep")
_WORD = re.compile(r"^[A-Za-z_][\w.]*=")
_KEYS = """configuration:
  KEY=VALUE words, such as task.width=64 or checkpoints.seconds=600, and --config FILE in TOML
  or YAML have the keys that `bilevel schema COMMAND` tells; words come before options, and
  options before the file; --set NAME=VALUE is task.NAME=VALUE
"""


_SETTINGS = """settings:
  --set NAME=VALUE,VALUE,... tries each of the values (commas within brackets or quotes do not
  count), and all combinations where it is given for several names; grid.NAME=[VALUE, ...] is the
  same among the words. The same command with the same --directory goes on with what was
  interrupted: runs that ended are kept, those begun go on from their checkpoints
"""

_CODES = """exit codes:
  0 all runs came to their ends, 1 some failed (see the table and runs.csv), 2 misused, 130
  interrupted by Ctrl-C, 143 by SIGTERM, 138 by SIGUSR1
"""


class Parser(argparse.ArgumentParser):
    """An argument parser that raises instead of printing usage and leaving."""

    def error(self, message: str) -> NoReturn:
        """Raise the message as one line."""
        raise UsageError(message)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options of a command line.

    **Raises:** `UsageError`, with the nearest known name for an unknown one.
    """
    parser, commands = _parsers()
    words = [word for word in argv if not word.startswith("-")]
    first_option = next((word for word in argv if word.startswith("-")), "")
    if words and words[0] not in commands and argv[0] == words[0]:
        msg = f"there is no command {words[0]!r}{did_you_mean(words[0], commands)}"
        raise UsageError(msg)
    options, surplus = parser.parse_known_args(argv)
    if options.command in _CONFIGURED:
        # Anywhere among the options, where a list of positional words could not stand.
        options.words = [word for word in surplus if _WORD.match(word)]
        surplus = [word for word in surplus if not _WORD.match(word)]
    if surplus:
        known = commands[options.command] if options.command else parser
        raise UsageError(_surplus(surplus[0], known))
    if options.command is None:
        what = f"{first_option} needs a command" if first_option else "which command"
        msg = f"{what}? There is {', '.join(commands)}; see bilevel --help."
        raise UsageError(msg)
    return options


def _surplus(argument: str, parser: argparse.ArgumentParser) -> str:
    if not argument.startswith("-"):
        return f"one argument too many: {argument!r}."
    option = argument.partition("=")[0]
    known = [name for action in parser._actions for name in action.option_strings]  # noqa: SLF001
    return f"there is no option {option}{did_you_mean(option, known)}"


def _parsers() -> tuple[Parser, dict[str, argparse.ArgumentParser]]:
    parser = Parser(
        prog="bilevel",
        description="Train through inner solves, at the accuracy that training needs.",
        epilog="bilevel COMMAND --help says more.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="store_true", help="print the version and leave")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    run = _command(commands, "run", "train a task", f"{_FILE}\n{_KEYS}\n{_POLICIES}")
    _add_task(run)
    run.add_argument(
        "--policy",
        metavar="P",
        help="how accurate each step is, see below (the task's own controller, else prdp on its "
        "ladder, else full)",
    )
    run.add_argument("--seed", type=_seed, metavar="N", help="random seed (0)")
    run.add_argument("--resume", action="store_true", help="go on with the run in --directory")
    run.add_argument(
        "--strict",
        action="store_true",
        default=None,
        help="with --resume: stop where a checkpoint is damaged",
    )
    run.add_argument(
        "--checkpoint-seconds",
        type=_share,
        metavar="S",
        help="between two checkpoints (60)",
    )
    run.add_argument("--tensorboard", metavar="DIR", help="event files for TensorBoard, into DIR")
    run.add_argument("--mlflow", metavar="URI", help="log to this tracking server of MLflow")
    _add_processes(run)
    run.add_argument("--keep", type=_whole, metavar="N", help="checkpoints, besides the best (2)")
    _add_output(run)

    compare = _command(
        commands, "compare", "train a task under several policies", f"{_FILE}\n{_KEYS}\n{_POLICIES}"
    )
    _add_task(compare)
    _add_comparison(compare)
    _add_output(compare)

    sweep = _command(
        commands,
        "sweep",
        "train a task under every choice of settings, policy and seed",
        f"{_SETTINGS}\n{_FILE}\n{_KEYS}\n{_POLICIES}\n{_CODES}",
    )
    _add_task(sweep)
    _add_comparison(sweep)
    _add_workers(sweep)
    sweep.add_argument(
        "--directory", type=_path, metavar="DIR", help="where to keep it (a new one in runs/)"
    )
    _add_reports(sweep)

    plot = _command(commands, "plot", "draw a run, a comparison or a sweep", None)
    plot.add_argument(
        "run", type=_path, metavar="RUN", help="directory of a run, comparison or sweep"
    )
    plot.add_argument(
        "--output", type=_path, metavar="FILE", help="picture to write (a PNG in the directory)"
    )

    report = _command(
        commands,
        "report",
        "write one page of runs: charts, tables, findings in words",
        "Comparisons have a part of the page each; runs of one task are put together. A run that\n"
        "goes on, or was killed, is shown as far as it came.",
    )
    report.add_argument(
        "runs",
        nargs="+",
        type=_path,
        metavar="RUN",
        help="directory of a run, comparison or sweep, or its comparison.json or history.jsonl",
    )
    report.add_argument(
        "--output", type=_path, metavar="FILE", help="page to write (report.html in the first RUN)"
    )
    report.add_argument("--text", action="store_true", help="print the findings, write no page")

    schema = _command(commands, "schema", "the JSON schema of a command's configuration", None)
    schema.add_argument("of", choices=_CONFIGURED, metavar="COMMAND", help="run, compare or sweep")

    info = _command(commands, "info", "versions, devices, adapters, and what is missing", None)
    info.add_argument("--json", action="store_true", help="print JSON")
    return parser, dict(commands.choices)


def _command(commands: Any, name: str, summary: str, epilog: str | None) -> Parser:
    return commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def _add_task(parser: Parser) -> None:
    parser.add_argument("task", metavar="FILE.py[:NAME]", help="the task (see below)")
    parser.add_argument(
        "--config", type=_path, metavar="FILE", help="a configuration in TOML or YAML (see schema)"
    )
    parser.add_argument(
        "--set",
        action="append",
        type=_assignment,
        default=[],
        metavar="NAME=VALUE",
        dest="settings",
        help="an argument of the task's function; may be given several times",
    )
    parser.add_argument(
        "--size",
        action="append",
        type=_size,
        default=argparse.SUPPRESS,
        metavar="SIZE",
        dest="settings",
        help="--set size=SIZE, for tasks that come in sizes: paper or small",
    )
    parser.add_argument(
        "--epochs",
        type=_whole,
        metavar="N",
        help="how long (the task's own); told to a task's function that takes `epochs`, too",
    )
    parser.add_argument(
        "--max-nonfinite",
        type=_whole,
        metavar="N",
        help="non-finite updates in a row before a run is given up (10)",
    )
    parser.add_argument(
        "--traceback", action="store_true", help="show whole tracebacks of what the file raises"
    )
    precision = parser.add_mutually_exclusive_group()
    precision.add_argument(
        "--x64", action="store_true", help="double precision by default, if the file does not say"
    )
    precision.add_argument(
        "--float32", action="store_true", help="single precision, if the file does not say"
    )


def _add_processes(parser: Parser) -> None:
    parser.add_argument(
        "--devices",
        type=_whole,
        metavar="N",
        help="devices that share each batch, in each process; simulated on the CPU (one, or in "
        "several processes all there are)",
    )
    parser.add_argument(
        "--processes",
        type=_whole,
        metavar="N",
        help="start so many on this machine, one run in all",
    )
    parser.add_argument(
        "--process",
        type=_process,
        metavar="I/N",
        help="be one of several that others start, with the same command; `auto` under Slurm, Open "
        "MPI or Kubernetes",
    )
    parser.add_argument(
        "--coordinator", metavar="HOST:PORT", help="with --process I/N: a free port where 0/N runs"
    )
    parser.add_argument(
        "--silence",
        type=_silence,
        metavar="S",
        help="seconds after which a process that does not answer is lost, and all others stop (15)",
    )


def _add_comparison(parser: Parser) -> None:
    parser.add_argument(
        "--policies",
        metavar="P,P,...",
        help="what to compare (what the task recommends, else full and run's policy)",
    )
    parser.add_argument(
        "--seeds",
        type=_seeds,
        metavar="N",
        help="how many seeds, from 0; or a list with commas in it, such as 1,2,25 (1)",
    )
    parser.add_argument(
        "--target",
        type=_real,
        metavar="X",
        help="metric that policies are timed to (the final one of full)",
    )
    parser.add_argument(
        "--margin",
        type=_share,
        metavar="X",
        help="part of full's final metric by which another may miss it (0.02)",
    )


def _add_workers(parser: Parser) -> None:
    parser.add_argument(
        "--workers",
        type=_whole,
        metavar="N",
        help="runs at a time (as many as cores; 1 where JAX has an accelerator)",
    )
    parser.add_argument(
        "--backend",
        metavar="NAME",
        help="of joblib, such as dask or ray; or slurm (processes on this machine)",
    )
    parser.add_argument("--address", metavar="URL", help="of the cluster, for dask and ray")
    parser.add_argument(
        "--slurm",
        action="append",
        type=_assignment,
        default=[],
        metavar="NAME=VALUE",
        dest="slurm_parameters",
        help="a parameter of submitit, such as timeout_min=600 or slurm_partition=gpu",
    )
    parser.add_argument(
        "--checkpoint-seconds",
        type=_share,
        metavar="S",
        help="between two checkpoints of a run (60)",
    )


def _add_output(parser: Parser) -> None:
    kept = parser.add_mutually_exclusive_group()
    kept.add_argument(
        "--directory", type=_path, metavar="DIR", help="where to keep it (a new one in runs/)"
    )
    kept.add_argument("--discard", action="store_true", help="keep nothing")
    _add_reports(parser)


def _add_reports(parser: Parser) -> None:
    parser.add_argument("--overwrite", action="store_true", help="replace what --directory holds")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")


def _path(word: str) -> Path:
    if not word or "\0" in word:
        msg = f"{word!r} is no path."
        raise argparse.ArgumentTypeError(msg)
    return Path(word)


def _whole(word: str) -> int:
    if not word.isdecimal() or int(word) < 1:
        msg = f"{word!r} is no whole number of 1 or more."
        raise argparse.ArgumentTypeError(msg)
    return int(word)


def _process(word: str) -> tuple[int, int] | str:
    if word == "auto":
        return word
    index, _, count = word.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        msg = f"{word!r} is no process: write I/N with I from 0 to N - 1, such as 0/4, or auto."
        raise argparse.ArgumentTypeError(msg)
    return int(index), int(count)


def _seed(word: str) -> int:
    if not word.isdecimal() or int(word) >= 2**32:
        msg = f"{word!r} is no seed: a whole number from 0 to 2**32 - 1."
        raise argparse.ArgumentTypeError(msg)
    return int(word)


def _seeds(word: str) -> tuple[int, ...]:
    if "," not in word:
        count = _whole(word)
        if count > _MOST_SEEDS:
            msg = f"{word!r} is more than {_MOST_SEEDS} seeds; for one seed write '{word},'."
            raise argparse.ArgumentTypeError(msg)
        return tuple(range(count))
    seeds = tuple(_seed(part.strip()) for part in word.split(",") if part.strip())
    if not seeds or len(set(seeds)) < len(seeds):
        msg = f"{word!r} should list seeds that differ from each other, such as 1,2,25."
        raise argparse.ArgumentTypeError(msg)
    return seeds


def _real(word: str) -> float:
    try:
        value = float(word)
    except ValueError:
        value = float("nan")
    if not abs(value) < float("inf"):
        msg = f"{word!r} is no finite number."
        raise argparse.ArgumentTypeError(msg)
    return value


def _share(word: str) -> float:
    value = _real(word)
    if value < 0:
        msg = f"{word!r} is negative."
        raise argparse.ArgumentTypeError(msg)
    return value


def _silence(word: str) -> float:
    value = _real(word)
    if not 3 <= value <= 20:
        msg = f"{word!r} should be from 3 to 20 seconds."
        raise argparse.ArgumentTypeError(msg)
    return value


def _size(word: str) -> tuple[str, str]:
    return "size", word


def _assignment(word: str) -> tuple[str, str]:
    name, separator, value = word.partition("=")
    if not separator or not name.isidentifier():
        msg = f"{word!r} is not of the form NAME=VALUE."
        raise argparse.ArgumentTypeError(msg)
    return name, value
