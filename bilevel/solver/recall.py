"""A function value that is known already, with the derivative of the function."""

from collections.abc import Callable
from typing import Any, TypeVar

import equinox as eqx
import jax
from jaxtyping import PyTree

from bilevel import vector
from bilevel.perturbation import along, perturbed

V = TypeVar("V")


def recall(function: Callable[[Any], V], x: PyTree, value: V) -> V:
    """function(x), not evaluated but taken from `value`; it differentiates as function(x) does.

    A line search evaluates the residual at the point it accepts, but none of what it does
    may be differentiated.  The next step needs that residual with its derivative: it
    would otherwise be evaluated twice in every iteration, derivative wanted or not.

    **Arguments:**

    - `function`: of x; arrays it captured are differentiated, too.
    - `value`: function(x), computed before.
    """
    closed = eqx.filter_closure_convert(function, x)
    arrays, static = eqx.partition(closed, eqx.is_array)

    @jax.custom_jvp
    def known(arrays: Any, x: Any, value: Any) -> Any:
        del arrays, x
        return value

    def rule(primals: Any, tangents: Any) -> Any:
        arrays, x, value = primals
        # Applied anew, so that a second derivative goes through the function as well.
        outcome = known(arrays, x, value)
        if not perturbed(tangents[:2]):
            return outcome, vector.zeros_like(outcome)

        def evaluated(inputs: Any) -> Any:
            arrays, x = inputs
            return eqx.combine(arrays, static)(x)

        return outcome, along(evaluated, (arrays, x), tangents[:2])

    known.defjvp(rule, symbolic_zeros=True)
    return known(arrays, x, jax.lax.stop_gradient(value))
