"""Charts: those that there is something to draw for."""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np

from bilevel.outer import series, text
from bilevel.outer.report.chart import (
    ADJOINT_STYLE,
    LIMIT_STYLE,
    NOISE_STYLE,
    PRIMAL_STYLE,
    Chart,
    Line,
)
from bilevel.outer.row import outcome
from bilevel.outer.run import COMPLETED, Run
from bilevel.outer.series import REFERENCE, Curve, Runs, Series, curve


def charts_of(runs: Runs, metric_name: str, target: float | None) -> list[Chart]:
    """What is drawn of runs.

    **Arguments:**

    - `runs`: by policy, one for each seed.
    - `metric_name`: what the metric is.
    - `target`: a metric to be marked.

    **Returns:** the charts that have a line.
    """
    found = [
        *_metric(runs, metric_name, target),
        *_budgets(runs),
        _residuals(runs),
        _gradient(runs),
        _savings(runs),
    ]
    return [chart for chart in found if chart is not None]


def _metric(runs: Runs, metric_name: str, target: float | None) -> list[Chart | None]:
    steps = series.steps_name(runs)
    metric = series.column("metric")
    goal = "" if target is None else f" The dotted line is the target, {text.number(target)}."

    unit = _unit(steps)

    def chart(
        key: str, title: str, x_name: str, x: Series, intro: str, told: Callable[[Line], str]
    ) -> Chart | None:
        lines = _lines(runs, [("", x, metric, PRIMAL_STYLE)])
        if not lines:
            return None
        caption = f"{intro}{_seeds(runs)}{goal}"
        points = [told(line) for line in lines]
        decades = key == "work"
        return Chart(
            key, title, x_name, metric_name, lines, caption, points, mark=target, decades=decades
        )

    def spent(unit: str, form: text.Form) -> Callable[[Line], str]:
        return lambda line: (
            f"{line.name}{_fate(runs, line.policy)} came to {text.number(line.curve.y[-1])} with "
            f"{form(line.curve.x[-1])} {unit}"
        )

    return [
        chart(
            "metric",
            f"{metric_name} over {unit}s",
            steps,
            series.epochs,
            f"The metric after each {unit}.",
            lambda line: f"{line.name}{_fate(runs, line.policy)}: {_course(line.curve, unit)}",
        ),
        chart(
            "work",
            f"Work and accuracy: {metric_name} over iterations",
            "Σ primal and adjoint iterations",
            series.work,
            "The metric against what it took to get there: further to the left is cheaper.",
            spent("iterations", text.count),
        )
        if series.known(runs, series.work)
        else None,
        chart(
            "time",
            f"{metric_name} over wall time",
            "wall time without compilation, s",
            series.seconds,
            "The metric against time: further to the left is faster.",
            spent("seconds", text.seconds),
        ),
    ]


def _budgets(runs: Runs) -> list[Chart | None]:
    by_cap, by_tolerance = series.budget_kinds(runs)
    steps = series.steps_name(runs)
    found: list[Chart | None] = []
    for key, unit, among, primal, adjoint in (
        ("budget", "iterations", by_cap, series.allowed, series.adjoint_allowed),
        ("tolerance", "relative tolerance", by_tolerance, *series.TOLERANCES),
    ):
        lines: list[Line] = []
        for name, group in among.items():
            sides = [("", series.epochs, primal, PRIMAL_STYLE)]
            if series.apart(group, primal, adjoint):
                sides = [
                    ("primal", series.epochs, primal, PRIMAL_STYLE),
                    ("adjoint", series.epochs, adjoint, ADJOINT_STYLE),
                ]
            lines += _lines({name: group}, sides, alone=len(runs) == 1)
        if lines:
            form = text.count if key == "budget" else text.number
            points = [f"{line.name}: {_path(line.curve, form)}" for line in lines]
            caption = f"What the controller allowed a solve.{_seeds(runs)}"
            title = f"Budget: {unit} {'allowed in' if key == 'budget' else 'of'} a solve"
            found.append(
                Chart(
                    key,
                    title,
                    steps,
                    unit,
                    lines,
                    caption,
                    points,
                    held=True,
                    whole=key == "budget",
                )
            )
    return found


def _residuals(runs: Runs) -> Chart | None:
    primal, adjoint = series.primal_residual, series.adjoint_residual
    if not (series.known(runs, primal) or series.known(runs, adjoint)):
        return None
    sides = [
        ("primal", series.epochs, primal, PRIMAL_STYLE),
        ("adjoint", series.epochs, adjoint, ADJOINT_STYLE),
    ]
    lines = _lines(runs, sides)
    points = [f"{line.name}: {_course(line.curve, '')}" for line in lines]
    caption = (
        "Residual norms that solves stopped at, each relative to its own right-hand side or start, "
        f"mean over an epoch.{_seeds(runs)}"
    )
    steps, title = series.steps_name(runs), "Residuals of the solves"
    return Chart("residual", title, steps, "relative residual", lines, caption, points)


def _gradient(runs: Runs) -> Chart | None:
    if not (series.known(runs, series.error_share) or series.known(runs, series.noise_share)):
        return None
    steps = series.steps_name(runs)
    points = [
        f"{name}: {'; '.join(parts)}"
        for name, group in runs.items()
        if (parts := [part for part in map(_share, *_shares(group)) if part])
    ]
    caption = f"How far the gradient can be trusted.{_seeds(runs)}"
    if len(runs) == 1:
        sides = [
            ("norm", series.epochs, series.column("gradient_norm"), PRIMAL_STYLE),
            ("estimated error", series.epochs, series.column("error"), ADJOINT_STYLE),
            ("noise of a batch", series.epochs, series.column("gradient_noise"), NOISE_STYLE),
        ]
        unit, mark = "Euclidean norm", None
    else:
        sides = [
            ("error", series.epochs, series.error_share, ADJOINT_STYLE),
            ("noise", series.epochs, series.noise_share, NOISE_STYLE),
        ]
        unit, mark = "part of the norm", 1.0
        caption += " At the dotted line they are as large as the gradient."
    sides = [side for side in sides if series.known(runs, side[2])]
    lines = _lines(runs, sides)
    known = {name: series.known(runs, series.column(name)) for name in ("error", "gradient_noise")}
    what = " and ".join(name.removeprefix("gradient_") for name in known if known[name])
    title = (
        f"The gradient's norm, {what}" if len(runs) == 1 else f"The gradient's {what} over its norm"
    )
    return Chart("gradient", title, steps, unit, lines, caption, points, mark=mark)


def _shares(group: Sequence[Run]) -> tuple[list[str], list[np.ndarray]]:
    forms = (("truncation error", series.error_share), ("noise", series.noise_share))
    values = [np.concatenate([form(run.history) for run in group]) for _, form in forms]
    return [name for name, _ in forms], values


def _share(name: str, values: np.ndarray) -> str:
    known = values[~np.isnan(values)]
    if not known.size:
        return ""
    return (
        f"{name} {text.ratio(float(np.median(known)))} of the norm in the median, above it in "
        f"{int((known > 1).sum()):,} of {known.size:,} epochs"
    )


def _savings(runs: Runs) -> Chart | None:
    limit, shares = series.reference(runs), series.saved_shares(runs)
    alone = len(runs) == 1
    if alone and not shares:
        return None
    lines: list[Line] = []
    for name, group in runs.items():
        found = curve(group, series.epochs, series.work_of_step)
        if found is None:
            continue
        if limit is not None and name in shares:
            lines.append(Line(name, name, _up_to(found, limit), area=True))
        else:
            lines.append(Line(name, name, found))
    if not lines:
        return None
    if limit is not None and alone:
        lines.append(Line("its finest budget throughout", "", limit, LIMIT_STYLE))
    points = [f"{name}: {100 * share:.0f} % saved" for name, share in shares.items()]
    against = "its own finest budget held throughout" if alone else REFERENCE
    caption = "Primal and adjoint iterations of an outer step, mean over an epoch. " + (
        f"The area is what was not spent, against {against}."
        if points
        else "No policy took fewer than the one it is measured against."
        if limit is not None
        else f"Without a run of {REFERENCE} there is nothing to measure savings by."
    )
    if points and not alone:
        caption += " It says nothing of the metric that was reached: see work and accuracy."
    steps = series.steps_name(runs)
    title = "What was saved: iterations of an outer step"
    return Chart(
        "savings", title, steps, "iterations", lines, caption, points, held=True, from_zero=True
    )


def _up_to(found: Curve, limit: Curve) -> Curve:
    """The line, with the area between it and what lies above."""
    height = dict(zip(limit.x, limit.y, strict=True))
    upper = np.array([height.get(x, y) for x, y in zip(found.x, found.y, strict=True)])
    return Curve(found.x, found.y, found.y, np.maximum(found.y, upper))


Sides: TypeAlias = Sequence[tuple[str, Series, Series, Sequence[int]]]


def _lines(runs: Runs, sides: Sides, *, alone: bool | None = None) -> list[Line]:
    """A line for each policy and side, named by what tells them apart."""
    alone = len(runs) == 1 if alone is None else alone
    lines: list[Line] = []
    for policy, group in runs.items():
        for part, x, y, dashes in sides:
            found = curve(group, x, y)
            if found is not None:
                name = part if alone and part else " ".join(filter(None, (policy, part)))
                lines.append(Line(name, policy, found, dashes))
    return lines


def _course(found: Curve, unit: str) -> str:
    """Where a line began and ended, and its lowest point where that is neither."""
    first, last = found.y[0], found.y[-1]
    words = f"from {text.number(first)} to {text.number(last)}"
    lowest = int(found.y.argmin())
    if found.y[lowest] < min(first, last):
        where = f" in {unit} {text.count(found.x[lowest])}" if unit else ""
        words += f", lowest {text.number(found.y[lowest])}{where}"
    return words


def _unit(steps: str) -> str:
    """What one of the epochs is called."""
    return steps.partition(" (")[0]


def _path(found: Curve, form: text.Form) -> str:
    low, high, first, last = found.y.min(), found.y.max(), found.y[0], found.y[-1]
    if low == high:
        return f"{form(first)} throughout"
    words = f"from {form(first)} to {form(last)}"
    if high > max(first, last):
        words += f", at most {form(high)}"
    if low < min(first, last):
        words += f", at least {form(low)}"
    return words


def _fate(runs: Runs, policy: str) -> str:
    status = outcome(runs[policy])
    return "" if status == COMPLETED else f" ({status})"


def _seeds(runs: Runs) -> str:
    most = max(len(group) for group in runs.values())
    if most < 2:
        return ""
    return f" Lines are medians of {most} seeds, in bands from the lowest to the highest."
