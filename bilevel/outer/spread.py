"""Spread: a number over seeds."""

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence

from scipy.special import stdtrit

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

    def show(self, form: Callable[[float | None], str]) -> str:
        """The mean, and ± half the confidence interval where there is one.

        **Arguments:**

        - `form`: writes a number.
        """
        if not self.confidence:
            return form(self.mean)
        # Digits beyond the second of what is uncertain say nothing.
        digits = 1 - math.floor(math.log10(self.confidence))
        return f"{form(self.mean)} ± {form(round(self.confidence, digits))}"
