"""Metric: what `validate` returned, as the host and a controller take it."""

import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from bilevel.outer.executable import Executable
from bilevel.outer.processes.shared import shared


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


def same_number(number: np.generic | float) -> np.generic | float:
    """What process 0 has measured, bit for bit, in every process."""
    name, bits = shared([type(number).__name__, np.asarray(number).tobytes().hex()])
    found = np.frombuffer(bytes.fromhex(bits), np.dtype(name))[0]
    return float(found) if name == "float" else found


def widened(metric: Any) -> Any:
    """Shape and dtype of a metric as `real_number` leaves it."""
    return metric if metric.dtype in (jnp.float32, jnp.float64) else math.nan


def compiled_validation(
    validate: Callable[[Any], Any], static: PyTree
) -> Executable[[PyTree], Any]:
    """A metric of the trained part of the parameters, compiled when it is first called.

    **Arguments:**

    - `validate`: a task's.
    - `static`: the part of its parameters that is not trained.
    """

    def outer_validation(trained: PyTree) -> Any:
        try:
            return validate(eqx.combine(trained, static))
        except jax.errors.JAXTypeError as error:
            error.add_note(
                "validate leaves JAX: give the task jit_validate=False, and it is called with "
                "concrete parameters instead of being compiled."
            )
            raise

    return Executable(outer_validation)
