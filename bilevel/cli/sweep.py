"""`bilevel sweep`: train a task under every choice of settings, policy and seed."""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from bilevel.cli.configuration import AnyConfiguration, configure
from bilevel.cli.failure import DONE, FAILED, UsageError
from bilevel.cli.output import put, say
from bilevel.cli.signals import leaving_on_signals
from bilevel.cli.taskfile import Given, Setting, TaskFile
from bilevel.cli.training import (
    CONFIGURATION_FILE,
    as_typed,
    console,
    directory_for,
    load,
    make_directory,
)
from bilevel.outer.checkpoints.durable import write_file
from bilevel.outer.policy import parse_policies
from bilevel.outer.sweeps.plan import Plan
from bilevel.outer.sweeps.result import Sweep
from bilevel.outer.sweeps.sweep import Crew, origin, run_sweep
from bilevel.outer.task import Task


@dataclasses.dataclass(frozen=True)
class FileTask:
    """The task of a file, in whatever process it is wanted.

    - `target`: ``FILE.py:NAME``, from the root on. `settings`: the same in every run.
    - `epochs`: of the command. `wide`: the precision it asks for; `None` leaves it to the file.
    """

    target: str
    settings: tuple[Setting, ...]
    epochs: int | None
    wide: bool | None

    def __call__(self, *, seed: int, **settings: Any) -> Task:
        """Load the file and build its task.

        **Raises:** what the file raises; `UsageError`.
        """
        if self.wide is not None:
            jax.config.update("jax_enable_x64", self.wide)
        given = [*self.settings, *((name, Given(value)) for name, value in settings.items())]
        return TaskFile(self.target, given, epochs=self.epochs, shows=False).build(seed)


def sweep(options: argparse.Namespace, words: Sequence[str]) -> int:
    """Make the runs that the options name.

    **Arguments:**

    - `options`: parsed.
    - `words`: that they were parsed from, to be kept with the sweep.

    **Returns:** the exit code.
    """
    configuration = configure(options)
    fixed: list[Setting] = options.settings
    grid: dict[str, list[str | Given]] = options.grid
    # Some arguments may have no default: the first values stand in for all.
    options.settings = [*fixed, *((name, values[0]) for name, values in grid.items())]
    file = load(options)
    settings = {
        name: [file.typed(name, value) for value in values] for name, values in grid.items()
    }
    if "seed" in settings:
        msg = "--set seed=... is for one seed; several are given by --seeds."
        raise UsageError(msg)
    file.check_seeds(options.seeds)
    try:
        parsed = () if options.policies is None else parse_policies(options.policies)
    except ValueError as error:
        raise UsageError(str(error)) from error
    options.discard = False
    directory = directory_for(options, f"{file.file.stem}-sweep")
    assert directory is not None
    make_directory(directory)
    effective = {name: value for name, value in file.effective.items() if name not in grid}
    plan = Plan(
        task=as_typed([options.task]).removeprefix("bilevel "),
        fixed=effective,
        settings=settings,
        policies=tuple(policy.text for policy in parsed),
        seeds=options.seeds,
        training={"epochs": options.epochs, "max_nonfinite": options.max_nonfinite},
        target=options.target,
        margin=options.margin,
        origin=origin(as_typed(words)),
        name="",
        metric_name="",
    )
    wide = True if options.x64 else False if options.float32 else None
    build = FileTask(file.target, tuple(fixed), options.epochs, wide)
    training = {
        "optimizer": None,
        "epochs": options.epochs,
        "callbacks": (),
        "max_nonfinite": options.max_nonfinite,
        "checkpoints": options.checkpoints,
    }
    crew = Crew(options.workers, options.backend, options.address, options.slurm)
    with leaving_on_signals() as leaving, file.guard():
        try:
            found = run_sweep(
                plan,
                build,
                directory,
                training,
                crew,
                progress=not options.quiet,
                overwrite=options.overwrite,
            )
        except (ValueError, FileExistsError, ImportError) as error:
            if not str(error).startswith("sweep: "):
                raise
            raise UsageError(_for_the_command(str(error))) from error
    _keep(found, configuration, options, effective)
    _show(found, options)
    if found.interrupted:
        say(f"interrupted; what was done so far is in {directory}, and the same command goes on")
        return leaving.code
    return FAILED if found.failures or found.unfinished else DONE


def _for_the_command(message: str) -> str:
    """A message of `bl.sweep` in the words of the command line."""
    message = message.removeprefix("sweep: ")
    for python, typed in (
        ("pass overwrite=True", "add --overwrite"),
        ('backend="slurm"', "--backend slurm"),
        ('backend="dask" or "ray"', "--backend dask or ray"),
        ("slurm= is", "--slurm is"),
        ("give epochs=.", "give --epochs N."),
        ("give optimizer=optax.adam(1e-3)", "give its Task optimizer=optax.adam(1e-3)"),
    ):
        message = message.replace(python, typed)
    return message


def _keep(
    found: Sweep,
    configuration: AnyConfiguration,
    options: argparse.Namespace,
    effective: dict[str, str],
) -> None:
    """Beside each comparison, what its runs were made with."""
    common = configuration.model_dump(mode="json", exclude={"grid"})
    for point in found.plan.points:
        folder: Path = found.directory / point.folder
        if not folder.is_dir():
            continue
        values = {name: repr(value) for name, value in point.settings}
        stored = {**common, "task": {**effective, **values}}
        content = {"command": "sweep", "file": str(options.task), "configuration": stored}
        write_file(folder / CONFIGURATION_FILE, f"{json.dumps(content, indent=2)}\n".encode())


def _show(found: Sweep, options: argparse.Namespace) -> None:
    if options.json:
        put(found.to_json())
        return
    out = console()
    out.print(found.table())
    out.print(f"kept in {found.directory}", soft_wrap=True)
