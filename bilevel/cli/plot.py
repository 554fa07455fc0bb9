"""`bilevel plot`: draw a run, a comparison or a sweep."""

import argparse
from pathlib import Path

from bilevel.cli.failure import DONE, FAILED, UsageError, reason
from bilevel.cli.output import put, say
from bilevel.outer.comparison import COMPARISON_FILE, Comparison
from bilevel.outer.plotting import MissingPlotsError, plot_runs
from bilevel.outer.run import SUMMARY_FILE, Run
from bilevel.outer.sweeps.plan import PLAN_FILE, Plan

_FORMATS = (".png", ".pdf", ".svg")


def plot(options: argparse.Namespace) -> int:
    """Draw what the options name.

    **Returns:** the exit code.
    """
    directory: Path = options.run
    output: Path | None = options.output
    if output is not None and output.suffix.lower() not in _FORMATS:
        msg = f"--output {output}: the ending should be one of {', '.join(_FORMATS)}."
        raise UsageError(msg)
    if not directory.is_dir():
        msg = f"there is no directory {directory}."
        raise UsageError(msg)
    if (directory / PLAN_FILE).is_file() and not (directory / COMPARISON_FILE).is_file():
        return _plot_sweep(directory, output)
    return _plot(directory, output)


def _plot_sweep(directory: Path, output: Path | None) -> int:
    """A picture beside each comparison of a sweep: its settings are not policies of one."""
    try:
        plan = Plan.read(directory)
    except ValueError as error:
        raise UsageError(str(error)) from error
    folders = [directory / point.folder for point in plan.points]
    drawn = [folder for folder in folders if (folder / COMPARISON_FILE).is_file()]
    if not drawn:
        msg = f"{directory} holds a sweep of which no comparison is whole yet; go on with it first."
        raise UsageError(msg)
    if output is not None:
        msg = f"--output: a sweep has a picture a comparison; name one of them, such as {drawn[0]}."
        raise UsageError(msg)
    return max(_plot(folder, None) for folder in drawn)


def _plot(directory: Path, output: Path | None) -> int:
    try:
        if (directory / COMPARISON_FILE).is_file():
            comparison = Comparison.read(directory)
            runs, title, target = comparison.runs, comparison.task, comparison.mean_target
            metric_name, default = comparison.metric_name, "comparison.png"
        elif (directory / SUMMARY_FILE).is_file():
            run = Run.read(directory)
            runs, title, target = {run.summary.policy: [run]}, run.summary.task, None
            metric_name, default = run.summary.metric_name, "run.png"
        else:
            msg = (
                f"{directory} holds neither a run nor a comparison: there is no {SUMMARY_FILE} "
                f"and no {COMPARISON_FILE} in it."
            )
            raise UsageError(msg)
        picture = plot_runs(
            runs,
            output or directory / default,
            title=title,
            metric_name=metric_name,
            target=target,
        )
    except ValueError as error:
        raise UsageError(str(error)) from error
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        msg = f"{where}{reason(error)}."
        raise UsageError(msg) from error
    except MissingPlotsError as error:
        say(str(error))
        return FAILED
    put(str(picture))
    return DONE
