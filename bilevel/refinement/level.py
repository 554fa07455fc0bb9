"""Level: a position on a ladder."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Int

from bilevel.refinement.namespace import AnyArray


def placed(
    name: str, level: Int[AnyArray, "..."] | int, count: int, *, concrete: bool
) -> Int[AnyArray, "..."] | int:
    """A level as an int on the ladder, or as an array that may lie beyond its ends.

    **Arguments:**

    - `name`: of the argument, for the message.
    - `level`: an int, or an integer array of any shape, traced or not.
    - `count`: number of levels of the ladder.
    - `concrete`: whether to wait for a concrete array of JAX and take the int it holds,
        rather than to leave it on its device.

    **Returns:** the level.

    **Raises:** `IndexError` for an int off the ladder, `TypeError` for what is no level.

    >>> placed("level", 3, count=5, concrete=True)
    3
    """
    if not _is_whole(level):
        msg = (
            f"Ladder.fidelity: {name} should be an int or an integer array, got {level!r} of type "
            f"{type(level).__name__}."
        )
        raise TypeError(msg)
    if isinstance(level, int | np.integer):
        if not 0 <= level < count:
            msg = f"Ladder.fidelity: {name} should be from 0 to {count - 1}, got {level}."
            raise IndexError(msg)
        return int(level)
    known = isinstance(level, np.ndarray) or (concrete and not isinstance(level, Tracer))
    if known and not level.ndim:
        return min(max(int(level), 0), count - 1)
    return jnp.asarray(level)


def _is_whole(level: object) -> bool:
    if isinstance(level, jax.Array | np.ndarray):
        return jnp.issubdtype(level.dtype, jnp.integer)
    return isinstance(level, int | np.integer) and not isinstance(level, bool)
