"""Plotting: what a run or a comparison looks like."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bilevel.budget import UNLIMITED
from bilevel.outer.history import History
from bilevel.outer.run import Run

# Okabe and Ito's palette, which stays apart under every kind of colour blindness, without
# its yellow, which does not show on white.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_STYLES = ("-", "--", "-.", ":")
_DECADE = 10.0


class MissingPlotsError(ImportError):
    """matplotlib is not installed."""


def plot_runs(
    runs: Mapping[str, Sequence[Run]],
    path: str | os.PathLike[str],
    *,
    title: str = "",
    metric_name: str = "metric",
) -> Path:
    """Draw the metric against outer steps and against work, and the budget against outer steps.

    Each policy has a colour and its name at the end of its line; several seeds are drawn
    as thin lines around their median.

    **Arguments:**

    - `runs`: by policy, one for each seed.
    - `path`: of the picture; the ending says the format, PNG, PDF or SVG.
    - `title`: above all panels.
    - `metric_name`: what the metric is, with its unit.

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
    figure = _figure(width=15.0, height=4.6)
    counted = any(run.history.work for group in drawn.values() for run in group)
    panels = [
        _Panel(_steps_name(drawn), metric_name, _epochs, _column("metric")),
        _Panel("Σ inner and adjoint iterations", metric_name, _work, _column("metric")),
        _Panel(_steps_name(drawn), *_budget_panel(drawn)),
    ]
    if not counted:
        del panels[1]
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for panel, axis in zip(panels, axes, strict=True):
        panel.draw(axis, drawn)
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)
    return path


Series = Callable[[History], np.ndarray]


class _Panel:
    def __init__(self, x_name: str, y_name: str, x: Series, y: Series):
        self.x_name = x_name
        self.y_name = y_name
        self.x = x
        self.y = y
        self.whole = y is _allowed

    def draw(self, axis: Any, runs: Mapping[str, Sequence[Run]]) -> None:
        ends: list[tuple[float, float, str, str]] = []
        everything: list[np.ndarray] = []
        spans: list[np.ndarray] = []
        for place, (name, group) in enumerate(runs.items()):
            colour = _COLOURS[place % len(_COLOURS)]
            style = _STYLES[place // len(_COLOURS) % len(_STYLES)]
            # Lines that coincide stay visible: the later one is the thinner.
            width = max(2.8 - 0.3 * place, 1.2)
            lines = [line for line in (self._line(run.history) for run in group) if line[0].size]
            for x, y in lines:
                many = len(lines) > 1
                thin = {"lw": 0.7, "alpha": 0.45} if many else {"lw": width}
                axis.plot(x, y, style, color=colour, **thin)
            if not lines:
                continue
            x, y = _median(lines)
            if len(lines) > 1:
                axis.plot(x, y, style, color=colour, lw=width)
            everything += [y for _, y in lines]
            spans += [x for x, _ in lines]
            ends.append((float(x[-1]), float(y[-1]), name, colour))
        logarithmic = _scale(axis.set_yscale, everything)
        if self.whole and logarithmic:
            _plain_ticks(axis.yaxis)
        if self.x is _work:
            _scale(axis.set_xscale, spans, least=2.0)
        axis.set_xlabel(self.x_name)
        # Above the axis a name reads from left to right and may be long.
        axis.set_title(self.y_name, loc="left", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(visible=True, color="#dddddd", lw=0.6)
        axis.set_axisbelow(True)
        _label(axis, ends)

    def _line(self, history: History) -> tuple[np.ndarray, np.ndarray]:
        x, y = self.x(history), self.y(history)
        usable = np.isfinite(x) & np.isfinite(y)
        return x[usable], y[usable]


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415
    except ImportError as error:
        msg = "pictures need matplotlib: pip install 'bilevel[plot]'"
        raise MissingPlotsError(msg) from error
    return Figure(figsize=(width, height), layout="constrained")


def _column(name: str) -> Series:
    return lambda history: history.column(name)


def _epochs(history: History) -> np.ndarray:
    return history.column("epoch")


def _work(history: History) -> np.ndarray:
    spent = history.cumulative("work")
    # The state before training has cost nothing, which a logarithmic axis cannot show.
    return np.where(spent > 0, spent, np.nan)


def _steps_name(runs: Mapping[str, Sequence[Run]]) -> str:
    updates = max(record.updates for group in runs.values() for r in group for record in r.history)
    return "outer step" if updates <= 1 else f"epoch ({updates} outer steps each)"


def _budget_panel(runs: Mapping[str, Sequence[Run]]) -> tuple[str, Series, Series]:
    """Iterations allowed, or the tolerance where that is what changes."""
    histories = [run.history for group in runs.values() for run in group]
    caps = {record.budget_iterations for history in histories for record in history}
    tolerances = {record.budget_rtol for history in histories for record in history}
    capped = {cap for cap in caps if cap is not None and cap < UNLIMITED}
    if len(capped) > 1 or len(tolerances - {None, 0.0}) < 1:
        return "budget: iterations allowed in a solve", _epochs, _allowed
    return "budget: relative tolerance of a solve", _epochs, _column("budget_rtol")


def _allowed(history: History) -> np.ndarray:
    caps = history.column("budget_iterations")
    return np.where(caps < UNLIMITED, caps, np.nan)


def _median(lines: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    length = min(len(x) for x, _ in lines)
    return (
        np.median([x[:length] for x, _ in lines], axis=0),
        np.median([y[:length] for _, y in lines], axis=0),
    )


def _scale(
    set_scale: Callable[[str], None], values: Sequence[np.ndarray], least: float = 1
) -> bool:
    """A logarithmic axis for positive numbers over more than some decades."""
    together = np.concatenate(values) if values else np.zeros(0)
    if together.size and together.min() > 0 and together.max() / together.min() > _DECADE**least:
        set_scale("log")
        return True
    return False


def _plain_ticks(axis: Any) -> None:
    """1, 2, 5, 10, ... written out, as counts are read."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter  # noqa: PLC0415

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axis.set_minor_formatter(NullFormatter())


def _label(axis: Any, ends: list[tuple[float, float, str, str]]) -> None:
    """Name each line at its end, names kept apart from each other."""
    axis.figure.canvas.draw()  # the scales are settled only now
    box = axis.get_window_extent()
    pixels = [axis.transData.transform((x, y))[1] for x, y, _, _ in ends]
    order = sorted(range(len(ends)), key=lambda place: pixels[place])
    heights = _apart([(pixels[place] - box.y0) / box.height for place in order])
    for place, height in zip(order, heights, strict=True):
        x, y, name, colour = ends[place]
        axis.annotate(
            name,
            xy=(x, y),
            xytext=(1.03, height),
            textcoords="axes fraction",
            color=colour,
            fontsize=9,
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.5, "alpha": 0.6},
        )


def _apart(heights: Sequence[float], gap: float = 0.055) -> list[float]:
    """Ascending heights moved as little as possible to stand a gap apart, inside [0, 1].

    Groups that touch are merged and centred on the mean of what they wanted.
    """
    groups: list[list[float]] = []
    for height in heights:
        groups.append([height])
        while len(groups) > 1 and _top(groups[-2], gap) + gap > _bottom(groups[-1], gap):
            groups[-2:] = [groups[-2] + groups[-1]]
    placed = [_bottom(group, gap) + gap * k for group in groups for k in range(len(group))]
    for place in reversed(range(len(placed))):
        limit = 1.0 if place == len(placed) - 1 else placed[place + 1] - gap
        placed[place] = min(placed[place], limit)
    return placed


def _bottom(group: Sequence[float], gap: float) -> float:
    return max(sum(group) / len(group) - gap * (len(group) - 1) / 2, 0.0)


def _top(group: Sequence[float], gap: float) -> float:
    return _bottom(group, gap) + gap * (len(group) - 1)
