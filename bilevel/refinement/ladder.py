"""Ladder: fidelities in order, coarse to fine."""

import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator
from typing import Annotated, Any

import equinox as eqx
import numpy as np
from jaxtyping import Float, Int
from pydantic import Field

from bilevel.budget import UNLIMITED, Budget
from bilevel.refinement.arguments import Cap, Count, Growth, Reduction, Schedule, Tolerance, checked
from bilevel.refinement.columns import Columns
from bilevel.refinement.fidelity import Fidelity, as_fidelity
from bilevel.refinement.lookup import fidelity_at
from bilevel.refinement.namespace import AnyArray
from bilevel.refinement.order import require_order, require_rising
from bilevel.refinement.sequence import Arithmetic, Formula, Sequence, Table
from bilevel.refinement.static import StaticParts

_LONGEST_LIST = 100_000


class Ladder(eqx.Module):
    """Fidelities in order, coarse to fine.

    A ladder is configuration: hashable, without arrays, compared by value.  What it
    returns is arrays only, so a fidelity passed to a compiled function never compiles
    it anew, and a traced level costs one gather or less.

    Build one with [`Ladder.iterations`][], [`Ladder.geometric`][],
    [`Ladder.tolerances`][], [`Ladder.from_schedule`][] or [`Ladder.of`][], then change
    it with [`Ladder.with_tolerances`][], [`Ladder.with_adjoint`][] or
    [`Ladder.with_static`][].  The adjoint solve gets the primal's numbers unless
    `with_adjoint` says otherwise.

    >>> ladder = Ladder.iterations(start=25, step=10, stop=600)
    >>> len(ladder), int(ladder.fidelity(2).budget.iterations)
    (59, 45)
    >>> ladder
    Ladder(59 levels, iterations 25 to 600)
    """

    primal: Columns = eqx.field(static=True)
    adjoint: Columns | None = eqx.field(static=True)
    static: StaticParts = eqx.field(static=True, default=StaticParts())

    @classmethod
    @checked
    def iterations(cls, start: Count = 1, step: Count = 1, stop: Count = 120) -> "Ladder":
        """Iteration counts that grow by a fixed step.

        **Arguments:**

        - `start`: iterations at the coarsest level.
        - `step`: iterations each level adds.
        - `stop`: iterations at the finest level, at least `start`; where the steps do
            not meet it, the last one is shorter.

        **Returns:** the ladder; every level spends its iterations whole.

        **Raises:** `ValueError` for an argument out of range.

        >>> [int(f.budget.iterations) for f in Ladder.iterations(start=1, step=4, stop=10)]
        [1, 5, 9, 10]
        """
        require_order("Ladder.iterations", start, stop, upwards=True)
        counts = Arithmetic(start, step, stop)
        columns = Columns(counts, Table((0.0,)), Table((0.0,)))
        return cls(columns, columns)

    @classmethod
    @checked
    def geometric(cls, start: Count = 1, factor: Growth = 1.5, stop: Count = 120) -> "Ladder":
        """Iteration counts that grow by a fixed factor, and by one at the least.

        **Arguments:**

        - `start`: iterations at the coarsest level.
        - `factor`: ratio of the iterations of neighbouring levels, > 1.
        - `stop`: iterations at the finest level, at least `start`.

        **Returns:** the ladder; every level spends its iterations whole.

        **Raises:** `ValueError` for an argument out of range.

        >>> [int(f.budget.iterations) for f in Ladder.geometric(start=2, factor=2.0, stop=20)]
        [2, 4, 8, 16, 20]
        """
        require_order("Ladder.geometric", start, stop, upwards=True)
        counts = [start]
        exact = float(start)
        while counts[-1] < stop:
            _bounded("Ladder.geometric", len(counts))
            exact *= factor
            counts.append(min(max(round(min(exact, stop)), counts[-1] + 1), stop))
        columns = Columns(Table(tuple(counts)), Table((0.0,)), Table((0.0,)))
        return cls(columns, columns)

    @classmethod
    @checked
    def tolerances(
        cls,
        start: Tolerance = 1e-1,
        factor: Reduction = 0.1,
        stop: Tolerance = 1e-8,
        iterations: Cap = None,
        *,
        absolute: bool = False,
    ) -> "Ladder":
        """Tolerances that shrink by a fixed factor.

        **Arguments:**

        - `start`: tolerance of the coarsest level, dimensionless.
        - `factor`: ratio of the tolerances of neighbouring levels, between 0 and 1.
        - `stop`: tolerance of the finest level, at most `start`.
        - `iterations`: cap on the iterations at every level; `None` for no cap.
        - `absolute`: whether the tolerances are absolute, in the units of the residual,
            rather than relative to each solve's own scale.

        **Returns:** the ladder.

        **Raises:** `ValueError` for an argument out of range.

        >>> [round(float(f.budget.rtol), 6) for f in Ladder.tolerances(0.1, 0.1, 1e-4)]
        [0.1, 0.01, 0.001, 0.0001]
        """
        require_order("Ladder.tolerances", start, stop, upwards=False)
        # A ratio that is a whole power but for rounding adds no level of its own.
        steps = max(math.ceil(math.log(stop / start) / math.log(factor) - 1e-9), 0)
        _bounded("Ladder.tolerances", steps + 1)
        values = (*(start * factor**level for level in range(steps)), stop)
        columns = Columns.of_tolerances(Table(values), iterations, absolute=absolute)
        return cls(columns, columns.adjoint_share())

    @classmethod
    @checked
    def from_schedule(
        cls,
        schedule: Schedule,
        levels: Annotated[
            int,
            Field(ge=1, le=UNLIMITED, description="Give the number of levels, 1 or more."),
        ],
        iterations: Cap = None,
        *,
        absolute: bool = False,
    ) -> "Ladder":
        """Tolerances from a schedule: level k has tolerance ``schedule(k)``.

        **Arguments:**

        - `schedule`: any optax schedule, or another function from an integer array of
            any shape to tolerances of that shape that JAX can trace.
        - `levels`: how many levels; beyond them the last tolerance holds.
        - `iterations`: cap on the iterations at every level; `None` for no cap.
        - `absolute`: whether the tolerances are absolute rather than relative.

        **Returns:** the ladder.  Nothing is stored for the levels.

        **Raises:** `ValueError` for an argument out of range, or a schedule that is negative
        or not finite at either end, or zero there without a cap.

        >>> import optax
        >>> ladder = Ladder.from_schedule(optax.exponential_decay(0.1, 1, 0.5), levels=10)
        >>> round(float(ladder.fidelity(2).budget.rtol), 6)
        0.025
        """
        columns = Columns.of_tolerances(Formula(schedule, levels), iterations, absolute=absolute)
        columns.check("Ladder.from_schedule")
        return cls(columns, columns.adjoint_share())

    @classmethod
    def of(cls, fidelities: Iterable[Fidelity | Budget]) -> "Ladder":
        """The listed fidelities, coarse to fine.

        **Arguments:**

        - `fidelities`: one a level, with concrete numbers.  A bare `Budget` stands for
            both solves; a `Fidelity` without `adjoint_budget` leaves the adjoint to the
            estimator.  Levels and probes they carry are replaced.

        **Returns:** the ladder.

        **Raises:** `ValueError` for an empty list, adjoint budgets at some levels only, or a
        level coarser than the one before (none of its caps larger, none of its tolerances
        tighter); `TypeError` for what is no fidelity, or is traced.

        >>> ladder = Ladder.of([Budget(5, rtol=1e-2), Budget(50, rtol=1e-6)])
        >>> float(ladder.fidelity(1).adjoint_budget.iterations)
        50.0
        """
        listed = [as_fidelity("Ladder.of", "fidelities", entry) for entry in fidelities]
        if not listed:
            msg = "Ladder.of: fidelities should hold at least one Fidelity or Budget, got none."
            raise ValueError(msg)
        adjoint = [f.adjoint_budget for f in listed if f.adjoint_budget is not None]
        if adjoint and len(adjoint) < len(listed):
            msg = (
                f"Ladder.of: either every fidelity has an adjoint_budget or none has, got "
                f"{len(adjoint)} of {len(listed)}."
            )
            raise ValueError(msg)
        primal = Columns.of_budgets([f.budget for f in listed])
        adjoint = Columns.of_budgets(adjoint) if adjoint else None
        require_rising("Ladder.of", listed)
        return cls(primal, adjoint, StaticParts.of([f.static for f in listed]))

    def with_tolerances(self, other: "Ladder | Budget") -> "Ladder":
        """The same iteration counts, with the tolerances of another ladder.

        Level by level; the shorter of the two stays at its last level.  So a cap that
        grows may go with a tolerance that shrinks, or with one that stays.

        **Arguments:**

        - `other`: a ladder, or a `Budget` for the same tolerance at every level.

        **Returns:** the ladder; its adjoint takes the adjoint's tolerances.

        **Raises:** `ValueError` where nothing would stop a level, `TypeError` for another
        type.

        >>> both = Ladder.iterations(10, 10, 30).with_tolerances(Budget(rtol=1e-6))
        >>> both
        Ladder(3 levels, iterations 10 to 30, rtol 1e-06)
        """
        source = _as_ladder("Ladder.with_tolerances", "other", other)
        adjoint = self.adjoint
        if adjoint is not None and source.adjoint is not None:
            adjoint = dataclasses.replace(
                adjoint, rtol=source.adjoint.rtol, atol=source.adjoint.atol
            )
            adjoint.check("Ladder.with_tolerances")
        primal = dataclasses.replace(self.primal, rtol=source.primal.rtol, atol=source.primal.atol)
        primal.check("Ladder.with_tolerances")
        return self._with_same_static("Ladder.with_tolerances", primal, adjoint)

    def with_adjoint(self, other: "Ladder | Budget | None") -> "Ladder":
        """The same primal budgets, with adjoint budgets of their own.

        **Arguments:**

        - `other`: a ladder, whose *primal* budgets the adjoint takes level by level, the
            shorter of the two staying at its last level; a `Budget` for the same at
            every level; `None` for the estimator's own default.

        **Returns:** the ladder.

        **Raises:** `TypeError` for another type.

        >>> ladder = Ladder.iterations(1, 1, 9).with_adjoint(Budget(20))
        >>> int(ladder.fidelity(0).adjoint_budget.iterations)
        20
        """
        if other is None:
            return self._with_same_static("Ladder.with_adjoint", self.primal, None)
        source = _as_ladder("Ladder.with_adjoint", "other", other)
        return self._with_same_static("Ladder.with_adjoint", self.primal, source.primal)

    def with_static(self, **parts: Any) -> "Ladder":
        """The same budgets, with static parts: what changes shapes, such as a grid size.

        **Arguments:**

        - `parts`: by name.  A list has one entry a level; anything else is the same at
            every level.  Entries are hashable; each distinct combination compiles once.

        **Returns:** the ladder.  Where static parts differ, `fidelity` needs a concrete
        level.

        **Raises:** `ValueError` for a list of another length, `TypeError` for an entry that
        is not hashable.

        >>> ladder = Ladder.iterations(1, 1, 3).with_static(grid=[32, 64, 64])
        >>> ladder.fidelity(1)["grid"]
        64
        """
        return Ladder(self.primal, self.adjoint, self.static.extended(len(self), parts))

    def fidelity(
        self,
        level: Int[AnyArray, "..."] | int,
        *,
        adjoint_level: Int[AnyArray, "..."] | int | None = None,
    ) -> Fidelity:
        """The fidelity of a level.

        **Arguments:**

        - `level`: position, from 0 (coarsest) to ``len(ladder) - 1``; an int, or an
            integer array of any shape, traced or not. Arrays beyond the ends are taken
            to the nearest end. One that lies on the host is looked up there.
        - `adjoint_level`: position that the adjoint budget is taken from, where it is
            not `level`.

        **Returns:** the fidelity; its numbers are arrays of the level's shape, int32 and
        JAX's default float, so that no level compiles anything anew.

        **Raises:** `IndexError` for an int off the ladder, `TypeError` for what is no level,
        `ValueError` for a traced level where static parts differ.

        >>> import jax
        >>> ladder = Ladder.iterations(10, 10, 50)
        >>> fidelity = jax.jit(lambda level: ladder.fidelity(level))(3)
        >>> int(fidelity.budget.iterations), int(fidelity.level)
        (40, 3)
        """
        return fidelity_at(self, level, adjoint_level)

    @property
    def coarsest(self) -> Fidelity:
        """The fidelity of level 0."""
        return self.fidelity(0)

    @property
    def finest(self) -> Fidelity:
        """The fidelity of the last level."""
        return self.fidelity(len(self) - 1)

    @property
    def max_iterations(self) -> int:
        """The largest iteration cap of any primal solve, an int: what to keep room for."""
        return int(self.primal.iterations.largest)

    @property
    def has_one_shape(self) -> bool:
        """Whether all levels have the same static parts, so that one compilation serves all."""
        return len(self.static) == 1

    def __hash__(self) -> int:
        """By value."""
        return hash((self.primal, self.adjoint, self.static))

    def __len__(self) -> int:
        """Number of levels."""
        adjoint = 1 if self.adjoint is None else len(self.adjoint)
        return max(len(self.primal), adjoint, len(self.static))

    def __iter__(self) -> Iterator[Fidelity]:
        """The fidelities, coarse to fine."""
        return (self.fidelity(level) for level in range(len(self)))

    def __repr__(self) -> str:
        """Number of levels, and what changes between the ends."""
        ends = [f"{len(self)} level{'' if len(self) == 1 else 's'}"]
        ends += self.primal.describe()
        if self.adjoint is None:
            ends.append("adjoint left to the estimator")
        elif self.adjoint != self.primal:
            ends += self.adjoint.describe("adjoint ")
        ends += self.static.describe()
        return f"Ladder({', '.join(ends)})"

    def _with_same_static(self, owner: str, primal: Columns, adjoint: Columns | None) -> "Ladder":
        changed = Ladder(primal, adjoint, self.static)
        if not self.has_one_shape and len(changed) != len(self):
            msg = (
                f"{owner}: a ladder with static parts keeps its {len(self)} levels, and this "
                f"would make them {len(changed)}. Call with_static last."
            )
            raise ValueError(msg)
        return changed


def positions(ladder: Ladder) -> Float[np.ndarray, " levels"]:
    """What a level's error falls geometrically in: its iterations, or its place from 1.

    >>> positions(Ladder.iterations(10, 10, 30)), positions(Ladder.tolerances(0.1, 0.1, 1e-3))
    (array([10., 20., 30.], dtype=float32), array([1., 2., 3.], dtype=float32))
    """
    return positions_of_both(ladder)[0]


def positions_of_both(ladder: Ladder) -> Float[np.ndarray, "2 levels"]:
    """Those of the primal and of the adjoint budgets."""
    sides: list[Sequence | None] = [None, None]
    if ladder.has_one_shape:
        adjoint = ladder.primal if ladder.adjoint is None else ladder.adjoint
        sides = [ladder.primal.iterations, adjoint.iterations]
    return _positions(sides[0], sides[1], len(ladder))


@functools.lru_cache(maxsize=64)
def _positions(
    primal: Sequence | None, adjoint: Sequence | None, count: int
) -> Float[np.ndarray, "2 levels"]:
    both = np.stack([_positions_of(iterations, count) for iterations in (primal, adjoint)])
    both.flags.writeable = False
    return both


def _positions_of(iterations: Sequence | None, count: int) -> Float[np.ndarray, " levels"]:
    if iterations is not None and len(iterations) == count:
        caps = np.array([iterations.value(level) for level in range(count)])
        if np.all(np.diff(caps) > 0) and caps[-1] < UNLIMITED:
            return np.maximum(caps, 1).astype(np.float32)
    return np.arange(1, count + 1).astype(np.float32)


def _as_ladder(owner: str, name: str, other: object) -> Ladder:
    if isinstance(other, Ladder):
        return other
    if isinstance(other, Budget):
        return Ladder.of([other])
    msg = f"{owner}: {name} should be a Ladder or a Budget, got {other!r}."
    raise TypeError(msg)


def _bounded(owner: str, levels: int) -> None:
    if levels > _LONGEST_LIST:
        msg = (
            f"{owner}: this makes {levels} levels, and at most {_LONGEST_LIST} are listed. "
            f"Use a larger step between levels."
        )
        raise ValueError(msg)
