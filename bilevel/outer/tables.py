"""Tables: a comparison on a screen."""

from collections.abc import Callable, Sequence

from rich.markup import escape
from rich.table import Table

from bilevel.outer import text
from bilevel.outer.row import Row
from bilevel.outer.run import COMPLETED
from bilevel.outer.spread import Spread

_FULL = "full"


def whole_runs(rows: Sequence[Row], task: str, metric_name: str) -> Table:
    """What whole runs came to, and what they spent.

    **Arguments:**

    - `rows`: one a policy.
    - `task`, `metric_name`: what was trained and measured.
    """
    table = text.table(title=escape(f"{task}, whole runs"))
    _columns(
        table,
        escape(metric_name),
        "× full",
        "Σ primal",
        "Σ adjoint",
        "saved",
        "solver, s",
        "wall, s",
        "compiles",
    )
    for row in rows:
        status = "" if row.status == COMPLETED else f" ({row.status})"
        table.add_row(
            f"{row.policy}{status}",
            _show(row.final_metric, text.number),
            _mean(row.relative_metric, "{:.3g}".format),
            _show(row.primal_iterations, text.count),
            _show(row.adjoint_iterations, text.count),
            "" if row.policy == _FULL else _part(row.saved),
            _mean(row.solver_seconds, text.seconds),
            _show(row.seconds, text.seconds),
            _mean(row.compilations, text.number),
        )
    return table


def until_target(rows: Sequence[Row], goal: str) -> Table:
    """What it took to get to a target, and the budgets on the way.

    **Arguments:**

    - `rows`: one a policy.
    - `goal`: the target in words.
    """
    table = text.table(title=escape(goal))
    _columns(table, "epochs", "Σ iterations", "saved", "wall, s", "saved", "without compile")
    table.add_column("budgets of the run", no_wrap=True)
    base = next((row for row in rows if row.policy == _FULL), None)
    for row in rows:
        if not row.reached:
            table.add_row(row.policy, "not reached", *[""] * 5, row.budgets)
            continue
        part = "" if row.reached == row.runs else f" ({row.reached} of {row.runs})"
        cells = [f"{row.policy}{part}", _mean(row.epochs_to_target, text.count)]
        for name, form in (("work_to_target", text.count), ("seconds_to_target", text.seconds)):
            value: Spread | None = getattr(row, name)
            reference: Spread | None = None if base is None else getattr(base, name)
            cells.append(_show(value, form))
            cells.append("" if row.policy == _FULL else _part(saved(value, reference)))
        cells.append(_mean(row.seconds_to_target_without_compile, text.seconds))
        table.add_row(*cells, row.budgets)
    return table


def saved(value: Spread | None, reference: Spread | None) -> float | None:
    """What part of a reference is saved; `None` where one of them is missing."""
    if value is None or reference is None or not reference.mean > 0:
        return None
    return 1 - value.mean / reference.mean


def _part(part: float | None) -> str:
    if part is None:
        return ""
    percent = round(100 * part)
    return f"{percent} %" if percent >= 0 else f"{-percent} % more"


def _columns(table: Table, *names: str) -> None:
    table.add_column("policy", no_wrap=True)
    for name in names:
        table.add_column(name, justify="right")


Form = Callable[[float | None], str]


def _show(value: Spread | None, form: Form) -> str:
    return text.NOTHING if value is None else value.show(form)


def _mean(value: Spread | None, form: Form) -> str:
    return text.NOTHING if value is None else form(value.mean)
