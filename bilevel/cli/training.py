"""What `run`, `compare` and `sweep` have in common: precision, directories, reports."""

import argparse
import json
import os
import shlex
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from bilevel.cli.configuration import Configuration
from bilevel.cli.failure import UsageError, reason
from bilevel.cli.taskfile import TaskFile
from bilevel.outer.callbacks import Callback, Event
from bilevel.outer.checkpoints.durable import write_file
from bilevel.outer.run import Run
from bilevel.outer.task import Task

ROOT = Path("runs")
CONFIGURATION_FILE = "configuration.json"
_WIDE = 120


def load(options: argparse.Namespace) -> TaskFile:
    """The task file of a command, in the precision it asks for."""
    # Before the file runs, which may say otherwise.
    if options.x64 or options.float32:
        jax.config.update("jax_enable_x64", bool(options.x64))
    return TaskFile(
        options.task, options.settings, epochs=options.epochs, traceback=options.traceback
    )


def check_trainable(task: Task, options: argparse.Namespace) -> None:
    """Refuse what would fail after compiling.

    **Raises:** `UsageError`.
    """
    if task.optimizer is None:
        msg = (
            f"the task {task.name!r} names no optimizer: give its Task optimizer=optax.adam(1e-3)."
        )
        raise UsageError(msg)
    if options.epochs is None and task.epochs is None:
        msg = f"the task {task.name!r} does not say how long it trains: give --epochs N."
        raise UsageError(msg)


def directory_for(options: argparse.Namespace, name: str) -> Path | None:
    """Where a command keeps its results: as asked, or a new folder under `runs`.

    **Raises:** `UsageError` for a directory that cannot be one.
    """
    if options.discard:
        return None
    if options.directory is not None:
        directory: Path = options.directory
        try:
            taken = directory.exists() and not directory.is_dir()
        except OSError as error:
            raise UsageError(_unwritable(directory, error)) from error
        if taken:
            msg = f"--directory {directory} is a file; name a directory."
            raise UsageError(msg)
        return directory
    slug = "".join(letter if letter.isalnum() else "-" for letter in name).strip("-") or "task"
    directory, number = ROOT / slug, 1
    while True:
        try:
            # Made at once: another command may be looking for a name, too.
            directory.mkdir(parents=True)
        except FileExistsError:
            number += 1
            directory = ROOT / f"{slug}-{number}"
        except OSError as error:
            raise UsageError(_unwritable(directory, error)) from error
        else:
            return directory


def make_directory(directory: Path | None) -> None:
    """Make the directory of the results, before anything is computed that it should keep.

    **Raises:** `UsageError` where nothing can be written to it.
    """
    if directory is None:
        return
    try:
        directory.mkdir(parents=True, exist_ok=True)
        # What permissions say is not what a mounted or a virtual file system does.
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise UsageError(_unwritable(directory, error)) from error


def as_typed(words: Sequence[str]) -> str:
    """A command as one would type it here: paths from the working directory on."""
    here = f"{Path.cwd()}{os.sep}"
    return shlex.join(["bilevel", *(word.removeprefix(here) for word in words)])


class KeepConfiguration(Callback):
    """Keeps what a command was run with, defaults included, once its run has the directory.

    - `effective`: the configuration.

    **Arguments:**

    - `directory`: of the results; `None` keeps nothing.
    - `options`, `configuration`, `file`: of the command.
    """

    def __init__(
        self,
        directory: Path | None,
        options: argparse.Namespace,
        configuration: Configuration,
        file: TaskFile,
    ):
        effective = configuration.model_dump(mode="json")
        effective["task"] = file.effective
        self.effective: dict[str, Any] = effective
        content = {"command": options.command, "file": str(options.task)}
        self._content = json.dumps({**content, "configuration": effective}, indent=2)
        self._file = None if directory is None else directory.absolute() / CONFIGURATION_FILE

    def start(self, event: Event) -> None:
        """Write it.

        **Raises:** `UsageError` where that cannot be done.
        """
        del event
        file, self._file = self._file, None  # of a comparison's runs, the first writes it
        if file is None:
            return
        try:
            write_file(file, f"{self._content}\n".encode())
        except OSError as error:
            raise UsageError(_unwritable(file, error)) from error


def _unwritable(directory: Path, error: OSError) -> str:
    return (
        f"cannot write to the directory {directory}: {reason(error)}. Name another with "
        "--directory, or keep nothing with --discard."
    )


def console() -> Console:
    """Standard output; wide enough for every table where it is no terminal."""
    out = Console(highlight=False)
    return out if out.is_terminal else Console(width=max(out.width, _WIDE), highlight=False)


def report(file: TaskFile, task: Task, runs: Sequence[Run], directory: Path | None) -> None:
    """The task's own table or picture, where it has one."""
    finished = [run for run in runs if run.history]
    if task.report is not None and finished:
        with file.guard():
            task.report(finished, directory)
