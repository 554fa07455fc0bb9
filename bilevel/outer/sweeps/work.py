"""Work: one run of a sweep, in whatever process it is handed to."""

import contextlib
import dataclasses
import enum
import importlib
import inspect
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from bilevel.outer.assignment import controller_for
from bilevel.outer.checkpoints.owner import DirectoryInUseError, Owner
from bilevel.outer.checkpoints.store import has_checkpoints
from bilevel.outer.optimize import NonFiniteError, optimize
from bilevel.outer.policy import parse_policy
from bilevel.outer.progress import Lines
from bilevel.outer.run import INTERRUPTED as STATUS_INTERRUPTED
from bilevel.outer.run import Run
from bilevel.outer.sweeps.attempt import finished, forget_failure, note_failure, under_way
from bilevel.outer.sweeps.point import Point
from bilevel.outer.sweeps.stopping import Process, Stop, StopBetweenEpochs, interruptible
from bilevel.outer.task import Task

Build = Callable[..., Task] | Task
"""A task, or a function of the settings, and of ``seed`` where it takes one, that returns it."""

LOG_FILE = "progress.log"
_PATIENCE = 10.0
"""Seconds that a run waits for its directory: who had it before may be saving."""


class Ending(enum.Enum):
    """What became of a run; the value is for people."""

    DONE = "done"
    BEFORE = "done before"
    FAILED = "failed"
    INTERRUPTED = "interrupted"
    IN_USE = "its directory is in use"
    NOT_BEGUN = "not begun"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a run.

    - `place`: among the runs of the sweep.
    - `words`: the run's own status, or the cause of its failure.
    - `metric`, `seconds`: at its end, and its wall time.
    """

    place: int
    ending: Ending
    words: str = ""
    metric: float | None = None
    seconds: float | None = None


@dataclasses.dataclass(frozen=True)
class Work:
    """One run of a sweep. A call makes it, and raises nothing: other runs are to go on.

    - `place`: among the runs of the sweep.
    - `build`: of the task.
    - `directory`: of the run. `stop`: of the sweep. `parent`: the process of the sweep.
    - `wide`: whether JAX computes in double precision.
    - `training`: further arguments of `optimize`.
    """

    place: int
    build: Build
    point: Point
    policy: str
    seed: int
    directory: Path
    stop: Stop
    parent: Process
    wide: bool
    training: Mapping[str, Any]

    @property
    def name(self) -> str:
        """For people."""
        return ", ".join(filter(None, [self.point.name, self.policy, f"seed {self.seed}"]))

    def __call__(self) -> Outcome:
        """Train, from the last checkpoint where there is one."""
        try:
            with interruptible(self.stop, self.parent), _precision(wide=self.wide):
                return self._made()
        except KeyboardInterrupt:
            return Outcome(self.place, Ending.INTERRUPTED)
        except DirectoryInUseError as error:
            return Outcome(self.place, Ending.IN_USE, str(error))
        except NonFiniteError as error:
            return self._told(error.run)
        except (Exception, SystemExit) as error:  # noqa: BLE001
            # Whatever it is, it is this run's.
            return self.failed(error)

    def _made(self) -> Outcome:
        if self.stop.said:
            return Outcome(self.place, Ending.NOT_BEGUN)
        self.directory.mkdir(parents=True, exist_ok=True)
        _wait_for(self.directory)
        if finished(self.directory):
            return Outcome(self.place, Ending.BEFORE)
        with under_way(self.directory):
            return self._told(self._train())

    def failed(self, error: BaseException) -> Outcome:
        """Write down that the run failed."""
        return Outcome(self.place, Ending.FAILED, note_failure(self.directory, error).cause)

    def checkpoint(self) -> Any:
        """What submitit asks for where Slurm takes the machine away: the same, queued again."""
        helpers: Any = importlib.import_module("submitit.helpers")  # only under submitit
        return helpers.DelayedSubmission(self)

    def _train(self) -> Run:
        forget_failure(self.directory)
        resume = has_checkpoints(self.directory)
        task = built(self.build, self.point, self.seed)
        controller = controller_for(parse_policy(self.policy), task)
        training: dict[str, Any] = dict(self.training)
        training["callbacks"] = [*self.training["callbacks"], StopBetweenEpochs(self.stop)]
        with (self.directory / LOG_FILE).open("a", encoding="utf-8") as log:
            return optimize(
                task,
                controller=controller,
                directory=self.directory,
                seed=self.seed,
                label=self.policy,
                resume=resume,
                overwrite=not resume,
                time_solver=True,
                progress=Lines(Console(file=log, width=120), interval=5.0),
                **training,
            )

    def _told(self, run: Run) -> Outcome:
        summary = run.summary
        ended = summary.status != STATUS_INTERRUPTED
        ending = Ending.DONE if ended else Ending.INTERRUPTED
        return Outcome(
            self.place, ending, summary.status, summary.final_metric, round(summary.seconds, 3)
        )


def built(build: Build, point: Point, seed: int) -> Task:
    """The task of a run.

    **Raises:** `TypeError` for something else; what the function raises.
    """
    if isinstance(build, Task):
        return build
    given = dict(point.settings)
    if takes_seed(build):
        given["seed"] = seed
    task: Any = build(**given)
    if not isinstance(task, Task):
        msg = f"sweep: task({', '.join(given)}) should return a Task, got {task!r}."
        raise TypeError(msg)
    return task


def takes_seed(build: Build) -> bool:
    """Whether a run depends on its seed by more than the order of its batches."""
    if isinstance(build, Task):
        return False
    parameters = inspect.signature(build).parameters.values()
    return any(
        parameter.name == "seed" or parameter.kind is parameter.VAR_KEYWORD
        for parameter in parameters
    )


def _precision(*, wide: bool) -> AbstractContextManager[Any]:
    """As in the process of the sweep; another process begins with JAX's own default."""
    if bool(jax.config.read("jax_enable_x64")) == wide:
        return contextlib.nullcontext()
    return jax.enable_x64(wide)


def _wait_for(directory: Path) -> None:
    """Wait until nobody has the directory: a process that was told to end may be saving.

    **Raises:** `DirectoryInUseError` where that takes too long.
    """
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            Owner(directory).release()
        except DirectoryInUseError:
            if time.monotonic() > deadline:
                raise
            time.sleep(_PATIENCE / 40)
        else:
            return
