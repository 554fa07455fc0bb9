"""ScheduledFidelity: levels by a schedule, decided before training starts."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int
from pydantic import Field

from bilevel.refinement.arguments import Reduction, Schedule, Tolerance, checked
from bilevel.refinement.fidelity import Fidelity
from bilevel.refinement.ladder import Ladder
from bilevel.refinement.lookup import fidelity_at, require_state
from bilevel.refinement.measurement import measured, saturating_increment
from bilevel.refinement.namespace import AnyArray, Namespace, decided, on_host

_POWERS = {"quadratic": 2, "cubic": 3}


class ScheduledState(NamedTuple):
    """Where the schedule stands.

    - `level`: position on the ladder, int32.
    - `rejected`: how often the schedule was not finite, int32.
    - `updates`: updates so far, int32.
    """

    level: Int[AnyArray, ""]
    rejected: Int[AnyArray, ""]
    updates: Int[AnyArray, ""]


class ScheduledFidelity(eqx.Module):
    """Levels by a schedule over the updates of the controller.

    **Arguments:**

    - `ladder`: the fidelities.
    - `schedule`: any optax schedule, or another traceable function from the number of
        updates (int32) to a level; it is rounded to the nearest level, kept on the
        ladder, and ignored where it is not finite.  `None` takes one level an update.

    **Raises:** `ValueError` for another type.

    >>> import optax
    >>> ladder = Ladder.iterations(10, 10, 50)
    >>> controller = ScheduledFidelity(ladder, optax.linear_schedule(0, 4, 8))
    >>> state, levels = controller.init(), []
    >>> for _ in range(9):
    ...     levels.append(int(controller.fidelity(state).budget.iterations))
    ...     state = controller.update(state)
    >>> levels
    [10, 10, 20, 30, 30, 30, 40, 50, 50]
    """

    ladder: Ladder
    schedule: Callable[[Any], Any] | None = eqx.field(static=True)

    requires: ClassVar[frozenset[str]] = frozenset()

    @checked
    def __init__(
        self,
        ladder: Annotated[Ladder, Field(description="Use for example Ladder.iterations().")],
        schedule: Schedule | None = None,
    ):
        self.ladder = ladder
        self.schedule = schedule

    @classmethod
    def hoag(
        cls,
        sequence: Literal["exponential", "quadratic", "cubic"] = "exponential",
        *,
        start: float = 1e-3,
        factor: float = 0.9,
        stop: float = 1e-12,
        iterations: int | None = None,
    ) -> "ScheduledFidelity":
        """HOAG's schedules: primal and adjoint tolerance shrink with every update.

        HOAG converges where the tolerances have a finite sum, as these do. It starts
        each solve from the last one's solution, the adjoint's included.

        **Arguments:**

        - `sequence`, `start`, `factor`, `stop`: as [`HoagTolerances`][].
        - `iterations`: cap on the iterations of each solve; `None` for no cap.

        **Returns:** the controller.

        **Raises:** `ValueError` for an argument out of range.

        **Source:** Pedregosa, Hyperparameter optimization with approximate gradient, ICML
        2016, arXiv 1602.02355.

        >>> controller = ScheduledFidelity.hoag("cubic", iterations=1000)
        >>> state = controller.update(controller.init())
        >>> round(float(controller.fidelity(state).budget.rtol), 9)
        0.000125
        """
        tolerances = HoagTolerances(sequence, start, factor, stop)
        return cls(Ladder.from_schedule(tolerances, tolerances.levels, iterations))

    def init(self) -> ScheduledState:
        """The state before training: the schedule's level for no update."""
        start = ScheduledState(*(np.zeros((), np.int32) for _ in range(3)))
        return self._moved(start, start.updates)

    def update(
        self,
        state: ScheduledState,
        metric: Any = None,
        *,
        gradient_norm: Any = None,
        error: Any = None,
    ) -> ScheduledState:
        """The state one update later: no measurement is read.

        **Arguments:**

        - `state`: the state before.
        - `metric`, `gradient_norm`, `error`: unused.

        **Returns:** the new state.
        """
        del metric, gradient_norm, error
        require_state("ScheduledFidelity", "update", state)
        return self._moved(state, saturating_increment(state.updates))

    def fidelity(self, state: ScheduledState) -> Fidelity:
        """The fidelity of the state's level."""
        require_state("ScheduledFidelity", "fidelity", state)
        return fidelity_at(self.ladder, state.level)

    def _moved(self, state: ScheduledState, updates: AnyArray) -> ScheduledState:
        wanted = None
        if self.schedule is not None:
            # The schedule is anyone's, and computes with JAX whatever it is told.
            wanted = _scheduled(self.schedule, updates)
            if on_host(updates) and not isinstance(wanted, Tracer):
                wanted = np.asarray(wanted)
        return _placed(len(self.ladder) - 1, state, updates, wanted)


@functools.partial(jax.jit, static_argnums=0)
def _scheduled(schedule: Callable[[Any], Any], updates: Int[Array, ""]) -> Float[Array, ""]:
    return jnp.asarray(measured("ScheduledFidelity", "schedule(updates)", schedule(updates)))


@decided
def _placed(
    xp: Namespace, last: int, state: ScheduledState, updates: Any, wanted: Any
) -> ScheduledState:
    if wanted is None:
        return ScheduledState(xp.minimum(updates, last), state.rejected, updates)
    usable = xp.isfinite(wanted)
    # Bounded before the conversion, for a float beyond int32 has no defined integer, and
    # after it, for a float32 may round the end of a very long ladder up.
    inside = xp.clip(xp.where(usable, wanted, xp.zeros_like(wanted)), 0, last)
    inside = xp.rint(inside).astype(np.int32)
    level = xp.where(usable, xp.minimum(inside, last), state.level)
    rejected = xp.where(usable, state.rejected, saturating_increment(state.rejected))
    return ScheduledState(level, rejected, updates)


@dataclasses.dataclass(frozen=True, init=False)
class HoagTolerances:
    """HOAG's sequences of tolerances, as a schedule in the sense of optax.

    The tolerance after k updates is ``start * factor**k`` (exponential),
    ``start / (k + 1)**2`` (quadratic) or ``start / (k + 1)**3`` (cubic), and never
    under `stop`.

    **Arguments:**

    - `sequence`: `"exponential"`, `"quadratic"` or `"cubic"`.
    - `start`: the first tolerance.
    - `factor`: of the exponential sequence, between 0 and 1.
    - `stop`: the smallest tolerance, at most `start`; the author's code stops at 1e-12.

    **Raises:** `ValueError` for an argument out of range.

    **Source:** Pedregosa, Hyperparameter optimization with approximate gradient, ICML
    2016, arXiv 1602.02355, section 4.

    >>> schedule = HoagTolerances("quadratic", start=1e-2)
    >>> [round(float(schedule(update)), 6) for update in range(3)]
    [0.01, 0.0025, 0.001111]
    """

    sequence: Literal["exponential", "quadratic", "cubic"]
    start: float
    factor: float
    stop: float

    @checked
    def __init__(
        self,
        sequence: Literal["exponential", "quadratic", "cubic"] = "exponential",
        start: Tolerance = 1e-3,
        factor: Reduction = 0.9,
        stop: Tolerance = 1e-12,
    ):
        if stop > start:
            msg = f"HoagTolerances: stop should be at most start, got {stop} above {start}."
            raise ValueError(msg)
        for name, value in zip(
            ("sequence", "start", "factor", "stop"), (sequence, start, factor, stop), strict=True
        ):
            object.__setattr__(self, name, value)

    def __call__(self, updates: Int[Array, "..."] | int) -> Float[Array, "..."]:
        """The tolerance after this many updates.

        **Arguments:**

        - `updates`: integers of any shape, >= 0, traced or not.

        **Returns:** tolerances of that shape, JAX's default float.
        """
        # In floating point: the cube of a count leaves int32 at 1291.
        count = jnp.asarray(updates, jnp.result_type(float))
        if self.sequence == "exponential":
            tolerance = self.start * self.factor**count
        else:
            tolerance = self.start / (1.0 + count) ** _POWERS[self.sequence]
        return jnp.maximum(tolerance, self.stop)

    @property
    def levels(self) -> int:
        """How many different tolerances there are until `stop`, that one included."""
        ratio = self.start / self.stop
        # A ratio that is a whole power but for rounding adds no level of its own.
        if self.sequence == "exponential":
            return math.ceil(-math.log(ratio) / math.log(self.factor) - 1e-9) + 1
        return max(math.ceil(ratio ** (1.0 / _POWERS[self.sequence]) * (1.0 - 1e-12)), 1)
