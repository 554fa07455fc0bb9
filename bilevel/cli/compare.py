"""`bilevel compare`: train a task under several policies."""

import argparse
from collections.abc import Sequence

from bilevel.cli.configuration import configure
from bilevel.cli.failure import DONE, UsageError
from bilevel.cli.output import put, say
from bilevel.cli.signals import leaving_on_signals
from bilevel.cli.training import (
    KeepConfiguration,
    as_typed,
    check_trainable,
    console,
    directory_for,
    load,
    make_directory,
    report,
)
from bilevel.outer.compare import check_policies, occupied_folder, recommended
from bilevel.outer.compare import compare as compare_policies
from bilevel.outer.plotting import MissingPlotsError, plot_runs
from bilevel.outer.policy import parse_policies


def compare(options: argparse.Namespace, words: Sequence[str]) -> int:
    """Compare the policies that the options name.

    **Arguments:**

    - `options`: parsed.
    - `words`: that they were parsed from, to be kept with the comparison.

    **Returns:** the exit code.
    """
    configuration = configure(options)
    file = load(options)
    file.check_seeds(options.seeds)
    task = file.build(options.seeds[0])
    check_trainable(task, options)
    try:
        written = options.policies
        policies = parse_policies(",".join(recommended(task)) if written is None else written)
        check_policies(policies, task, options.target)
    except ValueError as error:
        raise UsageError(str(error)) from error
    directory = directory_for(options, f"{task.name}-comparison")
    if directory is not None and not options.overwrite:
        occupied = occupied_folder(directory, policies, options.seeds)
        if occupied is not None:
            msg = f"{occupied} holds results already; add --overwrite, or name another directory."
            raise UsageError(msg)
    make_directory(directory)
    with leaving_on_signals() as leaving, file.guard():
        outcome = compare_policies(
            file.build,
            [policy.text for policy in policies],
            options.seeds,
            epochs=options.epochs,
            directory=directory,
            target=options.target,
            margin=options.margin,
            max_nonfinite=options.max_nonfinite,
            progress=not options.quiet,
            overwrite=options.overwrite,
            command=as_typed(words),
            callbacks=[KeepConfiguration(directory, options, configuration, file)],
        )
    out = console()
    put(outcome.to_json()) if options.json else out.print(outcome.table())
    runs = [run for group in outcome.runs.values() for run in group]
    if directory is not None and any(run.history for run in runs):
        try:
            picture = plot_runs(
                outcome.runs,
                directory / "comparison.png",
                title=outcome.task,
                metric_name=outcome.metric_name,
                target=outcome.mean_target,
            )
        except MissingPlotsError as error:
            say(f"no picture: {error}")
        else:
            if not options.json:
                out.print(f"kept in {directory}, picture in {picture}", soft_wrap=True)
    report(file, task, runs, directory)
    if outcome.interrupted:
        kept = "" if directory is None else f"; what was done so far is in {directory}"
        say(f"interrupted{kept}")
        return leaving.code
    return DONE
