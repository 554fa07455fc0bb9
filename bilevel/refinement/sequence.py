"""Sequences: one number for every level of a ladder, looked up in constant time."""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

Number: TypeAlias = int | float


@dataclasses.dataclass(frozen=True)
class Arithmetic:
    """``start, start + step, start + 2 step, ...``, the last one cut to ``stop``."""

    start: int
    step: int
    stop: int

    def __len__(self) -> int:
        """Number of entries."""
        return 1 - (self.start - self.stop) // self.step

    def value(self, level: int) -> int:
        """The entry at a level of this sequence, the last one beyond its end."""
        return min(self.start + self.step * level, self.stop)

    def at(self, level: Int[Array, "..."]) -> Array:
        """The entries at levels >= 0, traced or not."""
        # Below the last level this stays under `stop`; there it may leave int32, unused.
        last = len(self) - 1
        return jnp.where(level >= last, self.stop, self.start + self.step * level)

    @property
    def largest(self) -> int:
        """The largest entry."""
        return self.stop


@dataclasses.dataclass(frozen=True)
class Table:
    """Listed entries; the last one holds beyond the end."""

    values: tuple[Number, ...]

    def __len__(self) -> int:
        """Number of entries."""
        return len(self.values)

    def value(self, level: int) -> Number:
        """The entry at a level of this sequence, the last one beyond its end."""
        return self.values[min(level, len(self.values) - 1)]

    def at(self, level: Int[Array, "..."]) -> Array:
        """The entries at levels >= 0, traced or not."""
        entries = np.asarray(self.values)
        whole = np.issubdtype(entries.dtype, np.integer)
        table = jnp.asarray(entries, jnp.int32 if whole else None)
        if len(self.values) == 1:
            return jnp.broadcast_to(table[0], level.shape)
        return table[jnp.clip(level, 0, len(self.values) - 1)]

    @property
    def largest(self) -> Number:
        """The largest entry."""
        return max(self.values)


@dataclasses.dataclass(frozen=True)
class Formula:
    """``schedule(level)`` for `length` levels: any optax schedule, nothing stored."""

    schedule: Callable[[Any], Any]
    length: int

    def __len__(self) -> int:
        """Number of entries."""
        return self.length

    def value(self, level: int) -> float:
        """The entry at a level of this sequence, the last one beyond its end."""
        # Asked with an array, as `at` asks: a schedule may answer an int in another precision.
        with jax.ensure_compile_time_eval():
            return float(self.at(jnp.asarray(level, jnp.int32)))

    def at(self, level: Int[Array, "..."]) -> Array:
        """The entries at levels >= 0, traced or not."""
        return jnp.asarray(self.schedule(jnp.clip(level, 0, self.length - 1)))

    @property
    def largest(self) -> float:
        """The larger end."""
        return max(self.value(0), self.value(self.length - 1))


Sequence: TypeAlias = Arithmetic | Table | Formula
