"""Sweep: a task under every choice of settings, policy and seed."""

import dataclasses
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
import optax

from bilevel.outer import text
from bilevel.outer.assignment import controller_for
from bilevel.outer.callbacks import AnyCallback, as_callbacks
from bilevel.outer.checkpoints.owner import LOCK_FILE, Owner
from bilevel.outer.checkpoints.settings import Checkpoints
from bilevel.outer.compare import recommended
from bilevel.outer.machine import machine
from bilevel.outer.policy import Policy, parse_policies
from bilevel.outer.settings import ComparisonSettings, validated
from bilevel.outer.sweeps.attempt import finished
from bilevel.outer.sweeps.cluster import SLURM, run_with_submitit
from bilevel.outer.sweeps.crew import run_with_joblib
from bilevel.outer.sweeps.plan import PLAN_FILE, Plan
from bilevel.outer.sweeps.point import points
from bilevel.outer.sweeps.result import GROUPED_FILE, RUNS_FILE, TABLE_FILE, Sweep
from bilevel.outer.sweeps.stopping import Process, Stop, Told
from bilevel.outer.sweeps.work import Build, Ending, Outcome, Work, built, takes_seed
from bilevel.outer.task import Task
from bilevel.outer.versions import versions

_SEARCH = "best-fixed"


class OtherSweepError(ValueError):
    """The directory holds a sweep of another plan.

    >>> issubclass(OtherSweepError, ValueError)
    True
    """


def sweep(
    task: Build,
    policies: Sequence[str] | None = None,
    seeds: int | Sequence[int] = 1,
    settings: Mapping[str, Sequence[Any]] | None = None,
    *,
    directory: str | os.PathLike[str],
    optimizer: optax.GradientTransformation | None = None,
    epochs: int | None = None,
    target: float | None = None,
    margin: float = 0.02,
    workers: int | None = None,
    backend: str | None = None,
    address: str | None = None,
    slurm: Mapping[str, Any] | None = None,
    callbacks: AnyCallback | Sequence[AnyCallback] = (),
    progress: bool = True,
    max_nonfinite: int = 10,
    checkpoints: Checkpoints | None = None,
    overwrite: bool = False,
    command: str | None = None,
) -> Sweep:
    """Train under every choice of settings, policy and seed, several runs at a time.

    A run that raises, or whose process dies, is recorded with its cause and does not stop the
    others. The same call with the same directory goes on with a sweep that was interrupted, in
    whatever way: runs that ended are not made again, those that were begun go on from their
    checkpoints, those that failed are tried again. What the functions do is not compared.

    **Arguments:**

    - `task`: ``task(name=value, ...) -> Task``, of the settings, and of ``seed`` where it has such
        an argument; or one task, where nothing is set.
    - `policies`, `seeds`, `target`, `margin`: as in [`compare`][], without `best-fixed`, which is
        a search of runs one after another.
    - `settings`: by name, the values to try; every combination of them is.
    - `directory`: where the plan, the runs and the tables are kept: ``sweep.json``,
        ``sweep.csv``, ``runs.csv``, ``sweep.md``, and each run in
        ``NAME=VALUE,NAME=VALUE/POLICY/seed-N``. On a cluster all machines must see it.
    - `optimizer`, `epochs`, `callbacks`, `max_nonfinite`, `checkpoints`: as in [`optimize`][].
    - `workers`: runs at a time; by default as many as there are cores, or one where JAX has an
        accelerator. One makes the runs in this process.
    - `backend`: of joblib, such as ``"dask"`` or ``"ray"``, or ``"slurm"``; by default processes
        on this machine, or the backend of `joblib.parallel_config` around the call.
    - `address`: of the cluster, for Dask and Ray.
    - `slurm`: for Slurm, parameters of submitit's ``update_parameters``.
    - `progress`: whether to tell of each run that ends, on standard error.
    - `overwrite`: whether a sweep in `directory` is replaced, and not gone on with.
    - `command`: the command that this was made by, to be kept with it.

    **Returns:** the sweep: a comparison for each choice of settings, and tables of all.

    **Raises:** `OtherSweepError`, a `ValueError`, with the first difference, where `directory`
    holds a sweep of another plan; `DirectoryInUseError` where it is under way; `ValueError` or
    `TypeError` naming the argument; `ImportError` for a library that the backend needs; what the
    task's function raises, where it does so for every choice of settings.

    >>> import tempfile, bilevel as bl, optax
    >>> def task(rate):
    ...     return bl.Task(
    ...         1.0,
    ...         lambda theta, batch, fidelity: theta**2,
    ...         full=bl.Budget(1),
    ...         optimizer=optax.sgd(rate),
    ...         epochs=2,
    ...     )
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     found = sweep(
    ...         task,
    ...         ["full"],
    ...         settings={"rate": [0.25, 0.5]},
    ...         directory=folder,
    ...         workers=1,
    ...         progress=False,
    ...     )
    >>> [(name, row.final_metric.mean) for name, row in found.rows]
    [('rate=0.25', 0.25), ('rate=0.5', 0.0)]
    """
    if isinstance(policies, str):
        msg = f"sweep: policies should be a list, got {policies!r}. Write [{policies!r}]."
        raise TypeError(msg)
    chosen = _settings(task, settings or {})
    numbers = tuple(range(seeds)) if isinstance(seeds, int) else tuple(seeds)
    plan = Plan(
        task=_origin_of(task),
        fixed={},
        settings=chosen,
        policies=() if policies is None else tuple(policies),
        seeds=numbers,
        training={"epochs": epochs, "max_nonfinite": max_nonfinite},
        target=None if target is None else float(target),
        margin=float(margin),
        origin=origin(command),
        name="",
        metric_name="",
    )
    training = {
        "optimizer": optimizer,
        "epochs": epochs,
        "callbacks": as_callbacks(callbacks),
        "max_nonfinite": max_nonfinite,
        "checkpoints": checkpoints,
    }
    crew = Crew(workers, backend, address, dict(slurm or {}))
    return run_sweep(
        plan, task, Path(directory), training, crew, progress=progress, overwrite=overwrite
    )


@dataclasses.dataclass(frozen=True)
class Crew:
    """Who makes the runs; see `sweep`."""

    workers: int | None = None
    backend: str | None = None
    address: str | None = None
    slurm: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any])

    def check(self) -> None:
        """**Raises:** `ValueError` for what does not go together."""
        if self.workers is not None and self.workers < 1:
            msg = f"sweep: workers should be 1 or more, got {self.workers}."
            raise ValueError(msg)
        if self.backend == SLURM and self.address is not None:
            msg = "sweep: address is that of a cluster of Dask or Ray; Slurm has none."
            raise ValueError(msg)
        if self.slurm and self.backend != SLURM:
            msg = 'sweep: slurm= is for backend="slurm".'
            raise ValueError(msg)
        if self.address is not None and self.backend not in ("dask", "ray"):
            msg = 'sweep: address is that of a cluster: give backend="dask" or "ray", too.'
            raise ValueError(msg)


def run_sweep(
    plan: Plan,
    build: Build,
    directory: Path,
    training: Mapping[str, Any],
    crew: Crew,
    *,
    progress: bool,
    overwrite: bool,
) -> Sweep:
    """Make the runs of a plan that are not made yet, and merge them into one table.

    **Arguments:** those of `sweep`, taken apart.

    - `plan`: without the task's names, and with no policies for what the task recommends.
    """
    crew.check()
    plan = _completed(plan, build, training)
    directory.mkdir(parents=True, exist_ok=True)
    with Owner(directory):
        _claim(directory, plan, overwrite=overwrite)
        stop = Stop(directory)
        stop.unsay()
        works = [
            Work(
                place=place,
                build=build,
                point=point,
                policy=policy,
                seed=seed,
                directory=directory.absolute() / plan.folder(point, policy, seed),
                stop=Stop(directory.absolute()),
                parent=Process.this(),
                wide=_wide(),
                training=training,
            )
            for place, (point, policy, seed) in enumerate(plan.runs())
        ]
        left = [work for work in works if not finished(work.directory)]
        teller = _Teller(works, len(left), plan.metric_name, silent=not progress)
        with Told(stop) as told:
            try:
                _make(left, directory, crew, told, teller)
            except KeyboardInterrupt:
                told.said = True
            finally:
                stop.unsay()
        found = Sweep.read(directory, interrupted=told.said or teller.interrupted)
        found.save()
    return found


def _wide() -> bool:
    """Whether JAX computes in double precision by default."""
    return bool(jax.config.read("jax_enable_x64"))


def _make(works: list[Work], directory: Path, crew: Crew, told: Told, teller: "_Teller") -> None:
    if not works:
        return
    if crew.backend == SLURM:
        absolute = directory.absolute()
        run_with_submitit(works, absolute, crew.workers, crew.slurm, told, teller)
    else:
        run_with_joblib(works, crew.workers, crew.backend, crew.address, told, teller)


class _Teller:
    """Tells of each run that ends.

    - `interrupted`: whether one was.
    """

    def __init__(self, works: Sequence[Work], left: int, metric_name: str, *, silent: bool):
        self._names = [work.name for work in works]
        self._count, self._left = 0, left
        self._metric_name, self._silent = metric_name, silent
        self.interrupted = False
        if len(works) > left:
            self._say(f"{len(works) - left} of {len(works)} runs are there already")

    def __call__(self, outcome: Outcome) -> None:
        self._count += 1
        self.interrupted = self.interrupted or outcome.ending is Ending.INTERRUPTED
        if outcome.ending is Ending.NOT_BEGUN:
            return
        told = outcome.ending.value
        if outcome.ending is Ending.DONE:
            metric = f"{self._metric_name} {text.number(outcome.metric)}"
            told = f"{outcome.words}, {metric}, {text.seconds(outcome.seconds)} s"
        elif outcome.words:
            told = f"{told}: {outcome.words}"
        self._say(f"{self._count} of {self._left}: {self._names[outcome.place]}: {told}")

    def _say(self, message: str) -> None:
        if not self._silent:
            sys.stderr.write(f"{message}\n")
            sys.stderr.flush()


def origin(command: str | None) -> dict[str, Any]:
    """When, where and by which command a sweep was begun."""
    return {
        "command": command,
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(),
        "versions": versions(),
    }


def _origin_of(task: Any) -> str:
    if isinstance(task, Task):
        return task.name
    named = getattr(task, "__qualname__", type(task).__qualname__)
    return f"{getattr(task, '__module__', '')}.{named}".removeprefix("__main__.")


def _settings(task: Any, given: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The settings by name, each a list of values.

    **Raises:** `ValueError` or `TypeError` naming the one that is wrong.
    """
    if not isinstance(task, Task) and not callable(task):
        msg = f"sweep: task should be a Task or a function that returns one, got {task!r}."
        raise TypeError(msg)
    if given and isinstance(task, Task):
        first = next(iter(given))
        msg = (
            f"sweep: a Task has nothing to set: make it a function, task({first}=...), to set "
            f"{first}."
        )
        raise ValueError(msg)
    found: dict[str, list[Any]] = {}
    for name, values in given.items():
        if name == "seed":
            msg = "sweep: settings has a seed; seeds are for seeds=."
            raise ValueError(msg)
        if isinstance(values, str) or not isinstance(values, Sequence) or not values:
            msg = (
                f"sweep: settings[{name!r}] should be a list of the values to try, got {values!r}."
            )
            raise ValueError(msg)
        found[name] = list(values)
    return found


def _completed(plan: Plan, build: Build, training: Mapping[str, Any]) -> Plan:
    """The plan with what the task says, refused before hours of training where it cannot be run.

    **Raises:** `ValueError` naming what is wrong; what the task's function raises, where it does so
    for all settings.
    """
    numbers = validated(
        ComparisonSettings,
        "sweep",
        policies=plan.policies or ("full",),
        seeds=plan.seeds,
        target=plan.target,
        margin=plan.margin,
        directory=None,
    )
    plan = dataclasses.replace(plan, seeds=numbers.seeds)
    task = _first_task(plan, build)
    policies = _policies(plan, task)
    searches = [policy.text for policy in policies if policy.kind == _SEARCH]
    if searches:
        msg = (
            f"sweep: policy {searches[0]!r} is a search of runs one after another. Take it in "
            "compare, or sweep constant budgets: fixed=10,fixed=20,fixed=40."
        )
        raise ValueError(msg)
    if training["optimizer"] is None and task.optimizer is None:
        msg = f"sweep: the task {task.name!r} names no optimizer: give optimizer=optax.adam(1e-3)."
        raise ValueError(msg)
    if training["epochs"] is None and task.epochs is None:
        msg = f"sweep: the task {task.name!r} does not say how long it trains: give epochs=."
        raise ValueError(msg)
    if len(plan.seeds) > 1 and not isinstance(build, Task) and not takes_seed(build):
        msg = (
            f"sweep: {len(plan.seeds)} seeds would be as many times the same run: the task takes "
            "no argument named seed. Give its function one, or take one seed."
        )
        raise ValueError(msg)
    for name in ("seeds", *(f"settings[{name!r}]" for name in plan.settings)):
        values = plan.seeds if name == "seeds" else plan.settings[name[10:-2]]
        if len({repr(value) for value in values}) < len(values):
            msg = f"sweep: {name} should differ from each other, got {values!r}."
            raise ValueError(msg)
    return dataclasses.replace(
        plan,
        policies=tuple(policy.text for policy in policies),
        training={**plan.training, "precision": "float64" if _wide() else "float32"},
        name=task.name,
        metric_name=task.metric_name,
    )


def _policies(plan: Plan, task: Task) -> tuple[Policy, ...]:
    """The policies of a plan, or those that the task recommends.

    **Raises:** `ValueError` for one that is unknown, or that the task cannot serve.
    """
    known = [name for name in recommended(task) if name.partition("=")[0] != _SEARCH]
    try:
        policies = parse_policies(",".join(plan.policies or known))
        for policy in policies:
            if policy.kind != _SEARCH:
                controller_for(policy, task)
    except ValueError as error:
        msg = f"sweep: {error}"
        raise ValueError(msg) from error
    return policies


def _first_task(plan: Plan, build: Build) -> Task:
    """The task of the first settings that have one; those that have none fail by themselves."""
    first: Exception | None = None
    for point in points(plan.settings):
        try:
            return built(build, point, plan.seeds[0])
        except Exception as error:  # noqa: BLE001
            first = first or error
    assert first is not None
    raise first


def _claim(directory: Path, plan: Plan, *, overwrite: bool) -> None:
    """Have the directory hold this plan and no other.

    **Raises:** `OtherSweepError`; `FileExistsError` where it holds something else.
    """
    held = {entry.name for entry in directory.iterdir()} - {LOCK_FILE}
    if PLAN_FILE in held:
        before = Plan.read(directory)
        if overwrite:
            _remove(directory, before)
        elif (difference := before.difference(plan)) is not None:
            msg = (
                f"sweep: {directory} holds another sweep: {difference}. Name another directory, or "
                "pass overwrite=True to replace it."
            )
            raise OtherSweepError(msg)
        else:
            return
    elif held - {".stop"}:
        msg = f"sweep: {directory} holds something that is no sweep. Name another directory."
        raise FileExistsError(msg)
    plan.save(directory)


def _remove(directory: Path, plan: Plan) -> None:
    """Remove the runs and the tables of a sweep, and nothing else."""
    for point, policy, seed in plan.runs():
        shutil.rmtree(directory / plan.folder(point, policy, seed), ignore_errors=True)
    for name in (PLAN_FILE, GROUPED_FILE, RUNS_FILE, TABLE_FILE):
        (directory / name).unlink(missing_ok=True)
