"""ErrorControlled: as accurate as the hypergradient needs, and no more."""

from typing import Annotated, Any, ClassVar, NamedTuple

import equinox as eqx
import numpy as np
from jaxtyping import Bool, Float, Int
from pydantic import Field

from bilevel.refinement.arguments import checked
from bilevel.refinement.fidelity import Fidelity
from bilevel.refinement.ladder import Ladder, positions
from bilevel.refinement.lookup import fidelity_at, require_state
from bilevel.refinement.measurement import measured, saturating_increment
from bilevel.refinement.namespace import AnyArray, Namespace, decided

_LONGEST_STRIDE = 2**24

Fraction = Annotated[
    float, Field(gt=0.0, lt=1.0, description="It is a fraction of what is allowed, such as 0.5.")
]


class MeasuredError(NamedTuple):
    """Truncation error of a hypergradient: its parts, and their sum; absolute, like its norm.

    - `noise`: standard deviation of one batch's gradient about the mean of all, as a norm; 0
        where there is one batch, NaN where it is not known.
    """

    primal: Any
    adjoint: Any
    total: Any
    noise: Any = 0.0


class ErrorControlledState(NamedTuple):
    """Where both solves stand.

    - `level`, `adjoint_level`: positions on the ladder of the primal and the adjoint
        solve, int32.
    - `rejected`: updates whose error or norm was not finite or negative, int32.
    - `accepted`: whether the last hypergradient was accurate enough; false before the
        first one.  A loop that must not step along a bad one looks here and computes it
        again with the new fidelity.
    - `stride`, `adjoint_stride`: levels that the next tightening takes, int32.
    - `quiet`, `adjoint_quiet`: updates in a row with an error so small that it could be
        coarser, int32.
    - `norm`: of the hypergradient whose error was last told, float32.
    """

    level: Int[AnyArray, ""]
    rejected: Int[AnyArray, ""]
    adjoint_level: Int[AnyArray, ""]
    accepted: Bool[AnyArray, ""]
    stride: Int[AnyArray, ""]
    adjoint_stride: Int[AnyArray, ""]
    quiet: Int[AnyArray, ""]
    adjoint_quiet: Int[AnyArray, ""]
    norm: Float[AnyArray, ""]


class ErrorControlled(eqx.Module):
    """Keep the truncation error of the hypergradient below a part of its norm.

    A hypergradient z with truncation error ω is accepted where ``ω <= (1 - eta) ‖z‖``:
    then -z is a direction of descent, at an angle to the exact one of at most
    ``arcsin(1 - eta)``.  Where it is not, the solve that is to blame is tightened: the
    primal where its part of the error is above half of what is allowed, the adjoint
    likewise, the larger one if neither is, and the other one where the one to blame
    stands at the top already.  Each has a level of its own on the ladder.  Failures in
    a row take growing strides, so that a start far too coarse costs few steps.

    Of minibatches part of the norm is noise, which hides an error: where the error comes with
    a `noise`, what is allowed is ``(1 - eta)`` of the norm without it, and the part `noise` of it
    besides.

    After `patience` accepted updates in a row in which a part of the error was below
    `margin` of what is allowed, that solve is made coarser by one level.

    An error or norm that is NaN, infinite or negative proves nothing about the
    hypergradient, so it is treated as too large an error: it is not accepted, both
    solves (or the one whose part is unusable) are tightened, and `state.rejected`
    counts it.  To hold the level instead would freeze a controller that starts with so
    few iterations that no error can be estimated from them.

    **Arguments:**

    - `ladder`: the fidelities, coarse to fine, with adjoint budgets.  The primal budget
        is taken at one level, the adjoint budget at the other.
    - `eta`: how far the error has to stay below the norm, in (0, 1).
    - `patience`: accepted updates in a row before one level is given back, >= 1; `None`
        never gives back.
    - `margin`: part of what is allowed under which an error counts as needlessly small,
        in (0, 1).  Best no larger than the ratio of the errors of neighbouring levels
        (0.1 on a ladder of tolerances with factor 0.1), or the coarser level fails.
    - `growth`: levels that each failure in a row takes, as a multiple of the one before,
        >= 1; 1 takes one level each time.
    - `noise`: error that is allowed besides, as a part of the gradient's noise, in (0, 1).

    **Raises:** `ValueError` for an argument out of range, a ladder without adjoint
    budgets, or one whose static parts differ: those cannot come from two levels at once.

    **Source:** after MAID, Salehi, Mukherjee, Roberts, Ehrhardt, An adaptively inexact
    first-order method for bilevel optimization, 2023, arXiv 2308.10098, algorithms 3.1
    and 3.2. MAID has one accuracy for each solve, halves both, and multiplies them by
    little more than 1 at each success; its line search is not part of this.

    >>> ladder = Ladder.tolerances(start=1e-1, factor=0.5, stop=1e-8)
    >>> controller = ErrorControlled(ladder, eta=0.5)
    >>> state = controller.init()
    >>> state = controller.update(state, gradient_norm=1.0, error=0.8)
    >>> bool(state.accepted), int(state.level)
    (False, 1)
    >>> state = controller.update(state, gradient_norm=1.0, error=0.4)
    >>> bool(state.accepted), int(state.level)
    (True, 1)
    """

    ladder: Ladder
    eta: float = eqx.field(static=True)
    patience: int | None = eqx.field(static=True)
    margin: float = eqx.field(static=True)
    growth: int = eqx.field(static=True)
    noise: float = eqx.field(static=True)

    requires: ClassVar[frozenset[str]] = frozenset({"gradient_norm", "error"})
    without_measurement: ClassVar[str] = "goes on with more iterations"

    @checked
    def __init__(
        self,
        ladder: Annotated[Ladder, Field(description="Use for example Ladder.tolerances().")],
        *,
        eta: Fraction = 0.5,
        patience: Annotated[
            int | None,
            Field(ge=1, le=2**30, description="Give a number of updates, or None for never."),
        ] = 7,
        margin: Fraction = 0.5,
        growth: Annotated[
            int, Field(ge=1, le=16, description="Give 1 for one level at a time, or 2 to double.")
        ] = 2,
        noise: Fraction = 0.2,
    ):
        if ladder.adjoint is None:
            msg = (
                "ErrorControlled: ladder should have adjoint budgets, for it moves them, got "
                f"{ladder!r}. Use ladder.with_adjoint(ladder)."
            )
            raise ValueError(msg)
        if not ladder.has_one_shape:
            msg = (
                "ErrorControlled: the static parts of ladder should be the same at every level, "
                f"for primal and adjoint stand at different ones, got {ladder!r}. Use "
                "ProgressiveRefinement, or a ladder of budgets alone."
            )
            raise ValueError(msg)
        self.ladder = ladder
        self.eta = eta
        self.patience = patience
        self.margin = margin
        self.growth = growth
        self.noise = noise

    def init(self) -> ErrorControlledState:
        """The state before the first hypergradient, both solves at the coarsest level."""
        return ErrorControlledState(
            level=np.zeros((), np.int32),
            rejected=np.zeros((), np.int32),
            adjoint_level=np.zeros((), np.int32),
            accepted=np.zeros((), bool),
            stride=np.ones((), np.int32),
            adjoint_stride=np.ones((), np.int32),
            quiet=np.zeros((), np.int32),
            adjoint_quiet=np.zeros((), np.int32),
            norm=np.zeros((), np.float32),
        )

    def update(
        self,
        state: ErrorControlledState,
        metric: Any = None,
        *,
        gradient_norm: Any = None,
        error: Any = None,
    ) -> ErrorControlledState:
        """The state after one more hypergradient.

        **Arguments:**

        - `state`: the state before.
        - `metric`: unused.
        - `gradient_norm`: Euclidean norm of the hypergradient, a real scalar.
        - `error`: its estimated truncation error, absolute: an object with `primal`,
            `adjoint` and `total`, such as `result.error` of `bl.hypergradient`, or one
            scalar, which then moves both solves together. A `noise` that it has is that of
            minibatches.

        **Returns:** the new state, of the same structure, shapes and dtypes.

        **Raises:** `TypeError` where either is missing or no real number, `ValueError` for
        more than one number.
        """
        del metric
        require_state("ErrorControlled", "update", state)
        owner = "ErrorControlled.update"
        for name, value in (("gradient_norm", gradient_norm), ("error", error)):
            if value is None:
                msg = (
                    f"{owner}: {name} is missing. Pass gradient_norm= and error=, for example "
                    f"from bl.hypergradient."
                )
                raise TypeError(msg)
        norm = measured(owner, "gradient_norm", gradient_norm)
        rule = _Rule(
            self.eta, self.patience, self.margin, self.growth, self.noise, len(self.ladder) - 1
        )
        noise = measured(owner, "error.noise", getattr(error, "noise", 0.0))
        if all(hasattr(error, part) for part in ("primal", "adjoint", "total")):
            primal, adjoint, total = (
                measured(owner, f"error.{part}", getattr(error, part))
                for part in ("primal", "adjoint", "total")
            )
            return _decided(rule, state, norm, (primal, adjoint, total), noise)
        return _decided(rule, state, norm, (measured(owner, "error", error),), noise)

    def overdue(self, state: ErrorControlledState, gradient_norm: Any) -> Bool[AnyArray, ""]:
        """Whether an error that is measured now and then should be measured at once.

        It should where the last was too large, and where the gradient has shrunk to half since.

        >>> controller = ErrorControlled(Ladder.iterations(start=4, step=2, stop=20))
        >>> state = controller.init()
        >>> state = controller.update(state, gradient_norm=1.0, error=0.1)
        >>> bool(controller.overdue(state, 0.6)), bool(controller.overdue(state, 0.4))
        (False, True)
        """
        norm = measured("ErrorControlled.overdue", "gradient_norm", gradient_norm)
        return _overdue(len(self.ladder) - 1, state, norm)

    def fidelity(self, state: ErrorControlledState) -> Fidelity:
        """The primal budget of one level, the adjoint budget of the other."""
        require_state("ErrorControlled", "fidelity", state)
        return fidelity_at(self.ladder, state.level, state.adjoint_level)

    def finer(self, state: ErrorControlledState) -> tuple[Fidelity, Fidelity]:
        """The same fidelity but for a primal solve that goes twice as far, and for such an adjoint.

        How far the gradient is from those that these give is what the truncation of either
        solve costs, where no estimate of it is at hand.

        >>> controller = ErrorControlled(Ladder.iterations(start=4, step=2, stop=20))
        >>> primal, adjoint = controller.finer(controller.init())
        >>> [int(b.iterations) for f in (primal, adjoint) for b in (f.budget, f.adjoint_budget)]
        [8, 4, 4, 8]
        """
        places = positions(self.ladder)
        primal, adjoint = _doubled(None, state.level, state.adjoint_level, places)
        return (
            fidelity_at(self.ladder, primal, state.adjoint_level),
            fidelity_at(self.ladder, state.level, adjoint),
        )


@decided
def _doubled(xp: Namespace, rule: None, level: Any, adjoint: Any, places: Any) -> tuple[Any, Any]:
    del rule
    last = len(places) - 1
    first, second = (
        xp.minimum(xp.searchsorted(places, 2 * places[place]), last).astype(np.int32)
        for place in (level, adjoint)
    )
    return first, second


@decided
def _overdue(xp: Namespace, top: int, state: ErrorControlledState, norm: Any) -> Any:
    # At the top of both there is nothing that a measurement could change soon.
    full = (state.level >= top) & (state.adjoint_level >= top)
    return xp.where(full, False, ~state.accepted | (norm <= state.norm / 2))


class _Rule(NamedTuple):
    eta: float
    patience: int | None
    margin: float
    growth: int
    noise: float
    top: int


class _Place(NamedTuple):
    level: Int[AnyArray, ""]
    stride: Int[AnyArray, ""]
    quiet: Int[AnyArray, ""]


@decided
def _decided(
    xp: Namespace,
    rule: _Rule,
    state: ErrorControlledState,
    norm: Float[AnyArray, ""],
    error: tuple[Float[AnyArray, ""], ...],
    noise: Float[AnyArray, ""],
) -> ErrorControlledState:
    known = _usable(xp, norm)
    size = xp.where(known, norm, xp.zeros_like(norm))
    noise = xp.minimum(xp.where(_usable(xp, noise), noise, xp.zeros_like(noise)), size)
    signal = xp.where(noise > 0, xp.sqrt(xp.maximum(size**2 - noise**2, 0)), size)
    allowed = (1.0 - rule.eta) * signal + rule.noise * noise
    # One error for both solves counts against the whole allowance, a part against half.
    primal, adjoint, total = error if len(error) == 3 else error * 3
    share = 0.5 * allowed if len(error) == 3 else allowed

    usable = known & _usable(xp, primal) & _usable(xp, adjoint) & _usable(xp, total)
    accepted = usable & (total <= allowed)
    primal_blamed = ~(known & _usable(xp, primal) & (primal <= share))
    adjoint_blamed = ~(known & _usable(xp, adjoint) & (adjoint <= share))
    # Parts that each keep to their share may still not add up to an accepted total.
    neither = ~primal_blamed & ~adjoint_blamed
    primal_blamed |= neither & (primal >= adjoint)
    adjoint_blamed |= neither & (adjoint >= primal)
    primal_stuck = primal_blamed & (state.level >= rule.top)
    adjoint_stuck = adjoint_blamed & (state.adjoint_level >= rule.top)

    first = _moved(
        xp,
        _Place(state.level, state.stride, state.quiet),
        tighten=~accepted & (primal_blamed | adjoint_stuck),
        small=accepted & (primal <= rule.margin * share),
        rule=rule,
    )
    second = _moved(
        xp,
        _Place(state.adjoint_level, state.adjoint_stride, state.adjoint_quiet),
        tighten=~accepted & (adjoint_blamed | primal_stuck),
        small=accepted & (adjoint <= rule.margin * share),
        rule=rule,
    )
    return ErrorControlledState(
        level=first.level,
        rejected=xp.where(usable, state.rejected, saturating_increment(state.rejected)),
        adjoint_level=second.level,
        accepted=accepted,
        stride=first.stride,
        adjoint_stride=second.stride,
        quiet=first.quiet,
        adjoint_quiet=second.quiet,
        norm=xp.where(known, norm, state.norm).astype(state.norm.dtype),
    )


def _moved(
    xp: Namespace,
    place: _Place,
    tighten: Bool[AnyArray, ""],
    small: Bool[AnyArray, ""],
    rule: _Rule,
) -> _Place:
    up = xp.minimum(place.stride, rule.top - place.level)
    quiet = xp.where(small, saturating_increment(place.quiet), 0)
    back = xp.zeros_like(small) if rule.patience is None else quiet >= rule.patience
    down = xp.minimum(back.astype(np.int32), place.level)
    # Strides beyond the ladder say nothing more, and must not grow out of int32.
    longer = xp.minimum(place.stride, min(rule.top, _LONGEST_STRIDE) + 1) * rule.growth
    return _Place(
        level=place.level + xp.where(tighten, up, -down),
        stride=xp.where(tighten, longer, 1),
        quiet=xp.where(back, 0, quiet),
    )


def _usable(xp: Namespace, value: Float[AnyArray, ""]) -> Bool[AnyArray, ""]:
    return xp.isfinite(value) & (value >= 0)
