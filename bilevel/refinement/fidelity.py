"""Fidelity: what one outer step is computed with."""

from collections.abc import Hashable, Mapping
from typing import Any

import equinox as eqx
import jax
from jax.core import Tracer
from jaxtyping import Array, Int

from bilevel.budget import UNLIMITED, Budget
from bilevel.description import described
from bilevel.probe import Probe


def _sorted_parts(
    static: Mapping[str, Any] | tuple[tuple[str, Any], ...],
) -> tuple[tuple[str, Any], ...]:
    parts = dict(static)
    for name, part in parts.items():
        try:
            hash(part)
        except TypeError:
            msg = (
                f"Fidelity: the static part {name!r} should be hashable, got {part!r} of type "
                f"{type(part).__name__}. Pass arrays to the task itself, not through the fidelity."
            )
            raise TypeError(msg) from None
    # Sorted, so that the order of writing them compiles nothing anew.
    return tuple(sorted(parts.items(), key=lambda item: item[0]))


class Fidelity(eqx.Module):
    """What one outer step is computed with.

    Pass it whole to `bl.solve(..., fidelity=fidelity)`, which takes both budgets and
    the probe from it, or read its fields.

    **Arguments:**

    - `budget`: of the primal solve.
    - `adjoint_budget`: of the adjoint solve; `None` leaves it to the estimator's own
        default, never to the primal's budget.
    - `level`: position on the ladder, int32, traced; `None` off any ladder.
    - `probe`: filled by the outer loop, so that reports come out of the backward pass.
    - `static`: what changes shapes (a grid size, a dtype), by name, hashable: compared by
        value, and each distinct value compiles once.

    **Raises:** `TypeError` for a budget that is none, or a static part that is not hashable.

    >>> fidelity = Fidelity(Budget(iterations=20), static={"grid": 64})
    >>> fidelity["grid"]
    64
    """

    budget: Budget = eqx.field(default=None)  # required: `None` is refused by a message
    adjoint_budget: Budget | None = None
    level: Int[Array, ""] | int | None = None
    probe: Probe | None = None
    static: tuple[tuple[str, Hashable], ...] = eqx.field(
        static=True, default=(), converter=_sorted_parts
    )

    def __repr__(self) -> str:
        """The numbers in a line."""
        return described(self)

    def __check_init__(self) -> None:
        for name, budget in (("budget", self.budget), ("adjoint_budget", self.adjoint_budget)):
            if not (isinstance(budget, Budget) or (name == "adjoint_budget" and budget is None)):
                msg = (
                    f"Fidelity: {name} should be a Budget, got {budget!r} of type "
                    f"{type(budget).__name__}. Use for example Budget(iterations=100)."
                )
                raise TypeError(msg)

    def __getitem__(self, name: str) -> Any:
        """The static part called `name`."""
        parts: Mapping[str, Any] = dict(self.static)
        if name not in parts:
            known = ", ".join(sorted(parts)) or "none"
            msg = f"Fidelity: no static part {name!r}; there is {known}."
            raise KeyError(msg)
        return parts[name]

    def with_probe(self, probe: Probe | None) -> "Fidelity":
        """The same fidelity, reporting to `probe`."""
        return Fidelity(self.budget, self.adjoint_budget, self.level, probe, self.static)


def as_fidelity(owner: str, name: str, value: object) -> Fidelity:
    """A fidelity as it is, a bare budget for both solves but for its absolute tolerance.

    That is in the units of the primal's residual, and the adjoint's right-hand side has
    others: without a cap or a relative tolerance besides, the adjoint has its own default.

    **Raises:** `TypeError` for another type, naming the owner and its argument.

    >>> int(as_fidelity("Example", "fidelity", Budget(iterations=5)).adjoint_budget.iterations)
    5
    """
    if isinstance(value, Budget):
        return Fidelity(value, adjoint_share(value))
    if isinstance(value, Fidelity):
        return value
    msg = (
        f"{owner}: {name} should be a Fidelity or a Budget, got {value!r} of type "
        f"{type(value).__name__}. Use for example Budget(iterations=100)."
    )
    raise TypeError(msg)


def adjoint_share(budget: Budget) -> Budget | None:
    """What of a primal budget an adjoint may have: all but the absolute tolerance.

    >>> adjoint_share(Budget(iterations=5, atol=1e-3)), adjoint_share(Budget(atol=1e-3))
    (Budget(iterations=5, rtol=0.0, atol=0.0), None)
    """
    if isinstance(budget.atol, float) and budget.atol == 0.0:
        return budget
    unlimited = isinstance(budget.iterations, int) and budget.iterations >= UNLIMITED
    if unlimited and isinstance(budget.rtol, float) and budget.rtol == 0.0:
        return None
    return Budget(budget.iterations, budget.rtol)


def is_traced(fidelity: Fidelity) -> bool:
    """Whether any part of the fidelity is a tracer."""
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(fidelity))
