"""Chart: lines, with what they show in words and in a table."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from bilevel.outer import text
from bilevel.outer.report.thinning import spread_out, thinned
from bilevel.outer.series import Curve

MOST_ROWS = 40
"""Of a chart's table; the whole history is in the run's directory."""

PRIMAL_STYLE: tuple[int, ...] = ()
ADJOINT_STYLE = (7, 4)
NOISE_STYLE = (2, 3)
LIMIT_STYLE = (1, 3)


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of a chart.

    - `name`: in the legend.
    - `policy`: whose colour it has; grey where it is nobody's.
    - `curve`: where it goes.
    - `dashes`: lengths of its strokes and gaps, in pixels; none for a solid line.
    - `area`: whether the band is an area that means something by itself.
    """

    name: str
    policy: str
    curve: Curve
    dashes: Sequence[int] = ()
    area: bool = False


@dataclasses.dataclass(frozen=True)
class Chart:
    """Lines over one axis.

    - `key`: names it on the page.
    - `title`: above it.
    - `x_name`, `y_name`: what is to the right, and up.
    - `lines`: what is drawn.
    - `caption`: what it shows, in words.
    - `points`: and in numbers, a policy or line each.
    - `held`: whether a number holds from the epoch before to its own.
    - `mark`: a height to be marked.
    - `from_zero`: whether heights are seen in proportion.
    - `whole`: whether the heights are whole numbers.
    - `decades`: whether what is to the right may be drawn logarithmically.
    """

    key: str
    title: str
    x_name: str
    y_name: str
    lines: Sequence[Line]
    caption: str
    points: Sequence[str] = ()
    held: bool = False
    mark: float | None = None
    from_zero: bool = False
    whole: bool = False
    decades: bool = False

    def data(self, slots: dict[str, int]) -> dict[str, Any]:
        """What the page's script draws, as plain data; long lines are thinned.

        **Arguments:**

        - `slots`: by policy, the number of its colour, from 0.
        """
        return {
            "x": self.x_name,
            "y": self.y_name,
            "held": self.held,
            "mark": self.mark,
            "fromZero": self.from_zero,
            "logarithmic": self._logarithmic,
            "decades": self._wide,
            "lines": [self._line(line, slots) for line in self.lines],
        }

    def _line(self, line: Line, slots: dict[str, int]) -> dict[str, Any]:
        across = np.log(line.curve.x) if self._wide else line.curve.x
        places = thinned(across, line.curve.y)
        x, y, low, high = (side[places] for side in line.curve)
        data: dict[str, Any] = {
            "name": line.name,
            "slot": slots.get(line.policy, -1),
            "dashes": list(line.dashes),
            "x": _written(x),
            "y": _written(y),
        }
        if not np.array_equal(low, high):
            data |= {"low": _written(low), "high": _written(high), "area": line.area}
        return data

    @property
    def _wide(self) -> bool:
        """Whether what is to the right is drawn logarithmically."""
        return self.decades and _decades([line.curve.x for line in self.lines]) > 2

    @property
    def _logarithmic(self) -> bool:
        """Whether the heights are positive and over more than one decade."""
        return not self.from_zero and _decades([line.curve.y for line in self.lines]) > 1

    @property
    def head(self) -> list[str]:
        """The heads of the table's columns."""
        if self._shared is not None:
            return [self.x_name, *(line.name for line in self.lines)]
        return [
            head for line in self.lines for head in (f"{line.name}: {self.x_name}", self.y_name)
        ]

    @property
    def rows(self) -> list[list[str]]:
        """The rows of the table: evenly spread where there are many points."""
        form: Callable[[float | None], str] = text.count if self.whole else text.number
        shared = self._shared
        if shared is not None:
            found = [dict(zip(line.curve.x, line.curve.y, strict=True)) for line in self.lines]
            places = shared[spread_out(len(shared), MOST_ROWS)]
            return [
                [_plain(x), *(form(heights.get(x)) for heights in found)] for x in places.tolist()
            ]
        longest = max(len(line.curve.x) for line in self.lines)
        return [
            [cell for line in self.lines for cell in _point(line.curve, place, form)]
            for place in spread_out(longest, MOST_ROWS)
        ]

    @property
    def thinned(self) -> bool:
        """Whether the table leaves points out."""
        return max(len(line.curve.x) for line in self.lines) > MOST_ROWS

    @property
    def _shared(self) -> np.ndarray | None:
        """What is to the right, where the lines have it in common."""
        together = np.unique(np.concatenate([line.curve.x for line in self.lines]))
        longest = max(len(line.curve.x) for line in self.lines)
        # A line may lack its first point or one in between.
        return together if len(together) <= longest + len(self.lines) else None


def _point(curve: Curve, place: int, form: Callable[[float | None], str]) -> tuple[str, str]:
    if place >= len(curve.x):
        return text.NOTHING, text.NOTHING
    return _plain(float(curve.x[place])), form(float(curve.y[place]))


def _decades(parts: Sequence[np.ndarray]) -> float:
    """Over how many decades numbers go; none unless all are positive."""
    together = np.concatenate(parts)
    low, high = float(together.min()), float(together.max())
    return float(np.log10(high) - np.log10(low)) if low > 0 else 0.0


def _plain(value: float) -> str:
    return text.count(value) if float(value).is_integer() else text.number(value)


def _written(values: np.ndarray) -> list[float]:
    """Seven digits: more than a screen shows, in half the room."""
    return [float(f"{value:.7g}") for value in values]
