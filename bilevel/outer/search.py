"""Search: the cheapest level of a ladder that is good enough, with few runs."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence

DOUBT = 0.25
"""What misses by less may have missed by chance: training is noisy."""

Excess = Mapping[int, float]


def cheapest_level(
    look: Callable[[int], float],
    sizes: Sequence[float],
    trials: int,
    *,
    judge: Callable[[int], float] | None = None,
    known: Excess | None = None,
) -> int | None:
    """The cheapest level that is good enough; a level costs more than all below it.

    It halves what lies between the finest level known to miss and the coarsest known to be
    good enough, by the ratio of their sizes as far as the trials still suffice to close in:
    where the finest level is known and finer levels are never worse, n trials find the answer
    among 2ⁿ levels. Trials that are left look again below the answer, where a level only just
    missed. Then the answer is judged, and the level below it; if that turns the answer, the
    search goes on, by judging where there are no trials left, as many times again at most.

    **Arguments:**

    - `look`: at a level: by what part it misses, <= 0 where it is good enough; infinite
        where it failed. Called at most `trials` times.
    - `sizes`: of the levels, rising, positive.
    - `trials`: how many levels may be looked at.
    - `judge`: a closer look at a level looked at before, which is final; by default the
        look is.
    - `known`: judged before, at no cost.

    **Returns:** the level; `None` if none of those looked at is good enough.

    >>> cheapest_level(lambda level: 13 - level, range(1, 61), 6, known={59: 0.0})
    13
    """
    judged = dict(known or {})
    looked: dict[int, float] = {}
    closer = 0
    while True:
        excess = looked | judged
        best = min((level for level, by in excess.items() if by <= 0), default=None)
        left = trials - len(looked)
        level = _next(excess, best, sizes, left) if left > 0 else None
        if level is not None:
            looked[level] = look(level)
            continue
        if best is None:
            return None
        unsure = [best, *_just_below(best, excess)]
        level = next((level for level in unsure if level not in judged), None)
        if level is not None:
            judged[level] = looked[level] if judge is None else judge(level)
            closer += 1
            continue
        refuted = max((level for level in judged if level < best), default=best)
        if judge is None or best - refuted < 2 or closer >= trials:
            return best
        level = _middle(refuted, best, sizes)
        judged[level] = judge(level)
        closer += 1


def _just_below(best: int, excess: Excess) -> list[int]:
    """The next level below that was looked at, where it missed by little."""
    below = max((level for level in excess if level < best), default=None)
    return [] if below is None or excess[below] > DOUBT else [below]


def _next(excess: Excess, best: int | None, sizes: Sequence[float], left: int) -> int | None:
    """The level to look at next; `None` if no other could be the answer."""
    top = len(sizes) if best is None else best
    floor = max((level for level in excess if level < top), default=-1)
    if top - floor > 1:
        level = _middle(floor, top, sizes)
        reach = 2 ** (left - 1)
        if top - floor <= 2 * reach:
            level = min(max(level, top - reach), floor + reach)
        return level
    if best is None:
        return None
    hopeless = max(
        (level for level in excess if level < best and excess[level] > DOUBT), default=-1
    )
    tried = [hopeless, *sorted(level for level in excess if hopeless < level <= best)]
    gaps = [(low, high) for low, high in itertools.pairwise(tried) if high - low > 1]
    if not gaps:
        return None
    low, high = max(gaps, key=lambda gap: _size(gap[1], sizes) / _size(gap[0], sizes))
    return _middle(low, high, sizes)


def _middle(low: int, high: int, sizes: Sequence[float]) -> int:
    """The level between two whose size is nearest to their geometric mean."""
    wanted = math.sqrt(_size(low, sizes) * _size(high, sizes))
    return min(range(low + 1, high), key=lambda level: abs(math.log(sizes[level] / wanted)))


def _size(level: int, sizes: Sequence[float]) -> float:
    """Of a level, or of what would come before the first or after the last."""
    return sizes[0] / 2 if level < 0 else sizes[min(level, len(sizes) - 1)]
