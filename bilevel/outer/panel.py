"""Panel: one set of axes of a picture, drawn with matplotlib."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from bilevel.outer.look import faded
from bilevel.outer.run import Run
from bilevel.outer.series import (
    Curve,
    Runs,
    Series,
    allowed,
    curve,
    epochs,
    reference,
    saved_shares,
    work,
    work_of_step,
)
from bilevel.outer.spread import Spread
from bilevel.outer.ticks import few_ticks, scale

Looks: TypeAlias = Mapping[str, dict[str, Any]]
"""By policy, its colour and line."""

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
                line = curve(group, self.x, side.series)
                if line is None:
                    continue
                _draw(axis, line, look)
                heights += [line.low, line.high]
                spans.append(line.x)
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
        limit, shares = reference(self.runs), saved_shares(self.runs)
        alone = len(self.runs) == 1
        # Areas that lie over each other must not add up to a colour of none of them.
        alpha = max(0.2 / max(len(shares), 1), 0.06)
        top = 0.0
        for name, group in self.runs.items():
            line = curve(group, epochs, work_of_step)
            if line is None:
                continue
            look = dict(looks[name]) | {"drawstyle": "steps-pre", "linestyle": SOLID}
            _draw(axis, line, look)
            top = max(top, float(line.high.max()))
            if limit is None or name not in shares:
                continue
            length = min(len(line.x), len(limit.x))
            x, y, full = line.x[:length], line.y[:length], limit.y[:length]
            area = {"color": look["color"], "alpha": alpha, "lw": 0, "zorder": 1.5}
            axis.fill_between(x, y, full, where=full > y, step="pre", **area)
        if limit is not None and alone:
            axis.plot(limit.x, limit.y, color="#555555", lw=1, linestyle=(0, (1, 2)), zorder=2.5)
            top = max(top, float(limit.y.max()))
        few_ticks(axis.yaxis, 6)
        few_ticks(axis.xaxis, 6, whole=True)
        # From zero, or the area would not be in proportion to what it stands for.
        axis.set_ylim(0.0, 1.06 * top or 1.0)
        _dress(axis, self.x_name, "iterations of an outer step, shaded what is saved")


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


def _draw(axis: Any, line: Curve, look: Mapping[str, Any]) -> None:
    """A line in the band of its seeds, with its end marked."""
    if not np.array_equal(line.low, line.high):
        band = {"color": look["color"], "alpha": 0.16, "lw": 0}
        band |= {"step": "pre"} if "drawstyle" in look else {}
        axis.fill_between(line.x, line.low, line.high, zorder=2, **band)
    axis.plot(line.x, line.y, **look)
    axis.plot(line.x[-1:], line.y[-1:], "o", color=look["color"], ms=4, zorder=look["zorder"])


def _dress(axis: Any, x_name: str, y_name: str) -> None:
    axis.set_xlabel(x_name)
    # Above the axis a name reads from left to right and may be long.
    axis.set_title(y_name, loc="left", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(visible=True, color="#dddddd", lw=0.6)
    axis.set_axisbelow(True)
