"""Doctests run as a reader runs them: in JAX's default precision."""

import importlib.util
from collections.abc import Iterator

import jax
import pytest

# Without PyTorch these cannot be imported.
collect_ignore = (
    [
        "adapters/bilevel_arrays/torch",
        "adapters/bilevel_arrays/torch_solution.py",
        "adapters/bilevel_arrays/torch_watch.py",
    ]
    if importlib.util.find_spec("torch") is None
    else []
)


@pytest.fixture(autouse=True)
def _default_precision_in_doctests(request: pytest.FixtureRequest) -> Iterator[None]:
    if not isinstance(request.node, pytest.DoctestItem):
        yield
        return
    with jax.enable_x64(False):
        yield
