"""Plotting: what a run or a comparison looks like."""

import os
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bilevel.budget import UNLIMITED
from bilevel.outer import text
from bilevel.outer.history import History
from bilevel.outer.row import outcome
from bilevel.outer.run import COMPLETED, Run
from bilevel.outer.spread import Spread
from bilevel.outer.ticks import few_ticks, scale

# Okabe and Ito's palette, which stays apart under every kind of colour blindness, without
# its yellow, which does not show on white. A kind of policy has one colour in all pictures.
_COLOURS = {
    "full": "#0072B2",
    "prdp": "#009E73",
    "fixed": "#D55E00",
    "best-fixed": "#E69F00",
    "hoag": "#CC79A7",
    "schedule": "#56B4E9",
    "error": "#7B3FA0",
    "task": "#7A5230",
    "auto": "#000000",
}
_OTHERS = ("#2F6F6F", "#8A8D00", "#A0204C", "#5F6B73")
_STYLES = ("-", (0, (6, 2.5)), (0, (2.2, 1.6)), (0, (7, 1.8, 1.4, 1.8)), (0, (1, 1.2)))


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
    """Draw where runs went, what they spent, and by which budgets.

    The metric against outer steps, work and wall time; the budgets against outer steps, the
    adjoint's dashed where it is another; and for several policies the sums, of iterations and
    of time. A kind of policy has the same colour in every picture, and lines that coincide
    show through each other's gaps. Several seeds are drawn as their median, in a band from
    the lowest to the highest.

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
    steps = _steps_name(drawn)
    by_cap, by_tolerance = _budget_kinds(drawn)
    metric = _column("metric")
    curves = [_Panel(steps, metric_name, _epochs, metric, drawn, mark=target)]
    counted = any(run.history.work for group in drawn.values() for run in group)
    if counted:
        work = "Σ primal and adjoint iterations"
        curves.append(_Panel(work, metric_name, _work, metric, drawn, mark=target))
    seconds = "wall time without compilation, s"
    curves.append(_Panel(seconds, metric_name, _seconds, metric, drawn, mark=target))
    below: list[_Panel | _Bars] = []
    if by_cap or not by_tolerance:
        name = "budget: iterations allowed in a solve"
        below.append(_Panel(steps, name, _epochs, _allowed, by_cap or drawn, _adjoint_allowed))
    if by_tolerance:
        name = "budget: relative tolerance of a solve"
        rtol, adjoint = _TOLERANCES
        below.append(_Panel(steps, name, _epochs, rtol, by_tolerance, adjoint))
    if len(drawn) > 1:
        if counted:
            below.append(_Bars("Σ iterations: primal, adjoint (pale)", _work_parts, drawn))
        below.append(_Bars("wall time, s: solver, rest (pale), compile (grey)", _time_parts, drawn))
    rows = [curves, below] if len(drawn) > 1 else _folded([*curves, *below])
    across = max(len(row) for row in rows)
    figure = _figure(width=4.4 * across, height=3.7 * len(rows) + 0.8)
    looks = _looks(list(drawn))
    for panel, axis in _placed(figure, rows):
        panel.draw(axis, looks)
    _legend(figure, _labels(drawn), looks, title, columns=2 * across)
    if notes := _notes(drawn, by_cap, by_tolerance, target):
        figure.supxlabel("\n".join(notes), x=0.01, ha="left", fontsize=8, color="#444444")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)
    return path


Series = Callable[[History], np.ndarray]
Runs = Mapping[str, Sequence[Run]]
Lines = Sequence[tuple[np.ndarray, np.ndarray]]


class _Panel:
    """Lines of all policies; `adjoint` is drawn dashed beside `y` where it differs.

    A thin line across is at the height of `mark`.
    """

    def __init__(
        self,
        x_name: str,
        y_name: str,
        x: Series,
        y: Series,
        runs: Runs,
        adjoint: Series | None = None,
        mark: float | None = None,
    ):
        self.x_name = x_name
        self.y_name = y_name
        self.x = x
        self.y = y
        self.runs = runs
        self.adjoint = adjoint
        self.mark = mark

    def draw(self, axis: Any, looks: Mapping[str, dict[str, Any]]) -> None:
        heights: list[np.ndarray] = []
        spans: list[np.ndarray] = []
        for name, group in self.runs.items():
            look = dict(looks[name])
            sides: list[tuple[Series, dict[str, Any]]] = [(self.y, look)]
            if self.adjoint is not None:
                # A budget holds for a whole epoch.
                look |= {"drawstyle": "steps-pre"}
                sides = [(self.y, look | {"linestyle": "-"})]
                if _apart(group, self.y, self.adjoint):
                    sides.append((self.adjoint, look | {"linestyle": (0, (3, 1.5))}))
            for series, style in sides:
                lines = [self._line(run.history, series) for run in group]
                lines = [line for line in lines if line[0].size]
                if not lines:
                    continue
                _draw_lines(axis, lines, style)
                heights += [y for _, y in lines]
                spans += [x for x, _ in lines]
        if self.mark is not None and heights:
            axis.axhline(self.mark, color="#555555", lw=1, linestyle=(0, (1, 2)), zorder=2.5)
            heights.append(np.array([self.mark]))
        scale(axis.set_yscale, axis.yaxis, heights, whole=self.y is _allowed)
        if self.y is _allowed and axis.get_yscale() == "linear":
            axis.set_ylim(bottom=0)
        if self.x is _work:
            scale(axis.set_xscale, axis.xaxis, spans, least=2.0)
        axis.set_xlabel(self.x_name)
        # Above the axis a name reads from left to right and may be long.
        axis.set_title(self.y_name, loc="left", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(visible=True, color="#dddddd", lw=0.6)
        axis.set_axisbelow(True)

    def _line(self, history: History, series: Series) -> tuple[np.ndarray, np.ndarray]:
        x, y = self.x(history), series(history)
        usable = np.isfinite(x) & np.isfinite(y)
        return x[usable], y[usable]


class _Bars:
    """Sums of a run, one bar a policy, in parts; means over the seeds."""

    def __init__(self, name: str, parts: Callable[[Run], Sequence[float]], runs: Runs):
        self.name = name
        self.parts = parts
        self.runs = runs

    def draw(self, axis: Any, looks: Mapping[str, dict[str, Any]]) -> None:
        for place, (name, group) in enumerate(self.runs.items()):
            rows = np.array([self.parts(run) for run in group], dtype=float)
            left, colour = 0.0, looks[name]["color"]
            for part, width in enumerate(rows.mean(axis=0)):
                shade = "#B8B8B8" if part == 2 else _faded(colour, _SHADES[part])
                axis.barh(place, width, left=left, height=0.62, lw=0, color=shade)
                left += width
            spread = Spread.of(list(rows.sum(axis=1)))
            if spread is not None and spread.confidence:
                half = spread.confidence
                # A grey that shows on all bars, the black one too.
                axis.errorbar(left, place, xerr=half, color="#7A7A7A", lw=1.4, capsize=2.5)
        axis.set_yticks(range(len(self.runs)), list(self.runs), fontsize=9)
        axis.invert_yaxis()
        axis.set_xlim(left=0.0)
        axis.set_title(self.name, loc="left", fontsize=10)
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.tick_params(axis="y", length=0)
        axis.grid(visible=True, axis="x", color="#dddddd", lw=0.6)
        axis.set_axisbelow(True)
        few_ticks(axis.xaxis, 4)


_SHADES = (1.0, 0.4)


def _faded(colour: str, share: float) -> tuple[float, ...]:
    """A colour mixed with white, through which no grid shows."""
    channels = (int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5))
    return tuple(share * channel + 1 - share for channel in channels)


def _work_parts(run: Run) -> tuple[float, float]:
    return run.summary.primal_iterations or 0, run.summary.adjoint_iterations or 0


def _time_parts(run: Run) -> tuple[float, float, float]:
    solver = run.summary.solver_seconds or 0.0
    return solver, run.summary.seconds_without_compile - solver, run.summary.compile_seconds


def _folded(panels: Sequence["_Panel | _Bars"]) -> list[Sequence["_Panel | _Bars"]]:
    """In one row, or in two of about the same length."""
    if len(panels) <= 3:
        return [panels]
    half = (len(panels) + 1) // 2
    return [panels[:half], panels[half:]]


def _placed(
    figure: Any, rows: Sequence[Sequence["_Panel | _Bars"]]
) -> list[tuple["_Panel | _Bars", Any]]:
    """Panels with axes of their own; the rows are equally wide, however many are in them."""
    placed: list[tuple[_Panel | _Bars, Any]] = []
    for row, part in zip(rows, np.ravel(figure.subfigures(len(rows), 1)), strict=True):
        placed += zip(row, np.ravel(part.subplots(1, len(row))), strict=True)
    return placed


def _draw_lines(axis: Any, lines: Lines, look: Mapping[str, Any]) -> None:
    """The median of the seeds in a band from the lowest to the highest, with its end marked."""
    length = min(len(x) for x, _ in lines)
    xs, ys = (np.array([line[side][:length] for line in lines]) for side in (0, 1))
    x, y = np.median(xs, axis=0), np.median(ys, axis=0)
    if len(lines) > 1:
        band = {"color": look["color"], "alpha": 0.16, "lw": 0}
        band |= {"step": "pre"} if "drawstyle" in look else {}
        axis.fill_between(x, ys.min(axis=0), ys.max(axis=0), zorder=2, **band)
    axis.plot(x, y, **look)
    axis.plot(x[-1:], y[-1:], "o", color=look["color"], ms=4, zorder=look["zorder"])


def _looks(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Colour by kind of policy; style, width and order by place, so that all lines show."""
    looks: dict[str, dict[str, Any]] = {}
    taken: set[str] = set()
    for place, name in enumerate(names):
        # `fixed=4` and `full, seed 0`: the kind comes first.
        colour = _COLOURS.get(re.split("[=,]", name)[0])
        if colour is None:
            # A checksum, for Python's own hash differs from process to process.
            first = zlib.crc32(name.encode()) % len(_OTHERS)
            turned = _OTHERS[first:] + _OTHERS[:first]
            colour = next((other for other in turned if other not in taken), turned[0])
            taken.add(colour)
        looks[name] = {
            "color": colour,
            "linestyle": _STYLES[place % len(_STYLES)],
            "lw": max(3.4 - 0.4 * place, 1.8),
            "zorder": 3 + 0.1 * place,
        }
    return looks


def _labels(runs: Runs) -> dict[str, str]:
    """Policies, with what became of those that did not come to their end."""
    outcomes = {name: outcome(group) for name, group in runs.items()}
    return {
        name: name if status == COMPLETED else f"{name} ({status})"
        for name, status in outcomes.items()
    }


def _legend(
    figure: Any,
    labels: Mapping[str, str],
    looks: Mapping[str, dict[str, Any]],
    title: str,
    columns: int,
) -> None:
    """Names above all panels, where they are in no line's way; the title above them."""
    from matplotlib.lines import Line2D  # noqa: PLC0415

    figure.legend(
        handles=[Line2D([], [], label=labels[name], **look) for name, look in looks.items()],
        loc="outside upper left",
        ncols=min(len(looks), columns),
        frameon=False,
        handlelength=3.6,
        fontsize=9,
        title=title or None,
        title_fontproperties={"size": 12, "weight": "bold"},
        alignment="left",
    )


def _notes(runs: Runs, by_cap: Runs, by_tolerance: Runs, target: float | None) -> list[str]:
    notes: list[str] = []
    if target is not None:
        notes.append(f"Dotted: what policies are timed to, {text.number(target)}.")
    most = max(len(group) for group in runs.values())
    if most > 1:
        notes.append(
            f"Lines: medians of {most} seeds, in bands from the lowest to the highest. "
            "Bars: means, with the mean's 95 % confidence interval."
        )
    budgets = [(by_cap or runs, _allowed, _adjoint_allowed), (by_tolerance, *_TOLERANCES)]
    if any(_apart(group, *sides) for among, *sides in budgets for group in among.values()):
        notes.append("Budgets: the primal solve's; dashed the adjoint's, where it is another.")
    aside = [name for name in by_tolerance if by_cap and name not in by_cap]
    if aside:
        verb = "goes by its tolerance" if len(aside) == 1 else "go by their tolerance"
        notes.append(f"{', '.join(aside)} {verb}, under a cap on iterations that stays the same.")
    return notes


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415
    except ImportError as error:
        msg = "pictures need matplotlib: pip install matplotlib"
        raise MissingPlotsError(msg) from error
    return Figure(figsize=(width, height), layout="constrained")


def _column(name: str) -> Series:
    return lambda history: history.column(name)


_TOLERANCES = _column("budget_rtol"), _column("adjoint_budget_rtol")


def _epochs(history: History) -> np.ndarray:
    return history.column("epoch")


def _work(history: History) -> np.ndarray:
    spent = history.cumulative("work")
    # The state before training has cost nothing, which a logarithmic axis cannot show.
    return np.where(spent > 0, spent, np.nan)


def _seconds(history: History) -> np.ndarray:
    return history.column("elapsed") - history.cumulative("compile_seconds")


def _steps_name(runs: Runs) -> str:
    updates = max(record.updates for group in runs.values() for r in group for record in r.history)
    return "outer step" if updates <= 1 else f"epoch ({updates} outer steps each)"


def _budget_kinds(runs: Runs) -> tuple[Runs, Runs]:
    """Policies whose caps are drawn, and those whose tolerances are.

    A policy goes by its tolerance where that is positive and the cap does not move.
    """
    by_cap: dict[str, Sequence[Run]] = {}
    by_tolerance: dict[str, Sequence[Run]] = {}
    for name, group in runs.items():
        caps, tolerances = (
            {value for run in group for value in form(run.history) if np.isfinite(value)}
            for form in (_allowed, _column("budget_rtol"))
        )
        moving = len(tolerances - {0.0}) > 1 or (bool(tolerances - {0.0}) and not caps)
        if moving:
            by_tolerance[name] = group
        if caps and not (moving and len(caps) == 1):
            by_cap[name] = group
    return by_cap, by_tolerance


def _allowed(history: History) -> np.ndarray:
    caps = history.column("budget_iterations")
    return np.where(caps < UNLIMITED, caps, np.nan)


def _adjoint_allowed(history: History) -> np.ndarray:
    caps = history.column("adjoint_budget_iterations")
    return np.where(caps < UNLIMITED, caps, np.nan)


def _apart(runs: Sequence[Run], primal: Series, adjoint: Series) -> bool:
    """Whether the adjoint's budget is known in some run, and not the primal's."""
    sides = [(primal(run.history), adjoint(run.history)) for run in runs]
    return not all(
        np.isnan(other).all() or np.array_equal(own, other, equal_nan=True) for own, other in sides
    )
