"""Metric: what `validate` returned, as the host and a controller take it."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def real_number(value: Any) -> np.generic | float:
    """The metric on the host: float32 and float64 as they are, anything else as a float.

    **Raises:** `TypeError` for what is no real number, or more than one.
    """
    number: Any = np.asarray(value)[()] if isinstance(value, jax.Array) else value
    if isinstance(number, np.floating) and number.dtype.itemsize in (4, 8):
        return number
    if not isinstance(number, str | bytes):
        try:
            if np.shape(number) == () and not np.iscomplexobj(number):
                return float(number)
        except (TypeError, ValueError):
            pass
    msg = f"Task: validate should return one real number, got {value!r}. Reduce it, or take .real."
    raise TypeError(msg)


def widened(metric: Any) -> Any:
    """Shape and dtype of a metric as `real_number` leaves it."""
    return metric if metric.dtype in (jnp.float32, jnp.float64) else math.nan
