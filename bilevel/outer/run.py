"""Run: what training came to, in memory and in a directory."""

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from jaxtyping import PyTree
from rich.markup import escape
from rich.table import Table

from bilevel.outer import text
from bilevel.outer.checkpoint import load_arrays, read_arrays, save_arrays
from bilevel.outer.checkpoints.durable import write_file
from bilevel.outer.history import History, decode_number, encode
from bilevel.outer.versions import versions

HISTORY_FILE = "history.jsonl"
THETA_FILE = "theta.npz"
SUMMARY_FILE = "summary.json"
CHECKPOINTS_FOLDER = "checkpoints"

COMPLETED = "completed"
STOPPED = "stopped"
INTERRUPTED = "interrupted"
NONFINITE = "nonfinite"
FAILED = "failed"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
    """A run in numbers.

    - `task`, `policy`, `controller`, `seed`: what ran.
    - `status`: `completed`, `stopped` (by a callback), `interrupted` (by Ctrl-C),
        `nonfinite` (too many non-finite gradients in a row) or `failed` (an exception).
    - `message`: why it ended, in words; empty for `completed`.
    - `epochs`, `updates`, `nonfinite`, `failures`: epochs finished, updates made, updates
        skipped, solves that failed; these and the sums below include the updates of an
        epoch that was broken off.
    - `metric_name`, `first_metric`, `final_metric`, `best_metric`, `level`: where it went.
    - `solves`, `primal_iterations`, `adjoint_iterations`, `primal_applications`,
        `adjoint_applications`, `error_applications`: sums over the run; `None` if no solve
        reported.
    - `seconds`: wall time with everything; `compile_seconds` of it for compilation,
        `update_seconds` for updates, `validation_seconds` for validation.
    - `solver_seconds`: of `update_seconds` for the iterations of the solves, primal and
        adjoint, as timed after the run; `None` where nobody asked or it cannot be told.
    - `compilations`: of the update.
    - `other_compilations`: of validation and controller.
    - `device`, `versions`: what it ran on.
    """

    task: str
    policy: str
    controller: str
    seed: int
    status: str
    message: str = ""
    epochs: int
    updates: int
    nonfinite: int
    failures: int | None
    metric_name: str
    first_metric: float | None
    final_metric: float | None
    best_metric: float | None
    level: int | None
    solves: int | None
    primal_iterations: int | None
    adjoint_iterations: int | None
    primal_applications: int | None
    adjoint_applications: int | None
    error_applications: int | None
    seconds: float
    compile_seconds: float
    update_seconds: float
    validation_seconds: float
    compilations: int
    other_compilations: int
    device: str
    versions: dict[str, str]
    solver_seconds: float | None = None

    @property
    def seconds_without_compile(self) -> float:
        """Wall time of everything but compilation."""
        return self.seconds - self.compile_seconds

    @property
    def work(self) -> int | None:
        """Primal and adjoint iterations together; `None` if no solve reported."""
        if self.primal_iterations is None:
            return None
        return self.primal_iterations + (self.adjoint_iterations or 0)

    def to_json(self) -> str:
        """The summary as one JSON object."""
        fields = encode(dataclasses.asdict(self))
        fields["seconds_without_compile"] = self.seconds_without_compile
        return json.dumps(fields, indent=2, allow_nan=False)

    @classmethod
    def from_json(cls, written: str) -> Self:
        """Read what `to_json` wrote.

        **Raises:** `ValueError` for anything else.
        """
        stored: Any = json.loads(written)
        fields = dataclasses.fields(cls)
        given: set[Any] = set(stored) if isinstance(stored, dict) else set()
        # What has a default may have come with a later version.
        missing = {field.name for field in fields if field.default is dataclasses.MISSING} - given
        if missing:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            named = f"{', '.join(sorted(missing)[:3])}{more}"
            msg = f"not a summary of a bilevel run, {named} missing"
            raise ValueError(msg)
        names = [field.name for field in fields if field.name in given]
        return cls(**{name: decode_number(stored[name]) for name in names})


@dataclasses.dataclass(frozen=True)
class Run:
    """What training came to.

    - `theta`: the parameters it ended with, like the task's `theta0`; from a directory,
        and without its pytree, a dictionary of arrays by the path of their leaf.
    - `history`: one record an epoch.
    - `summary`: the run in numbers.
    - `directory`: where it is kept; `None` if nowhere.

    >>> import bilevel as bl, optax
    >>> task = bl.Task(1.0, lambda theta, batch, fidelity: theta**2, full=bl.Budget(1))
    >>> run = bl.optimize(task, optax.sgd(0.25), epochs=2, progress=False)
    >>> float(run.theta), run.status, run.summary.updates
    (0.25, 'completed', 2)
    """

    theta: PyTree
    history: History
    summary: Summary
    directory: Path | None = None

    @property
    def status(self) -> str:
        """How it ended; see `bilevel.outer.run.Summary`."""
        return self.summary.status

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write parameters and summary into a directory, the history too if it is not there.

        **Arguments:**

        - `directory`: made if it does not exist. It receives `theta.npz`, `summary.json`
            and `history.jsonl`.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        if directory != self.directory:
            self.history.write(directory / HISTORY_FILE)
        self.save_result(directory)

    def save_result(self, directory: Path) -> None:
        """Write parameters and summary only."""
        save_arrays(directory / THETA_FILE, self.theta)
        _save_summary(directory, self.summary)

    def with_summary(self, **fields: Any) -> Self:
        """The same run with other fields in its summary, on disk too."""
        summary = dataclasses.replace(self.summary, **fields)
        run = dataclasses.replace(self, summary=summary)
        if run.directory is not None:
            _save_summary(run.directory, summary)
        return run

    @classmethod
    def read(cls, directory: str | os.PathLike[str], like: PyTree = None) -> Self:
        """Read a run from its directory.

        **Arguments:**

        - `directory`: of the run.
        - `like`: the task's `theta0`, to get the parameters in its structure; `None` for a
            dictionary of arrays.

        **Raises:** `FileNotFoundError` if there is no run, `ValueError` if it cannot be
        read.
        """
        directory = Path(directory)
        if not (directory / SUMMARY_FILE).is_file():
            msg = f"{directory} holds no run: there is no {SUMMARY_FILE} in it."
            raise FileNotFoundError(msg)
        try:
            summary = Summary.from_json((directory / SUMMARY_FILE).read_text(encoding="utf-8"))
        except ValueError as error:
            msg = f"{directory / SUMMARY_FILE}: {error}"
            raise ValueError(msg) from error
        path = directory / THETA_FILE
        theta = read_arrays(path) if like is None else load_arrays(path, like)
        return cls(theta, History.read(directory / HISTORY_FILE), summary, directory)

    def table(self) -> Table:
        """The summary as a printable table."""
        summary = self.summary
        table = text.table(title=escape(f"{summary.task}, {summary.policy}: {summary.status}"))
        table.show_header = False
        table.add_column()
        table.add_column()
        first, final = text.number(summary.first_metric), text.number(summary.final_metric)
        rows = {
            summary.metric_name: f"{first} → {final}",
            "epochs, updates": f"{summary.epochs:,}, {summary.updates:,}",
            "Σ primal iterations": text.count(summary.primal_iterations),
            "Σ adjoint iterations": text.count(summary.adjoint_iterations),
            "wall time": f"{text.seconds(summary.seconds)} s, without compile "
            f"{text.seconds(summary.seconds_without_compile)} s",
            "of it in the solves": f"{text.seconds(summary.solver_seconds)} s",
            "compilations of the update": str(summary.compilations),
        }
        if summary.solver_seconds is None:
            del rows["of it in the solves"]
        if summary.nonfinite:
            rows["updates skipped, not finite"] = text.count(summary.nonfinite)
        if summary.failures:
            rows["solves failed"] = text.count(summary.failures)
        if summary.error_applications:
            rows["operator applications for error estimates"] = text.count(
                summary.error_applications
            )
        if summary.primal_iterations is None:
            rows["no solve reported"] = "pass fidelity=fidelity to bl.solve to have them counted"
        if self.directory is not None:
            rows["kept in"] = str(self.directory)
        for name, value in rows.items():
            table.add_row(escape(name), escape(value))
        return table


def _save_summary(directory: Path, summary: Summary) -> None:
    write_file(directory / SUMMARY_FILE, f"{summary.to_json()}\n".encode())


def holds_run(directory: Path) -> bool:
    """Whether a directory has files of a run."""
    names = (HISTORY_FILE, THETA_FILE, SUMMARY_FILE, CHECKPOINTS_FOLDER)
    return any((directory / name).exists() for name in names)


_SUMS = (
    "failures",
    "solves",
    "primal_iterations",
    "adjoint_iterations",
    "primal_applications",
    "adjoint_applications",
    "error_applications",
)


def _sum(*parts: float | None) -> int | None:
    known = [part for part in parts if part is not None]
    return round(sum(known)) if known else None


def summarize(
    history: History,
    unfinished: Mapping[str, float | None],
    *,
    task: str,
    policy: str,
    controller: str,
    seed: int,
    status: str,
    message: str,
    metric_name: str,
    seconds: float,
    compile_seconds: float,
    compilations: int,
    other_compilations: int,
    device: str,
) -> Summary:
    """The numbers of a run out of its history and what no record says.

    **Arguments:**

    - `history`: of the finished epochs.
    - `unfinished`: numbers of an epoch that was broken off, by the names of a record.
    - the others: fields of the summary.
    """
    metrics = [metric for metric in history.values("metric") if metric is not None]
    sums: dict[str, Any] = {name: _sum(history.total(name), unfinished.get(name)) for name in _SUMS}
    return Summary(
        task=task,
        policy=policy,
        controller=controller,
        seed=seed,
        status=status,
        message=message,
        epochs=history[-1].epoch if history else 0,
        updates=_sum(history.total("updates"), unfinished.get("updates")) or 0,
        nonfinite=_sum(history.total("nonfinite"), unfinished.get("nonfinite")) or 0,
        metric_name=metric_name,
        first_metric=metrics[0] if metrics else None,
        final_metric=metrics[-1] if metrics else None,
        best_metric=min((metric for metric in metrics if math.isfinite(metric)), default=None),
        level=history[-1].level if history else None,
        seconds=seconds,
        compile_seconds=compile_seconds,
        update_seconds=history.total("seconds") or 0.0,
        validation_seconds=history.total("validation_seconds") or 0.0,
        compilations=compilations,
        other_compilations=other_compilations,
        device=device,
        versions=versions(),
        **sums,
    )
