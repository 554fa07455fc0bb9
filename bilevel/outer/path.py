"""Path: the budgets that a run went through."""

from collections.abc import Sequence
from typing import Any, TypeAlias

from bilevel.budget import UNLIMITED
from bilevel.outer import text
from bilevel.outer.run import Run

_SIDES = ("budget", "adjoint_budget")
_PARTS = ("iterations", "rtol", "atol")


def budget_path(run: Run) -> list[dict[str, Any]]:
    """The epochs in which the budget changed, and what it then was.

    **Returns:** for each an `epoch`, a `level`, and the fields of the budgets and of the static
        parts that there are.

    >>> import bilevel as bl, optax
    >>> task = bl.Task(1.0, lambda theta, batch, fidelity: theta**2, full=bl.Budget(9))
    >>> run = bl.optimize(task, optax.sgd(0.25), epochs=2, progress=False)
    >>> [(entry["epoch"], entry["budget_iterations"]) for entry in budget_path(run)]
    [(1, 9)]
    """
    names = ["level", "static", *(f"{side}_{part}" for side in _SIDES for part in _PARTS)]
    path: list[dict[str, Any]] = []
    before: dict[str, Any] = {}
    for record in run.history:
        fields = {name: getattr(record, name) for name in names}
        known = {name: value for name, value in fields.items() if value is not None}
        if record.epoch and known != before:
            path.append({"epoch": record.epoch, **known})
            before = known
    return path


def budgets_in_words(runs: Sequence[Run]) -> str:
    """Where the budgets began and ended: `1→14`, `25`, `1→9 / 1→4`.

    In between stands their finest where that was neither, `1→14→9`, else their coarsest. Where
    static parts change it is told of each, `cells 8: 1→5, cells 16: 5→9`.

    **Arguments:**

    - `runs`: of one policy; where their seeds end apart, `1→9…14`.

    **Returns:** primal and adjoint, the latter where it differs.
    """
    paths = [budget_path(run) for run in runs]
    # In the order in which they come first.
    statics = list(dict.fromkeys(entry.get("static") for path in paths for entry in path))
    if len(statics) < 2:
        return _of_both(paths)
    parts = [
        (static, [[entry for entry in path if entry.get("static") == static] for path in paths])
        for static in statics
    ]
    words = [(static, _of_both(own)) for static, own in parts]
    alike = len({budgets for _, budgets in words}) == 1
    if alike:
        return f"{' → '.join(str(static) for static, _ in words)}: {words[0][1]}"
    return ", ".join(f"{static}: {budgets}" for static, budgets in words)


Paths: TypeAlias = list[list[dict[str, Any]]]


def _of_both(paths: Paths) -> str:
    primal, adjoint = (_in_words(paths, side) for side in _SIDES)
    return primal if adjoint in (primal, text.NOTHING) else f"{primal} / {adjoint}"


def _in_words(entries: Paths, side: str) -> str:
    """One of the two budgets: its cap if that moves, else its tolerance."""
    paths: list[list[tuple[Any, ...]]] = [
        [tuple(entry.get(f"{side}_{part}") for part in _PARTS) for entry in path]
        for path in entries
    ]
    paths = [[entry for entry in path if entry[0] is not None] for path in paths]
    paths = [path for path in paths if path]
    met = {entry for path in paths for entry in path}
    if not met:
        return text.NOTHING
    if len(met) == 1:
        return text.budget(*next(iter(met)))
    moving = next(part for part in range(3) if len({entry[part] for entry in met}) > 1)
    values = [[entry[moving] for entry in path] for path in paths]
    starts, ends = ({path[place] for path in values} for place in (0, -1))
    # The fewest iterations are the coarsest budget, the largest tolerance is.
    finest, coarsest = (max, min) if moving == 0 else (min, max)
    turns = [
        extreme({value for path in values for value in path}) for extreme in (finest, coarsest)
    ]
    words = [_span(starts, moving)]
    words += [_span({turn}, moving) for turn in turns if turn not in starts | ends][:1]
    if len(values[0]) > 1 or len(ends) > 1:
        words.append(_span(ends, moving))
    return ("" if moving == 0 else "tol ") + "→".join(words)


def _span(values: set[Any], moving: int) -> str:
    ordered = sorted(values)
    return "…".join(_one(value, moving) for value in dict.fromkeys((ordered[0], ordered[-1])))


def _one(value: float, moving: int) -> str:
    if moving:
        return f"{value:.0e}"
    return "no limit" if value >= UNLIMITED else f"{round(value):,}"
