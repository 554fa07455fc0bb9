"""Look: the colour and the line of a policy, the same in every picture."""

import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

# Okabe and Ito's palette, which stays apart under every kind of colour blindness, without
# its yellow, which does not show on white. A kind of policy has one colour in all pictures.
_COLOURS = {
    "full": "#0072B2",
    "prdp": "#009E73",
    "fixed": "#D55E00",
    "best-fixed": "#E69F00",
    "hoag": "#CC79A7",
    "schedule": "#56B4E9",
    "error": "#7B3FA0",
    "task": "#7A5230",
    "auto": "#000000",
}
_OTHERS = ("#2F6F6F", "#8A8D00", "#A0204C", "#5F6B73")
_STYLES = ("-", (0, (6, 2.5)), (0, (2.2, 1.6)), (0, (7, 1.8, 1.4, 1.8)), (0, (1, 1.2)))


def looks(names: Sequence[str]) -> Mapping[str, dict[str, Any]]:
    """Colour by kind of policy; style, width and order by place, so that all lines show.

    **Returns:** by name, what matplotlib's lines take.

    >>> looks(["full", "prdp"])["prdp"]["color"]
    '#009E73'
    """
    found: dict[str, dict[str, Any]] = {}
    taken: set[str] = set()
    for place, name in enumerate(names):
        # `fixed=4` and `full, seed 0`: the kind comes first.
        colour = _COLOURS.get(re.split("[=,]", name)[0])
        if colour is None:
            # A checksum, for Python's own hash differs from process to process.
            first = zlib.crc32(name.encode(errors="replace")) % len(_OTHERS)
            turned = _OTHERS[first:] + _OTHERS[:first]
            colour = next((other for other in turned if other not in taken), turned[0])
            taken.add(colour)
        found[name] = {
            "color": colour,
            "linestyle": _STYLES[place % len(_STYLES)],
            "lw": max(3.4 - 0.4 * place, 1.8),
            "zorder": 3 + 0.1 * place,
        }
    return found


def faded(colour: str, share: float) -> tuple[float, ...]:
    """A colour mixed with white, through which no grid shows."""
    channels = (int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5))
    return tuple(share * channel + 1 - share for channel in channels)
