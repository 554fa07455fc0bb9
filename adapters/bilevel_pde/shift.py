"""Shift: a field moved by whole points, such that XLA fuses it into what is made of it."""

from typing import Any

import jax
import numpy as np
from jaxtyping import Array


def shift(field: Array, offset: tuple[int, ...], periodic: tuple[bool, ...]) -> Array:
    """The field with at each point the value `offset` points further.

    Zero where that point is outside, or on a periodic axis from the other end.  Padding by
    negative and positive amounts fuses; slices that are joined, and rolls, do not.

    **Arguments:**

    - `field`: of as many dimensions as `offset` and `periodic`.

    >>> import jax.numpy as jnp
    >>> [int(v) for v in shift(jnp.arange(1, 5), (1,), (False,))]
    [2, 3, 4, 0]
    >>> [int(v) for v in shift(jnp.arange(1, 5), (-1,), (True,))]
    [4, 1, 2, 3]
    """
    padding = [(-o, o, 0) for o in offset]
    zero = np.zeros((), field.dtype)
    for axis, (o, wraps) in enumerate(zip(offset, periodic, strict=True)):
        if o == 0 or not wraps:
            continue
        padding[axis] = (0, 0, 0)
        size = field.shape[axis]
        other = o - size if o > 0 else o + size
        index = jax.lax.broadcasted_iota(np.int32, field.shape, axis)
        inside = index < size - o if o > 0 else index >= -o
        field = jax.lax.select(inside, _along(field, axis, o), _along(field, axis, other))
    if all(amount == (0, 0, 0) for amount in padding):
        return field
    return jax.lax.pad(field, zero, padding)


def shift_piece(piece: Any, offset: tuple[int, ...], periodic: tuple[bool, ...]) -> Any:
    """A coefficient moved like a field, but for axes along which it is constant.

    NumPy arrays stay NumPy arrays.
    """
    if piece.ndim == 0:
        return piece
    moves = tuple(0 if size == 1 else o for o, size in zip(offset, piece.shape, strict=True))
    if not isinstance(piece, np.ndarray):
        return shift(piece, moves, periodic)
    for axis, (o, wraps) in enumerate(zip(moves, periodic, strict=True)):
        if o == 0:
            continue
        piece = np.roll(piece, -o, axis)
        if not wraps:
            outside = [slice(None)] * piece.ndim
            outside[axis] = slice(-o, None) if o > 0 else slice(None, -o)
            piece[tuple(outside)] = 0
    return piece


def _along(field: Array, axis: int, o: int) -> Array:
    padding = [(0, 0, 0)] * field.ndim
    padding[axis] = (-o, o, 0)
    return jax.lax.pad(field, np.zeros((), field.dtype), padding)
