"""Comparison: runs under several policies, side by side."""

import dataclasses
import json
import math
import os
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from bilevel.outer import text
from bilevel.outer.history import decode_number, encode
from bilevel.outer.run import COMPLETED, STOPPED, Run

COMPARISON_FILE = "comparison.json"
FULL = "full"
SEARCH = "best-fixed"


@dataclasses.dataclass(frozen=True)
class Spread:
    """Mean and standard deviation of one number over seeds.

    - `mean`: over the runs that have the number.
    - `deviation`: of the sample; `None` for fewer than two.
    - `count`: runs that have it.

    >>> Spread.of([1.0, 3.0]).mean
    2.0
    """

    mean: float
    deviation: float | None
    count: int

    @classmethod
    def of(cls, values: Sequence[float | None]) -> "Spread | None":
        """From numbers; `None` if there is none."""
        known = [float(value) for value in values if value is not None]
        if not known:
            return None
        finite = all(math.isfinite(value) for value in known)
        mean = statistics.fmean(known)
        deviation = statistics.stdev(known) if len(known) > 1 and finite else None
        return cls(mean, deviation, len(known))

    def show(self, form: Callable[[float | None], str]) -> str:
        """The mean, and ± the deviation where there is one."""
        if not self.deviation:
            return form(self.mean)
        return f"{form(self.mean)} ± {form(self.deviation)}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One policy, over its seeds.

    - `policy`, `runs`: its name, and how many runs there are.
    - `status`: `completed`, or what the others were.
    - `final_metric`, `best_metric`: at the end, and the smallest of a run.
    - `primal_iterations`, `adjoint_iterations`: sums over a run.
    - `seconds`, `seconds_without_compile`: wall time of a run.
    - `compilations`: of the update, in a run.
    - `reached`: runs that came to the target.
    - `epochs_to_target`, `work_to_target`, `seconds_to_target`,
        `seconds_to_target_without_compile`: until then, over the runs that did; work is
        primal and adjoint iterations together.
    """

    policy: str
    runs: int
    status: str
    final_metric: Spread | None
    best_metric: Spread | None
    primal_iterations: Spread | None
    adjoint_iterations: Spread | None
    seconds: Spread | None
    seconds_without_compile: Spread | None
    compilations: Spread | None
    reached: int | None
    epochs_to_target: Spread | None
    work_to_target: Spread | None
    seconds_to_target: Spread | None
    seconds_to_target_without_compile: Spread | None


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
        return cls(record.epoch, until.work, record.elapsed, record.elapsed - compiled)


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A constant level that the search for the best one tried.

    - `level`, `iterations`: of the ladder, and its primal cap.
    - `work`: iterations to the target; infinite if it was not reached.
    - `metric`: at the end.
    """

    level: int
    iterations: int | None
    work: float
    metric: float

    @classmethod
    def of(cls, level: int, run: Run, target: float | None) -> Self:
        """Of a run at that level."""
        arrival = Arrival.of(run, target)
        # Where no solve reports its iterations, epochs at a cap are the work.
        cap = run.history[-1].budget_iterations if run.history else None
        work = math.inf
        if arrival is not None:
            work = arrival.epoch * (cap or 1) if arrival.work is None else arrival.work
        metric = run.summary.final_metric
        usable = metric is not None and math.isfinite(metric) and run.status == COMPLETED
        return cls(level, cap, work, metric if usable and metric is not None else math.inf)

    @property
    def cost(self) -> tuple[float, float]:
        """Work first; where no level reaches the target, the metric decides."""
        return self.work, self.metric


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Runs under several policies, side by side.

    - `task`, `metric_name`: what was trained and measured.
    - `runs`: by policy, one for each seed.
    - `target`: metric that policies are timed to; `None` takes full's final metric.
    - `margin`: part of full's final metric by which another may miss it.
    - `search`: levels that `best-fixed` tried.
    - `interrupted`: whether Ctrl-C ended it early.

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

    def target_of(self, place: int) -> float | None:
        """The target for the runs of one seed, by its place among the seeds."""
        if self.target is not None:
            return self.target
        full = self.runs.get(FULL, [])
        if place >= len(full) or full[place].status not in (COMPLETED, STOPPED):
            return None
        metric = full[place].summary.final_metric
        if metric is None or not math.isfinite(metric):
            return None
        return metric + self.margin * abs(metric)

    @property
    def rows(self) -> list[Row]:
        """One row a policy, in the order they were asked for."""
        return [self._row(policy, runs) for policy, runs in self.runs.items() if runs]

    def table(self) -> Group:
        """Two printable tables: whole runs, and what it took to the target."""
        parts: list[Table | Text] = [self._whole_runs()]
        if any(row.reached is not None for row in self.rows):
            parts.append(self._to_target())
        parts += [Text(note) for note in self._notes()]
        return Group(*parts)

    def to_json(self) -> str:
        """The comparison as one JSON object; the runs by their summaries."""
        fields = {
            "task": self.task,
            "metric_name": self.metric_name,
            "target": self.target,
            "targets": [self.target_of(place) for place in range(self._seeds)],
            "margin": self.margin,
            "interrupted": self.interrupted,
            "rows": [dataclasses.asdict(row) for row in self.rows],
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
        """Write `comparison.json`; the runs have written themselves."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / COMPARISON_FILE).write_text(self.to_json() + "\n", encoding="utf-8")

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
        others = sorted({run.status for run in runs} - {COMPLETED})
        return Row(
            policy=policy,
            runs=len(runs),
            status=", ".join(others) or COMPLETED,
            final_metric=Spread.of([summary.final_metric for summary in summaries]),
            best_metric=Spread.of([summary.best_metric for summary in summaries]),
            primal_iterations=Spread.of([summary.primal_iterations for summary in summaries]),
            adjoint_iterations=Spread.of([summary.adjoint_iterations for summary in summaries]),
            seconds=Spread.of([summary.seconds for summary in summaries]),
            seconds_without_compile=Spread.of(
                [summary.seconds_without_compile for summary in summaries]
            ),
            compilations=Spread.of([summary.compilations for summary in summaries]),
            reached=len(reached) if any(target is not None for target in targets) else None,
            epochs_to_target=Spread.of([arrival.epoch for arrival in reached]),
            work_to_target=Spread.of([arrival.work for arrival in reached]),
            seconds_to_target=Spread.of([arrival.seconds for arrival in reached]),
            seconds_to_target_without_compile=Spread.of(
                [arrival.seconds_without_compile for arrival in reached]
            ),
        )

    def _whole_runs(self) -> Table:
        table = text.table(title=escape(f"{self.task}, whole runs"))
        _columns(
            table,
            (
                "policy",
                escape(self.metric_name),
                "Σ primal",
                "Σ adjoint",
                "wall, s",
                "without compile",
            ),
        )
        table.add_column("compiles", justify="right")
        for row in self.rows:
            status = "" if row.status == COMPLETED else f" ({row.status})"
            table.add_row(
                f"{row.policy}{status}",
                _show(row.final_metric, text.number),
                _show(row.primal_iterations, text.count),
                _show(row.adjoint_iterations, text.count),
                _show(row.seconds, text.seconds),
                _show(row.seconds_without_compile, text.seconds),
                _show(row.compilations, text.number),
            )
        return table

    def _to_target(self) -> Table:
        targets = [self.target_of(place) for place in range(self._seeds)]
        level = Spread.of(targets)
        where = text.NOTHING if level is None else text.number(level.mean)
        how = "" if self.target is not None else f", full's final one + {100 * self.margin:.3g} %"
        table = text.table(title=escape(f"until {self.metric_name} ≤ {where}{how}"))
        _columns(table, ("policy", "epochs", "Σ iterations", "saved", "wall, s", "saved"))
        table.add_column("without compile", justify="right")
        table.add_column("saved", justify="right")
        base = next((row for row in self.rows if row.policy == FULL), None)
        for row in self.rows:
            if not row.reached:
                table.add_row(row.policy, "not reached")
                continue
            part = "" if row.reached == row.runs else f" ({row.reached} of {row.runs})"
            cells = [f"{row.policy}{part}", _show(row.epochs_to_target, text.count)]
            for name, form in (
                ("work_to_target", text.count),
                ("seconds_to_target", text.seconds),
                ("seconds_to_target_without_compile", text.seconds),
            ):
                value: Spread | None = getattr(row, name)
                cells += [
                    _show(value, form),
                    _saved(value, None if row.policy == FULL else base, name),
                ]
            table.add_row(*cells)
        return table

    def _notes(self) -> list[str]:
        notes: list[str] = []
        if any(row.runs > 1 for row in self.rows):
            notes.append("Means over the seeds, ± the sample's standard deviation.")
        if self.search:
            tried = ", ".join(
                f"{candidate.iterations}" for candidate in sorted(self.search, key=_by_level)
            )
            found = "".join(
                f" {policy} stands for {runs[0].history[-1].budget_iterations} iterations."
                for policy, runs in self.runs.items()
                if policy.startswith(SEARCH) and runs and runs[0].history
            )
            notes.append(f"{SEARCH} tried budgets of {tried} iterations.{found}")
        if any(row.primal_iterations is None for row in self.rows):
            notes.append(
                "Where Σ is missing no solve reported: pass fidelity=fidelity to bl.solve."
            )
        if self.interrupted:
            notes.append("Interrupted: what is missing was not run.")
        return notes


def _by_level(candidate: Candidate) -> int:
    return candidate.level


def _columns(table: Table, names: Sequence[str]) -> None:
    for name in names:
        table.add_column(name, justify="left" if name == "policy" else "right")


def _show(value: Spread | None, form: Callable[[float | None], str]) -> str:
    return text.NOTHING if value is None else value.show(form)


def _saved(value: Spread | None, base: Row | None, name: str) -> str:
    reference: Spread | None = None if base is None else getattr(base, name)
    if value is None or reference is None or not reference.mean > 0:
        return ""
    saved = round(100 * (1 - value.mean / reference.mean))
    return f"{saved} %" if saved >= 0 else f"{-saved} % more"


def _relative(run: Run) -> str:
    # Policy and seed: the last two folders.
    return "" if run.directory is None else Path(*run.directory.parts[-2:]).as_posix()
