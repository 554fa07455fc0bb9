"""AutomaticRefinement: as fine as the gradient needs, measured, without anything to set."""

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

Part = Annotated[
    float, Field(gt=0.0, lt=1.0, description="It is a part of something, such as 0.1.")
]

GAP = 0.3
"""How far the levels of a comparison lie apart, as a part of the position between them."""

WEIGHT = 0.25
"""Of the newest gradient norm in the average."""

TRUST = 2.0
"""How far beyond the levels last compared, on either side, the model is used, as a factor."""

BEYOND = 2.0
"""How far an error may be beyond what is allowed before a gradient is not to be used."""

LEAST = 0.1
"""Of a gradient's norm is taken to be no error, however large the error."""

_HALVINGS = 50


class Differences(NamedTuple):
    """Distances between gradients of one batch at one θ, computed at the levels compared.

    - `coarser`: ‖g_a − g_b‖ of the coarsest and the middle one.
    - `finer`: ‖g_b − g_c‖ of the middle and the finest one.
    - `noise`: standard deviation of a batch's gradient about the mean of all batches, as a
        norm; 0 where there is one batch, NaN where it was not measured this time.

    In a loop of one's own, with `gradient(fidelity)` for the present batch and θ:

    >>> ladder = Ladder.iterations(1, 1, 50)
    >>> controller = AutomaticRefinement(ladder)
    >>> state = controller.init()
    >>> def gradient(fidelity):
    ...     return 1.0 + 0.5 ** int(fidelity.budget.iterations)
    >>> for _ in range(20):
    ...     g = gradient(controller.fidelity(state))
    ...     difference = None
    ...     if controller.due(state):
    ...         a, b, c = (gradient(fidelity) for fidelity in controller.compared(state))
    ...         difference = Differences(abs(a - b), abs(b - c))
    ...     state = controller.update(state, gradient_norm=abs(g), error=difference)
    >>> int(controller.fidelity(state).budget.iterations)  # 0.5 ** 4 < 0.1
    4
    """

    coarser: Any
    finer: Any
    noise: Any = 0.0


class AutomaticState(NamedTuple):
    """The level, and a model of the gradient's error: ``exp(log_error - rate (p - place))``.

    - `level`: position on the ladder, int32.
    - `rejected`: measurements that were not finite or negative, int32.
    - `comparisons`: so far, int32.
    - `updates`, `compared_at`: so far, and when it was compared last, int32.
    - `lowest`: the coarsest level to go back to: a gradient that was not finite is not asked
        for again; int32.
    - `log_error`, `place`, `rate`: of the model; p is a level's number of iterations.
    - `least`, `highest`: the coarsest and the finest p of the last comparison: between half of
        the one and twice the other the model is used.
    - `wanted`: the p that the model asks for, wherever the level could go.
    - `norm`: average norm of the gradients.
    - `noise`: of a batch's gradient.
    - `credit`: iterations that may be spent on comparisons.
    - `due`: whether the next gradient should be compared.
    - `accepted`: whether the last gradient was accurate enough to step along.  One that was
        compared and found wanting is better computed again, with the new fidelity: the first
        steps of a training decide much, and what is learnt there of a solver's errors stays.
    """

    level: Int[AnyArray, ""]
    rejected: Int[AnyArray, ""]
    comparisons: Int[AnyArray, ""]
    updates: Int[AnyArray, ""]
    compared_at: Int[AnyArray, ""]
    lowest: Int[AnyArray, ""]
    log_error: Float[AnyArray, ""]
    place: Float[AnyArray, ""]
    rate: Float[AnyArray, ""]
    least: Float[AnyArray, ""]
    highest: Float[AnyArray, ""]
    wanted: Float[AnyArray, ""]
    norm: Float[AnyArray, ""]
    noise: Float[AnyArray, ""]
    credit: Float[AnyArray, ""]
    due: Bool[AnyArray, ""]
    accepted: Bool[AnyArray, ""]


class AutomaticRefinement(eqx.Module):
    """Keep the gradient's truncation error small next to the gradient and to its noise.

    Now and then a gradient is computed at three levels, on the same batch. How fast the
    distances between them fall is the solver's rate of convergence, and so they tell the
    error that each level's gradient has, and the level that an allowed error takes. In
    between, the error is taken to stay and the gradient's norm is watched, which costs
    nothing: as training comes to its end the gradient shrinks, its error does not, and the
    level rises. Noise of minibatches hides an error, so there may be more of it. The level
    falls again where the gradient grows.

    It reads no validation metric and no epochs: it is told of every update, or of as many
    as one likes.

    **Arguments:**

    - `ladder`: the fidelities, coarse to fine. Where their static parts differ, such as a
        grid, it uses the finest level of each: what two levels on one grid differ by says
        nothing of the grid's own error.
    - `signal`: error that is allowed, as a part of the mean gradient's norm, in (0, 1).
    - `noise`: error that is allowed besides, as a part of the gradient's noise, in (0, 1).
    - `share`: part of the work that may go into comparisons, in (0, 1).

    The defaults were found on two tasks; docs/automatic.md tells what else was tried, and
    docs/results.md how they do on others.

    **Raises:** `ValueError` for an argument out of range.

    >>> controller = AutomaticRefinement(Ladder.iterations(1, 1, 50), signal=0.1)
    >>> state = controller.init()
    >>> bool(controller.due(state)), [int(f.budget.iterations) for f in controller.compared(state)]
    (True, [1, 2, 3])
    >>> state = controller.update(state, gradient_norm=1.0, error=Differences(0.4, 0.2))
    >>> bool(state.accepted), int(controller.fidelity(state).budget.iterations)
    (False, 3)
    """

    ladder: Ladder
    signal: float = eqx.field(static=True)
    noise: float = eqx.field(static=True)
    share: float = eqx.field(static=True)
    _rule: "_Rule" = eqx.field(static=True)

    requires: ClassVar[frozenset[str]] = frozenset({"gradient_norm"})
    without_measurement: ClassVar[str] = "goes on with more iterations"

    @checked
    def __init__(
        self,
        ladder: Annotated[Ladder, Field(description="Use for example Ladder.iterations().")],
        *,
        signal: Part = 0.1,
        noise: Part = 0.3,
        share: Part = 0.05,
    ):
        if not ladder.has_one_shape:
            ladder = Ladder.of(ladder.fidelity(level) for level in ladder.static.last_of_each)
        self.ladder = ladder
        self.signal = signal
        self.noise = noise
        self.share = share
        self._rule = _Rule(signal, noise, share, len(ladder) - 1)

    def init(self) -> AutomaticState:
        """The state before the first update, at the coarsest level, with a comparison due."""

        def real(value: float) -> Any:
            return np.asarray(value, np.float32)

        zero = np.zeros((), np.int32)
        return AutomaticState(
            level=zero,
            rejected=zero,
            comparisons=zero,
            updates=zero,
            compared_at=zero,
            lowest=zero,
            log_error=real(0),
            place=real(0),
            rate=real(0),
            least=real(0),
            highest=real(0),
            wanted=real(0),
            norm=real(0),
            noise=real(0),
            credit=real(0),
            due=np.asarray(len(self.ladder) > 1),
            accepted=np.asarray(True),
        )

    def due(self, state: AutomaticState) -> Bool[AnyArray, ""]:
        """Whether the next gradient should be compared."""
        return state.due

    def compared(self, state: AutomaticState) -> tuple[Fidelity, Fidelity, Fidelity]:
        """The levels that a comparison computes a gradient at, coarse to fine.

        One of them is the level of `fidelity(state)`.
        """
        levels = _levels(self._rule, state.level)
        coarse, middle, fine = (fidelity_at(self.ladder, level) for level in levels)
        return coarse, middle, fine

    def update(
        self,
        state: AutomaticState,
        metric: Any = None,
        *,
        gradient_norm: Any = None,
        error: Any = None,
    ) -> AutomaticState:
        """The state after one more update.

        **Arguments:**

        - `state`: the state before.
        - `metric`: unused.
        - `gradient_norm`: Euclidean norm of the gradient, a real scalar.
        - `error`: `Differences`, where a comparison was made; else `None`.

        **Returns:** the new state, of the same structure, shapes and dtypes.

        **Raises:** `TypeError` where `gradient_norm` is missing or no real number, or `error`
        is something else; `ValueError` for more than one number.
        """
        del metric
        require_state("AutomaticRefinement", "update", state)
        owner = "AutomaticRefinement.update"
        if gradient_norm is None:
            msg = f"{owner}: gradient_norm is missing. Pass the norm of each update's gradient."
            raise TypeError(msg)
        norm = measured(owner, "gradient_norm", gradient_norm)
        if error is None:
            return _after(self._rule, state, positions(self.ladder), norm, None)
        parts = ("coarser", "finer", "noise")
        if not all(hasattr(error, part) for part in parts):
            msg = (
                f"{owner}: error should be bl.Differences between the gradients at the levels of "
                f"compared(state), got {type(error).__name__}. Leave it out where none was made."
            )
            raise TypeError(msg)
        numbers = tuple(measured(owner, f"error.{part}", getattr(error, part)) for part in parts)
        return _after(self._rule, state, positions(self.ladder), norm, numbers)

    def fidelity(self, state: AutomaticState) -> Fidelity:
        """The fidelity of the state's level."""
        require_state("AutomaticRefinement", "fidelity", state)
        return fidelity_at(self.ladder, state.level)


class _Rule(NamedTuple):
    signal: float
    noise: float
    share: float
    top: int


def _trio(xp: Namespace, rule: _Rule, level: Any) -> tuple[Any, Any, Any]:
    """Levels about this one, and this one among them; the first two coincide if there are two."""
    gap = xp.maximum(xp.round(GAP * (level + 1)), 1).astype(np.int32)
    low = xp.maximum(xp.minimum(level - gap, rule.top - 2), 0)
    high = xp.minimum(xp.maximum(level + gap, low + 2 * gap), rule.top)
    at_end = (level == low) | (level == high)
    return low, xp.where(at_end, (low + high) // 2, level), high


@decided
def _levels(xp: Namespace, rule: _Rule, level: Any) -> tuple[Any, Any, Any]:
    return _trio(xp, rule, level)


def _due(xp: Namespace, rule: _Rule, state: AutomaticState, places: Any) -> Bool[AnyArray, ""]:
    """Whether the state's level should be compared."""
    if rule.top == 0:
        return xp.zeros_like(state.due)
    cost = _cost(xp, rule, state.level, places)
    # Each step out of the known doubles it, so that all of these together are few.
    here = places[state.level]
    unknown = (state.wanted > TRUST * state.highest) & (here > state.highest)
    # What went down may have gone down to where the solver has not begun to converge.
    unknown = unknown | (here < state.least)
    # Training changes fastest where it begins, and there a comparison costs next to nothing.
    old = state.updates >= 2 * state.compared_at
    return (state.comparisons == 0) | unknown | old | (state.credit >= cost)


def _cost(xp: Namespace, rule: _Rule, level: Any, places: Any) -> Any:
    """Iterations that a comparison takes beyond the gradient that is there."""
    low, middle, high = _trio(xp, rule, level)
    return places[low] + places[middle] + places[high] - places[level]


@decided
def _after(
    xp: Namespace, rule: _Rule, state: AutomaticState, places: Any, norm: Any, differences: Any
) -> AutomaticState:
    dtype = state.norm.dtype
    epsilon = float(np.finfo(norm.dtype).eps)
    known = _usable(xp, norm)
    norm = xp.where(known, norm, xp.zeros_like(norm)).astype(dtype)
    here = places[state.level]
    smooth = xp.where(state.norm > 0, state.norm + WEIGHT * (norm - state.norm), norm)
    fields = state._replace(
        updates=saturating_increment(state.updates),
        norm=xp.where(known, smooth, state.norm),
        credit=state.credit + rule.share * here,
    )
    usable = known
    if differences is not None:
        fields, good = _learnt(xp, rule, fields, places, norm, differences, epsilon)
        usable = usable & good
    finer = xp.minimum(state.level + 1, rule.top).astype(np.int32)
    fields = fields._replace(lowest=xp.where(known, state.lowest, finer))
    level, wanted, excess = _placed(xp, rule, fields, places, known)
    # One that is beyond the allowance by a little is made better by the next.
    accepted = (level <= state.level) | (excess <= np.log(BEYOND)) | ~known
    # The norm of a gradient that is mostly error is no measure of the next.
    fields = fields._replace(norm=xp.where(accepted, fields.norm, xp.zeros_like(norm)))
    fields = fields._replace(level=level.astype(np.int32), wanted=wanted.astype(dtype))
    return fields._replace(
        accepted=accepted,
        due=_due(xp, rule, fields, places),
        rejected=xp.where(usable, state.rejected, saturating_increment(state.rejected)),
        **{
            name: getattr(fields, name).astype(dtype)
            for name in (
                "log_error",
                "place",
                "rate",
                "least",
                "highest",
                "norm",
                "noise",
                "credit",
            )
        },
    )


def _learnt(
    xp: Namespace,
    rule: _Rule,
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
    low, middle, high = _trio(xp, rule, state.level)
    before, after = places[middle] - places[low], places[high] - places[middle]
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
    learnt = state._replace(
        log_error=xp.log(xp.maximum(error, tiny)),
        place=xp.where(agree, places[low], places[middle]),
        rate=rate,
        least=places[low],
        highest=places[high],
        noise=_averaged(xp, state.noise, noise),
        comparisons=saturating_increment(state.comparisons),
        compared_at=state.updates,
    )
    kept = state._replace(comparisons=learnt.comparisons, compared_at=learnt.compared_at)
    pairs = zip(learnt, kept, strict=True)
    chosen = AutomaticState(*(xp.where(usable, new, old) for new, old in pairs))
    paid = state.credit - _cost(xp, rule, state.level, places)
    # Debts are forgiven: they come of steps into the unknown, which are few.
    return chosen._replace(credit=xp.maximum(paid, 0)), usable


def _rate(xp: Namespace, coarser: Any, finer: Any, before: Any, after: Any) -> Any:
    """r with finer / coarser = (1 − exp(−r after)) / (exp(r before) − 1), by bisection."""
    ratio = finer / coarser
    before, after = xp.maximum(before, 1e-3), xp.maximum(after, 1e-3)
    low, high = xp.full_like(ratio, np.log(1e-9)), xp.log(80.0 / before)
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
    xp: Namespace, rule: _Rule, state: AutomaticState, places: Any, known: Any
) -> tuple[Any, Any, Any]:
    """The next level; the position that the model asks for; the log of this level's excess."""
    here = places[state.level]
    noise = xp.minimum(state.noise, state.norm)
    signal = xp.sqrt(xp.maximum(state.norm**2 - noise**2, 0))
    tiny = float(np.finfo(state.norm.dtype).tiny)
    log_error = state.log_error - state.rate * (here - state.place)
    error = xp.where(state.comparisons > 0, xp.exp(xp.minimum(log_error, 80.0)), 0.0)
    # Of a gradient that is mostly error, the part that is none may be no larger than this.
    sure = xp.maximum(signal - error, LEAST * signal)
    allowed = xp.maximum(rule.signal * sure + rule.noise * noise, tiny)
    excess = log_error - xp.log(allowed)
    rate = xp.where(state.rate > 0, state.rate, 1.0)
    wanted = xp.where(state.comparisons > 0, here + excess / rate, here)
    # A gradient that is not finite may be one that was not solved for well enough.
    wanted = xp.where(known, wanted, 2 * here)
    limit = xp.minimum(2 * here + 1, xp.maximum(TRUST * state.highest, here))
    limit = xp.where(known, limit, 2 * here + 1)
    goal = xp.clip(wanted, xp.maximum(here / 2, state.least / TRUST), limit)
    level = xp.searchsorted(places, goal - 1e-4 * goal)
    return xp.clip(level, state.lowest, rule.top), wanted, excess


def _usable(xp: Namespace, value: Float[AnyArray, ""]) -> Bool[AnyArray, ""]:
    return xp.isfinite(value) & (value >= 0)
