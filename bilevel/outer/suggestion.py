"""Suggestions: what an unknown name may have been meant for."""

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The rest of a sentence about an unknown name: the nearest known one, or all.

    >>> did_you_mean("epoch", ["epochs", "seed"])
    '; did you mean epochs?'
    >>> did_you_mean("z", ["epochs", "seed"])
    '; known: epochs, seed.'
    """
    names = list(known)
    if near := difflib.get_close_matches(name, names, n=1):
        return f"; did you mean {near[0]}?"
    return f"; known: {', '.join(names)}." if names else "; there is none."
