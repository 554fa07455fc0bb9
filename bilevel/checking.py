"""What an inner problem's functions return, checked before anything runs."""

from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import PyTree

from bilevel.bound import BoundProblem


def check_functions(bound: BoundProblem, x: PyTree) -> None:
    """Evaluate shapes and dtypes of what the problem is made of, at x.

    **Raises:** `TypeError` naming what does not fit x; an error of the functions
    themselves gets a note of where it came up.
    """
    kind = bound.name
    if bound.mapping is not None:
        check_like(f"{kind}: the mapping", _evaluated(kind, "mapping", bound.mapping, x), x)
    if bound.rhs is not None:
        check_like(f"{kind}: the right-hand side", bound.rhs, x)
    operator = bound.operator
    if operator is not None and operator.matrix is not None:
        _check_matrix(kind, operator.matrix.shape, x)
    check_like(f"{kind}: the residual", _evaluated(kind, "residual", bound.residual, x), x)


def check_like(what: str, outcome: PyTree, x: PyTree) -> None:
    """**Raises:** `TypeError` naming the leaf that is not like that of x."""
    expected, got = jax.tree.structure(x), jax.tree.structure(outcome)
    if expected != got:
        msg = (
            f"{what} must have the structure of x0, {expected}, got {got}. Return a pytree like x."
        )
        raise TypeError(msg)
    pairs = zip(jax.tree_util.tree_leaves_with_path(x), jax.tree.leaves(outcome), strict=True)
    for (path, leaf), value in pairs:
        where = jax.tree_util.keystr(path)
        if leaf.shape != value.shape:
            msg = (
                f"{what} at x{where} has shape {value.shape}, expected {leaf.shape} as x0 has. "
                "Check the shapes of what the problem computes, and of x0."
            )
            raise TypeError(msg)
        if leaf.dtype != value.dtype:
            msg = (
                f"{what} at x{where} is {value.dtype}, but x0{where} is {leaf.dtype}. Give x0, "
                f"theta and the data one dtype, for example x0.astype({value.dtype})."
            )
            raise TypeError(msg)


def _evaluated(kind: str, name: str, function: Callable[[Any], Any], x: PyTree) -> PyTree:
    try:
        return jax.eval_shape(function, x)
    except Exception as error:
        leaves = jax.tree.leaves(x)
        shapes = ", ".join(f"{leaf.dtype}{list(leaf.shape)}" for leaf in leaves)
        error.add_note(f"{kind}: this came up in its {name}, evaluated at an x of {shapes}.")
        raise


def _check_matrix(kind: str, shape: tuple[int, ...], x: PyTree) -> None:
    leaves = jax.tree.leaves(x)
    if len(leaves) != 1 or leaves[0].ndim == 0 or leaves[0].shape[0] != shape[0]:
        shapes = ", ".join(str(leaf.shape) for leaf in leaves)
        msg = (
            f"{kind}: a matrix of shape {shape} acts on one array of {shape[0]} entries, got x0 of "
            f"shape {shapes}. Give x0 the shape ({shape[0]},), or the operator as a function "
            "v -> A v."
        )
        raise TypeError(msg)
