"""Spread: a number over seeds."""

import dataclasses
import math
import statistics
from collections.abc import Sequence

from scipy.special import stdtrit

from bilevel.outer import text

CONFIDENCE = 0.95
"""Of the interval that a spread tells."""


@dataclasses.dataclass(frozen=True)
class Spread:
    """Mean of one number over seeds, and how well it is known.

    - `mean`: over the runs that have the number.
    - `deviation`: standard deviation of the sample; `None` for fewer than two.
    - `count`: runs that have it.
    - `confidence`: half the width of the mean's 95 % confidence interval by Student's t;
        `None` for fewer than two.

    >>> Spread.of([1.0, 3.0]).mean
    2.0
    """

    mean: float
    deviation: float | None
    count: int
    confidence: float | None = None

    @classmethod
    def of(cls, values: Sequence[float | None]) -> "Spread | None":
        """From numbers; `None` if there is none."""
        known = [float(value) for value in values if value is not None]
        if not known:
            return None
        mean, count = statistics.fmean(known), len(known)
        if count == 1 or not all(math.isfinite(value) for value in known):
            return cls(mean, None, count)
        deviation = statistics.stdev(known)
        quantile = float(stdtrit(count - 1, 0.5 + CONFIDENCE / 2))
        return cls(mean, deviation, count, quantile * deviation / math.sqrt(count))

    def show(self, form: text.Form) -> str:
        """The mean, and ± half the confidence interval where there is one.

        Both end with the second digit of what is uncertain, for digits beyond say nothing, or
        with the fourth of the larger.

        **Arguments:**

        - `form`: writes a number; with an exponent where it is very large or small.

        >>> Spread(12.3456, 0.4, 3, 0.72).show(text.number)
        '12.35 ± 0.72'
        """
        half = self.confidence
        if not half:
            return form(self.mean)
        size = max(abs(self.mean), half)
        exponent = form(size).partition("e")[2]
        scale = 10.0 ** int(exponent or 0)
        shown = min(_last_place(half / scale, 2), max(_last_place(size / scale, 4), 0))
        mean, half = (round(value / scale, shown) for value in (self.mean, half))
        if not half:
            return form(self.mean)
        written = f"{mean:,.{max(shown, 0)}f} ± {half:,.{max(shown, 0)}f}"
        return f"({written})e{exponent}" if exponent else written


def _last_place(value: float, digits: int) -> int:
    """The decimal place of a number's last digit, of so many."""
    return digits - 1 - math.floor(math.log10(value))
