"""Proximal operators: the non-smooth terms of a composite objective."""

import abc
import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, PyTree


class ProximalOperator(eqx.Module):
    """A convex function h(x, θ) by its proximal operator; subclass it for your own.

    prox(z, γ, θ) = argmin over x of γ h(x, θ) + ½ ‖x - z‖².  Parikh and Boyd 2014 list many.
    The shortest one:

    >>> import jax.numpy as jnp, bilevel as bl
    >>> class HalfSquare(bl.ProximalOperator):
    ...     separable = True
    ...
    ...     def __call__(self, z, step, theta):
    ...         return z / (1 + step)
    >>> problem = bl.CompositeMinimization(lambda x, theta: 0.5 * (x - theta) ** 2, HalfSquare())
    >>> round(float(bl.solve(problem, 4.0, 0.0).value), 4)
    2.0

    What a subclass may declare:

    - `separable`: each entry of the result depends on the same real entry of z alone.
        The systems of the derivative are then symmetric, and live on the support.
    - `pinned`: where that dependence vanishes (off the support, at a bound) the result
        does not move with θ either. Saves a Hessian product where it is true.
    """

    separable: ClassVar[bool] = False

    @property
    def pinned(self) -> bool:
        """Whether entries off the support stay where they are as θ moves."""
        return False

    @abc.abstractmethod
    def __call__(self, z: PyTree, step: Array | float, theta: PyTree) -> PyTree:
        """The proximal operator of `step` · h(·, θ) at z, like z."""

    def check(self, x: PyTree) -> None:
        """**Raises:** `TypeError` for an unknown of the wrong kind."""


class L1(ProximalOperator):
    """h = Σ w |x|: soft thresholding, which makes x sparse (lasso).

    **Arguments:**

    - `weight`: w >= 0 in units of the objective over units of x: a number, an array that
        broadcasts to x, a pytree of such like x, or a function of θ that returns one.
        For complex x it shrinks the modulus.

    **Raises:** `ValueError` for a negative weight.

    >>> import jax.numpy as jnp, bilevel as bl
    >>> [float(v) for v in bl.L1(1.0)(jnp.array([3.0, -0.5]), 1.0, None)]
    [2.0, 0.0]
    """

    separable: ClassVar[bool] = True

    weight: Any

    def __check_init__(self) -> None:
        """Validate the weight where it is concrete."""
        _not_negative("L1", "weight", self.weight)

    @property
    def pinned(self) -> bool:
        """Entries off the support are zero."""
        return True

    def __call__(self, z: PyTree, step: Array | float, theta: PyTree) -> PyTree:
        """Shrink every entry by step · w, to zero at most."""
        return _leafwise(
            lambda leaf, weight: _shrink(leaf, jnp.asarray(step, weight.dtype) * weight),
            z,
            (parameter("L1", "weight", self.weight, theta, z),),
        )


class ElasticNet(ProximalOperator):
    """h = Σ w |x| + ½ Σ q |x|²: soft thresholding and shrinking (Zou and Hastie 2005).

    **Arguments:**

    - `weight`: w >= 0, as in [`L1`][].
    - `quadratic`: q >= 0, given in the same ways.

    **Raises:** `ValueError` for a negative weight.

    >>> import jax.numpy as jnp, bilevel as bl
    >>> [float(v) for v in bl.ElasticNet(1.0, 1.0)(jnp.array([3.0, -0.5]), 1.0, None)]
    [1.0, 0.0]
    """

    separable: ClassVar[bool] = True

    weight: Any
    quadratic: Any

    def __check_init__(self) -> None:
        """Validate the weights where they are concrete."""
        _not_negative("ElasticNet", "weight", self.weight)
        _not_negative("ElasticNet", "quadratic", self.quadratic)

    @property
    def pinned(self) -> bool:
        """Entries off the support are zero."""
        return True

    def __call__(self, z: PyTree, step: Array | float, theta: PyTree) -> PyTree:
        """Shrink by step · w, then divide by 1 + step · q."""

        def apply(leaf: Array, weight: Array, quadratic: Array) -> Array:
            length = jnp.asarray(step, weight.dtype)
            return _shrink(leaf, length * weight) / (1 + length * quadratic)

        weights = (
            parameter("ElasticNet", "weight", self.weight, theta, z),
            parameter("ElasticNet", "quadratic", self.quadratic, theta, z),
        )
        return _leafwise(apply, z, weights)


class NonNegative(ProximalOperator):
    """h = 0 where every entry is at least 0, infinite elsewhere: projection.

    >>> import jax.numpy as jnp, bilevel as bl
    >>> [float(v) for v in bl.NonNegative()(jnp.array([3.0, -0.5]), 1.0, None)]
    [3.0, 0.0]
    """

    separable: ClassVar[bool] = True

    @property
    def pinned(self) -> bool:
        """Entries at the bound are zero."""
        return True

    def __call__(self, z: PyTree, step: Array | float, theta: PyTree) -> PyTree:
        """Set negative entries to zero."""
        del step, theta
        # Written so that NaN stays NaN.
        return jax.tree.map(lambda leaf: jnp.where(leaf < 0, 0, leaf).astype(leaf.dtype), z)

    def check(self, x: PyTree) -> None:
        """Refuse complex unknowns."""
        _real("NonNegative", x)


class Box(ProximalOperator):
    """h = 0 where lower <= x <= upper, infinite elsewhere: projection.

    **Arguments:**

    - `lower`, `upper`: bounds in the units of x: numbers, arrays that broadcast to x,
        pytrees of such like x, or functions of θ that return one; infinite for none.

    **Raises:** `ValueError` for bounds that cross, where they are plain numbers.

    >>> import jax.numpy as jnp, bilevel as bl
    >>> [float(v) for v in bl.Box(0.0, 1.0)(jnp.array([3.0, 0.5, -1.0]), 1.0, None)]
    [1.0, 0.5, 0.0]
    """

    separable: ClassVar[bool] = True

    lower: Any
    upper: Any
    fixed: bool = eqx.field(static=True)

    def __init__(self, lower: Any = -math.inf, upper: Any = math.inf):
        self.lower = lower
        self.upper = upper
        # An array may have come from θ through a closure: only plain numbers certainly did not.
        self.fixed = isinstance(lower, int | float) and isinstance(upper, int | float)
        if self.fixed and not lower <= upper:
            msg = f"Box: lower must not exceed upper, got {lower} and {upper}."
            raise ValueError(msg)

    @property
    def pinned(self) -> bool:
        """Whether the bounds are plain numbers."""
        return self.fixed

    def __call__(self, z: PyTree, step: Array | float, theta: PyTree) -> PyTree:
        """Move entries that are outside to the bound."""
        del step
        bounds = (
            parameter("Box", "lower", self.lower, theta, z),
            parameter("Box", "upper", self.upper, theta, z),
        )
        return _leafwise(_clip, z, bounds)

    def check(self, x: PyTree) -> None:
        """Refuse complex unknowns."""
        _real("Box", x)


class Proximal(ProximalOperator):
    """A proximal operator given as a function, of which nothing else is known.

    **Arguments:**

    - `function`: function(z, step, theta) -> like z.
    """

    function: Callable[[Any, Any, Any], Any]

    def __call__(self, z: PyTree, step: Array | float, theta: PyTree) -> PyTree:
        """The user's function."""
        return self.function(z, step, theta)


@dataclasses.dataclass(frozen=True)
class ProximalParts:
    """A composite objective at one θ, in the parts that proximal methods use.

    - `objective`: x -> the smooth part g; `gradient`: x -> its direction of steepest ascent.
    - `proximal`: (z, step) -> prox of step · h at z.
    - `step`: the γ of the residual.
    """

    objective: Callable[[Any], Array]
    gradient: Callable[[Any], Any]
    proximal: Callable[[Any, Any], Any]
    step: Float[Array, ""]


def parameter(owner: str, name: str, given: Any, theta: PyTree, x: PyTree) -> PyTree:
    """A parameter at θ as a pytree like x: one array for every leaf, in its real dtype.

    **Raises:** `TypeError` for another structure, `ValueError` for a shape that does not
    broadcast.
    """
    value: Any = given(theta) if callable(given) else given
    treedef = jax.tree.structure(x)
    if jax.tree.structure(value) == jax.tree.structure(0):
        value = jax.tree.unflatten(treedef, [value] * treedef.num_leaves)
    if jax.tree.structure(value) != treedef:
        msg = (
            f"{owner}: {name} must be one number or array, or a pytree like x, {treedef}, got "
            f"{jax.tree.structure(value)}."
        )
        raise TypeError(msg)

    def fit(leaf: Array, part: Any) -> Array:
        array = jnp.asarray(part)
        try:
            fits = np.broadcast_shapes(leaf.shape, array.shape) == leaf.shape
        except ValueError:
            fits = False
        if not fits:
            msg = (
                f"{owner}: {name} has shape {array.shape}, which does not broadcast to the "
                f"unknown's {leaf.shape}."
            )
            raise ValueError(msg)
        return array.astype(jnp.finfo(leaf.dtype).dtype)

    return jax.tree.map(fit, x, value)


def _leafwise(function: Callable[..., Array], z: PyTree, parameters: tuple[PyTree, ...]) -> PyTree:
    return jax.tree.map(function, z, *parameters)


def _shrink(z: Array, threshold: Array) -> Array:
    # The tests are false for NaN, which so stays NaN; derivatives are those of the branch taken.
    modulus = jnp.abs(jax.lax.stop_gradient(z))
    inside = modulus < threshold
    if not jnp.iscomplexobj(z):
        return jnp.where(inside, 0, z - threshold * jnp.sign(z)).astype(z.dtype)
    outer = jnp.where(inside | (modulus == 0), 1, z)
    return jnp.where(inside, 0, z - threshold * jnp.where(modulus == 0, 0, outer / jnp.abs(outer)))


def _clip(z: Array, lower: Array, upper: Array) -> Array:
    inside = jnp.where(z < lower, lower, jnp.where(z > upper, upper, z))
    # A bound that is NaN compares as false everywhere.
    return jnp.where(jnp.isnan(lower) | jnp.isnan(upper), jnp.nan, inside)


def _not_negative(owner: str, name: str, given: Any) -> None:
    if callable(given):
        return
    for leaf in jax.tree.leaves(given):
        if isinstance(leaf, Tracer):
            continue
        smallest = float(jnp.min(jnp.asarray(leaf)))
        if smallest < 0:
            msg = f"{owner}: {name} must not be negative, got {smallest}."
            raise ValueError(msg)


def _real(owner: str, x: PyTree) -> None:
    if any(jnp.iscomplexobj(leaf) for leaf in jax.tree.leaves(x)):
        msg = (
            f"{owner}: bounds need real unknowns, got complex ones. Split them into real and "
            "imaginary parts."
        )
        raise TypeError(msg)
