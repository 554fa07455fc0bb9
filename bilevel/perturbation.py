"""Derivatives of custom rules, along the inputs that are perturbed and no others."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from bilevel import vector


def is_zero(tangent: Any) -> bool:
    """Whether a tangent of a rule with symbolic zeros is one."""
    return isinstance(tangent, jax.custom_derivatives.SymbolicZero)


def perturbed(tangents: PyTree) -> bool:
    """Whether any tangent is not zero."""
    return not all(is_zero(leaf) for leaf in jax.tree.leaves(tangents, is_leaf=is_zero))


def instantiate(tangents: PyTree) -> PyTree:
    """The tangents with arrays of zeros for symbolic ones."""
    return jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype) if is_zero(leaf) else leaf,
        tangents,
        is_leaf=is_zero,
    )


def along(function: Callable[[Any], Any], inputs: PyTree, tangents: PyTree) -> PyTree:
    """∂ function · tangents over the perturbed inputs alone: a constant matrix costs nothing.

    At least one of the tangents must be perturbed.
    """
    leaves, treedef = jax.tree.flatten(inputs)
    directions = jax.tree.leaves(tangents, is_leaf=is_zero)
    moving = [i for i, direction in enumerate(directions) if not is_zero(direction)]

    def moved(parts: list[Any]) -> Any:
        merged = list(leaves)
        for index, part in zip(moving, parts, strict=True):
            merged[index] = part
        return function(jax.tree.unflatten(treedef, merged))

    _, tangent = jax.jvp(moved, ([leaves[i] for i in moving],), ([directions[i] for i in moving],))
    return tangent


@jax.custom_jvp
def with_derivative_of(value: PyTree, moved: PyTree, trust: Array) -> PyTree:
    """`value`, with the derivative of `moved` times `trust`.

    With NaN for `trust` a failure keeps its last iterate and gets no derivative that looks
    like one.
    """
    del moved, trust
    return value


@with_derivative_of.defjvp
def _with_derivative_of_jvp(primals: Any, tangents: Any) -> Any:
    _, _, trust = primals
    _, direction, _ = tangents
    # Applied anew, so that a second derivative sees how the value moves.
    return with_derivative_of(*primals), vector.scale(trust, direction)
