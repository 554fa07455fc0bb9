"""Which cases of a test run by default: a few that show each thing once, the rest in CI."""

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import pytest


def few(fast: Callable[..., bool], *columns: Iterable[Any]) -> list[Any]:
    """Every combination of the columns, marked slow unless `fast` of its values holds."""
    return [
        pytest.param(*case, marks=[] if fast(*case) else [pytest.mark.slow])
        for case in itertools.product(*columns)
    ]
