"""Compare: the same training under several policies."""

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import optax

from bilevel.outer.assignment import controller_for, default_policy
from bilevel.outer.callbacks import AnyCallback
from bilevel.outer.comparison import COMPARISON_FILE, Candidate, Comparison
from bilevel.outer.optimize import NonFiniteError, optimize
from bilevel.outer.policy import Policy, parse_policies
from bilevel.outer.progress import Reporter
from bilevel.outer.run import INTERRUPTED, Run, holds_run
from bilevel.outer.search import best_level
from bilevel.outer.settings import ComparisonSettings, validated
from bilevel.outer.task import Task
from bilevel.refinement.fixed import FixedFidelity


def compare(
    task: Task | Callable[[int], Task],
    policies: Sequence[str] | None = None,
    seeds: int | Sequence[int] = 1,
    *,
    optimizer: optax.GradientTransformation | None = None,
    epochs: int | None = None,
    directory: str | os.PathLike[str] | None = None,
    target: float | None = None,
    margin: float = 0.05,
    callbacks: AnyCallback | Sequence[AnyCallback] = (),
    progress: bool | Reporter = True,
    max_nonfinite: int = 10,
    overwrite: bool = False,
) -> Comparison:
    """Train under several policies, and say what each took to get where.

    Every run compiles for itself, so wall times with compilation are those of a single
    run. A run that is given up as non-finite stays in the table, marked; Ctrl-C ends
    the comparison with the runs there are.

    **Arguments:**

    - `task`: a task, or ``task(seed) -> Task`` where start or data depend on the seed.
    - `policies`: of `full`, `fixed=K`, `fixed=K:M`, `best-fixed`, `best-fixed=RUNS`,
        `schedule=linear:STEP`, `hoag=exponential|quadratic|cubic`, `prdp`, `error`, `task`,
        which ``bilevel compare --help`` explains. By default what the task recommends, else
        `full` and the task's controller, or `prdp` on its ladder.
    - `seeds`: how many, from 0, or the seeds themselves.
    - `optimizer`, `epochs`, `callbacks`, `progress`, `max_nonfinite`: as in
        [`optimize`][].
    - `directory`: where to keep the runs and `comparison.json`; `None` keeps nothing.
    - `target`: metric that the policies are timed to; by default the final metric of
        `full`, seed by seed, with the margin.
    - `margin`: part of full's final metric by which another may miss it.
    - `overwrite`: whether a comparison in `directory` may be replaced.

    **Returns:** the comparison: runs, rows and a table.

    **Raises:** `ValueError` or `TypeError` naming the argument; `FileExistsError`.

    >>> import bilevel as bl, optax
    >>> def loss(theta, batch, fidelity):
    ...     root = bl.solve(bl.FixedPoint(lambda x, t: 0.5 * x + t), theta, 0.0, fidelity=fidelity)
    ...     return (root.value - 4.0) ** 2
    >>> task = bl.Task(
    ...     1.0,
    ...     loss,
    ...     validate=lambda theta: abs(2 * theta - 4.0),
    ...     epochs=20,
    ...     optimizer=optax.sgd(0.1),
    ...     ladder=bl.Ladder.iterations(2, 2, 20),
    ... )
    >>> comparison = compare(task, ["full", "prdp"], progress=False)
    >>> [row.policy for row in comparison.rows]
    ['full', 'prdp']
    """
    build = _same(task) if isinstance(task, Task) else task
    numbers = tuple(range(seeds)) if isinstance(seeds, int) else tuple(seeds)
    first = _built(build, numbers[0] if numbers else 0)
    chosen = policies if policies is not None else recommended(first)
    settings = validated(
        ComparisonSettings,
        "compare",
        policies=chosen if isinstance(chosen, str) else tuple(chosen),
        seeds=numbers,
        target=None if target is None else float(target),
        margin=float(margin),
        directory=directory,
    )
    parsed = parse_policies(",".join(settings.policies))
    check_policies(parsed, first, settings.target)
    _check_settings(settings)
    if settings.directory is not None and not overwrite:
        occupied = occupied_folder(settings.directory, parsed, settings.seeds)
        if occupied is not None:
            msg = (
                f"compare: {occupied} holds results already. Name another directory, or pass "
                "overwrite=True to replace them."
            )
            raise FileExistsError(msg)
    common = {
        "optimizer": optimizer,
        "epochs": epochs,
        "callbacks": callbacks,
        "max_nonfinite": max_nonfinite,
        "overwrite": overwrite,
    }
    comparing = _Comparing(build, settings, common, progress, parsed, first)
    try:
        comparing.run()
    finally:
        # A task that fails under its third policy leaves the first two on record.
        if settings.directory is not None:
            comparing.comparison.save(settings.directory)
    return comparing.comparison


class _Comparing:
    """The runs of a comparison, in order.

    - `comparison`: so far.
    """

    def __init__(
        self,
        build: Callable[[int], Task],
        settings: ComparisonSettings,
        common: dict[str, Any],
        progress: bool | Reporter,  # noqa: FBT001
        policies: Sequence[Policy],
        first: Task,
    ):
        self._build = build
        self._first = first
        self._policies = policies
        self._settings = settings
        self._common = common
        self._progress = progress
        self.comparison = Comparison(
            task=first.name,
            metric_name=first.metric_name,
            runs={policy.text: [] for policy in policies},
            target=settings.target,
            margin=settings.margin,
            search=[],
            interrupted=False,
        )

    def run(self) -> None:
        """Train under every policy; the search last, for its target is the full solve's."""
        try:
            for policy in sorted(self._policies, key=lambda policy: policy.kind == "best-fixed"):
                if policy.kind == "best-fixed":
                    self._search(policy, self._first)
                else:
                    self._all_seeds(
                        policy, lambda task, policy=policy: controller_for(policy, task)
                    )
        except _Interrupted:
            self.comparison = dataclasses.replace(self.comparison, interrupted=True)

    def _all_seeds(self, policy: Policy, controller: Callable[[Task], Any]) -> None:
        for seed in self._settings.seeds:
            task = _built(self._build, seed)
            directory = self._settings.directory
            if directory is not None:
                directory = _folder(directory, policy, seed)
            run = self._train(task, controller(task), policy.text, seed, directory)
            self.comparison.runs[policy.text].append(run)
            if run.status == INTERRUPTED:
                raise _Interrupted

    def _search(self, policy: Policy, task: Task) -> None:
        """Find the best constant level with the first seed, then train all seeds at it."""
        assert task.ladder is not None
        ladder, seed = task.ladder, self._settings.seeds[0]
        target = self.comparison.target_of(0)

        def cost(level: int) -> tuple[float, float]:
            name = f"{policy.text}, trying level {level}"
            run = self._train(task, FixedFidelity(ladder.fidelity(level)), name, seed, None)
            if run.status == INTERRUPTED:
                raise _Interrupted
            candidate = Candidate.of(level, run, target)
            self.comparison.search.append(candidate)
            return candidate.cost

        level, _ = best_level(cost, len(ladder), policy.numbers[0])
        self._all_seeds(policy, lambda task: FixedFidelity((task.ladder or ladder).fidelity(level)))

    def _train(
        self, task: Task, controller: Any, name: str, seed: int, directory: Path | None
    ) -> Run:
        label = name if len(self._settings.seeds) == 1 else f"{name}, seed {seed}"
        try:
            return optimize(
                task,
                controller=controller,
                directory=directory,
                seed=seed,
                progress=self._progress,
                label=label,
                **self._common,
            )
        except NonFiniteError as error:
            return error.run


class _Interrupted(Exception):  # noqa: N818
    """Ctrl-C ended a run."""


def _same(task: Task) -> Callable[[int], Task]:
    return lambda _: task


def _built(build: Callable[[int], Task], seed: int) -> Task:
    task: Any = build(seed)
    if not isinstance(task, Task):
        msg = f"compare: task(seed) should return a Task, got {task!r}."
        raise TypeError(msg)
    return task


def recommended(task: Task) -> tuple[str, ...]:
    """The policies that a task recommends, else the full solve and its default.

    **Raises:** `ValueError` for a task without controller, ladder and full fidelity.
    """
    if task.policies:
        return tuple(task.policies)
    return tuple(dict.fromkeys(("full", default_policy(task))))


def check_policies(policies: Sequence[Policy], task: Task, target: float | None) -> None:
    """Refuse before hours of training what would fail after them.

    **Raises:** `ValueError` for a policy that the task or the comparison cannot serve.
    """
    kinds = {policy.kind for policy in policies}
    for policy in policies:
        if policy.kind != "best-fixed":
            controller_for(policy, task)
        elif task.ladder is None:
            msg = f"policy {policy.text!r} searches a ladder; give the task ladder=."
            raise ValueError(msg)
        elif target is None and "full" not in kinds:
            msg = f"policy {policy.text!r} needs full among the policies, or a target."
            raise ValueError(msg)


def occupied_folder(
    directory: Path, policies: Sequence[Policy], seeds: Sequence[int]
) -> Path | None:
    """The first folder that a comparison would write to and that holds results already."""
    if (directory / COMPARISON_FILE).exists():
        return directory
    folders = [_folder(directory, policy, seed) for policy in policies for seed in seeds]
    return next((folder for folder in folders if holds_run(folder)), None)


def _folder(directory: Path, policy: Policy, seed: int) -> Path:
    return directory / policy.slug / f"seed-{seed}"


def _check_settings(settings: ComparisonSettings) -> None:
    for name in ("seeds", "policies"):
        values = getattr(settings, name)
        if len(set(values)) < len(values):
            msg = (
                f"compare: {name} should differ from each other, got {', '.join(map(str, values))}."
            )
            raise ValueError(msg)
