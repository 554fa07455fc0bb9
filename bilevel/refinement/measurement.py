"""Measurement: a number a controller is told during training."""

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from bilevel.refinement.namespace import AnyArray


def measured(owner: str, name: str, value: Any) -> Float[AnyArray, ""]:
    """Read one real scalar, from JAX, NumPy, Python or another library.

    float32 stays float32 and float64 stays float64; half precision is widened to
    float32, for a ratio near 0.98 has no digits left in it; a Python number takes
    JAX's default float.  Scalars of other libraries are read with ``float(value)``.
    The value itself may be anything, NaN and infinity included.

    **Arguments:**

    - `owner`, `name`: who asks, and for which argument: for the message.
    - `value`: a real scalar, possibly traced.

    **Returns:** the value, a floating array of shape ``()``: JAX's if the value is one,
    NumPy's otherwise.

    **Raises:** `ValueError` for any other shape, `TypeError` for what is no real number.

    >>> measured("Example", "metric", 0.5).shape
    ()
    """
    array: Any = value
    if type(value) is np.float32:
        return array
    if isinstance(value, np.ndarray | np.generic):
        # float64 stays only where JAX would keep it, too: both have to decide alike.
        array = np.asarray(value, jax.dtypes.canonicalize_dtype(np.asarray(value).dtype))
    elif not isinstance(value, jax.Array):
        array = np.asarray(_converted(owner, name, value), jnp.result_type(float))
    if array.shape != ():
        msg = (
            f"{owner}: {name} should be one number, got shape {array.shape}. "
            f"Reduce it first, for example with jnp.mean."
        )
        raise ValueError(msg)
    if jnp.issubdtype(array.dtype, jnp.floating):
        return array.astype(jnp.promote_types(array.dtype, jnp.float32))
    if jnp.issubdtype(array.dtype, jnp.integer):
        return array.astype(jnp.result_type(float))
    msg = f"{owner}: {name} should be a real number, got dtype {array.dtype}. Pass a norm."
    raise TypeError(msg)


def _converted(owner: str, name: str, value: Any) -> float:
    # A string that spells a number is still no number.
    if not isinstance(value, bool | str | bytes):
        with contextlib.suppress(TypeError, ValueError):
            return float(value)
    msg = f"{owner}: {name} should be a real number, got {value!r} of type {type(value).__name__}."
    raise TypeError(msg)


def saturating_increment(count: AnyArray) -> AnyArray:
    """One more, except at the end of the dtype, where a counter stays instead of wrapping."""
    return count + (count < np.iinfo(count.dtype).max)
