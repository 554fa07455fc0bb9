"""Two ways to compute the same: one that is fast, and one that has a derivative."""

from collections.abc import Callable
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from bilevel.perturbation import along, perturbed

V = TypeVar("V")


def evaluated_as(fast: Callable[[Any], V], slow: Callable[[Any], V], argument: PyTree) -> V:
    """fast(argument), which differentiates as slow(argument) does.

    Line searches of other libraries are loops without reverse mode, or on request loops of a
    fixed length, which have it and cost that length every time. So a solve runs the one, and
    only a derivative pays for the other.

    **Arguments:**

    - `fast`, `slow`: the same function of `argument`; arrays they captured are differentiated,
        too.

    >>> import jax
    >>> float(jax.grad(lambda x: evaluated_as(lambda x: x * x, lambda x: x**2, x))(3.0))
    6.0
    """
    functions = [eqx.filter_closure_convert(function, argument) for function in (fast, slow)]
    arrays, static = eqx.partition(functions, eqx.is_array)

    @jax.custom_jvp
    def known(arrays: Any, argument: Any) -> Any:
        # JAX hands constants over as Python numbers.
        arrays, argument = jax.tree.map(jnp.asarray, (arrays, argument))
        return eqx.combine(arrays, static)[0](argument)

    def rule(primals: Any, tangents: Any) -> Any:
        # Applied anew, so that a second derivative goes through the function as well.
        outcome = known(*primals)
        if not perturbed(tangents):
            return outcome, jax.tree.map(_nothing, outcome)

        def evaluated(inputs: Any) -> Any:
            arrays, argument = jax.tree.map(jnp.asarray, inputs)
            return eqx.combine(arrays, static)[1](argument)

        return outcome, along(evaluated, primals, tangents)

    known.defjvp(rule, symbolic_zeros=True)
    return known(arrays, argument)


def _nothing(leaf: Any) -> Any:
    if jnp.issubdtype(leaf.dtype, jnp.inexact):
        return jnp.zeros_like(leaf)
    return np.zeros(leaf.shape, jax.dtypes.float0)
