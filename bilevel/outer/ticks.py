"""Ticks: few of them, at round numbers, on linear or logarithmic axes."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

_DECADE = 10.0


def scale(
    set_scale: Callable[[str], None],
    axis: Any,
    values: Sequence[np.ndarray],
    least: float = 1,
    *,
    whole: bool = False,
) -> None:
    """A logarithmic axis for positive numbers over more than some decades; few ticks."""
    from matplotlib.ticker import (  # noqa: PLC0415
        FuncFormatter,
        LogFormatterMathtext,
        LogFormatterSciNotation,
        LogLocator,
        NullLocator,
    )

    together = np.concatenate(values) if values else np.zeros(0)
    if not together.size:
        return
    low, high = float(together.min()), float(together.max())
    if not (low > 0 and high / low > _DECADE**least):
        few_ticks(axis, 6, whole=whole)
        return
    set_scale("log")
    axis.set_minor_locator(NullLocator())
    if high / low < _DECADE**2:
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    else:
        axis.set_major_locator(LogLocator(numticks=7))
    plain = low >= 1e-2 and high < 1e6
    if plain:
        axis.set_major_formatter(FuncFormatter(_number))
    elif high / low < _DECADE**2:
        # Left to itself it names powers of ten alone.
        everywhere = (np.inf, np.inf)
        axis.set_major_formatter(LogFormatterSciNotation(minor_thresholds=everywhere))
    else:
        axis.set_major_formatter(LogFormatterMathtext())


def few_ticks(axis: Any, most: int, *, whole: bool = False) -> None:
    """A linear axis with at most so many steps between ticks, at whole numbers if asked."""
    from matplotlib.ticker import FuncFormatter  # noqa: PLC0415

    axis.set_major_formatter(FuncFormatter(_number))
    axis.get_major_locator().set_params(nbins=most, integer=whole)


def _number(value: float, _: object = None) -> str:
    """A tick, as numbers are read: 0.05, 12, 20,000."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.6g}"
