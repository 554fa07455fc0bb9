"""Thinning: fewer points of a line, that look the same."""

import itertools

import numpy as np

MOST_POINTS = 900
"""Of a line on the page: more than a screen has columns for it."""


def thinned(y: np.ndarray, most: int = MOST_POINTS) -> np.ndarray:
    """Which points of a line to keep: of each stretch the first, the lowest and the highest.

    Peaks stay, for they are what one looks for; both ends stay too.

    **Arguments:**

    - `y`: heights, finite.
    - `most`: how many points there may be, but for a few.

    **Returns:** positions, in order.

    >>> thinned(np.array([1.0, 2.0, 3.0]))
    array([0, 1, 2])
    >>> len(thinned(np.zeros(10_000)))
    301
    """
    if len(y) <= most:
        return np.arange(len(y))
    edges = np.linspace(0, len(y), most // 3 + 1).astype(int)
    kept = {0, len(y) - 1}
    for start, stop in itertools.pairwise(edges.tolist()):
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
