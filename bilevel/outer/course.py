"""Course: what the metrics of a history say, in words."""

from typing import TypeAlias

import numpy as np

from bilevel.outer import text
from bilevel.outer.finding import Finding, Kind, Weight, places
from bilevel.outer.history import History

FLAT = 0.02
"""A metric that changes by less than this part of itself stands still."""

LATE = 0.3
"""Part of the work that may follow without gain before that is said."""

HIGH = 0.1
"""By what part of itself a metric may end above its best before that is said."""

SHORTEST = 10
"""Epochs with a metric below which nothing is said of its course."""

Course: TypeAlias = tuple[np.ndarray, np.ndarray]
"""Positions of records, and their metrics."""


def not_finite(history: History) -> Finding | None:
    """Metrics that are no numbers."""
    bad = np.array(
        [record.metric is not None and not np.isfinite(record.metric) for record in history]
    )
    if not bad.any():
        return None
    return Finding(
        Kind.METRIC,
        Weight.PROBLEM,
        f"The metric was NaN or infinite in {places(history, bad)}.",
        "Validation solves may need a finer budget than training solves.",
    )


def _course(history: History) -> Course | None:
    """Positions and values of the finite metrics after training began, if they suffice."""
    metric, epoch = history.column("metric"), history.column("epoch")
    (positions,) = np.nonzero(np.isfinite(metric) & (epoch > 0))
    return (positions, metric[positions]) if len(positions) >= SHORTEST else None


def _fall(before: float, after: float) -> float:
    """By what part of itself a metric fell."""
    scale = abs(before)
    return (before - after) / scale if scale > 0 else 0.0


def _last_fall(values: np.ndarray) -> tuple[int, float]:
    """Length of the last fifth, and by what part the medians fell from the one before."""
    length = max(len(values) // 5, 2)
    before, last = np.median(values[-2 * length : -length]), np.median(values[-length:])
    return length, _fall(float(before), float(last))


def still_falling(history: History) -> Finding | None:
    """A metric that had not come to rest."""
    course = _course(history)
    if course is None:
        return None
    length, fall = _last_fall(course[1])
    if fall <= FLAT:
        return None
    return Finding(
        Kind.SLOPE,
        Weight.ADVICE,
        f"The metric never reached a plateau: it still fell by {100 * fall:.3g} % over the last "
        f"{length:,} epochs against the {length:,} before (medians).",
        "Train longer, or with a larger step.",
    )


def standstill(history: History) -> Finding | None:
    """A plateau that took much of the work, most of all under the finest budget."""
    course = _course(history)
    if course is None or abs(_last_fall(course[1])[1]) > FLAT:
        return None
    positions, values = course
    end = float(np.median(values[-max(len(values) // 5, 2) :]))
    arrived = positions[np.argmax(values <= end + FLAT * abs(end))]
    after = len(history) - 1 - arrived
    work = np.nan_to_num(history.column("work"))
    share = work[arrived + 1 :].sum() / work.sum() if work.sum() > 0 else after / len(history)
    what = f"less than {100 * FLAT:.0f} %"
    top = _at_top(history)
    if top is not None:
        start = max(top, int(arrived) + 1)
        spent = work[start:].sum() / work.sum() if work.sum() > 0 else 0.0
        if spent >= LATE:
            return Finding(
                Kind.TOP,
                Weight.ADVICE,
                f"The budget stood at its largest for the last {len(history) - start:,} epochs, "
                f"which took {100 * spent:.0f} % of all iterations, while the metric gained "
                f"{what}.",
                "End the ladder sooner, or stop there (bl.Patience, bl.Target).",
            )
    if share < LATE:
        return None
    return Finding(
        Kind.PLATEAU,
        Weight.ADVICE,
        f"The metric stood still from epoch {history[int(arrived)].epoch} on: the {after:,} epochs "
        f"after it gained {what} and took {100 * share:.0f} % of all "
        f"{'iterations' if work.sum() > 0 else 'epochs'}.",
        "Stop there (bl.Patience, bl.Target), or make the step smaller if it should go lower.",
    )


def _at_top(history: History) -> int | None:
    """Position from which the largest cap held to the end; `None` if the cap never moved."""
    caps = history.column("budget_iterations")
    known = caps[np.isfinite(caps)]
    if not known.size or known.min() == known.max() or caps[-1] != known.max():
        return None
    (below,) = np.nonzero(np.isfinite(caps) & (caps < known.max()))
    return int(below[-1]) + 1


def above_best(history: History) -> Finding | None:
    """A metric that ended worse than it was."""
    course = _course(history)
    if course is None:
        return None
    positions, values = course
    length = max(len(values) // 5, 2)
    # The best of the end against the best of all: one noisy epoch alone is no loss.
    end, best = float(values[-length:].min()), float(values.min())
    rise = -_fall(best, end)
    if rise <= HIGH:
        return None
    place = history[int(positions[values.argmin()])].epoch
    return Finding(
        Kind.WORSE,
        Weight.ADVICE,
        f"The metric ended above its best, {text.number(best)} in epoch {place}: in the last "
        f"{length:,} epochs it was {text.number(end)} or more.",
        "Take a smaller step towards the end, or the parameters of the best epoch (a checkpoint "
        "keeps them).",
    )


def unmeasured(history: History) -> Finding | None:
    """No metric at all."""
    if np.isnan(history.column("metric")).all() and not any(r.metric is not None for r in history):
        what = "No record has a metric, so nothing is said of where training went."
        return Finding(Kind.UNMEASURED, Weight.NOTE, what, "Give the task validate=.")
    return None
