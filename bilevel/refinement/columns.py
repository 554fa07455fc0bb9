"""Columns: the budgets of all levels of a ladder, one sequence a field."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Int

from bilevel.budget import UNLIMITED, Budget
from bilevel.refinement.sequence import Number, Sequence, Table


@dataclasses.dataclass(frozen=True)
class Columns:
    """The budgets of all levels, one sequence a field."""

    iterations: Sequence
    rtol: Sequence
    atol: Sequence

    def __len__(self) -> int:
        """Levels until the last field stops changing."""
        return max(len(self.iterations), len(self.rtol), len(self.atol))

    def at(self, level: Int[Array, "..."] | int) -> Budget:
        """The budget of a level, its fields arrays: NumPy's where the level is an int."""

        def entry(sequence: Sequence, dtype: Any) -> Array:
            if isinstance(level, int):
                return np.asarray(sequence.value(level), dtype)  # pyright: ignore[reportReturnType]
            return sequence.at(level).astype(dtype)

        real = jnp.result_type(float)
        # Not by Budget(...): checking arrays would make the host wait for the device, and
        # every entry has been checked when the ladder was built.
        fields = entry(self.iterations, jnp.int32), entry(self.rtol, real), entry(self.atol, real)
        return jax.tree.unflatten(jax.tree.structure(Budget(1)), fields)

    def adjoint_share(self) -> "Columns | None":
        """What of these an adjoint may have; see [`bilevel.refinement.fidelity.adjoint_share`][].

        `None` where absolute tolerances are all there is.
        """
        none = Table((0.0,))
        if self.atol == none:
            return self
        unlimited = self.iterations.value(0) >= UNLIMITED
        return (
            None if unlimited and self.rtol == none else Columns(self.iterations, self.rtol, none)
        )

    def check(self, owner: str) -> None:
        """Refuse a level that nothing would stop."""
        columns = (self.iterations, self.rtol, self.atol)
        listed = max((len(column) for column in columns if isinstance(column, Table)), default=0)
        # Formulas and steps run one way, so their ends are enough.
        for level in {*range(listed), len(self) - 1}:
            limits = self.rtol.value(level), self.atol.value(level)
            if not all(0.0 <= limit < math.inf for limit in limits):
                msg = (
                    f"{owner}: tolerances should be finite and at least 0, got rtol {limits[0]} "
                    f"and atol {limits[1]} at level {level}."
                )
                raise ValueError(msg)
            if self.iterations.value(level) >= UNLIMITED and not any(limits):
                msg = (
                    f"{owner}: nothing would stop the iteration at level {level}. Give it a cap "
                    f"(iterations=) or a positive tolerance."
                )
                raise ValueError(msg)

    def describe(self, prefix: str = "") -> list[str]:
        """What changes from the coarsest level to the finest, field by field, in words."""
        described: list[str] = []
        for field in dataclasses.fields(self):
            sequence: Sequence = getattr(self, field.name)
            first, last = sequence.value(0), sequence.value(len(sequence) - 1)
            if first == last and first in (0, UNLIMITED):
                continue
            span = f"{first:.4g} to {last:.4g}" if first != last else f"{first:.4g}"
            if field.name == "iterations":
                span = f"{first} to {last}" if first != last else f"{first}"
            described.append(f"{prefix}{field.name} {span}")
        return described

    @classmethod
    def of_tolerances(
        cls, sequence: Sequence, iterations: int | None, *, absolute: bool
    ) -> "Columns":
        """Tolerances that change, under one cap or none."""
        cap = Table((UNLIMITED if iterations is None else iterations,))
        none = Table((0.0,))
        return cls(cap, none, sequence) if absolute else cls(cap, sequence, none)

    @classmethod
    def of_budgets(cls, budgets: list[Budget]) -> "Columns":
        """Listed budgets, with concrete numbers."""
        for budget in budgets:
            if any(isinstance(leaf, Tracer) or jnp.ndim(leaf) for leaf in jax.tree.leaves(budget)):
                msg = (
                    f"Ladder.of: budgets should hold concrete scalars, got {budget}. Build the "
                    f"ladder outside jit and vmap."
                )
                raise TypeError(msg)

        def column(values: list[Number]) -> Table:
            return Table((values[0],) if len(set(values)) == 1 else tuple(values))

        return cls(
            column([int(budget.iterations) for budget in budgets]),
            column([float(budget.rtol) for budget in budgets]),
            column([float(budget.atol) for budget in budgets]),
        )


@functools.partial(jax.jit, static_argnames=("primal", "adjoint", "count"))
def looked_up(
    primal: Columns,
    adjoint: Columns | None,
    count: int,
    level: Int[Array, "..."],
    adjoint_level: Int[Array, "..."],
) -> tuple[Budget, Budget | None, Int[Array, "..."]]:
    """Both budgets and the level itself, for levels that may lie beyond the ends.

    Compiled, because a loop that asks outside of any trace would otherwise pay for some
    twenty operations one by one, and for compiling each of them at the first step.
    """

    def inside(level: Int[Array, "..."]) -> Int[Array, "..."]:
        # Neither int8 nor uint32 could hold both the level and the bounds.
        wide = level.astype(jnp.promote_types(level.dtype, jnp.int32))
        return jnp.clip(wide, 0, count - 1).astype(jnp.int32)

    level = inside(level)
    adjoint_budget = None if adjoint is None else adjoint.at(inside(adjoint_level))
    return primal.at(level), adjoint_budget, level
