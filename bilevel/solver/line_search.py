"""Line searches: how far to go along a direction."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from bilevel import vector
from bilevel.bound import BoundProblem
from bilevel.status import Status

SLACK = 10.0
"""Rounding errors of an objective value, in units of its last place, that count as equal."""

LONGEST = 1e8
"""The first step is at most so many times as long as the unknown."""


class Found(NamedTuple):
    """What a line search came to; constants, without derivatives.

    - `length`: step along the direction; 0 where none was found.
    - `value`, `residual`: objective and downhill residual at the end of the step.
    - `evaluations`: how often these were evaluated.
    - `success`: whether there is a step.
    """

    length: Float[Array, ""]
    value: Float[Array, ""]
    residual: PyTree
    evaluations: Int[Array, ""]
    success: Bool[Array, ""]


def objective_of(problem: BoundProblem) -> Callable[[PyTree], Array]:
    """The objective, which the solver's `requires` has made sure of."""
    assert problem.objective is not None
    return problem.objective


def slack(value: Float[Array, ""]) -> Float[Array, ""]:
    """A difference of objectives that may be due to rounding alone."""
    return SLACK * jnp.finfo(value.dtype).eps * jnp.abs(value)


def first_length(problem: BoundProblem, x: PyTree, residual: PyTree) -> Float[Array, ""]:
    """A first step along the residual that knows the units: 1 over the curvature along it.

    Exact for a quadratic.  Without positive curvature the step is as long as x, or of
    length 1 where x is zero; with next to none, it is 10⁸ times as long as x at most, from
    where halving it still comes to an end.  At a residual of zero, where no step is long
    and its derivative is all that matters, an arbitrary direction tells the curvature.  One
    Hessian-vector product; a constant.
    """
    x, residual = jax.lax.stop_gradient((x, residual))
    norm = vector.norm(residual)
    some = norm > 0
    direction = vector.where(some, residual, vector.arbitrary(x, 1))
    unit = vector.scale(1.0 / vector.norm(direction), direction)
    _, change = jax.jvp(problem.residual, (x,), (unit,))
    curvature = -vector.dot(unit, change)
    curvature = jnp.where(some, curvature, jnp.abs(curvature))
    reach = vector.norm(x)
    limited = some & (reach > 0)
    longest = jnp.where(limited, LONGEST * reach, jnp.inf) / jnp.where(some, norm, 1.0)
    reach = jnp.where(reach > 0, reach, 1.0)
    curved = curvature > 0
    length = jnp.where(
        curved,
        jnp.minimum(1.0 / jnp.where(curved, curvature, 1.0), longest),
        reach / jnp.where(some, norm, 1.0),
    )
    return jax.lax.stop_gradient(length)


def rounding_hides(
    value: Float[Array, ""],
    norm: Float[Array, ""],
    first_length: Float[Array, ""],
    largest_norm: Float[Array, ""],
    decrease: Float[Array, ""] | float,
) -> Bool[Array, ""]:
    """Whether rounding may hide a decrease of the objective, so that slopes may stand in for it.

    It may where a step of the first length need not decrease by more than rounding, or
    where the gradient has shrunk by far.  At a kink it does neither: there, steps shrink
    until every decrease drowns, and slopes would accept steps for ever.

    **Arguments:**

    - `value`, `norm`: objective and gradient norm.
    - `first_length`, `largest_norm`: natural step length at the start, and the largest
        gradient norm so far: a start next to a saddle has a small one.
    - `decrease`: the constant of the search's first condition.
    """
    promised = decrease * first_length * norm**2 <= slack(value)
    shrunk = norm <= jnp.sqrt(jnp.sqrt(jnp.finfo(norm.dtype).eps)) * largest_norm
    return promised | shrunk


def failure_of(
    value: Float[Array, ""],
    norm: Float[Array, ""],
    first_length: Float[Array, ""],
    largest_norm: Float[Array, ""],
) -> Int[Array, ""]:
    """Why no step was found: rounding, where that explains it, or a failure.

    Rounding does where a step of the first length promises less than the objective can
    show, or where the gradient has shrunk to the square root of rounding level.  Lengths
    that the search itself has shrunk prove nothing: at a kink they vanish, too.

    **Arguments:**

    - `value`, `norm`: objective and gradient norm.
    - `first_length`, `largest_norm`: as in [`rounding_hides`][].
    """
    promised = first_length * norm**2 <= 10 * slack(value)
    shrunk = norm <= jnp.sqrt(jnp.finfo(norm.dtype).eps) * largest_norm
    return jnp.where(promised | shrunk, jnp.int32(Status.ROUNDING), jnp.int32(Status.LINE_SEARCH))


class _Bracket(NamedTuple):
    """A step known to be too short, one known to be too long, and the best so far."""

    trial: Float[Array, ""]
    low: Float[Array, ""]
    low_slope: Float[Array, ""]
    high: Float[Array, ""]
    best: Found
    done: Bool[Array, ""]


def wolfe(
    problem: BoundProblem,
    x: PyTree,
    direction: PyTree,
    value: Float[Array, ""],
    residual: PyTree,
    *,
    decrease: Float[Array, ""] | float,
    curvature: Float[Array, ""] | float,
    trials: int,
    hidden: Bool[Array, ""] | bool = True,
) -> Found:
    """A step length that fulfils the weak Wolfe conditions, by bracketing; 1 is tried first.

    With φ(α) = objective(x + α p): φ(α) ≤ φ(0) + c₁ α φ'(0) and φ'(α) ≥ c₂ φ'(0).  Where the
    decrease drowns in rounding, and `hidden` allows it, the first condition is replaced by
    its form in slopes, φ'(α) ≤ (2c₁ - 1) φ'(0) with φ(α) no larger than φ(0) to within
    rounding (Hager and Zhang 2005, equation 4.1), so that a search works down to the
    rounding level of the gradient instead of its square root.  Inside a bracket the secant
    of the slopes is followed, safeguarded by bisection (Lewis and Overton 2013 for the
    bracketing).

    **Arguments:**

    - `direction`: p, downhill.
    - `value`, `residual`: at x.
    - `decrease`, `curvature`: c₁ < c₂.
    - `trials`: most evaluations, static.
    - `hidden`: whether slopes may decide, see [`rounding_hides`][].

    **Returns:** constants. If the second condition cannot be met, the longest step that
    met the first.
    """
    objective = objective_of(problem)
    x, direction, value, residual = jax.lax.stop_gradient((x, direction, value, residual))
    slope = vector.dot(residual, direction)
    dtype = slope.dtype
    infinity = jnp.asarray(jnp.inf, dtype)

    def evaluate(bracket: _Bracket) -> _Bracket:
        trial = bracket.trial
        point = vector.add_scaled(x, trial, direction)
        here, r = objective(point), problem.residual(point)
        left = vector.dot(r, direction)
        required = (decrease * trial * slope).astype(value.dtype)
        equal = (here <= value + slack(value)) & (left >= (2 * decrease - 1) * slope)
        lower = (here <= value - required) & (here < value)
        decreased = jnp.where(clear, lower, equal)
        decreased = decreased & jnp.isfinite(left)
        short = decreased & (left > curvature * slope)
        found = Found(trial, here, r, bracket.best.evaluations + 1, decreased)
        best = vector.where(decreased, found, bracket.best)
        best = best._replace(evaluations=found.evaluations)
        low = jnp.where(short, trial, bracket.low)
        high = jnp.where(decreased, bracket.high, trial)
        return _Bracket(
            trial=_next_trial(bracket, left, low, high, short),
            low=low,
            low_slope=jnp.where(short, left, bracket.low_slope),
            high=high,
            best=best,
            done=decreased & ~short,
        )

    def goes_on(bracket: _Bracket) -> Array:
        return ~bracket.done & (bracket.best.evaluations < trials)

    # Told from the first trial: one that a search has shrunk would look drowned anyway.
    clear = (decrease * slope > slack(value)) | ~jnp.asarray(hidden)
    zero = jnp.zeros((), dtype)
    none = Found(zero, value, residual, jnp.int32(0), jnp.array(False))
    start = _Bracket(jnp.ones((), dtype), zero, slope, infinity, none, jnp.array(False))
    return jax.lax.stop_gradient(jax.lax.while_loop(goes_on, evaluate, start).best)


def _next_trial(
    bracket: _Bracket, left: Array, low: Array, high: Array, short: Array
) -> Float[Array, ""]:
    """Between the ends of the bracket, or beyond its lower end while there is no upper one."""
    trial = bracket.trial
    bend = bracket.low_slope - left
    bend = jnp.where(bend > 0, bend, jnp.nan)
    # Where the slope, linear from the lower end of the bracket through the trial, vanishes.
    secant = bracket.low + (trial - bracket.low) * bracket.low_slope / bend
    width = high - low
    middle = low + 0.5 * width
    near = jnp.clip(secant, low + 0.1 * width, high - 0.1 * width)
    inside = jnp.where(jnp.isfinite(near), near, middle)
    outside = jnp.where(jnp.isfinite(secant), jnp.clip(secant, 2 * trial, 10 * trial), 4 * trial)
    return jnp.where(short & jnp.isinf(high), outside, inside)
