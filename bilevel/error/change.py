"""What a step changes of derivatives."""

from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, PyTree

from bilevel import vector

SMALL = 1e-3
"""A step is small that is this much shorter than x: what it changes is linear in it."""


def change(derivatives: Callable[[Any], Any], x: PyTree, step: PyTree) -> PyTree:
    """What a step changes of derivatives: the difference, which is exact however long it is.

    Of a small step the difference would be one of rounding, and the derivative half-way is as
    good.
    """
    there, halfway = vector.add(x, step), vector.add_scaled(x, 0.5, step)
    difference = vector.subtract(derivatives(there), derivatives(x))
    _, derivative = jax.jvp(derivatives, (halfway,), (step,))
    return vector.where(is_small(step, x), derivative, difference)


def is_small(step: PyTree, x: PyTree) -> Array:
    """Whether derivatives change linearly along a step from x, as good as."""
    return vector.norm(step) <= SMALL * vector.norm(x)
