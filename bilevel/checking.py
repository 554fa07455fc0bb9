"""What an inner problem's functions return, checked before anything runs."""

from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import PyTree

from bilevel.bound import BoundProblem
from bilevel.context import SCALARS_HINT, evaluating, is_list_of_scalars


def check_functions(bound: BoundProblem, x: PyTree, theta: PyTree = None) -> None:
    """Evaluate shapes and dtypes of what the problem is made of, at x.

    **Arguments:**

    - `theta`: what the problem was bound to, for the message.

    **Raises:** `TypeError` naming what does not fit x; an error of the functions
    themselves gets a note of where it came up.
    """
    kind = bound.name

    def evaluated(name: str, function: Callable[[Any], Any]) -> PyTree:
        with evaluating(f"{name} of {kind}", x=x, theta=theta):
            return jax.eval_shape(function, x)

    if bound.mapping is not None:
        check_like(f"{kind}: the mapping", evaluated("mapping(x, theta)", bound.mapping), x)
    if bound.rhs is not None:
        check_like(f"{kind}: the right-hand side", bound.rhs, x)
    operator = bound.operator
    if operator is not None and operator.matrix is not None:
        _check_matrix(kind, operator.matrix.shape, x)
    name = "residual(x, theta)" if bound.objective is None else "objective(x, theta)"
    if operator is not None:
        name = "rhs - operator.matvec(x)"
    try:
        outcome = evaluated(name, bound.residual)
    except Exception:
        if operator is not None:  # of the two parts, whichever is wrong says so itself
            image = evaluated("operator.matvec(x)", operator.matvec)
            check_like(f"{kind}: operator.matvec(x)", image, x)
        raise
    check_like(f"{kind}: the residual", outcome, x)


def check_like(what: str, outcome: PyTree, x: PyTree) -> None:
    """**Raises:** `TypeError` naming the leaf that is not like that of x."""
    expected, got = jax.tree.structure(x), jax.tree.structure(outcome)
    if expected != got:
        hint = SCALARS_HINT if is_list_of_scalars(x) else "Return a pytree like x."
        msg = f"{what} must have the structure of x0, {expected}, got {got}. {hint}"
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
                f"{what} at x{where} is {value.dtype}, but x0{where} is {leaf.dtype}. "
                f"{_of_one_dtype(value.dtype, where)}"
            )
            raise TypeError(msg)


def _of_one_dtype(dtype: Any, where: str) -> str:
    if not jax.numpy.issubdtype(dtype, jax.numpy.inexact) or jax.numpy.finfo(dtype).bits < 32:
        return f"Let it compute in the dtype of x, without a cast: .astype(x{where}.dtype)."
    return f"Give x0, theta and the data one dtype, for example x0.astype({dtype})."


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
