"""Thinning: fewer points of a line, that look the same."""

import itertools

import numpy as np

MOST_POINTS = 900
"""Of a line on the page: more than a screen has columns for it."""


def thinned(x: np.ndarray, y: np.ndarray, most: int = MOST_POINTS) -> np.ndarray:
    """Which points of a line to keep: of each stretch the first, the lowest and the highest.

    Peaks stay, for they are what one looks for; both ends stay too.

    **Arguments:**

    - `x`: where each point is to the right on the screen, finite and never falling: the
        logarithm where the axis is logarithmic.
    - `y`: heights, finite.
    - `most`: how many points there may be, but for a few.

    **Returns:** positions, in order.

    >>> thinned(np.arange(3.0), np.array([1.0, 2.0, 3.0]))
    array([0, 1, 2])
    >>> len(thinned(np.arange(10_000.0), np.zeros(10_000)))
    301
    """
    if len(y) <= most:
        return np.arange(len(y))
    # In stretches as wide as each other on the screen, not with as many points as each other.
    edges = np.searchsorted(x, np.linspace(x[0], x[-1], most // 3 + 1)[1:-1])
    kept = {0, len(y) - 1}
    for start, stop in itertools.pairwise([0, *edges.tolist(), len(y)]):
        if stop > start:
            part = y[start:stop]
            kept |= {start, int(start + part.argmin()), int(start + part.argmax())}
    return np.array(sorted(kept))


def spread_out(length: int, most: int) -> list[int]:
    """At most so many positions, evenly spread, with both ends.

    >>> spread_out(5, 3), spread_out(2, 3)
    ([0, 2, 4], [0, 1])
    """
    if length <= most:
        return list(range(length))
    return sorted({round(k * (length - 1) / (most - 1)) for k in range(most)})
