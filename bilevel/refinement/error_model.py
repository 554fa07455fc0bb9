"""Error model: what the truncation of either solve costs a gradient, and what that asks for.

Vectors have an entry for each side: the primal's and the adjoint's budget, or one for both
where they move together.
"""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from bilevel.refinement.measurement import saturating_increment
from bilevel.refinement.namespace import AnyArray, Namespace, decided

GAP = 0.3
"""How far the levels of a comparison lie apart, as a part of the position between them."""

WEIGHT, RISING = 0.25, 0.03
"""Of the newest gradient norm in the average: of one below it, and of one above it."""

TRUST = 2.0
"""How far beyond the levels last compared, on either side, the model is used, as a factor."""

BEYOND = 2.0
"""How far an error may be beyond what is allowed before a gradient is not to be used."""

LEAST = 0.1
"""Of a gradient's norm is taken to be no error, however large the error."""

_HALVINGS = 50
_REAL = (
    "log_error",
    "place",
    "rate",
    "least",
    "highest",
    "wanted",
    "norm",
    "noise",
    "credit",
)


class AutomaticState(NamedTuple):
    """Levels, and a model of the gradient's error: ``exp(log_error - rate (p - place))`` a side.

    - `levels`: positions on the ladder of the primal and the adjoint solve, or one for both,
        int32.
    - `rejected`: measurements that were not finite or negative, int32.
    - `comparisons`: of a side so far, int32.
    - `updates`, `compared_at`: so far, and when a side was compared last, int32.
    - `lowest`: the coarsest level to go back to: a gradient that was not finite is not asked
        for again; int32.
    - `log_error`, `place`, `rate`: of the model; p is a level's number of iterations.
    - `least`, `highest`: the coarsest and the finest p of the last comparison: between half of
        the one and twice the other the model is used.
    - `wanted`: the p that the model asks for, wherever the level could go.
    - `norm`: average norm of the gradients.
    - `noise`: of a batch's gradient.
    - `credit`: iterations that may be spent on comparisons.
    - `side`: which side is to be compared next: 0 the primal, 1 the adjoint; int32.
    - `due`: whether the next gradient should be compared.
    - `accepted`: whether the last gradient was accurate enough to step along.  One that was
        compared and found wanting is better computed again, with the new fidelity: the first
        steps of a training decide much, and what is learnt there of a solver's errors stays.
    """

    levels: Int[AnyArray, " sides"]
    rejected: Int[AnyArray, ""]
    comparisons: Int[AnyArray, " sides"]
    updates: Int[AnyArray, ""]
    compared_at: Int[AnyArray, " sides"]
    lowest: Int[AnyArray, " sides"]
    log_error: Float[AnyArray, " sides"]
    place: Float[AnyArray, " sides"]
    rate: Float[AnyArray, " sides"]
    least: Float[AnyArray, " sides"]
    highest: Float[AnyArray, " sides"]
    wanted: Float[AnyArray, " sides"]
    norm: Float[AnyArray, ""]
    noise: Float[AnyArray, ""]
    credit: Float[AnyArray, ""]
    side: Int[AnyArray, ""]
    due: Bool[AnyArray, ""]
    accepted: Bool[AnyArray, ""]

    @property
    def level(self) -> Int[AnyArray, ""]:
        """Position of the primal solve."""
        return self.levels[0]

    @property
    def adjoint_level(self) -> Int[AnyArray, ""]:
        """Position of the adjoint solve."""
        return self.levels[-1]


class Rule(NamedTuple):
    """What is allowed, and the finest level.

    - `signal`, `noise`: error that is allowed, as parts of these.
    - `share`: of the work that may go into comparisons.
    - `top`: the finest level.
    """

    signal: float
    noise: float
    share: float
    top: int


def blank(sides: int, *, due: bool) -> AutomaticState:
    """The state before the first update, at the coarsest level."""

    def whole(*shape: int) -> Any:
        return np.zeros(shape, np.int32)

    def real(*shape: int) -> Any:
        return np.zeros(shape, np.float32)

    return AutomaticState(
        levels=whole(sides),
        rejected=whole(),
        comparisons=whole(sides),
        updates=whole(),
        compared_at=whole(sides),
        lowest=whole(sides),
        log_error=real(sides),
        place=real(sides),
        rate=real(sides),
        least=real(sides),
        highest=real(sides),
        wanted=real(sides),
        norm=real(),
        noise=real(),
        credit=real(),
        side=whole(),
        due=np.asarray(due),
        accepted=np.asarray(True),
    )


@decided
def compared_levels(xp: Namespace, rule: Rule, state: AutomaticState) -> Any:
    """The levels of both sides at which a comparison computes a gradient, coarse to fine."""
    chosen = _side(xp, state)
    return tuple(
        xp.where(chosen, place, state.levels).astype(np.int32)
        for place in _trio(xp, rule, state.levels)
    )


@decided
def after(
    xp: Namespace, rule: Rule, state: AutomaticState, places: Any, norm: Any, differences: Any
) -> AutomaticState:
    """The state after one more update.

    **Arguments:**

    - `places`: of all levels, a row a side.
    - `norm`: of the gradient.
    - `differences`: coarser, finer and noise, where the side of the state was compared.
    """
    dtype = state.norm.dtype
    epsilon = float(np.finfo(norm.dtype).eps)
    known = _usable(xp, norm)
    norm = xp.where(known, norm, xp.zeros_like(norm)).astype(dtype)
    # A gradient that is large for once hides no error of the next.
    weight = xp.where(norm > state.norm, RISING, WEIGHT)
    smooth = xp.where(state.norm > 0, state.norm + weight * (norm - state.norm), norm)
    here = _at(xp, places, state.levels)
    fields = state._replace(
        updates=saturating_increment(state.updates),
        norm=xp.where(known, smooth, state.norm),
        credit=state.credit + rule.share * here.sum(),
    )
    usable = known
    if differences is not None:
        fields, good = _learnt(xp, rule, fields, places, norm, differences, epsilon)
        usable = usable & good
    finer = xp.minimum(state.levels + 1, rule.top).astype(np.int32)
    fields = fields._replace(lowest=xp.where(known, state.lowest, finer))
    levels, wanted, excess = _placed(xp, rule, fields, places, here, known)
    # One that is beyond the allowance by a little is made better by the next.
    accepted = (levels <= state.levels).all() | (excess <= np.log(BEYOND)) | ~known
    if differences is not None:
        # What one side costs is not known before it was compared, too.
        accepted = accepted & ((fields.comparisons > 0).all() | ~known)
    # The norm of a gradient that is mostly error is no measure of the next.
    fields = fields._replace(norm=xp.where(accepted, fields.norm, xp.zeros_like(norm)))
    fields = fields._replace(levels=levels.astype(np.int32), wanted=wanted)
    due, side = _due(xp, rule, fields, places)
    return fields._replace(
        accepted=accepted,
        due=due,
        side=side.astype(np.int32),
        rejected=xp.where(usable, state.rejected, saturating_increment(state.rejected)),
        **{name: getattr(fields, name).astype(dtype) for name in _REAL},
    )


def _side(xp: Namespace, state: AutomaticState) -> Bool[AnyArray, " sides"]:
    """True for the side that is compared."""
    return xp.arange(state.levels.shape[0]) == state.side


def _at(xp: Namespace, places: Any, levels: Any) -> Any:
    return places[xp.arange(places.shape[0]), levels]


def _trio(xp: Namespace, rule: Rule, level: Any) -> tuple[Any, Any, Any]:
    """Levels about this one, and this one among them; the first two coincide if there are two."""
    gap = xp.maximum(xp.round(GAP * (level + 1)), 1).astype(np.int32)
    low = xp.maximum(xp.minimum(level - gap, rule.top - 2), 0)
    high = xp.minimum(xp.maximum(level + gap, low + 2 * gap), rule.top)
    at_end = (level == low) | (level == high)
    return low, xp.where(at_end, (low + high) // 2, level), high


def _due(xp: Namespace, rule: Rule, state: AutomaticState, places: Any) -> tuple[Any, Any]:
    """Whether the state's levels should be compared, and which side."""
    if rule.top == 0:
        return xp.zeros_like(state.due), state.side
    here = _at(xp, places, state.levels)
    cost = _cost(xp, rule, state.levels, places, here)
    # Each step out of the known doubles it, so that all of these together are few.
    unknown = (state.wanted > TRUST * state.highest) & (here > state.highest)
    # What went down may have gone down to where the solver has not begun to converge.
    unknown = unknown | (here < state.least)
    # Training changes fastest where it begins, and there a comparison costs next to nothing.
    old = state.updates >= 2 * state.compared_at
    new = state.comparisons == 0
    # The most urgent, among equals the one not compared for longest.
    urgency = xp.where(new, 3.0, xp.where(unknown, 2.0, xp.where(old, 1.0, 0.0)))
    side = xp.argmax(urgency - state.compared_at / (state.updates + 1.0))
    return (new | unknown | old | (state.credit >= cost))[side], side


def _cost(xp: Namespace, rule: Rule, levels: Any, places: Any, here: Any) -> Any:
    """Iterations that a comparison of each side takes beyond the gradient that is there."""
    low, middle, high = (_at(xp, places, each) for each in _trio(xp, rule, levels))
    return low + middle + high - here + 2 * (here.sum() - here)


def _learnt(
    xp: Namespace,
    rule: Rule,
    state: AutomaticState,
    places: Any,
    norm: Any,
    differences: tuple[Any, Any, Any],
    epsilon: float,
) -> tuple[AutomaticState, Any]:
    """The model after a comparison, and whether its numbers could be used."""
    coarser, finer, noise = (xp.asarray(number).astype(state.norm.dtype) for number in differences)
    usable = _usable(xp, coarser) & _usable(xp, finer)
    coarser, finer = (xp.where(usable, x, xp.ones_like(x)) for x in (coarser, finer))
    low, middle, high = (_at(xp, places, levels) for levels in _trio(xp, rule, state.levels))
    before, after = middle - low, high - middle
    span = xp.maximum(before + after, 1)
    # Below this a difference is rounding, and tells no rate.
    floor = 32 * epsilon * norm
    halving = np.log(2.0) / span
    falling = (finer < coarser) & (finer > floor)
    unknown = xp.where(state.rate > 0, state.rate, halving)
    # Where nothing falls, finer levels are tried one doubling at a time.
    standing = xp.where(finer > floor, xp.minimum(unknown, halving), unknown)
    rate = xp.where(falling, _rate(xp, coarser, finer, before, after), standing)
    error = finer / -xp.expm1(-rate * xp.maximum(after, 1))
    # Where the finer two agree, it may be the tolerance of the solves that made them: what is
    # known is the error of the coarsest.
    agree = finer <= floor
    error = xp.where(agree, xp.maximum(coarser, floor), error)
    tiny = float(np.finfo(state.norm.dtype).tiny)
    chosen = _side(xp, state)
    new = {
        "log_error": xp.log(xp.maximum(error, tiny)) - _scale(xp, state),
        "place": xp.where(agree, low, middle),
        "rate": rate,
        "least": low,
        "highest": high,
    }
    here = _at(xp, places, state.levels)
    cost = xp.where(chosen, _cost(xp, rule, state.levels, places, here), 0).sum()
    return state._replace(
        **{
            name: xp.where(chosen & usable, value, getattr(state, name))
            for name, value in new.items()
        },
        noise=xp.where(usable, _averaged(xp, state.noise, noise), state.noise),
        comparisons=xp.where(chosen, saturating_increment(state.comparisons), state.comparisons),
        compared_at=xp.where(chosen, state.updates, state.compared_at),
        # Debts are forgiven: they come of steps into the unknown, which are few.
        credit=xp.maximum(state.credit - cost, 0),
    ), usable


def _rate(xp: Namespace, coarser: Any, finer: Any, before: Any, after: Any) -> Any:
    """r with finer / coarser = (1 − exp(−r after)) / (exp(r before) − 1), by bisection."""
    ratio = finer / coarser
    before, after = xp.maximum(before, 1e-3), xp.maximum(after, 1e-3)
    low, high = xp.full_like(before, np.log(1e-9)), xp.log(80.0 / before)
    for _ in range(_HALVINGS):
        middle = 0.5 * (low + high)
        r = xp.exp(middle)
        falls_more = -xp.expm1(-r * after) < ratio * xp.expm1(r * before)
        low, high = xp.where(falls_more, low, middle), xp.where(falls_more, middle, high)
    return xp.exp(0.5 * (low + high))


def _averaged(xp: Namespace, before: Any, noise: Any) -> Any:
    known = _usable(xp, noise)
    noise = xp.where(known, noise, xp.zeros_like(noise))
    mean = xp.where(before > 0, 0.5 * (before + noise), noise)
    return xp.where(known, mean, before)


def _placed(
    xp: Namespace, rule: Rule, state: AutomaticState, places: Any, here: Any, known: Any
) -> tuple[Any, Any, Any]:
    """The next levels; the positions that the model asks for; the log of the error's excess."""
    noise = xp.minimum(state.noise, state.norm)
    signal = xp.sqrt(xp.maximum(state.norm**2 - noise**2, 0))
    tiny = float(np.finfo(state.norm.dtype).tiny)
    compared = state.comparisons > 0
    at_place = state.log_error + _scale(xp, state)
    log_error = at_place - state.rate * (here - state.place)
    error = xp.where(compared, xp.exp(xp.minimum(log_error, 80.0)), 0.0).sum()
    # Of a gradient that is mostly error, the part that is none may be no larger than this.
    sure = xp.maximum(signal - error, LEAST * signal)
    allowed = xp.maximum(rule.signal * sure + rule.noise * noise, tiny)
    excess = xp.log(xp.maximum(error, tiny)) - xp.log(allowed)
    rate = xp.where(state.rate > 0, state.rate, 1.0)
    coarsest = xp.maximum(here / 2, xp.maximum(places[:, 0], state.least / TRUST))
    most = xp.exp(xp.minimum(at_place - rate * (coarsest - state.place), 80.0))
    parts = _parts(xp, rate, xp.where(compared, most, np.inf), allowed)
    wanted = xp.where(compared, here + (log_error - xp.log(xp.maximum(parts, tiny))) / rate, here)
    # A gradient that is not finite may be one that was not solved for well enough.
    wanted = xp.where(known, wanted, 2 * here)
    limit = xp.minimum(2 * here + 1, xp.maximum(TRUST * state.highest, here))
    limit = xp.where(known, limit, 2 * here + 1)
    goal = xp.minimum(xp.maximum(wanted, xp.maximum(here / 2, state.least / TRUST)), limit)
    goal = goal - 1e-4 * goal
    levels = (places < goal[:, None]).sum(axis=1)
    levels = xp.minimum(xp.maximum(levels, state.lowest), rule.top)
    # The primal goes as far as the adjoint at least: its error moves where training ends, the
    # adjoint's, which shrinks with the gradient, only the way there.
    return xp.maximum(levels, levels[-1]), wanted, excess


def _scale(xp: Namespace, state: AutomaticState) -> Any:
    """The logarithm of what each side's error is proportional to.

    The adjoint's right-hand side shrinks with the gradient, and with it what its truncation
    costs; that of the primal does not.
    """
    tiny = float(np.finfo(state.norm.dtype).tiny)
    sides = state.levels.shape[0]
    return xp.where(xp.arange(sides) == 1, xp.log(xp.maximum(state.norm, tiny)), 0.0)


def _parts(xp: Namespace, rate: Any, most: Any, allowed: Any) -> Any:
    """How much of the allowed error each side may have, so that both together cost least.

    Of errors aᵢ exp(−rᵢ pᵢ) with a given sum, Σ pᵢ is least where rᵢ times the error is the
    same on all sides. A side whose error is at `most` so large leaves the rest to the other.
    """
    if rate.shape[0] == 1:
        return allowed + xp.zeros_like(rate)
    fair = allowed * rate[::-1] / rate.sum()
    return allowed - xp.minimum(fair, most)[::-1]


def _usable(xp: Namespace, value: Float[AnyArray, ""]) -> Bool[AnyArray, ""]:
    return xp.isfinite(value) & (value >= 0)
