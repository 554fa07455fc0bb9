"""Compare: the same training under several policies."""

import dataclasses
import itertools
import os
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import optax

from bilevel.outer import text
from bilevel.outer.assignment import controller_for, default_policy
from bilevel.outer.callbacks import AnyCallback
from bilevel.outer.checkpoints.store import remove_checkpoints
from bilevel.outer.comparison import COMPARISON_FILE, FULL, Candidate, Comparison
from bilevel.outer.limits import in_words, limits
from bilevel.outer.machine import machine
from bilevel.outer.optimize import NonFiniteError, optimize
from bilevel.outer.policy import Policy, parse_policies, parse_policy
from bilevel.outer.processes.shared import several
from bilevel.outer.progress import Reporter
from bilevel.outer.run import INTERRUPTED, Run, holds_run
from bilevel.outer.search import cheapest_level
from bilevel.outer.settings import ComparisonSettings, validated
from bilevel.outer.spread import Spread
from bilevel.outer.task import Task
from bilevel.outer.versions import versions
from bilevel.outer.warm_up import warm_up
from bilevel.refinement.fidelity import Fidelity
from bilevel.refinement.fixed import FixedFidelity
from bilevel.refinement.ladder import Ladder


def compare(
    task: Task | Callable[[int], Task],
    policies: Sequence[str] | None = None,
    seeds: int | Sequence[int] = 1,
    *,
    optimizer: optax.GradientTransformation | None = None,
    epochs: int | None = None,
    directory: str | os.PathLike[str] | None = None,
    target: float | None = None,
    margin: float = 0.02,
    callbacks: AnyCallback | Sequence[AnyCallback] = (),
    progress: bool | Reporter = True,
    max_nonfinite: int = 10,
    overwrite: bool = False,
    command: str | None = None,
) -> Comparison:
    """Train under several policies, and say what each took to get where.

    Every run compiles for itself, so wall times with compilation are those of a single
    run. A run that is given up as non-finite stays in the table, marked; Ctrl-C ends
    the comparison with the runs there are.

    **Arguments:**

    - `task`: a task, or ``task(seed) -> Task`` where start or data depend on the seed.
    - `policies`: of `full`, `fixed=K`, `fixed=K:M`, `best-fixed`, `best-fixed=RUNS`,
        `schedule=linear:STEP`, `schedule=iterations:STEP`, `hoag=exponential|quadratic|cubic`,
        `prdp`, `error`, `auto`, `task`,
        which ``bilevel compare --help`` explains. By default what the task recommends, else
        `full` and the task's controller, or `prdp` on its ladder.
    - `seeds`: how many, from 0, or the seeds themselves.
    - `optimizer`, `epochs`, `callbacks`, `progress`, `max_nonfinite`: as in
        [`optimize`][].
    - `directory`: where to keep the runs and `comparison.json`; `None` keeps nothing.
    - `target`: metric that the policies are timed to, and that `best-fixed` has to end at;
        by default the final metric of `full`, seed by seed, with the margin.
    - `margin`: part of full's final metric by which another may miss it.
    - `overwrite`: whether a comparison in `directory` may be replaced.
    - `command`: the command that this was made by, to be kept with it.

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
    if several():
        msg = (
            "compare: it trains in one process, and this is one of several. Compare without the "
            "others, or run each policy by itself with optimize."
        )
        raise ValueError(msg)
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
        "time_solver": True,
    }
    origin = {
        "command": command,
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(),
        "versions": versions(),
    }
    comparing = _Comparing(build, settings, common, progress, parsed, first, origin)
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
        origin: dict[str, Any],
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
            origin=origin,
        )
        self._tried: dict[tuple[int, int], Run] = {}

    def run(self) -> None:
        """Train under every policy; the search last, for its target is the full solve's."""
        try:
            self._warm_up()
            for policy in sorted(self._policies, key=lambda policy: policy.kind == "best-fixed"):
                if policy.kind == "best-fixed":
                    self._search(policy, self._first)
                else:
                    self._all_seeds(
                        policy, lambda task, policy=policy: controller_for(policy, task)
                    )
        except _Interrupted:
            self.comparison = dataclasses.replace(self.comparison, interrupted=True)

    def _warm_up(self) -> None:
        policies = [policy for policy in self._policies if policy.kind != "best-fixed"]
        full = parse_policy(FULL)
        controller = controller_for(policies[0] if policies else full, self._first)
        try:
            warm_up(self._first, self._common["optimizer"], controller)
        except KeyboardInterrupt:
            raise _Interrupted from None

    def _all_seeds(self, policy: Policy, controller: Callable[[Task], Any]) -> None:
        for seed in self._settings.seeds:
            task = _built(self._build, seed)
            directory = self._directory(policy, seed)
            run = self._train(task, controller(task), policy.text, seed, directory)
            self.comparison.runs[policy.text].append(run)
            if run.status == INTERRUPTED:
                raise _Interrupted

    def _search(self, policy: Policy, task: Task) -> None:
        """Find the cheapest constant level that ends where the full solve does.

        The first seed says where to look, all seeds what is found: one seed's noise is often
        larger than the margin.
        """
        assert task.ladder is not None
        ladder, seeds = task.ladder, self._settings.seeds
        places = [k for k in range(len(seeds)) if self.comparison.target_of(k) is not None]
        top = len(ladder) - 1
        full = self.comparison.runs.get(FULL, [])
        if len(full) == len(seeds) and same_budgets(ladder.fidelity(top), task.full_fidelity):
            self._tried |= {(top, seed): run for seed, run in zip(seeds, full, strict=True)}

        def excess(level: int, wanted: Sequence[int]) -> float:
            runs = {place: self._try(policy, level, place) for place in wanted}
            self._note_candidates(ladder)
            return self.comparison.excess(runs)

        level = None
        if places:
            known = {top: excess(top, places)} if (top, seeds[0]) in self._tried else {}
            level = cheapest_level(
                lambda level: excess(level, places[:1]),
                _sizes(ladder),
                policy.numbers[0],
                judge=lambda level: excess(level, places),
                known=known,
            )
        if level is not None:
            runs = [self._try(policy, level, place) for place in range(len(seeds))]
        elif len(full) == len(seeds):
            # No level gets there: what is left is to solve in full.
            runs = full
        else:
            self._all_seeds(policy, lambda task: controller_for(parse_policy(FULL), task))
            return
        for seed, run in zip(seeds, runs, strict=True):
            kept = _renamed(run, self._label(policy.text, seed), self._directory(policy, seed))
            self.comparison.runs[policy.text].append(kept)

    def _try(self, policy: Policy, level: int, place: int) -> Run:
        """The run at a constant level, made unless there is one."""
        seed = self._settings.seeds[place]
        run = self._tried.get((level, seed))
        if run is None:
            task = _built(self._build, seed)
            assert task.ladder is not None
            name = f"{policy.text}, trying level {level}"
            run = self._train(task, FixedFidelity(task.ladder.fidelity(level)), name, seed, None)
            if run.status == INTERRUPTED:
                raise _Interrupted
            self._tried[level, seed] = run
        return run

    def _note_candidates(self, ladder: Ladder) -> None:
        """Bring what the comparison says about the search up to date."""
        places = {seed: place for place, seed in enumerate(self._settings.seeds)}
        search = self.comparison.search
        search.clear()
        for level in sorted({level for level, _ in self._tried}):
            runs = {places[seed]: run for (k, seed), run in self._tried.items() if k == level}
            metrics = [run.summary.final_metric for run in runs.values()]
            work = Spread.of([run.summary.work for run in runs.values()])
            metric = Spread.of(metrics)
            fidelity = ladder.fidelity(level)
            search.append(
                Candidate(
                    level=level,
                    budget=_in_words(fidelity, static=not ladder.has_one_shape),
                    runs=len(runs),
                    work=None if work is None else work.mean,
                    metric=None if metric is None else metric.mean,
                    excess=self.comparison.excess(runs),
                )
            )

    def _label(self, name: str, seed: int) -> str:
        return name if len(self._settings.seeds) == 1 else f"{name}, seed {seed}"

    def _directory(self, policy: Policy, seed: int) -> Path | None:
        directory = self._settings.directory
        return None if directory is None else _folder(directory, policy, seed)

    def _train(
        self, task: Task, controller: Any, name: str, seed: int, directory: Path | None
    ) -> Run:
        try:
            return optimize(
                task,
                controller=controller,
                directory=directory,
                seed=seed,
                progress=self._progress,
                label=self._label(name, seed),
                **self._common,
            )
        except NonFiniteError as error:
            return error.run


def same_budgets(first: Fidelity, second: Fidelity | None) -> bool:
    """Whether two fidelities come to the same solve."""
    if second is None or first.static != second.static:
        return False
    numbers = [{**limits(fidelity), "level": None} for fidelity in (first, second)]
    return numbers[0] == numbers[1]


def _in_words(fidelity: Fidelity, *, static: bool) -> str:
    budget = fidelity.budget
    words = text.budget(int(budget.iterations), float(budget.rtol), float(budget.atol))
    return f"{in_words(fidelity.static)}, {words}" if static else words


def _sizes(ladder: Ladder) -> Sequence[float]:
    """Something that grows with the levels: their iterations, or their places."""
    caps = [int(fidelity.budget.iterations) for fidelity in ladder]
    rising = all(low < high for low, high in itertools.pairwise(caps))
    return caps if rising else range(1, len(caps) + 1)


def _renamed(run: Run, name: str, directory: Path | None) -> Run:
    """A run that was made for another purpose, as it is to be kept."""
    run = dataclasses.replace(run, summary=dataclasses.replace(run.summary, policy=name))
    if directory is None:
        return dataclasses.replace(run, directory=None)
    remove_checkpoints(directory)
    run.save(directory)
    return dataclasses.replace(run, directory=directory)


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
