"""Point: one choice of settings, and the folder of its runs."""

import dataclasses
import hashlib
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

_LONGEST = 100
_PLAIN = "=._+-,"


@dataclasses.dataclass(frozen=True)
class Point:
    """One choice of settings.

    - `settings`: a value for each, in the order in which they were given.

    >>> Point((("learning_rate", 0.001), ("width", 64))).name
    'learning_rate=0.001, width=64'
    """

    settings: tuple[tuple[str, Any], ...] = ()

    @property
    def words(self) -> list[str]:
        """Name and value of each setting."""
        return [f"{name}={in_words(value)}" for name, value in self.settings]

    @property
    def name(self) -> str:
        """For tables; empty where nothing is set."""
        return ", ".join(self.words)

    @property
    def folder(self) -> str:
        """For paths: the name where every system takes it, else with a digest to tell it apart.

        >>> Point((("shape", (3, 4)),)).folder
        'shape=-3,-4--b4249550'
        """
        wanted = ",".join(self.words)
        kept = "".join(
            letter if letter.isascii() and (letter.isalnum() or letter in _PLAIN) else "-"
            for letter in wanted
        )
        # A comma within a value could stand for one between two settings.
        unique = kept == wanted and not any("," in word for word in self.words)
        if unique and len(kept) <= _LONGEST:
            return kept
        digest = hashlib.sha256(wanted.encode()).hexdigest()[:8]
        return f"{kept[:_LONGEST]}-{digest}"


def in_words(value: Any) -> str:
    """A value of a setting as one would type it.

    >>> in_words(0.001), in_words("adam"), in_words(None)
    ('0.001', 'adam', 'none')
    """
    if value is None:
        return "none"
    if isinstance(value, str):
        return value
    return repr(plain(value))


def plain(value: Any) -> Any:
    """A value as JSON has it; what JSON has not, as Python writes it."""
    item = getattr(value, "item", None)
    if item is not None and getattr(value, "shape", None) == ():
        value = item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if isinstance(value, Mapping):
        return {str(name): plain(part) for name, part in value.items()}
    return repr(value)


def points(settings: Mapping[str, Sequence[Any]]) -> list[Point]:
    """Every combination of the values, the last setting changing fastest.

    >>> [point.name for point in points({"a": [1, 2], "b": ["x"]})]
    ['a=1, b=x', 'a=2, b=x']
    """
    names = list(settings)
    return [
        Point(tuple(zip(names, values, strict=True)))
        for values in itertools.product(*settings.values())
    ]
