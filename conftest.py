"""Doctests run as a reader runs them: in JAX's default precision."""

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(autouse=True)
def _default_precision_in_doctests(request: pytest.FixtureRequest) -> Iterator[None]:
    if not isinstance(request.node, pytest.DoctestItem):
        yield
        return
    with jax.enable_x64(False):
        yield
