"""Tables: what a comparison says of its policies."""

from collections.abc import Sequence

from bilevel.outer import text
from bilevel.outer.row import Row
from bilevel.outer.run import COMPLETED
from bilevel.outer.sheet import Column, Sheet
from bilevel.outer.spread import Spread

_FULL = "full"


def whole_runs(rows: Sequence[Row], task: str, metric_name: str, *, budgets: bool) -> Sheet:
    """What whole runs came to, and what they spent.

    **Arguments:**

    - `rows`: one a policy.
    - `task`, `metric_name`: what was trained and measured.
    - `budgets`: whether to tell them here, where no other table does.
    """
    names = [
        row.policy if row.status == COMPLETED else f"{row.policy} ({row.status})" for row in rows
    ]

    def shown(name: str, form: text.Form, head: str) -> Column:
        return Column(head, [_show(getattr(row, name), form) for row in rows])

    noisy = any(row.gradient_noise is not None for row in rows)
    saved = [text.NOTHING if row.policy == _FULL else _part(row.saved) for row in rows]
    return Sheet(
        f"{task}, whole runs",
        [
            Column("policy", names, words=True),
            shown("final_metric", text.number, f"final {metric_name}"),
            shown("relative_metric", text.ratio, "× full"),
            *([shown("gradient_noise", text.ratio, "noise")] if noisy else []),
            shown("primal_iterations", text.count, "Σ primal"),
            shown("adjoint_iterations", text.count, "Σ adjoint"),
            Column("saved", saved),
            Column("solver, s", [_mean(row.solver_seconds, text.seconds) for row in rows]),
            shown("seconds", text.seconds, "wall, s"),
            Column("compiles", [_mean(row.compilations, text.number) for row in rows]),
            *([_budgets(rows)] if budgets else []),
        ],
    )


def until_target(rows: Sequence[Row], goal: str) -> Sheet:
    """What it took to get to a target, and the budgets on the way.

    **Arguments:**

    - `rows`: one a policy.
    - `goal`: the target in words.
    """

    def part(row: Row, value: float | None) -> str:
        return text.NOTHING if row.policy == _FULL or not row.reached else _part(value)

    def shown(name: str, form: text.Form, head: str) -> Column:
        return Column(head, [_show(getattr(row, name), form) for row in rows])

    names = [
        f"{row.policy} ({row.reached} of {row.runs})"
        if row.reached and row.reached < row.runs
        else row.policy
        for row in rows
    ]
    seconds = [_mean(row.seconds_to_target_without_compile, text.seconds) for row in rows]
    epochs = [
        _mean(row.epochs_to_target, text.count) if row.reached else "not reached" for row in rows
    ]
    return Sheet(
        goal,
        [
            Column("policy", names, words=True),
            Column("epochs", epochs),
            shown("work_to_target", text.count, "Σ iterations"),
            Column("saved", [part(row, row.saved_to_target) for row in rows]),
            shown("seconds_to_target", text.seconds, "wall, s"),
            Column("saved", [part(row, row.seconds_saved_to_target) for row in rows]),
            Column("without compile, s", seconds),
            _budgets(rows),
        ],
    )


def _budgets(rows: Sequence[Row]) -> Column:
    return Column("budgets of the run", [row.budgets for row in rows], words=True)


def _part(part: float | None) -> str:
    if part is None:
        return text.NOTHING
    percent = round(100 * part)
    return f"{percent} %" if percent >= 0 else f"{-percent} % more"


def _show(value: Spread | None, form: text.Form) -> str:
    return text.NOTHING if value is None else value.show(form)


def _mean(value: Spread | None, form: text.Form) -> str:
    return text.NOTHING if value is None else form(value.mean)
