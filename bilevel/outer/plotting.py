"""Plotting: what a run or a comparison looks like."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from bilevel.outer import series, text
from bilevel.outer.look import looks
from bilevel.outer.panel import DASHED, DOTTED, SOLID, Bars, Looks, Panel, Savings, Side
from bilevel.outer.row import outcome
from bilevel.outer.run import COMPLETED, Run
from bilevel.outer.series import Runs, Series


class MissingPlotsError(ImportError):
    """matplotlib is not installed."""


def plot_runs(
    runs: Mapping[str, Sequence[Run]],
    path: str | os.PathLike[str],
    *,
    title: str = "",
    metric_name: str = "metric",
    target: float | None = None,
) -> Path:
    """Draw where runs went, what they spent, by which budgets, and how accurate they were.

    The metric against outer steps, work (the work–accuracy curve) and wall time; the budgets
    against outer steps, the adjoint's dashed where it is another; for several policies the
    sums, of iterations and of time; the residuals that the solves stopped at; the gradient's
    estimated truncation error against its norm, and its noise; the iterations of an outer
    step, with what was saved as an area. What no run reported is left out. A kind of policy
    has the same colour in every picture, and lines that coincide show through each other's
    gaps. Several seeds are drawn as their median, in a band from the lowest to the highest.

    **Arguments:**

    - `runs`: by policy, one for each seed.
    - `path`: of the picture; the ending says the format, PNG, PDF or SVG.
    - `title`: above the names of the policies.
    - `metric_name`: what the metric is, with its unit.
    - `target`: a metric to be marked by a line, such as the one that policies are timed to.

    **Returns:** the path.

    **Raises:** `ImportError` if matplotlib is not installed; `ValueError` if there is
    nothing to draw.

    >>> import tempfile, bilevel as bl, optax
    >>> task = bl.Task(1.0, lambda theta, batch, fidelity: theta**2, full=bl.Budget(1))
    >>> run = bl.optimize(task, optax.sgd(0.25), epochs=2, progress=False)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     picture = plot_runs({"full": [run]}, f"{folder}/run.png")
    ...     picture.name
    'run.png'
    """
    drawn = {name: list(group) for name, group in runs.items() if any(run.history for run in group)}
    if not drawn:
        msg = "there is nothing to draw: no run has finished an epoch."
        raise ValueError(msg)
    curves = _curves(drawn, metric_name, target)
    below = _budgets(drawn)
    if len(drawn) > 1:
        below += _sums(drawn)
    quality = _quality(drawn)
    together = [*curves, *below, *quality]
    rows = [curves, below, quality] if len(drawn) > 1 else _folded(together)
    rows = [row for row in rows if row]
    across = max(len(row) for row in rows)
    figure = _figure(width=4.4 * across, height=3.7 * len(rows) + 0.8)
    styles = looks(list(drawn))
    for panel, axis in _placed(figure, rows):
        panel.draw(axis, styles)
    _legend(figure, _labels(drawn), styles, title, columns=2 * across)
    if notes := _notes(drawn, quality, target):
        figure.supxlabel("\n".join(notes), x=0.01, ha="left", fontsize=8, color="#444444")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)
    return path


_Drawn: TypeAlias = Panel | Bars | Savings


def _curves(runs: Runs, metric_name: str, target: float | None) -> list[_Drawn]:
    """Where the metric went: over steps, work and time."""
    xs: list[tuple[str, Series]] = [(series.steps_name(runs), series.epochs)]
    if _counted(runs):
        xs.append(("Σ primal and adjoint iterations", series.work))
    xs.append(("wall time without compilation, s", series.seconds))
    metric = [Side(series.column("metric"))]
    return [Panel(name, metric_name, x, metric, runs, mark=target) for name, x in xs]


def _budgets(runs: Runs) -> list[_Drawn]:
    """What solves were allowed."""
    steps = series.steps_name(runs)
    by_cap, by_tolerance = series.budget_kinds(runs)
    panels: list[_Drawn] = []
    if by_cap or not by_tolerance:
        name = "budget: iterations allowed in a solve"
        sides = _both(series.allowed, series.adjoint_allowed)
        panels.append(Panel(steps, name, series.epochs, sides, by_cap or runs, held=True))
    if by_tolerance:
        name = "budget: relative tolerance of a solve"
        sides = _both(*series.TOLERANCES)
        panels.append(Panel(steps, name, series.epochs, sides, by_tolerance, held=True))
    return panels


def _both(primal: Series, adjoint: Series) -> list[Side]:
    """The primal's solid, and the adjoint's dashed where it is another."""
    return [
        Side(primal, SOLID),
        Side(adjoint, DASHED, lambda group: series.apart(group, primal, adjoint)),
    ]


def _sums(runs: Runs) -> list[_Drawn]:
    """What was spent."""
    bars: list[_Drawn] = []
    if _counted(runs):
        bars.append(Bars("Σ iterations: primal, adjoint (pale)", _work_parts, runs))
    bars.append(Bars("wall time, s: solver, rest (pale), compile (grey)", _time_parts, runs))
    return bars


def _quality(runs: Runs) -> list[_Drawn]:
    """How accurate the solves and the gradient were, and what less accuracy saved."""
    steps = series.steps_name(runs)
    panels: list[_Drawn] = []
    primal, adjoint = series.primal_residual, series.adjoint_residual
    if series.known(runs, primal) or series.known(runs, adjoint):
        sides = [Side(primal, SOLID), Side(adjoint, DASHED)]
        name = "relative residual: primal, adjoint (dashed)"
        panels.append(Panel(steps, name, series.epochs, sides, runs))
    if series.known(runs, series.error_share) or series.known(runs, series.noise_share):
        if len(runs) == 1:
            # One policy leaves room for the norm itself.
            shown: list[tuple[str, Series, Any]] = [("norm", series.column("gradient_norm"), SOLID)]
            shown.append(("error (dashed)", series.column("error"), DASHED))
            shown.append(("noise (dotted)", series.column("gradient_noise"), DOTTED))
            form, mark = "gradient: {}", None
        else:
            shown = [("error (dashed)", series.error_share, DASHED)]
            shown.append(("noise (dotted)", series.noise_share, DOTTED))
            form, mark = "of the gradient's norm: {}", 1.0
        shown = [each for each in shown if series.known(runs, each[1])]
        sides = [Side(each, style) for _, each, style in shown]
        name = form.format(", ".join(name for name, _, _ in shown))
        panels.append(Panel(steps, name, series.epochs, sides, runs, mark=mark))
    if (len(runs) > 1 and series.known(runs, series.work_of_step)) or series.saved_shares(runs):
        panels.append(Savings(steps, runs))
    return panels


def _counted(runs: Runs) -> bool:
    return any(run.history.work for group in runs.values() for run in group)


def _work_parts(run: Run) -> tuple[float, float]:
    return run.summary.primal_iterations or 0, run.summary.adjoint_iterations or 0


def _time_parts(run: Run) -> tuple[float, float, float]:
    solver = run.summary.solver_seconds or 0.0
    return solver, run.summary.seconds_without_compile - solver, run.summary.compile_seconds


def _folded(panels: Sequence[_Drawn]) -> list[Sequence[_Drawn]]:
    """In rows of about the same length, of three at most: more would be too small to read."""
    rows = -(-len(panels) // 3)
    short, longer = divmod(len(panels), rows)
    folded: list[Sequence[_Drawn]] = []
    start = 0
    for row in range(rows):
        stop = start + short + (row < longer)
        folded.append(panels[start:stop])
        start = stop
    return folded


def _placed(figure: Any, rows: Sequence[Sequence[_Drawn]]) -> list[tuple[_Drawn, Any]]:
    """Panels with axes of their own; the rows are equally wide, however many are in them."""
    placed: list[tuple[_Drawn, Any]] = []
    for row, part in zip(rows, np.ravel(figure.subfigures(len(rows), 1)), strict=True):
        placed += zip(row, np.ravel(part.subplots(1, len(row))), strict=True)
    return placed


def _labels(runs: Runs) -> dict[str, str]:
    """Policies, with what became of those that did not come to their end."""
    outcomes = {name: outcome(group) for name, group in runs.items()}
    return {
        name: name if status == COMPLETED else f"{name} ({status})"
        for name, status in outcomes.items()
    }


def _legend(
    figure: Any, labels: Mapping[str, str], styles: Looks, title: str, columns: int
) -> None:
    """Names above all panels, where they are in no line's way; the title above them."""
    from matplotlib.lines import Line2D  # noqa: PLC0415

    figure.legend(
        handles=[Line2D([], [], label=labels[name], **look) for name, look in styles.items()],
        loc="outside upper left",
        ncols=min(len(styles), columns),
        frameon=False,
        handlelength=3.6,
        fontsize=9,
        title=title or None,
        title_fontproperties={"size": 12, "weight": "bold"},
        alignment="left",
    )


def _notes(runs: Runs, quality: Sequence[_Drawn], target: float | None) -> list[str]:
    notes: list[str] = []
    by_cap, by_tolerance = series.budget_kinds(runs)
    if target is not None:
        notes.append(f"Dotted: what policies are timed to, {text.number(target)}.")
    most = max(len(group) for group in runs.values())
    if most > 1:
        notes.append(
            f"Lines: medians of {most} seeds, in bands from the lowest to the highest. "
            "Bars: means, with the mean's 95 % confidence interval."
        )
    budgets: list[tuple[Runs, Series, Series]] = [
        (by_cap or runs, series.allowed, series.adjoint_allowed),
        (by_tolerance, *series.TOLERANCES),
    ]
    if any(series.apart(group, *sides) for among, *sides in budgets for group in among.values()):
        notes.append("Budgets: the primal solve's; dashed the adjoint's, where it is another.")
    aside = [name for name in by_tolerance if by_cap and name not in by_cap]
    if aside:
        verb = "goes by its tolerance" if len(aside) == 1 else "go by their tolerance"
        notes.append(f"{', '.join(aside)} {verb}, under a cap on iterations that stays the same.")
    if any(isinstance(panel, Savings) for panel in quality):
        shares = series.saved_shares(runs)
        each = ", ".join(f"{name} {100 * share:.0f} %" for name, share in shares.items())
        against = "its finest budget throughout (dotted)" if len(runs) == 1 else "full"
        if each:
            notes.append(f"Shaded: iterations saved against {against}: {each}.")
    return notes


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415
    except ImportError as error:
        msg = "pictures need matplotlib: pip install matplotlib"
        raise MissingPlotsError(msg) from error
    return Figure(figsize=(width, height), layout="constrained")
