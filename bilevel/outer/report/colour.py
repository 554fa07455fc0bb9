"""Colour: of a policy, on a light page and on a dark one."""

import itertools

LIGHT = "#ffffff"
DARK = "#15181c"
LEAST = {LIGHT: 3.2, DARK: 5.0}
"""Contrast of a line with the page; WCAG 2.2 asks for 3 (1.4.11), and light on dark glows less."""


def on_page(colour: str, page: str) -> str:
    """The colour, made darker or lighter until it stands off the page.

    **Arguments:**

    - `colour`: as `#rrggbb`.
    - `page`: `LIGHT` or `DARK`.

    >>> on_page("#0072B2", LIGHT), on_page("#000000", DARK)
    ('#0072b2', '#8a8a8a')
    """
    towards = 0.0 if _luminance(_channels(page)) > 0.2 else 1.0
    for step in itertools.count():
        share = min(step * 0.02, 1.0)
        mixed = [channel + share * (towards - channel) for channel in _channels(colour)]
        if share >= 1 or contrast(_written(mixed), page) >= LEAST[page]:
            return _written(mixed)
    raise AssertionError


def contrast(one: str, other: str) -> float:
    """How far two colours stand off each other, from 1 to 21 (WCAG 2.2).

    >>> contrast("#000000", "#ffffff")
    21.0
    """
    low, high = sorted(_luminance(_channels(colour)) for colour in (one, other))
    return (high + 0.05) / (low + 0.05)


def _channels(colour: str) -> list[float]:
    return [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]


def _written(channels: list[float]) -> str:
    return "#" + "".join(f"{round(255 * channel):02x}" for channel in channels)


def _luminance(channels: list[float]) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
