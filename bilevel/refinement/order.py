"""Order: levels go from coarse to fine."""

import itertools
from collections.abc import Sequence

from bilevel.budget import Budget
from bilevel.refinement.fidelity import Fidelity
from bilevel.refinement.sequence import Number


def require_order(owner: str, start: Number, stop: Number, *, upwards: bool) -> None:
    """Refuse ends of a ladder that are the wrong way round.

    **Raises:** `ValueError` naming the two.
    """
    if (start > stop) if upwards else (start < stop):
        msg = (
            f"{owner}: levels go from coarse to fine, got start {start} finer than stop {stop}. "
            f"Swap the two."
        )
        raise ValueError(msg)


def require_rising(owner: str, fidelities: Sequence[Fidelity]) -> None:
    """Refuse a list in which a level is coarser than the one before.

    It is where none of its iteration caps is larger, none of its tolerances tighter, and
    not all are the same. Where one is finer and another coarser, or a static part differs,
    which of them costs more cannot be told from the numbers, and the order is the user's.

    **Raises:** `ValueError` naming the two levels.
    """
    for level, (coarse, fine) in enumerate(itertools.pairwise(fidelities)):
        before, after = _cost(coarse), _cost(fine)
        falls = all(b >= a for b, a in zip(before, after, strict=True)) and before != after
        if falls and coarse.static == fine.static:
            msg = (
                f"{owner}: levels go from coarse to fine, got {fine.budget} at level {level + 1} "
                f"after {coarse.budget} at level {level}, which allows more iterations or has "
                "tighter tolerances. Sort them; a controller takes the last for the finest."
            )
            raise ValueError(msg)


def _cost(fidelity: Fidelity) -> list[float]:
    """Numbers that rise with the cost of a fidelity."""
    budgets = [fidelity.budget]
    if fidelity.adjoint_budget is not None:
        budgets.append(fidelity.adjoint_budget)
    return [number for budget in budgets for number in _numbers(budget)]


def _numbers(budget: Budget) -> tuple[float, float, float]:
    return float(budget.iterations), -float(budget.rtol), -float(budget.atol)
