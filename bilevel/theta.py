"""θ: what may be differentiated, and whether anything reads it."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from bilevel.context import evaluating
from bilevel.dependence import reads
from bilevel.problem import InnerProblem

_NEEDS_VALUES = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
)


def require_differentiable(theta: PyTree) -> None:
    """**Raises:** `TypeError` for a θ of which no leaf is a float or complex array."""
    leaves = jax.tree_util.tree_leaves_with_path(theta)
    if not leaves or any(eqx.is_inexact_array(leaf) for _, leaf in leaves):
        return
    kinds = ", ".join(
        f"theta{jax.tree_util.keystr(path)} is {getattr(leaf, 'dtype', type(leaf).__name__)}"
        for path, leaf in leaves
    )
    msg = (
        f"theta must hold a float or complex array to differentiate, and {kinds}. Write 3.0 for 3."
    )
    raise TypeError(msg)


def require_read(
    outer_loss: Callable[[Any, Any], Array],
    problem: InnerProblem,
    moving: PyTree,
    with_theta: Callable[[PyTree], PyTree],
    x0: PyTree,
) -> None:
    """Refuse a θ that nothing reads, whose gradient would be zero without a word.

    **Arguments:**

    - `moving`: the differentiable leaves of θ, which `with_theta` completes.

    **Raises:** `ValueError`.
    """

    def all_of_it(moving: PyTree) -> Any:
        theta = with_theta(moving)
        return evaluated(problem, theta, x0), outer_value(outer_loss, x0, theta)

    try:
        if not jax.tree.leaves(moving) or reads(all_of_it, moving):
            return
    except _NEEDS_VALUES:
        return  # it may do without tracing, and says so itself where it cannot
    msg = (
        "nothing reads theta: neither the problem nor outer_loss depends on it, and its gradient "
        "would be zero. Was it captured? Pass it as an argument: use the theta that the functions "
        "are given, not the variable outside."
    )
    raise ValueError(msg)


def outer_value(outer_loss: Callable[[Any, Any], Array], x: PyTree, theta: PyTree) -> Array:
    """outer_loss(x, theta), a real scalar.

    **Raises:** `TypeError` for anything else.
    """
    with evaluating("outer_loss(x, theta)", x=x, theta=theta):
        value = jnp.asarray(outer_loss(x, theta))
    if value.ndim != 0 or not jnp.issubdtype(value.dtype, jnp.floating):
        msg = (
            f"outer_loss(x, theta) must return a real scalar, got shape {value.shape} of "
            f"{value.dtype}. Take the mean or the sum."
        )
        raise TypeError(msg)
    return value


def evaluated(problem: InnerProblem, theta: PyTree, x: PyTree) -> Any:
    """All that a problem computes of θ: its residual, and its objective where it has one."""
    bound = problem.at(theta)
    return bound.residual(x), None if bound.objective is None else bound.objective(x)
