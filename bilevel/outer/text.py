"""How names and numbers are put before a reader."""

import math
from collections.abc import Callable
from typing import TypeAlias

from rich import box
from rich.table import Table

Form: TypeAlias = Callable[[float | None], str]
"""How a number is written."""

NOTHING = "–"
"""What a table shows where there is no value."""


def number(value: float | None) -> str:
    """Four significant digits.

    >>> number(0.00012345), number(12.5), number(None)
    ('1.234e-04', '12.5', '–')
    """
    if value is None:
        return NOTHING
    if not math.isfinite(value):
        return str(value)
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        return f"{value:.4g}"
    return f"{value:.3e}"


def count(value: float | None) -> str:
    """A whole number with separators.

    >>> count(37585)
    '37,585'
    """
    return NOTHING if value is None else f"{round(value):,}"


def seconds(value: float | None) -> str:
    """A duration in seconds.

    >>> seconds(0.0123), seconds(75.2), seconds(0.0004567)
    ('0.012', '75.2', '0.00046')
    """
    if value is None:
        return NOTHING
    if 0 < value < 0.01:
        return f"{value:.2g}"
    return f"{value:.3f}" if value < 10 else f"{value:.1f}"


def ratio(value: float | None) -> str:
    """How many times another number, to three digits.

    >>> ratio(1.0204), ratio(2345.6)
    ('1.02', '2.35e+03')
    """
    return NOTHING if value is None else f"{value:.3g}"


def budget(iterations: int | None, rtol: float | None, atol: float | None) -> str:
    """A budget in a few characters.

    >>> budget(25, 0.0, 0.0), budget(2**31 - 1, 1e-3, 0.0), budget(40, 1e-5, 0.0)
    ('25', '1e-03', '40 to 1e-05')
    """
    unlimited = 2**31 - 1
    tolerances = [f"{value:.0e}{suffix}" for value, suffix in ((rtol, ""), (atol, " abs")) if value]
    if iterations is None:
        return NOTHING
    if iterations < unlimited:
        return " to ".join([f"{iterations:,}", *tolerances[:1]])
    return tolerances[0] if tolerances else "no limit"


def table(title: str | None = None, caption: str | None = None) -> Table:
    """An empty table in the style of all the others."""
    return Table(
        title=title,
        caption=caption,
        box=box.SIMPLE_HEAD,
        title_justify="left",
        caption_justify="left",
        pad_edge=False,
    )
