"""Panel: one set of axes of a picture, drawn with matplotlib."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from bilevel.outer.history import History
from bilevel.outer.look import faded
from bilevel.outer.run import Run
from bilevel.outer.series import (
    REFERENCE,
    Runs,
    Series,
    allowed,
    epochs,
    finest_work,
    work,
    work_of_step,
)
from bilevel.outer.spread import Spread
from bilevel.outer.ticks import few_ticks, scale

Looks: TypeAlias = Mapping[str, dict[str, Any]]
"""By policy, its colour and line."""

Lines: TypeAlias = Sequence[tuple[np.ndarray, np.ndarray]]
"""Of several seeds, x and y."""

SOLID = "-"
DASHED = (0, (3, 1.5))
DOTTED = (0, (1, 1.4))


class Side(NamedTuple):
    """One line of each policy.

    - `series`: its heights.
    - `style`: of the line; `None` takes the policy's own.
    - `where`: tells which policies it is drawn for.
    """

    series: Series
    style: Any = None
    where: Callable[[Sequence[Run]], bool] = bool


class Panel:
    """Lines of all policies.

    **Arguments:**

    - `x_name`, `y_name`: of the axes.
    - `x`: what is to the right.
    - `sides`: the lines of each policy.
    - `runs`: by policy.
    - `mark`: height of a thin line across.
    - `held`: whether a number holds for a whole epoch, and is drawn as a step.
    """

    def __init__(
        self,
        x_name: str,
        y_name: str,
        x: Series,
        sides: Sequence[Side],
        runs: Runs,
        *,
        mark: float | None = None,
        held: bool = False,
    ):
        self.x_name = x_name
        self.y_name = y_name
        self.x = x
        self.sides = sides
        self.runs = runs
        self.mark = mark
        self.held = held

    def draw(self, axis: Any, looks: Looks) -> None:
        """Draw it."""
        heights: list[np.ndarray] = []
        spans: list[np.ndarray] = []
        for name, group in self.runs.items():
            for side in self.sides:
                if not side.where(group):
                    continue
                look = dict(looks[name])
                if side.style is not None:
                    look["linestyle"] = side.style
                if self.held:
                    look["drawstyle"] = "steps-pre"
                lines = [_line(run.history, self.x, side.series) for run in group]
                lines = [line for line in lines if line[0].size]
                if not lines:
                    continue
                _draw_lines(axis, lines, look)
                heights += [y for _, y in lines]
                spans += [x for x, _ in lines]
        if self.mark is not None and heights:
            axis.axhline(self.mark, color="#555555", lw=1, linestyle=(0, (1, 2)), zorder=2.5)
            heights.append(np.array([self.mark]))
        whole = any(side.series is allowed for side in self.sides)
        scale(axis.set_yscale, axis.yaxis, heights, whole=whole)
        if whole and axis.get_yscale() == "linear":
            axis.set_ylim(bottom=0)
        if self.x is work:
            scale(axis.set_xscale, axis.xaxis, spans, least=2.0)
        elif self.x is epochs:
            few_ticks(axis.xaxis, 6, whole=True)
        _dress(axis, self.x_name, self.y_name)


class Savings:
    """Iterations of an outer step, and in colour what is saved against the reference.

    The reference is `full`, or for one policy alone its own finest budget held throughout.

    **Arguments:**

    - `x_name`: what the epochs are called.
    - `runs`: by policy.
    """

    def __init__(self, x_name: str, runs: Runs):
        self.x_name = x_name
        self.runs = runs

    def draw(self, axis: Any, looks: Looks) -> None:
        """Draw it."""
        reference = self._reference()
        # Areas that lie over each other must not add up to a colour of none of them.
        alpha = max(0.2 / max(len(self.runs) - 1, 1), 0.06)
        top = 0.0
        for name, group in self.runs.items():
            lines = [_line(run.history, epochs, work_of_step) for run in group]
            lines = [line for line in lines if line[0].size]
            if not lines:
                continue
            look = dict(looks[name]) | {"drawstyle": "steps-pre", "linestyle": SOLID}
            _draw_lines(axis, lines, look)
            top = max(top, *(float(y.max()) for _, y in lines))
            if reference is None or (name == REFERENCE and len(self.runs) > 1):
                continue
            x, y = _median(lines)
            length = min(len(y), len(reference[1]))
            x, y, limit = x[:length], y[:length], reference[1][:length]
            area = {"color": look["color"], "alpha": alpha, "lw": 0, "zorder": 1.5}
            axis.fill_between(x, y, limit, where=limit > y, step="pre", **area)
        if reference is not None and len(self.runs) == 1:
            axis.plot(*reference, color="#555555", lw=1, linestyle=(0, (1, 2)), zorder=2.5)
            top = max(top, float(reference[1].max()))
        few_ticks(axis.yaxis, 6)
        few_ticks(axis.xaxis, 6, whole=True)
        # From zero, or the area would not be in proportion to what it stands for.
        axis.set_ylim(0.0, 1.06 * top or 1.0)
        _dress(axis, self.x_name, "iterations of an outer step, shaded what is saved")

    def _reference(self) -> tuple[np.ndarray, np.ndarray] | None:
        alone = len(self.runs) == 1
        group = next(iter(self.runs.values())) if alone else self.runs.get(REFERENCE, [])
        series = finest_work if alone else work_of_step
        lines = [_line(run.history, epochs, series) for run in group]
        lines = [line for line in lines if line[0].size]
        return _median(lines) if lines else None


class Bars:
    """Sums of a run, one bar a policy, in parts; means over the seeds.

    **Arguments:**

    - `name`: above it.
    - `parts`: of a run.
    - `runs`: by policy.
    """

    def __init__(self, name: str, parts: Callable[[Run], Sequence[float]], runs: Runs):
        self.name = name
        self.parts = parts
        self.runs = runs

    def draw(self, axis: Any, looks: Looks) -> None:
        """Draw it."""
        for place, (name, group) in enumerate(self.runs.items()):
            rows = np.array([self.parts(run) for run in group], dtype=float)
            left, colour = 0.0, looks[name]["color"]
            for part, width in enumerate(rows.mean(axis=0)):
                shade = "#B8B8B8" if part == 2 else faded(colour, _SHADES[part])
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


def _line(history: History, x: Series, y: Series) -> tuple[np.ndarray, np.ndarray]:
    right, up = x(history), y(history)
    usable = np.isfinite(right) & np.isfinite(up)
    return right[usable], up[usable]


def _median(lines: Lines) -> tuple[np.ndarray, np.ndarray]:
    length = min(len(x) for x, _ in lines)
    xs, ys = (np.array([line[side][:length] for line in lines]) for side in (0, 1))
    return np.median(xs, axis=0), np.median(ys, axis=0)


def _draw_lines(axis: Any, lines: Lines, look: Mapping[str, Any]) -> None:
    """The median of the seeds in a band from the lowest to the highest, with its end marked."""
    x, y = _median(lines)
    if len(lines) > 1:
        ys = np.array([line[1][: len(x)] for line in lines])
        band = {"color": look["color"], "alpha": 0.16, "lw": 0}
        band |= {"step": "pre"} if "drawstyle" in look else {}
        axis.fill_between(x, ys.min(axis=0), ys.max(axis=0), zorder=2, **band)
    axis.plot(x, y, **look)
    axis.plot(x[-1:], y[-1:], "o", color=look["color"], ms=4, zorder=look["zorder"])


def _dress(axis: Any, x_name: str, y_name: str) -> None:
    axis.set_xlabel(x_name)
    # Above the axis a name reads from left to right and may be long.
    axis.set_title(y_name, loc="left", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(visible=True, color="#dddddd", lw=0.6)
    axis.set_axisbelow(True)
