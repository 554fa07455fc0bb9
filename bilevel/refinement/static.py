"""StaticParts: what changes shapes from level to level of a ladder."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeAlias

from jaxtyping import Int

from bilevel.budget import Budget
from bilevel.refinement.fidelity import Fidelity
from bilevel.refinement.namespace import AnyArray

Parts: TypeAlias = tuple[tuple[str, Any], ...]
"""Names and values of one level, as a `Fidelity` holds them."""


@dataclasses.dataclass(frozen=True)
class StaticParts:
    """The static parts of all levels: one entry a level, or one for all of them."""

    levels: tuple[Parts, ...] = ((),)

    @classmethod
    def of(cls, levels: list[Parts]) -> "StaticParts":
        """One entry a level, kept as one where they are all the same."""
        return cls(tuple(levels[:1] if len(set(levels)) == 1 else levels))

    def __len__(self) -> int:
        """Number of entries."""
        return len(self.levels)

    def at(self, level: Int[AnyArray, "..."] | int) -> Parts:
        """The parts of a level, which has to be concrete where they differ."""
        if len(self.levels) == 1:
            return self.levels[0]
        if isinstance(level, int):
            return self.levels[level]
        names = ", ".join(sorted({name for parts in self.levels for name, _ in parts}))
        msg = (
            f"Ladder.fidelity: static parts ({names}) differ between the levels, so the level has "
            f"to be one concrete number, not traced. Call controller.fidelity(state) outside jit, "
            f"and pass the fidelity in: each distinct static part compiles once."
        )
        raise ValueError(msg)

    @property
    def last_of_each(self) -> list[int]:
        """Of each run of levels with the same parts the last.

        >>> StaticParts(((("grid", 8),), (("grid", 8),), (("grid", 16),))).last_of_each
        [1, 2]
        """
        last = len(self.levels) - 1
        return [k for k in range(last) if self.levels[k] != self.levels[k + 1]] + [last]

    def extended(self, count: int, parts: Mapping[str, Any]) -> "StaticParts":
        """With more parts for `count` levels: a list has one entry a level."""
        for name, part in parts.items():
            if isinstance(part, list) and len(part) != count:
                msg = (
                    f"Ladder.with_static: {name} should list one entry for each of the {count} "
                    f"levels, got {len(part)}."
                )
                raise ValueError(msg)
        listed = any(isinstance(part, list) for part in parts.values())
        levels: list[Parts] = []
        for level in range(count if listed or len(self.levels) > 1 else 1):
            own = {
                name: part[level] if isinstance(part, list) else part
                for name, part in parts.items()
            }
            # The fidelity checks and orders them, as it does for users.
            levels.append(Fidelity(Budget(1), static={**dict(self.at(level)), **own}).static)
        return StaticParts.of(levels)

    def describe(self) -> list[str]:
        """The parts of the coarsest and of the finest level, in words."""
        first, last = dict(self.levels[0]), dict(self.levels[-1])
        return [
            f"{name} {value}" if value == last.get(name) else f"{name} {value} to {last.get(name)}"
            for name, value in first.items()
        ]
