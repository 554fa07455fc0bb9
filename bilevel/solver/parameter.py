"""Checks of the numbers that users give to solvers."""

import math

from jax.core import Tracer
from jaxtyping import Array


def number(owner: str, name: str, value: Array | float) -> float | None:
    """The value where it is concrete, `None` where it is traced.

    **Raises:** `TypeError` if it is no real scalar.
    """
    if isinstance(value, Tracer):
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        msg = f"{owner}: {name} must be a real number, got {value!r}."
        raise TypeError(msg) from None


def positive(owner: str, name: str, value: Array | float) -> None:
    """**Raises:** `ValueError` unless the value is positive and finite, or traced."""
    given = number(owner, name, value)
    if given is not None and not (given > 0 and math.isfinite(given)):
        msg = f"{owner}: {name} must be positive and finite, got {given}."
        raise ValueError(msg)


def within(owner: str, name: str, value: Array | float, low: float, high: float) -> None:
    """**Raises:** `ValueError` unless low <= value < high, or traced."""
    given = number(owner, name, value)
    if given is not None and not low <= given < high:
        msg = f"{owner}: {name} must be at least {low} and below {high}, got {given}."
        raise ValueError(msg)


def whole(owner: str, name: str, value: int, low: int = 1) -> None:
    """**Raises:** `ValueError` unless the value is a whole number, at least `low`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        msg = f"{owner}: {name} must be a whole number, at least {low}, got {value!r}."
        raise ValueError(msg)
