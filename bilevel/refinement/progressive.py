"""ProgressiveRefinement: refine where training has come to a stand."""

import math
from typing import Annotated, Any, ClassVar, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from pydantic import Field

from bilevel.refinement.arguments import checked
from bilevel.refinement.fidelity import Fidelity
from bilevel.refinement.ladder import Ladder
from bilevel.refinement.lookup import fidelity_at, require_state
from bilevel.refinement.measurement import measured, saturating_increment
from bilevel.refinement.namespace import AnyArray, Namespace, decided

Threshold = Annotated[
    float, Field(gt=0.0, le=1.0, description="It is a ratio of two metrics, such as 0.9.")
]


class ProgressiveState(NamedTuple):
    """What the rule remembers.

    - `level`: position on the ladder, int32.
    - `rejected`: entries that were ignored, int32.
    - `checkpoint`: smoothed metric at the last refinement.
    - `smoothed`: the last `error_window` smoothed entries, a ring.
    - `newest`: where in the ring the last one is, int32.
    - `entries`: entries taken so far, int32; it stops counting at ``error_window + 1``,
        from where on the rule is in force.
    """

    level: Int[AnyArray, ""]
    rejected: Int[AnyArray, ""]
    checkpoint: Float[AnyArray, ""]
    smoothed: Float[AnyArray, " error_window"]
    newest: Int[AnyArray, ""]
    entries: Int[AnyArray, ""]


class ProgressiveRefinement(eqx.Module):
    """Refine by one level where the validation metric has come to a stand.

    With the smoothed metric ē (an exponential moving average with weight
    ``2 / (ema_window + 1)``, started at the first entry), after each entry:

    1. with fewer than ``error_window + 1`` entries, the level is held;
    2. while ``ē[-1] / ē[-error_window] <= stepping_threshold`` the metric still falls, and
       the level is held;
    3. otherwise, with ``r = ē[-1] / checkpoint``: where ``r < stopping_threshold`` (the
       last refinement paid) or ``r > 1`` (it got worse since), the checkpoint becomes
       ``ē[-1]`` and the level rises by one; else it is held, for refining has stopped
       paying.

    The level never falls, and the stop is not final.  The rule compares ratios, so the
    metric has to be positive where it is better the smaller it is: an error, not a score.

    An entry that is NaN, infinite or negative has no place in a ratio.  It is left out
    of the average as if it had not come, the level is held, and `state.rejected` counts
    it; `bl.optimize` says so once, in the words of `objection`.  A metric of which no
    entry is positive never refines: give an error in place of a score or of a
    log-likelihood, or take `ScheduledFidelity` or `ErrorControlled`, which read no ratio.

    **Arguments:**

    - `ladder`: the fidelities, coarse to fine.
    - `stepping_threshold`: the metric stands still where it keeps more than this part of
        itself over the window; dimensionless, in (0, 1].
    - `stopping_threshold`: a refinement has paid where less than this part of the
        checkpoint is left; dimensionless, in (0, 1].
    - `ema_window`: window w of the average, in entries, >= 1; `None` takes the metric
        unsmoothed.
    - `error_window`: δ, in entries, >= 2.  ``ē[-1] / ē[-δ]`` spans δ - 1 steps.
    - `checkpoint`: what the first standstill is compared with; positive, infinity allowed.
        The published 100 lets it refine always, unless the metric is then between 90
        and 100; infinity does for a metric of any size.

    **Raises:** `ValueError` for an argument out of range.

    **Source:** Bhatia, Koehler, Thuerey, PRDP: Progressively Refined Differentiable
    Physics, ICLR 2025, arXiv 2502.19611; code in github.com/tum-pbs/PRDP.

    >>> ladder = Ladder.iterations(start=25, step=10, stop=600)
    >>> controller = ProgressiveRefinement(ladder, ema_window=None, error_window=2)
    >>> state = controller.init()
    >>> for metric in (1.0, 0.5, 0.499):
    ...     state = controller.update(state, metric)
    >>> int(controller.fidelity(state).budget.iterations)
    35
    """

    ladder: Ladder
    stepping_threshold: float = eqx.field(static=True)
    stopping_threshold: float = eqx.field(static=True)
    ema_window: float | None = eqx.field(static=True)
    error_window: int = eqx.field(static=True)
    checkpoint: float = eqx.field(static=True)

    requires: ClassVar[frozenset[str]] = frozenset({"metric"})

    @checked
    def __init__(
        self,
        ladder: Annotated[Ladder, Field(description="Use for example Ladder.iterations().")],
        *,
        stepping_threshold: Threshold = 0.98,
        stopping_threshold: Threshold = 0.9,
        ema_window: Annotated[
            float | None,
            Field(
                ge=1.0,
                allow_inf_nan=False,
                description="Give a number of entries, or None for none.",
            ),
        ] = 6,
        error_window: Annotated[
            int,
            Field(ge=2, le=10**6, description="The ratio spans error_window - 1 steps, such as 2."),
        ] = 3,
        checkpoint: Annotated[
            float, Field(gt=0.0, description="Give a positive metric, or math.inf.")
        ] = 100.0,
    ):
        self.ladder = ladder
        self.stepping_threshold = stepping_threshold
        self.stopping_threshold = stopping_threshold
        self.ema_window = ema_window
        self.error_window = error_window
        self.checkpoint = checkpoint

    def init(self) -> ProgressiveState:
        """The state before the first entry, at the coarsest level.

        **Returns:** the state; its numbers have JAX's default float, which holds float32
        metrics without loss.
        """
        real = jnp.result_type(float)
        return ProgressiveState(
            level=np.zeros((), np.int32),
            rejected=np.zeros((), np.int32),
            checkpoint=np.asarray(self.checkpoint, real),
            smoothed=np.zeros((self.error_window,), real),
            newest=np.zeros((), np.int32),
            entries=np.zeros((), np.int32),
        )

    def update(
        self,
        state: ProgressiveState,
        metric: Any = None,
        *,
        gradient_norm: Any = None,
        error: Any = None,
    ) -> ProgressiveState:
        """The state after one more entry; the published rule takes one an epoch.

        **Arguments:**

        - `state`: the state before.
        - `metric`: validation metric, a real scalar of any library, traced or not,
            smaller is better.  The first entry is the one before training.
            float32 decides in float32, whatever the dtype of the state.
        - `gradient_norm`, `error`: unused; the rule does not measure the solver.

        **Returns:** the new state, of the same structure, shapes and dtypes.

        **Raises:** `TypeError` for what is no real number, `ValueError` for more than one.
        """
        del gradient_norm, error
        require_state("ProgressiveRefinement", "update", state)
        entry = measured("ProgressiveRefinement.update", "metric", metric)
        rule = _Rule(
            self.stepping_threshold,
            self.stopping_threshold,
            None if self.ema_window is None else 2.0 / (self.ema_window + 1.0),
            self.error_window,
            len(self.ladder) - 1,
        )
        return _taken(rule, state, entry)

    def objection(self, metric: float) -> str | None:
        """What the rule has against a metric, in a sentence; `None` if it can use it.

        >>> controller = ProgressiveRefinement(Ladder.iterations())
        >>> controller.objection(-3.0)
        'the metric is -3, and the rule, which compares ratios, can refine only on a positive ...
        """
        if math.isfinite(metric) and metric > 0:
            return None
        return (
            f"the metric is {metric:.4g}, and the rule, which compares ratios, can refine only on "
            "a positive one that is smaller where it is better; until there is one the level is "
            "held. Validate an error rather than a score, or take bl.ScheduledFidelity or "
            "bl.ErrorControlled."
        )

    def fidelity(self, state: ProgressiveState) -> Fidelity:
        """The fidelity of the state's level."""
        require_state("ProgressiveRefinement", "fidelity", state)
        return fidelity_at(self.ladder, state.level)


class _Rule(NamedTuple):
    stepping: float
    stopping: float
    weight: float | None
    window: int
    last: int


@decided
def _taken(
    xp: Namespace, rule: _Rule, state: ProgressiveState, entry: Float[Array, ""]
) -> ProgressiveState:
    kept = state.smoothed.dtype
    dtype = entry.dtype if entry.dtype.itemsize < kept.itemsize else kept
    usable = xp.isfinite(entry) & (entry >= 0)
    entry = xp.where(usable, entry, xp.zeros_like(entry)).astype(dtype)
    smoothed = state.smoothed.astype(dtype)
    checkpoint = state.checkpoint.astype(dtype)

    latest = entry
    if rule.weight is not None:
        before = smoothed[state.newest]
        # As an increment a metric that does not move leaves the average as it is, to the
        # last bit; as a weighted sum it would wander, and rounding would pass for a rise.
        average = before + rule.weight * (entry - before)
        latest = xp.where(state.entries == 0, entry, average)
    newest = (state.newest + 1) % rule.window
    smoothed = xp.where(xp.arange(rule.window) == newest, latest, smoothed)
    entries = xp.minimum(state.entries + 1, rule.window + 1)
    # In a ring of that many entries the oldest one follows the newest one.
    oldest = smoothed[(newest + 1) % rule.window]

    standing = _ratio(xp, latest, oldest) > rule.stepping
    left = _ratio(xp, latest, checkpoint)
    paid_or_worse = (left < rule.stopping) | (left > 1)
    refine = usable & (entries > rule.window) & standing & paid_or_worse

    return ProgressiveState(
        level=xp.minimum(state.level + refine.astype(np.int32), rule.last),
        rejected=xp.where(usable, state.rejected, saturating_increment(state.rejected)),
        checkpoint=xp.where(refine, latest.astype(kept), state.checkpoint),
        smoothed=xp.where(usable, smoothed.astype(kept), state.smoothed),
        newest=xp.where(usable, newest, state.newest),
        entries=xp.where(usable, entries, state.entries),
    )


def _ratio(xp: Namespace, numerator: Any, denominator: Any) -> Any:
    """Numerator over denominator, both >= 0; 0 / 0 counts as 0: a metric that is zero falls."""
    safe = xp.where(denominator > 0, denominator, xp.ones_like(denominator))
    beyond = xp.where(numerator > 0, xp.inf, 0).astype(numerator.dtype)
    return xp.where(denominator > 0, numerator / safe, beyond)
