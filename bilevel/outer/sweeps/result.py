"""Result: the runs of a sweep in one table."""

import csv
import dataclasses
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from rich.console import Group
from rich.text import Text

from bilevel.outer.checkpoints.durable import write_file
from bilevel.outer.comparison import FULL, Comparison
from bilevel.outer.frame import data_frame
from bilevel.outer.history import History, encode
from bilevel.outer.row import Row
from bilevel.outer.run import FAILED, HISTORY_FILE, SUMMARY_FILE, Run, Summary, summarize
from bilevel.outer.sheet import Column, Sheet
from bilevel.outer.spread import Spread
from bilevel.outer.sweeps.attempt import Failure, failure_of, finished
from bilevel.outer.sweeps.plan import Plan
from bilevel.outer.sweeps.point import Point, in_words, plain
from bilevel.outer.tables import until_target, whole_runs

GROUPED_FILE = "sweep.csv"
RUNS_FILE = "runs.csv"
TABLE_FILE = "sweep.md"
NOT_BEGUN = "not begun"
UNFINISHED = "unfinished"

_SHOWN = 10
"""Failures that are told one by one."""

Cell = float | str | None


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What a sweep came to: a comparison of the policies for each choice of settings.

    - `comparisons`: by the settings in words, such as ``"learning_rate=0.001, width=64"``, in the
        order of the plan; of one empty name where nothing was set. Their runs come without
        parameters: `bl.Run.read(run.directory)` has them.
    - `failures`: of runs that raised or whose process died, by the name of the run.
    - `unfinished`: names of the runs that were not begun, or broken off; the same call goes on
        with them.
    - `interrupted`: whether the sweep was told to stop.
    - `directory`: where it is kept.

    `read` gives the sweep that a directory holds, as far as it has come.

    >>> import tempfile, bilevel as bl, optax
    >>> task = bl.Task(1.0, lambda theta, batch, fidelity: theta**2, full=bl.Budget(1))
    >>> given = {"optimizer": optax.sgd(0.25), "epochs": 2, "workers": 1, "progress": False}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     found = bl.sweep(task, ["full", "fixed=2"], directory=folder, **given)
    ...     again = bl.Sweep.read(folder)
    >>> [row.policy for _, row in again.rows], again.unfinished
    (['full', 'fixed=2'], [])
    """

    comparisons: Mapping[str, Comparison]
    failures: Mapping[str, Failure]
    unfinished: Sequence[str]
    interrupted: bool
    directory: Path
    plan: Plan = dataclasses.field(repr=False)

    @classmethod
    def read(cls, directory: str | os.PathLike[str], *, interrupted: bool = False) -> Self:
        """Read a sweep, finished or not.

        **Raises:** `FileNotFoundError` if there is none, `ValueError` if it cannot be read.
        """
        directory = Path(directory)
        plan = Plan.read(directory)
        failures: dict[str, Failure] = {}
        unfinished: list[str] = []
        found: dict[str, dict[str, list[Run]]] = {}
        for point, policy, seed in plan.runs():
            folder = directory / plan.folder(point, policy, seed)
            run_name = ", ".join(filter(None, [point.name, policy, f"seed {seed}"]))
            failure = failure_of(folder)
            if failure is not None:
                failures[run_name] = failure
            elif not finished(folder):
                unfinished.append(run_name)
            run = _run(plan, folder, policy, seed, failure)
            found.setdefault(point.name, {}).setdefault(policy, []).append(run)
        title = plan.name or plan.task
        comparisons = {
            name: Comparison(
                task=f"{title}, {name}" if name else title,
                metric_name=plan.metric_name,
                runs=runs,
                target=plan.target,
                margin=plan.margin,
                search=[],
                interrupted=any(run.status in (NOT_BEGUN, UNFINISHED) for run in _all(runs)),
                origin=plan.origin,
            )
            for name, runs in found.items()
        }
        return cls(comparisons, failures, unfinished, interrupted, directory, plan)

    @property
    def rows(self) -> list[tuple[str, Row]]:
        """The settings in words and the row of a comparison, for each choice and policy."""
        return [(name, row) for name, each in self.comparisons.items() for row in each.rows]

    @property
    def sheets(self) -> list[Sheet]:
        """The tables by themselves: whole runs, and what it took to the targets."""
        named = [
            dataclasses.replace(row, policy=", ".join(filter(None, [name, row.policy])))
            for name, row in self.rows
        ]
        names = [row.policy for _, row in self.rows]
        metric = self.plan.metric_name
        timed = any(row.reached is not None for row in named)
        title = self.plan.name or self.plan.task
        sheets = [whole_runs(named, title, metric, budgets=not timed)]
        if timed:
            sheets.append(until_target(named, self._goal))
        return [_without_savings_of_full(sheet, names) for sheet in sheets]

    @property
    def _goal(self) -> str:
        (first, *others) = self.comparisons.values()
        if not others or self.plan.target is not None:
            return first.goal
        return f"until {self.plan.metric_name} ≤ full's final one with the same settings and seed"

    @property
    def notes(self) -> list[str]:
        """What a reader of the tables has to know, a sentence or two each."""
        notes = self._together
        if len(self.comparisons) > 1 and FULL in self.plan.policies:
            notes.append("× full and what is saved: against full with the same settings and seeds.")
        notes.append(
            "Wall times are those of runs side by side, each with its process's start: for times "
            "that count, compare the policies one after another (bl.compare)."
        )
        failed = [f"Failed: {name}: {failure.cause}" for name, failure in self.failures.items()]
        notes += failed[:_SHOWN]
        if len(failed) > _SHOWN:
            notes.append(f"Failed: {len(failed) - _SHOWN} more, see {RUNS_FILE}.")
        if self.unfinished:
            notes.append(
                f"Unfinished: {len(self.unfinished)} of {len(list(self.plan.runs()))} runs. The "
                "same command or call with this directory goes on."
            )
        return notes

    @property
    def _together(self) -> list[str]:
        """The notes of the comparisons, with the settings where they are not those of all."""
        told = {name: each.notes for name, each in self.comparisons.items()}
        owners = {
            note: [name for name in told if note in told[name]]
            for note in dict.fromkeys(note for each in told.values() for note in each)
        }
        return [
            note if len(names) == len(told) else f"{'; '.join(names)}: {note}"
            for note, names in owners.items()
        ]

    def table(self) -> Group:
        """The printable tables, then notes."""
        return Group(*self.sheets, *(Text(note) for note in self.notes))

    def to_markdown(self) -> str:
        """The tables and notes in Markdown."""
        lines = [f"**{sheet.title}**\n\n{sheet.markdown()}\n" for sheet in self.sheets]
        return "\n".join([*lines, *(f"- {note}" for note in self.notes)])

    def to_json(self) -> str:
        """The sweep as one JSON object: plan, rows, failures, and what is unfinished."""
        settings = {
            point.name: {name: plain(value) for name, value in point.settings}
            for point in self.plan.points
        }
        fields = {
            "task": self.plan.name,
            "metric_name": self.plan.metric_name,
            "settings": {name: plain(values) for name, values in self.plan.settings.items()},
            "rows": [
                {"settings": settings[name], **dataclasses.asdict(row)} for name, row in self.rows
            ],
            "failures": {name: failure.cause for name, failure in self.failures.items()},
            "unfinished": list(self.unfinished),
            "interrupted": self.interrupted,
            "directory": str(self.directory),
        }
        return json.dumps(encode(fields), indent=2, allow_nan=False)

    def to_csv(self, *, runs: bool = False) -> str:
        """The table as CSV with full digits, a row for each choice of settings and policy.

        Of a number over seeds there are its mean and, as ``NAME_confidence``, half the width of
        the mean's 95 % confidence interval.

        **Arguments:**

        - `runs`: whether a row is one run instead.
        """
        columns = self._columns(runs=runs)
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
        return text.getvalue()

    def to_dataframe(self, *, runs: bool = False) -> Any:
        """The table of `to_csv` as a data frame of pandas, or of polars where that is installed.

        **Raises:** `ImportError` where neither is.
        """
        columns = self._columns(runs=runs)
        words = {name for name, cells in columns.items() if any(isinstance(c, str) for c in cells)}
        columns = {
            name: [None if cell is None else in_words(cell) for cell in cells]
            if name in words
            else cells
            for name, cells in columns.items()
        }
        whole = {
            name
            for name, cells in columns.items()
            if name not in words and all(c is None or isinstance(c, int) for c in cells)
        }
        return data_frame("Sweep.to_dataframe", columns, whole, words)

    def save(self) -> None:
        """Write `sweep.csv`, `runs.csv` and `sweep.md`, and the comparisons that are whole."""
        files = {
            GROUPED_FILE: self.to_csv(),
            RUNS_FILE: self.to_csv(runs=True),
            TABLE_FILE: f"{self.to_markdown()}\n",
        }
        for name, content in files.items():
            write_file(self.directory / name, content.encode())
        for point in self.plan.points:
            comparison = self.comparisons[point.name]
            if comparison.interrupted:
                continue
            for run in _all(comparison.runs):
                if run.directory is not None and not (run.directory / SUMMARY_FILE).exists():
                    dataclasses.replace(run, theta={}, directory=None).save(run.directory)
            comparison.save(self.directory / point.folder)

    def _columns(self, *, runs: bool) -> dict[str, list[Cell]]:
        if runs:
            records = [
                {**_settings(point), **_of_run(run, self.directory)}
                for point in self.plan.points
                for run in _all(self.comparisons[point.name].runs)
            ]
        else:
            records = [
                {**_settings(point), **_of_row(row)}
                for point in self.plan.points
                for row in self.comparisons[point.name].rows
            ]
        return {name: [record[name] for record in records] for name in records[0]}


def _all(runs: Mapping[str, Sequence[Run]]) -> list[Run]:
    return [run for group in runs.values() for run in group]


def _run(plan: Plan, folder: Path, policy: str, seed: int, failure: Failure | None) -> Run:
    """A run as it is on disk, without its parameters; made up where it has left nothing.

    There is one for every seed, failed or not: comparisons go by their places.
    """
    records, summary = folder / HISTORY_FILE, folder / SUMMARY_FILE
    history = History.read(records) if records.is_file() else History()
    if summary.is_file():
        stored = Summary.from_json(summary.read_text(encoding="utf-8"))
        if failure is not None:
            stored = dataclasses.replace(stored, status=FAILED, message=failure.cause)
        elif not finished(folder):
            stored = dataclasses.replace(stored, status=UNFINISHED)
        return Run(None, history, stored, folder)
    status = FAILED if failure is not None else UNFINISHED if history else NOT_BEGUN
    made_up = summarize(
        history,
        {},
        task=plan.name or plan.task,
        policy=policy,
        controller="",
        seed=seed,
        status=status,
        message="" if failure is None else failure.cause,
        metric_name=plan.metric_name,
        seconds=history[-1].elapsed if history else 0.0,
        compile_seconds=history.total("compile_seconds") or 0.0,
        compilations=0,
        other_compilations=0,
        device="",
    )
    return Run(None, history, dataclasses.replace(made_up, versions={}), folder)


def _without_savings_of_full(sheet: Sheet, names: Sequence[str]) -> Sheet:
    """The full solve saves nothing against itself, under whatever name it stands in the table."""
    columns = [
        Column(
            column.name,
            ["–" if name == FULL else cell for name, cell in zip(names, column.cells, strict=True)],
        )
        if column.name == "saved"
        else column
        for column in sheet.columns
    ]
    return Sheet(sheet.title, columns)


def _settings(point: Point) -> dict[str, Cell]:
    found = {name: plain(value) for name, value in point.settings}
    return {
        name: value if isinstance(value, int | float | str) else in_words(value)
        for name, value in found.items()
    }


_NUMBERS = (
    "first_metric",
    "final_metric",
    "best_metric",
    "epochs",
    "updates",
    "nonfinite",
    "failures",
    "solves",
    "primal_iterations",
    "adjoint_iterations",
    "primal_applications",
    "adjoint_applications",
    "error_applications",
    "seconds",
    "seconds_without_compile",
    "solver_seconds",
    "compilations",
)


def _of_run(run: Run, directory: Path) -> dict[str, Cell]:
    summary = run.summary
    where = "" if run.directory is None else run.directory.relative_to(directory).as_posix()
    words: dict[str, Cell] = {"policy": summary.policy, "seed": summary.seed}
    words |= {"status": summary.status, "message": summary.message}
    return {**words, **{name: getattr(summary, name) for name in _NUMBERS}, "directory": where}


def _of_row(row: Row) -> dict[str, Cell]:
    found: dict[str, Cell] = {}
    for field in dataclasses.fields(row):
        value: Any = getattr(row, field.name)
        if str(field.type).startswith("bilevel") or "Spread" in str(field.type):
            spread: Spread | None = value
            found[field.name] = None if spread is None else spread.mean
            found[f"{field.name}_confidence"] = None if spread is None else spread.confidence
        else:
            found[field.name] = value
    return found
