"""Grid colours: an order of a grid's points in which those of a colour do not see one another."""

import functools
import itertools
import math

import numpy as np

from bilevel_pde.definiteness import Offset


def grid_colours(
    shape: tuple[int, ...], periodic: tuple[bool, ...], offsets: tuple[Offset, ...]
) -> tuple[np.ndarray, int]:
    """Few colours for a stencil's points, by rules for the axes: fast on grids of any size.

    Red and black for a stencil along the axes; a third colour where a periodic axis has an
    odd number of points; 2ᵈ in d dimensions for a stencil that reaches across corners; more
    for one that reaches further.

    **Arguments:**

    - `shape`: of the grid; `periodic`: which of its axes close on themselves.
    - `offsets`: which neighbours a point sees, by steps along the axes.

    **Returns:** an integer for each point, from 0, of the grid's shape, and how many there are.
    """
    lines, count = colour_lines(shape, periodic, offsets)
    return functools.reduce(np.add.outer, lines).astype(np.int32) % count, count


@functools.lru_cache(maxsize=256)
def colour_lines(
    shape: tuple[int, ...], periodic: tuple[bool, ...], offsets: tuple[Offset, ...]
) -> tuple[tuple[np.ndarray, ...], int]:
    """Numbers along each axis whose sums, by remainders of a count, are the colours."""
    seen = {_reduced(shape, periodic, offset) for offset in offsets} - {(0,) * len(shape)}
    steps = [{abs(offset[axis]) for offset in seen} - {0} for axis in range(len(shape))]
    lines = [_line(n, closed, s) for n, closed, s in zip(shape, periodic, steps, strict=True)]
    counts = [1 + int(line.max()) for line in lines]
    if all(sum(o != 0 for o in offset) == 1 for offset in seen):
        # A neighbour differs along one axis, where the colours do: so do the sums.
        count = max(counts)
        weights = [1] * len(shape)
    else:
        # Colours of a neighbour differ along some axis: so do the digits of the sums.
        count = math.prod(counts)
        weights = [math.prod(counts[axis + 1 :]) for axis in range(len(shape))]
    for fewer in range(2, count):
        found = _modular(shape, periodic, seen, fewer)
        if found is not None:
            lines, weights, count = [np.arange(n) for n in shape], found, fewer
            break
    return tuple(w * line % count for w, line in zip(weights, lines, strict=True)), count


def _reduced(shape: tuple[int, ...], periodic: tuple[bool, ...], offset: Offset) -> Offset:
    """The offset by the shortest way; nowhere, if it leads outside from everywhere."""
    steps: list[int] = []
    for points, closed, step in zip(shape, periodic, offset, strict=True):
        if closed:
            steps.append((step + points // 2) % points - points // 2)
        elif abs(step) >= points:
            return (0,) * len(shape)
        else:
            steps.append(step)
    return tuple(steps)


def _line(points: int, closed: bool, steps: set[int]) -> np.ndarray:  # noqa: FBT001
    """Colours along an axis, distinct for points some of the steps apart."""
    index = np.arange(points)
    if not steps:
        return np.zeros(points, int)
    # As many points as the longest step and one more are distinct, in blocks; around a closed
    # axis some blocks are longer.
    blocks = max(points // (max(steps) + 1), 1)
    most = -(-points // blocks) if closed else max(steps) + 1
    for count in range(2, most):
        if (not closed or points % count == 0) and all(step % count for step in steps):
            return index % count
    if not closed:
        return index % most
    lengths = np.full(blocks, points // blocks)
    lengths[: points % blocks] += 1
    return np.concatenate([np.arange(length) for length in lengths])


def _modular(
    shape: tuple[int, ...], periodic: tuple[bool, ...], seen: set[Offset], count: int
) -> list[int] | None:
    """Weights a such that a·i mod `count` differs for neighbours, also around closed axes."""
    choices = [
        [a for a in range(count) if not closed or a * points % count == 0]
        for points, closed in zip(shape, periodic, strict=True)
    ]
    weights = np.array(list(itertools.product(*choices)))
    right = np.all(weights @ np.array(sorted(seen)).T % count, axis=1)
    first = int(np.argmax(right))
    return [int(a) for a in weights[first]] if right[first] else None
