"""Taylor's test: does a derivative belong to its function."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from bilevel import vector
from bilevel.reverse_only import has_reverse_only
from bilevel.testing.conformance import flat_norm
from bilevel.testing.sample import inexact, random_like, with_inexact

ROUNDING = 4.0
"""Rounding errors of a function's value that are taken for granted, in units of its last place."""

CLEARANCE = 30.0
"""How far a remainder must stand out of the noise to count: 3 % of it may then be noise."""

FITTED = 4
"""Steps that the slope is fitted to: the smallest ones that stand out."""


@dataclasses.dataclass(frozen=True)
class TaylorResult:
    """What came out of a Taylor test.

    - `slope`: order of the remainder in the step. 2 for a right derivative, 1 for a wrong
        one, infinite for a function that is linear to rounding, and NaN where noise hides
        the remainder, so that `slope >= 1.95` is the test in every case.
    - `remainders`: ‖f(p + h v) - f(p) - h Df(p) v‖ for each step h.
    - `steps`: the steps h, falling.
    """

    slope: float
    remainders: tuple[float, ...]
    steps: tuple[float, ...]


def taylor_test(
    function: Callable[[Any], Any],
    point: PyTree,
    direction: PyTree | None = None,
    derivative: PyTree | Callable[[Any], Any] | None = None,
    *,
    steps: Sequence[float] | None = None,
    noise: float = 0.0,
    seed: int = 0,
) -> TaylorResult:
    """Measure the order of the remainder of a function's first-order Taylor expansion.

    The slope is fitted to the smallest steps whose remainder stands out of the noise:
    rounding, whatever the smallest three steps leave (a truncated inner solve makes a
    function noisy, too), and the noise given.

    **Arguments:**

    - `function`: function(p) -> a pytree of real or complex arrays, usually a scalar.
    - `point`: p, any pytree; leaves that are not float or complex stay as they are.
    - `direction`: v, like the point; by default a random one as long as the point (or of
        length 1 at zero). Real and imaginary parts are coordinates of their own.
    - `derivative`: the derivative under test: a gradient like the point, in JAX's
        convention (for scalar functions), or a function v -> Df(p) v. By default JAX's
        own derivative of `function`, in forward mode, or in reverse mode where the function
        has no other.
    - `steps`: h, falling; by default from 1/2 down to below the root of the rounding
        error, each a quarter of the last.
    - `noise`: absolute error of the function's values, in their units, if known.
    - `seed`: of the random direction.

    **Returns:** a [`TaylorResult`][].

    **Raises:** `TypeError` where a gradient is given, or is all there is, and the function
    returns no real scalar.

    >>> import jax.numpy as jnp
    >>> bool(taylor_test(jnp.exp, 1.0).slope >= 1.95)
    True
    >>> bool(taylor_test(jnp.exp, 1.0, derivative=2.7).slope >= 1.95)
    False
    """
    moving = inexact(point)
    if direction is None:
        length = flat_norm(moving) or 1.0
        direction = random_like(moving, seed)
        direction = vector.scale(length / flat_norm(direction), direction)
    else:
        direction = jax.tree.map(
            lambda leaf, entry: jnp.asarray(entry, leaf.dtype),
            moving,
            eqx.filter(jax.tree.map(jnp.asarray, direction), eqx.is_inexact_array),
        )
    value = function(with_inexact(point, moving))
    slope = _directional(function, point, moving, direction, derivative, value)
    if steps is None:
        steps = _default_steps(moving)
    remainders: list[float] = []
    for step in steps:
        moved = function(with_inexact(point, vector.add_scaled(moving, step, direction)))
        remainders.append(_remainder(moved, value, slope, step))
    tail = max(remainders[-3:]) if len(remainders) >= 2 * 3 else 0.0
    rounding = ROUNDING * _epsilon(value) * max(flat_norm(value), flat_norm(slope))
    order = _order(np.asarray(steps), np.asarray(remainders), rounding + noise, tail)
    return TaylorResult(order, tuple(remainders), tuple(float(step) for step in steps))


def _order(steps: np.ndarray, remainders: np.ndarray, known: float, tail: float) -> float:
    if not np.all(np.isfinite(remainders)):
        return float("nan")
    if remainders.max() <= CLEARANCE * known:
        return float("inf")
    clear = remainders > CLEARANCE * max(known, tail)
    # Only an unbroken run from the largest step on: what rises again is noise.
    count = len(clear) if clear.all() else int(np.argmin(clear))
    if count < 2:
        # A kink that the largest step alone crosses leaves a function that is linear beyond.
        return float("inf" if remainders[1:].max() <= CLEARANCE * known else "nan")
    chosen = slice(max(count - FITTED, 0), count)
    return float(np.polyfit(np.log(steps[chosen]), np.log(remainders[chosen]), 1)[0])


def _default_steps(point: PyTree) -> list[float]:
    smallest = 0.25 * np.sqrt(_epsilon(point))
    count = int(np.ceil(np.log(0.5 / smallest) / np.log(4.0))) + 2
    return [0.5 * 0.25**k for k in range(count)]


def _epsilon(tree: PyTree) -> float:
    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    return vector.epsilon([leaf for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.inexact)])


def _remainder(moved: PyTree, value: PyTree, slope: PyTree, step: float) -> float:
    return flat_norm(
        [
            np.asarray(a) - np.asarray(b) - step * np.asarray(c)
            for a, b, c in zip(
                jax.tree.leaves(moved), jax.tree.leaves(value), jax.tree.leaves(slope), strict=True
            )
        ]
    )


def _directional(
    function: Callable[[Any], Any],
    point: PyTree,
    moving: PyTree,
    direction: PyTree,
    derivative: PyTree | Callable[[Any], Any] | None,
    value: PyTree,
) -> PyTree:
    """Df(p) v by whichever derivative is under test."""

    def of_moving(moving: PyTree) -> Any:
        return function(with_inexact(point, moving))

    if callable(derivative):
        return derivative(with_inexact(point, direction))
    if derivative is None:
        try:
            return jax.jvp(of_moving, (moving,), (direction,))[1]
        except TypeError as error:
            if not has_reverse_only(error):
                raise
        gradient = jax.grad(of_moving)(moving)
    else:
        leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(value)]
        if len(leaves) != 1 or leaves[0].shape or jnp.iscomplexobj(leaves[0]):
            msg = (
                "taylor_test: a gradient belongs to a function that returns one real scalar, and "
                f"this one returns {value}. Give derivative= as a function v -> Df(p) v."
            )
            raise TypeError(msg)
        gradient = eqx.filter(jax.tree.map(jnp.asarray, derivative), eqx.is_inexact_array)
    # JAX's gradient of a real function is conjugate to the direction of steepest ascent.
    return vector.dot(vector.conjugate(gradient), direction)
