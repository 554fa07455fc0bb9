"""Finding: one thing that a history says, in words."""

import dataclasses
import enum

import numpy as np

from bilevel.outer.history import History


class Weight(enum.Enum):
    """How much a finding matters; the text of each member says what to make of it.

    >>> Weight.PROBLEM.value
    'Something failed: results may be wrong or missing.'
    """

    PROBLEM = "Something failed: results may be wrong or missing."
    ADVICE = "Work was wasted or accuracy was missed, and a setting would change that."
    NOTE = "Good to know when reading the numbers."


class Kind(enum.Enum):
    """What was found; the text of each member is its headline."""

    EMPTY = "No epoch was finished"
    ENDED = "The run did not come to its end"
    FAILURES = "Solves failed"
    SKIPPED = "Updates were skipped"
    METRIC = "The metric was not finite"
    REFUSED = "The controller could not use some metrics"
    PRIMAL_CAP = "The primal solve stopped at its cap"
    ADJOINT_CAP = "The adjoint stopped at its cap"
    PRIMAL_TOLERANCE = "The primal solve missed its tolerance"
    ADJOINT_TOLERANCE = "The adjoint missed its tolerance"
    ERROR = "The truncation error was above the gradient's norm"
    LOPSIDED = "One of the two budgets is short"
    NOISE = "The gradient's noise was above its truncation error"
    NOISY = "The gradient's noise was above its norm"
    SLOPE = "The metric never reached a plateau"
    TOP = "The budget stood at its largest without gain"
    PLATEAU = "The metric stood still"
    WORSE = "The metric ended above its best"
    COMPILED = "The update was compiled more than once"
    UNCOUNTED = "No solve reported"
    UNMEASURED = "There is no metric"


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that a history says.

    - `kind`: what it is.
    - `weight`: how much it matters.
    - `what`: what happened, in numbers.
    - `advice`: what to do about it; empty where there is nothing to do.

    >>> print(Finding(Kind.EMPTY, Weight.NOTE, "The history is empty.", "Train longer."))
    The history is empty. Train longer.
    """

    kind: Kind
    weight: Weight
    what: str
    advice: str = ""

    def __str__(self) -> str:
        """What happened and what to do, in one line."""
        return f"{self.what} {self.advice}".strip()


def count_of(count: float, name: str) -> str:
    """A number of things.

    >>> count_of(1, "epoch"), count_of(1200, "epoch")
    ('1 epoch', '1,200 epochs')
    """
    return f"{count:,.0f} {name}" if count == 1 else f"{count:,.0f} {name}s"


def times(ratio: float) -> str:
    """How many times as large something is.

    >>> times(3.1416), times(1_234_567.0)
    ('3.14 times', '1,234,567 times')
    """
    return f"{ratio:,.0f} times" if 1000 <= ratio < 1e7 else f"{ratio:.3g} times"


def part_of(part: float, whole: float | None, name: str) -> str:
    """A part of so many things; alone where nobody counted them.

    >>> part_of(3, 16, "solves")
    '3 of 16 solves'
    """
    return f"{part:,.0f} of {whole:,.0f} {name}" if whole else f"{part:,.0f} {name}"


def places(history: History, chosen: np.ndarray) -> str:
    """Epochs in words, the first and the last of them where there are many.

    >>> from bilevel.outer.history import Record
    >>> history = History(Record(epoch=epoch) for epoch in range(5))
    >>> places(history, np.array([False, True, True, False, True]))
    'epochs 1–2 and 4'
    """
    numbers = [record.epoch for record, taken in zip(history, chosen, strict=True) if taken]
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    written = [f"{low}" if low == high else f"{low}–{high}" for low, high in spans]
    if len(written) > 4:
        return f"epochs {', '.join(written[:3])} … {written[-1]}"
    head = "epoch" if len(numbers) == 1 else "epochs"
    return f"{head} {', '.join(written[:-1])}{' and ' if written[1:] else ''}{written[-1]}"
