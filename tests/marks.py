"""Marks for tables of cases."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def _name(value: Any) -> Any:
    return getattr(value, "name", value)


def others_slow(values: Iterable[Any], *fast: Any, key: Callable[[Any], Any] = _name) -> list[Any]:
    """Parameters of which all but those named run with `-m slow` alone.

    A name that none of the values has is an error: else a typing mistake here, or another
    name there, would take the last case out of the default suite unseen.
    """
    values = list(values)
    names = [key(value) for value in values]
    missing = [name for name in fast if name not in names]
    assert not missing, f"no such cases: {missing}; there are {names}"
    return [
        pytest.param(value, marks=[] if name in fast else pytest.mark.slow)
        for name, value in zip(names, values, strict=True)
    ]
