"""Search: the level of a ladder that costs least, with few evaluations."""

from collections.abc import Callable
from typing import TypeVar

Cost = TypeVar("Cost", bound=tuple[float, ...])


def best_level(
    cost: Callable[[int], Cost], levels: int, evaluations: int
) -> tuple[int, dict[int, Cost]]:
    """Minimise over levels: a coarse grid, then the middles beside the best level so far.

    **Arguments:**

    - `cost`: of a level; tuples are compared entry by entry.
    - `levels`: how many there are.
    - `evaluations`: of `cost` at most, >= 3.

    **Returns:** the best level, and all costs by level.

    >>> best_level(lambda level: ((level - 13.0) ** 2,), levels=60, evaluations=12)[0]
    13
    """
    last = levels - 1
    grid = min(levels, max(3, (evaluations + 1) // 2))
    known: dict[int, Cost] = {}
    for place in range(grid):
        level = round(place * last / max(grid - 1, 1))
        if level not in known:
            known[level] = cost(level)
    while len(known) < evaluations:
        best = min(known, key=known.__getitem__)
        level = _widest_gap_beside(best, sorted(known))
        if level is None:
            break
        known[level] = cost(level)
    return min(known, key=known.__getitem__), known


def _widest_gap_beside(best: int, known: list[int]) -> int | None:
    """The middle of the wider of the two intervals that end at the best level."""
    place = known.index(best)
    neighbours = known[max(place - 1, 0) : place] + known[place + 1 : place + 2]
    neighbours = [level for level in neighbours if abs(level - best) > 1]
    if not neighbours:
        return None
    return (best + max(neighbours, key=lambda level: abs(level - best))) // 2
