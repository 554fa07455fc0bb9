"""Optimize: the outer loop."""

import os
from collections.abc import Sequence
from typing import Any

import optax
from jax.sharding import Mesh

from bilevel.outer.archive import NotKeptError, in_words
from bilevel.outer.callbacks import AnyCallback, as_callbacks
from bilevel.outer.checkpoints.settings import Checkpoints
from bilevel.outer.checkpoints.store import has_checkpoints
from bilevel.outer.devices import mesh_of
from bilevel.outer.giving_up import NonFiniteStreak
from bilevel.outer.processes.shared import decided, first, several
from bilevel.outer.progress import Reporter, reporter
from bilevel.outer.run import (
    COMPLETED,
    FAILED,
    INTERRUPTED,
    NONFINITE,
    STOPPED,
    Run,
    holds_run,
)
from bilevel.outer.settings import LoopSettings, validated
from bilevel.outer.shield import shielded
from bilevel.outer.task import Task, check_parts
from bilevel.outer.training import Training
from bilevel.refinement.fixed import FixedFidelity
from bilevel.signature import brief


class NonFiniteError(RuntimeError):
    """Too many updates in a row had a loss or gradient that was not finite.

    - `run`: what was done until then; saved already if there is a directory.

    >>> import bilevel as bl, jax.numpy as jnp, optax
    >>> task = bl.Task(1.0, lambda theta, batch, fidelity: theta * jnp.nan, full=bl.Budget(1))
    >>> try:
    ...     bl.optimize(task, optax.sgd(0.1), epochs=9, max_nonfinite=3, progress=False)
    ... except NonFiniteError as error:
    ...     print(error.run.summary.nonfinite, float(error.run.theta))
    3 1.0
    """

    def __init__(self, message: str, run: Run):
        super().__init__(message)
        self.run = run


def optimize(
    task: Task,
    optimizer: optax.GradientTransformation | None = None,
    controller: Any | None = None,
    epochs: int | None = None,
    directory: str | os.PathLike[str] | None = None,
    seed: int = 0,
    callbacks: AnyCallback | Sequence[AnyCallback] = (),
    progress: bool | Reporter = True,  # noqa: FBT001, FBT002
    *,
    max_nonfinite: int = 10,
    overwrite: bool = False,
    resume: bool = False,
    label: str | None = None,
    time_solver: bool = False,
    checkpoints: Checkpoints | None = None,
    devices: int | Mesh | None = None,
) -> Run:
    """Train a task's parameters, at the fidelity a controller asks for.

    The update is compiled once: budgets and ladder levels are traced, and only static
    parts of a fidelity (a grid) or another shape of batch compile again. The controller
    takes one measurement an epoch; a controller that reads the metric gets the one
    before training as its first.

    Ctrl-C ends the run with what was done so far, saved and returned; `run.status` is
    then ``"interrupted"``.

    **Arguments:**

    - `task`: what is trained.
    - `optimizer`: any optax optimizer; the task's by default.
    - `controller`: decides the fidelity; by default the task's own, else the full solve.
    - `epochs`: how many in all; the task's by default.
    - `directory`: where to keep `history.jsonl` (at most a second behind),
        `theta.npz`, `summary.json` and checkpoints; `None` keeps nothing. One run at a time
        has a directory.
    - `seed`: of the random keys that batches get, >= 0.
    - `callbacks`: [`Callback`][] objects, or functions called with an [`Event`][] after
        every epoch; one, or a sequence of them.
    - `progress`: `True` for a bar on a terminal and lines elsewhere, on standard error;
        `False` for none; or a reporter of your own.
    - `max_nonfinite`: updates in a row whose loss or gradient is not finite before the
        run is given up. Each is skipped, counted and said.
    - `overwrite`: whether a run in `directory` may be replaced.
    - `resume`: whether to go on with the run in `directory`, from its last checkpoint;
        the result is the same as without the break. Refused where the seed, the batches'
        shapes, or the numbers in the optimizer, the controller, the ladder or the loss's own
        closure have changed; the code of the functions and what stands in arrays, globals and
        objects cannot be compared and must be the same.
    - `label`: name of the run in tables and files; the controller's class by default.
    - `time_solver`: whether to find out after the run how much of its time the solves took,
        by some more updates whose results are dropped: at most a twentieth of its wall time,
        in no other figure of the run. It is the summary's `solver_seconds`.
    - `checkpoints`: how often they are written and how many are kept; by default every minute, the
        last two and the best.
    - `devices`: that share the work on each batch: a number of them, or a `jax.sharding.Mesh` whose
        first axis it is. Each batch's leading axis is split over them, all else is on each, and
        arrays that the task has put on several devices stay as they are. Gradients are those of
        one device but for rounding. In several processes (see [`connected_processes`][]) a number
        is of each process's, and `None` takes all there are; only process 0 writes and speaks.

    **Returns:** the run: parameters, history, summary.

    **Raises:** [`NonFiniteError`][] when the run is given up; `ResumeError`, a `ValueError`, if
    the run in `directory` was begun with something else; `FileExistsError` if the directory
    holds a run; `DirectoryInUseError` if another process has it; `NotKeptError`, which has the
    run, if it could not be written at the end; `TypeError` or `ValueError` naming the argument;
    what the task's own functions raise, after saving what was done.

    >>> import bilevel as bl, optax
    >>> def loss(theta, batch, fidelity):
    ...     root = bl.solve(bl.FixedPoint(lambda x, t: 0.5 * x + t), theta, 0.0, fidelity=fidelity)
    ...     return (root.value - 4.0) ** 2
    >>> task = bl.Task(1.0, loss, validate=lambda theta: abs(2 * theta - 4.0))
    >>> controller = bl.ProgressiveRefinement(bl.Ladder.iterations(2, 2, 20))
    >>> run = optimize(task, optax.sgd(0.1), controller, epochs=40, progress=False)
    >>> run.summary.compilations, round(float(run.theta), 2)
    (1, 2.0)
    """
    task = _checked(task)
    optimizer = task.optimizer if optimizer is None else optimizer
    if optimizer is None:
        msg = "optimize: optimizer is missing. Give one, for example optax.adam(1e-3)."
        raise ValueError(msg)
    check_parts("optimize", "optimizer", optimizer, ("init", "update"), "an optax optimizer")
    controller = _controller(task, controller)
    epochs = task.epochs if epochs is None else epochs
    if epochs is None:
        msg = "optimize: epochs is missing. Say how many, for example epochs=100."
        raise ValueError(msg)
    mesh = mesh_of(devices, batches=task.batches is not None)
    settings = validated(
        LoopSettings,
        "optimize",
        epochs=epochs,
        seed=seed,
        max_nonfinite=max_nonfinite,
        directory=directory,
        overwrite=overwrite,
        resume=resume,
    )
    _check_directory_once(settings)
    training = Training(
        task,
        optimizer,
        controller,
        settings,
        _checkpoints(checkpoints),
        as_callbacks(callbacks),
        reporter(progress if first() else False),
        label or type(controller).__name__,
        mesh,
    )
    return _guarded(training, time_solver=time_solver)


def _guarded(training: Training, *, time_solver: bool) -> Run:
    """Train, and keep what was done however it ends; the directory is this run's meanwhile."""
    with training.owning():
        # Who waited for the directory may find another run in it than when it was looked at.
        _check_directory_once(training.settings)
        return _kept(training, time_solver=time_solver)


def _kept(training: Training, *, time_solver: bool) -> Run:
    if training.resumes:
        # A refusal comes before anything of this run is kept or said.
        training.restore()
    try:
        training.go()
    except KeyboardInterrupt as told:
        words = ["interrupted", *map(str, told.args), training.place]
        with shielded():
            return training.end(INTERRUPTED, " ".join(words))
    except NonFiniteStreak as streak:
        with shielded():
            run = training.end(NONFINITE, str(streak))
        raise NonFiniteError(str(streak), run) from None
    except BaseException as error:
        try:
            with shielded():
                training.end(FAILED, f"{type(error).__name__} {training.place}: {error}")
        except NotKeptError as second:
            error.add_note(str(second))
        except Exception as second:
            # Arrays that another process's end has left without values cannot be kept.
            if not several():
                raise
            error.add_note(f"nor could the run be kept: {second}")
        raise
    reason = training.stop_reason
    with shielded():
        run = training.end(COMPLETED if reason is None else STOPPED, reason or "")
    return _timed(run, training) if time_solver else run


def _timed(run: Run, training: Training) -> Run:
    """The run, with what its solves took."""
    try:
        try:
            return run.with_summary(solver_seconds=training.solver_seconds())
        except KeyboardInterrupt:
            return run.with_summary(status=INTERRUPTED, message="interrupted after the last epoch")
    except OSError as error:
        msg = f"the run could not be kept: {in_words(error)}"
        raise NotKeptError(msg, run) from error


def _checkpoints(given: Any) -> Checkpoints:
    if given is None or isinstance(given, Checkpoints):
        return Checkpoints() if given is None else given
    msg = f"optimize: checkpoints should be a bl.Checkpoints, got {brief(given)}."
    raise TypeError(msg)


def _checked(task: Any) -> Task:
    if isinstance(task, Task):
        return task
    hint = " Call it to get its task." if callable(task) else ""
    msg = f"optimize: task should be a Task, got {task!r}.{hint}"
    raise TypeError(msg)


def _controller(task: Task, controller: Any | None) -> Any:
    controller = task.controller if controller is None else controller
    if controller is None:
        full = task.full_fidelity
        if full is None:
            msg = (
                "optimize: controller is missing. Give one, for example "
                "bl.FixedFidelity(bl.Budget(iterations=100)), or give the task a ladder."
            )
            raise ValueError(msg)
        controller = FixedFidelity(full)
    if isinstance(controller, str):
        msg = (
            f"optimize: controller should be a controller, got {controller!r}. Policies by name "
            "are for bl.compare(task, policies=[...]) and the command line; here give an object, "
            "for example bl.ProgressiveRefinement(ladder)."
        )
        raise TypeError(msg)
    check_parts(
        "optimize", "controller", controller, ("init", "update", "fidelity"), "a controller"
    )
    return controller


def _check_directory_once(settings: LoopSettings) -> None:
    decided(
        lambda: _check_directory(settings), FileNotFoundError, NotADirectoryError, FileExistsError
    )


def _check_directory(settings: LoopSettings) -> None:
    directory = settings.directory
    if settings.resume:
        if directory is None or not has_checkpoints(directory):
            msg = (
                f"optimize: resume needs a directory with a run's checkpoints, got {directory}. "
                "Leave resume out to begin."
            )
            raise FileNotFoundError(msg)
        return
    if directory is None:
        return
    if directory.exists() and not directory.is_dir():
        msg = f"optimize: directory {directory} is a file. Name a directory."
        raise NotADirectoryError(msg)
    if holds_run(directory) and not settings.overwrite:
        msg = (
            f"optimize: {directory} holds a run already. Name another directory, or pass "
            "overwrite=True to replace it or resume=True to go on with it."
        )
        raise FileExistsError(msg)
