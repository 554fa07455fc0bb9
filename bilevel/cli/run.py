"""`bilevel run`: train a task."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.text import Text

from bilevel.cli.configuration import Configuration, configure
from bilevel.cli.failure import DONE, FAILED, UsageError
from bilevel.cli.output import put, say
from bilevel.cli.processes import check_devices, check_processes, joined, start
from bilevel.cli.signals import leaving_on_signals
from bilevel.cli.taskfile import TaskFile
from bilevel.cli.training import (
    KeepConfiguration,
    check_trainable,
    console,
    directory_for,
    load,
    make_directory,
    report,
)
from bilevel.outer.archive import ResumeError
from bilevel.outer.assignment import controller_for, default_policy
from bilevel.outer.callbacks import Callback
from bilevel.outer.checkpoints.sharded import orbax_library
from bilevel.outer.checkpoints.store import has_checkpoints
from bilevel.outer.devices import DevicesError
from bilevel.outer.diagnostics import diagnose
from bilevel.outer.finding import Weight
from bilevel.outer.mlflow import MLflow
from bilevel.outer.optimize import NonFiniteError, optimize
from bilevel.outer.policy import parse_policy
from bilevel.outer.processes.shared import decided, first
from bilevel.outer.run import INTERRUPTED as STATUS_INTERRUPTED
from bilevel.outer.run import Run, holds_run
from bilevel.outer.task import Task
from bilevel.outer.tensorboard import TensorBoard


def run(options: argparse.Namespace, words: Sequence[str]) -> int:
    """Train the task that the options name.

    **Arguments:**

    - `options`: parsed.
    - `words`: that they were parsed from, for processes to be started with.

    **Returns:** the exit code.
    """
    _check_options(options)
    configuration = configure(options)
    check_processes(options)
    if options.processes is not None and options.process is None:
        return start(options, words)
    with joined(options):
        return _run(options, configuration)


def _run(options: argparse.Namespace, configuration: Configuration) -> int:
    check_devices(options)
    file = load(options)
    task = file.build(options.seed)
    check_trainable(task, options)
    try:
        written = options.policy
        policy = parse_policy(default_policy(task) if written is None else written)
        controller = controller_for(policy, task)
    except ValueError as error:
        raise UsageError(str(error)) from error
    directory = _agreed(lambda: _directory(options, f"{task.name}-{policy.text}"))
    callbacks: list[Callback] = []
    if first():
        kept = KeepConfiguration(directory, options, configuration, file)
        callbacks = [kept, *_trackers(options, {"policy": policy.text, **kept.effective})]
    try:
        with leaving_on_signals() as leaving, file.guard():
            outcome = optimize(
                task,
                controller=controller,
                epochs=options.epochs,
                directory=directory,
                seed=options.seed,
                max_nonfinite=options.max_nonfinite,
                progress=not options.quiet,
                overwrite=options.overwrite,
                resume=options.resume,
                label=policy.text,
                checkpoints=options.checkpoints,
                callbacks=callbacks,
                devices=options.devices,
            )
    except (ResumeError, FileExistsError, DevicesError) as error:
        raise UsageError(str(error).removeprefix("optimize: ")) from error
    except NonFiniteError as error:
        if options.quiet and first():  # else the progress has said it
            say(str(error))
        return FAILED
    if first():
        _show(options, file, task, outcome, directory)
    return leaving.code if outcome.status == STATUS_INTERRUPTED else DONE


def _show(
    options: argparse.Namespace, file: TaskFile, task: Task, outcome: Run, directory: Path | None
) -> None:
    if options.json:
        put(outcome.summary.to_json())
    else:
        console().print(outcome.table(), *_advice(outcome))
    report(file, task, [outcome], directory)
    if outcome.status == STATUS_INTERRUPTED and options.quiet:
        kept = "" if directory is None else f"; what was done so far is in {directory}"
        say(f"{outcome.summary.message}{kept}")


def _directory(options: argparse.Namespace, name: str) -> str | None:
    directory = directory_for(options, name)
    _check_directory(options, directory)
    make_directory(directory)
    return None if directory is None else str(directory)


def _agreed(choose: Callable[[], str | None]) -> Path | None:
    """The directory that process 0 chooses: others might see what it has made already."""
    directory = decided(choose, UsageError)
    return None if directory is None else Path(directory)


def _advice(outcome: Run) -> list[Text]:
    """What the history says that would change something, a line each."""
    found = diagnose(outcome.history, outcome.summary)
    return [
        Text(f"{each.weight.name.lower()}: {each}")
        for each in found
        if each.weight is not Weight.NOTE
    ]


def _trackers(options: argparse.Namespace, parameters: dict[str, Any]) -> list[Callback]:
    """What else is to be told of the run.

    **Raises:** `UsageError` where its library is not installed.
    """
    found: list[Callback] = []
    try:
        if options.tensorboard is not None:
            found.append(TensorBoard(options.tensorboard, parameters))
        if options.mlflow is not None:
            found.append(MLflow(options.mlflow, parameters=parameters))
        if options.checkpoints.backend == "orbax":
            orbax_library()
    except ImportError as error:
        raise UsageError(str(error)) from error
    return found


def _check_options(options: argparse.Namespace) -> None:
    if options.resume and options.overwrite:
        msg = "--resume goes on with a run and --overwrite replaces it; give one of them."
        raise UsageError(msg)
    if options.resume and options.directory is None:
        msg = "--resume needs --directory, the one the run was kept in."
        raise UsageError(msg)


def _check_directory(options: argparse.Namespace, directory: Path | None) -> None:
    if directory is None:
        return
    if options.resume and not has_checkpoints(directory):
        msg = f"{directory} holds no run to go on with: there are no checkpoints in it."
        raise UsageError(msg)
    if holds_run(directory) and not (options.overwrite or options.resume):
        msg = f"{directory} holds a run already; add --overwrite or --resume, or name another."
        raise UsageError(msg)
