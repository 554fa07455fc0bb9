"""evaluate: the hypergradient of a cross-validation loss, all folds in one program."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

import bilevel as bl
from bilevel_solvers.search_models import Fold, LinearModel, Shared, Theta


@functools.partial(jax.jit, static_argnames=("model", "error"))
def evaluate(
    model: LinearModel,
    shared: Shared,
    folds: Fold,
    theta: Theta,
    x0: Array,
    adjoint_guess: Array | None,
    fidelity: bl.Fidelity | None,
    *,
    error: bool,
) -> bl.Hypergradient:
    """Mean test loss over the folds, and its gradient.

    **Arguments:**

    - `x0`, `adjoint_guess`: a start for each fold, along the first axis.
    - `error`: whether to estimate the truncation error, static.

    **Returns:** a `bl.Hypergradient` with the fields of both solutions along the folds. The
    error is at most the mean of theirs, which it says.
    """

    def outer_loss(fold: Fold) -> Callable[[Array, Theta], Array]:
        def loss(x: Array, theta: Theta) -> Array:
            del theta
            return model.outer_loss(x, shared, fold)

        return loss

    def one(x0: Array, guess: Array | None, fold: Fold) -> bl.Hypergradient:
        return bl.hypergradient(
            outer_loss(fold),
            model.problem(shared, fold),
            theta,
            x0,
            solver=model.solver(fold),
            estimator=model.estimator(),
            adjoint_guess=guess,
            fidelity=fidelity,
            error=error,
        )

    each = jax.vmap(one)(x0, adjoint_guess, folds)

    def mean(part: Any) -> Any:
        return jax.tree.map(
            lambda leaf: leaf if jnp.issubdtype(leaf.dtype, jnp.integer) else jnp.mean(leaf, 0),
            part,
        )

    return bl.Hypergradient(
        mean(each.value),
        mean(each.gradient),
        each.primal,
        each.adjoint,
        mean(each.error),
        each.cost,
    )
