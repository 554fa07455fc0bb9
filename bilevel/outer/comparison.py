"""Comparison: runs under several policies, side by side."""

import dataclasses
import json
import math
import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from rich.console import Group
from rich.text import Text

from bilevel.outer import text
from bilevel.outer.history import decode_number, encode
from bilevel.outer.path import budget_path, budgets_in_words
from bilevel.outer.row import Row, came_to_its_end, outcome
from bilevel.outer.run import Run
from bilevel.outer.sheet import Sheet
from bilevel.outer.spread import CONFIDENCE, Spread
from bilevel.outer.tables import until_target, whole_runs

COMPARISON_FILE = "comparison.json"
TABLE_FILE = "comparison.md"
FULL = "full"
SEARCH = "best-fixed"


@dataclasses.dataclass(frozen=True)
class Arrival:
    """What a run had spent when its metric first was at most the target.

    - `epoch`; `work` in iterations, primal and adjoint; `seconds` of wall time, and without
        compilation.
    """

    epoch: int
    work: int | None
    seconds: float
    seconds_without_compile: float

    @classmethod
    def of(cls, run: Run, target: float | None) -> "Arrival | None":
        """Of a run; `None` if it never got there, or there is no target."""
        record = None if target is None else run.history.first_at(target)
        if record is None:
            return None
        until = run.history.until(record)
        compiled = float(until.total("compile_seconds") or 0.0)
        # Before the first update nothing was spent, which is not the same as not known.
        work = until.work if record.epoch else 0
        return cls(record.epoch, work, record.elapsed, record.elapsed - compiled)


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A constant level that the search for the best one tried.

    - `level`, `budget`: of the ladder, and what it allows a solve, in words.
    - `runs`: seeds that it was tried with.
    - `work`: iterations of a run, primal and adjoint; mean over the seeds.
    - `metric`: at the end; mean over the seeds.
    - `excess`: by what part the metric misses what it had to reach, mean over the seeds; at
        most 0 where it got there, infinite where a run failed.
    """

    level: int
    budget: str
    runs: int
    work: float | None
    metric: float | None
    excess: float


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Runs under several policies, side by side.

    - `task`, `metric_name`: what was trained and measured.
    - `runs`: by policy, one for each seed.
    - `target`: metric that policies are timed to; `None` takes full's final metric.
    - `margin`: part of full's final metric by which another may miss it.
    - `search`: levels that `best-fixed` tried.
    - `interrupted`: whether Ctrl-C ended it early.
    - `origin`: when, where and by which command it was made.

    >>> import bilevel as bl, optax
    >>> task = bl.Task(1.0, lambda theta, batch, fidelity: theta**2, full=bl.Budget(1))
    >>> comparison = bl.compare(task, ["full"], optimizer=optax.sgd(0.25), epochs=2, progress=False)
    >>> comparison.rows[0].final_metric.mean
    0.25
    """

    task: str
    metric_name: str
    runs: dict[str, list[Run]]
    target: float | None
    margin: float
    search: list[Candidate]
    interrupted: bool
    origin: dict[str, Any] = dataclasses.field(default_factory=dict[str, Any])

    def target_of(self, place: int) -> float | None:
        """The target for the runs of one seed, by its place among the seeds."""
        if self.target is not None:
            return self.target
        full = self.runs.get(FULL, [])
        if place >= len(full) or not came_to_its_end(full[place]):
            return None
        metric = full[place].summary.final_metric
        if metric is None:
            return None
        return metric + self.margin * abs(metric)

    def excess(self, runs: Mapping[int, Run]) -> float:
        """By what part final metrics miss the target, mean over the seeds; 0 reaches it.

        **Arguments:**

        - `runs`: by the place of their seeds; those without a target do not count.

        **Returns:** infinite where a run failed, NaN where nothing has a target.
        """
        misses: list[float] = []
        for place, run in runs.items():
            target = self.target_of(place)
            if target is None:
                continue
            metric = run.summary.final_metric
            if metric is None or not came_to_its_end(run):
                return math.inf
            # A target of zero gives no part to measure by.
            misses.append((metric - target) / (abs(target) or 1.0))
        return statistics.fmean(misses) if misses else math.nan

    @property
    def rows(self) -> list[Row]:
        """One row a policy, in the order they were asked for."""
        return [self._row(policy, runs) for policy, runs in self.runs.items() if runs]

    def table(self) -> Group:
        """Two printable tables: whole runs, and what it took to the target; then notes."""
        return Group(*self.sheets, *(Text(note) for note in self.notes))

    @property
    def sheets(self) -> list[Sheet]:
        """The tables by themselves."""
        rows = self.rows
        timed = any(row.reached is not None for row in rows)
        whole = whole_runs(rows, self.task, self.metric_name, budgets=not timed)
        return [whole, until_target(rows, self.goal)] if timed else [whole]

    def to_markdown(self) -> str:
        """The tables and notes in Markdown, with what made them."""
        lines = [f"**{sheet.title}**\n\n{sheet.markdown()}\n" for sheet in self.sheets]
        lines.append("\n".join(f"- {note}" for note in [*self.notes, *_origin_notes(self.origin)]))
        return "\n".join(lines)

    @property
    def goal(self) -> str:
        """What policies are timed to, in words."""
        how = "" if self.target is not None else f", full's final one + {self._percent}"
        if how and self._seeds > 1:
            how += ", seed by seed"
        return f"until {self.metric_name} ≤ {text.number(self.mean_target)}{how}"

    @property
    def mean_target(self) -> float | None:
        """What policies are timed to, mean over the seeds."""
        targets = Spread.of([self.target_of(place) for place in range(self._seeds)])
        return None if targets is None else targets.mean

    @property
    def _percent(self) -> str:
        return f"{100 * self.margin:.3g} %"

    def to_json(self) -> str:
        """The comparison as one JSON object; the runs by their summaries."""
        fields = {
            "task": self.task,
            "metric_name": self.metric_name,
            "target": self.target,
            "targets": [self.target_of(place) for place in range(self._seeds)],
            "margin": self.margin,
            "interrupted": self.interrupted,
            "origin": self.origin,
            "confidence": CONFIDENCE,
            "rows": [dataclasses.asdict(row) for row in self.rows],
            "budgets": {
                policy: [budget_path(run) for run in runs] for policy, runs in self.runs.items()
            },
            "search": [dataclasses.asdict(candidate) for candidate in self.search],
            "runs": {
                policy: [json.loads(run.summary.to_json()) for run in runs]
                for policy, runs in self.runs.items()
            },
            "directories": {
                policy: [_relative(run) for run in runs] for policy, runs in self.runs.items()
            },
        }
        return json.dumps(encode(fields), indent=2, allow_nan=False)

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write `comparison.json` and `comparison.md`; the runs have written themselves."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / COMPARISON_FILE).write_text(self.to_json() + "\n", encoding="utf-8")
        (directory / TABLE_FILE).write_text(self.to_markdown() + "\n", encoding="utf-8")

    @classmethod
    def read(cls, directory: str | os.PathLike[str]) -> Self:
        """Read a comparison and its runs from their directory.

        **Raises:** `FileNotFoundError` if there is none, `ValueError` if it cannot be read.
        """
        directory = Path(directory)
        path = directory / COMPARISON_FILE
        if not path.is_file():
            msg = f"{directory} holds no comparison: there is no {COMPARISON_FILE} in it."
            raise FileNotFoundError(msg)
        try:
            stored: Any = json.loads(path.read_text(encoding="utf-8"))
            runs = {
                policy: [Run.read(directory / folder) for folder in folders if folder]
                for policy, folders in stored["directories"].items()
            }
            search = [
                Candidate(**{name: decode_number(value) for name, value in entry.items()})
                for entry in stored["search"]
            ]
            return cls(
                stored["task"],
                stored["metric_name"],
                runs,
                stored["target"],
                stored["margin"],
                search,
                stored["interrupted"],
                stored["origin"],
            )
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            msg = f"{path} is no comparison that bilevel wrote: {error!r}"
            raise ValueError(msg) from error

    @property
    def _seeds(self) -> int:
        return max((len(runs) for runs in self.runs.values()), default=0)

    def _row(self, policy: str, runs: list[Run]) -> Row:
        summaries = [run.summary for run in runs]
        targets = [self.target_of(place) for place in range(len(runs))]
        arrivals = [Arrival.of(run, target) for run, target in zip(runs, targets, strict=True)]
        reached = [arrival for arrival in arrivals if arrival is not None]
        full = self.runs.get(FULL, [])
        pairs = list(zip(runs, full, strict=False))
        ended = all(came_to_its_end(run) for pair in pairs for run in pair)
        bases = [Arrival.of(run, target) for run, target in zip(full, targets, strict=False)]
        both = [(mine, base) for mine, base in zip(arrivals, bases, strict=False) if mine and base]
        return Row(
            policy=policy,
            runs=len(runs),
            status=outcome(runs),
            final_metric=Spread.of([summary.final_metric for summary in summaries]),
            best_metric=Spread.of([summary.best_metric for summary in summaries]),
            relative_metric=Spread.of([_ratio(run, base) for run, base in pairs if ended]),
            gradient_noise=Spread.of([_noise(run) for run in runs]),
            primal_iterations=Spread.of([summary.primal_iterations for summary in summaries]),
            adjoint_iterations=Spread.of([summary.adjoint_iterations for summary in summaries]),
            work=Spread.of([summary.work for summary in summaries]),
            saved=_saved([(run.summary.work, base.summary.work) for run, base in pairs if ended]),
            seconds=Spread.of([summary.seconds for summary in summaries]),
            seconds_without_compile=Spread.of(
                [summary.seconds_without_compile for summary in summaries]
            ),
            solver_seconds=Spread.of([summary.solver_seconds for summary in summaries]),
            compilations=Spread.of([summary.compilations for summary in summaries]),
            budgets=budgets_in_words(runs),
            reached=len(reached) if any(target is not None for target in targets) else None,
            epochs_to_target=Spread.of([arrival.epoch for arrival in reached]),
            work_to_target=Spread.of([arrival.work for arrival in reached]),
            seconds_to_target=Spread.of([arrival.seconds for arrival in reached]),
            seconds_to_target_without_compile=Spread.of(
                [arrival.seconds_without_compile for arrival in reached]
            ),
            saved_to_target=_saved([(mine.work, base.work) for mine, base in both]),
            seconds_saved_to_target=_saved([(mine.seconds, base.seconds) for mine, base in both]),
        )

    @property
    def notes(self) -> list[str]:
        """What a reader of the tables has to know, a sentence or two each."""
        notes: list[str] = []
        rows = self.rows
        most = max((row.runs for row in rows), default=0)
        if most > 1:
            notes.append(
                f"Means over {most} seeds, ± half the 95 % confidence interval of the mean "
                "(Student's t)."
            )
        if any(row.reached is not None for row in rows):
            notes.append(
                "Timed to the first epoch at the target, for full too, whose own first is often "
                "before its last."
            )
        if any(row.gradient_noise is not None for row in rows):
            notes.append(
                "Noise: how far one batch's gradient is from the mean of all, as a part of its "
                "norm, in the last epoch."
            )
        if any(row.solver_seconds is not None for row in rows):
            notes.append(
                "Solver: Σ iterations times what one takes, timed after the run; without set-up."
            )
        if self.target is None and FULL in self.runs and self.mean_target is None:
            notes.append(
                f"Nothing is timed to a target: {FULL} came to no finite {self.metric_name}. Give "
                "one (target=, --target)."
            )
        notes += self._estimate_notes()
        notes += self._search_notes()
        if any(row.primal_iterations is None for row in rows):
            notes.append(
                "Where Σ is missing no solve reported: pass fidelity=fidelity to bl.solve."
            )
        if self.interrupted:
            notes.append("Interrupted: what is missing was not run.")
        return notes

    def _estimate_notes(self) -> list[str]:
        """What error estimates took, which is in no sum of iterations."""
        means: dict[str, float] = {}
        for policy, runs in self.runs.items():
            spent = Spread.of([run.summary.error_applications for run in runs])
            if spent is not None and spent.mean > 0:
                means[policy] = spent.mean
        if not means:
            return []
        each = "; ".join(f"{policy}: {text.count(mean)}" for policy, mean in means.items())
        return [f"Besides Σ, applications for estimates of the gradient's error: {each}."]

    def _search_notes(self) -> list[str]:
        searches = [policy for policy, runs in self.runs.items() if _is_search(policy) and runs]
        if not searches and not self.search:
            return []
        wanted = (
            f"within {self._percent} of full's" if self.target is None else "at most the target"
        )
        lines = [
            f"{SEARCH}: the cheapest constant budget whose final {self.metric_name} is {wanted}."
        ]
        if self.search:
            tried = "; ".join(
                f"{each.budget}: {text.number(each.metric)}"
                # Another mean than its neighbours', with which it may not be in order.
                + (f" ({each.runs} of {self._seeds} seeds)" if each.runs < self._seeds else "")
                for each in sorted(self.search, key=lambda each: each.level)
            )
            lines[0] += f" Tried: {tried}."
        for policy in searches:
            allowed = budgets_in_words(self.runs[policy])
            reached = any(each.excess <= 0 for each in self.search)
            none = "" if reached else ", the full solve's, for no level tried gets there"
            lines.append(f"{policy} stands for {allowed} iterations{none}.")
        return [" ".join(lines)]


def _is_search(policy: str) -> bool:
    return policy.partition("=")[0] == SEARCH


def _origin_notes(origin: Mapping[str, Any]) -> list[str]:
    """What made a comparison, as far as it is known."""
    if not origin:
        return []
    machine, versions = origin["machine"], origin["versions"]
    command = f"`{origin['command']}`, " if origin["command"] else ""
    core = "core" if machine["cores"] == 1 else "cores"
    packages = ", ".join(f"{name} {version}" for name, version in versions.items())
    devices = ", ".join(machine["devices"])
    where = f"{machine['processor']}, {machine['cores']} {core}, device {devices}"
    return [
        f"Made by {command}{origin['date']}, on {where}; {machine['dtype']} by default.",
        f"Versions: {packages}.",
    ]


def _ratio(run: Run, base: Run) -> float | None:
    """`None` where the reference is no positive number: a ratio would say nothing."""
    mine, reference = run.summary.final_metric, base.summary.final_metric
    return mine / reference if mine is not None and reference and reference > 0 else None


def _noise(run: Run) -> float | None:
    for last in run.history[-1:]:
        if last.gradient_noise is not None and last.gradient_norm:
            return last.gradient_noise / last.gradient_norm
    return None


def _saved(pairs: Sequence[tuple[float | None, float | None]]) -> float | None:
    """Part of the second numbers' sum that the first save; `None` where one is missing."""
    known = [(mine, full) for mine, full in pairs if mine is not None and full is not None]
    full = sum(base for _, base in known)
    if len(known) < len(pairs) or not full > 0:
        return None
    return 1 - sum(mine for mine, _ in known) / full


def _relative(run: Run) -> str:
    # Policy and seed: the last two folders.
    return "" if run.directory is None else Path(*run.directory.parts[-2:]).as_posix()
