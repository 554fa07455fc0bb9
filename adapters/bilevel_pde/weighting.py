"""Weighting: operators with control volumes in their rows, back as they were discretised."""

import functools
import operator as operator_module
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from bilevel_pde.definiteness import Definiteness
from bilevel_pde.diffusion import Diffusion
from bilevel_pde.grid import Grid
from bilevel_pde.shift import shift_piece
from bilevel_pde.stencil import Stencil


def as_discretised(
    operator: Stencil | Diffusion, solve: Callable[[Stencil | Diffusion], Callable[[Any], Any]]
) -> Callable[[Array], Array]:
    """V -> C⁻¹ v for a weighted or transposed C, by what inverts plain operators.

    With the control volumes W a weighted C = W A has the inverse A⁻¹ W⁻¹, and a transposed
    one C = W (W⁻¹ C W) W⁻¹, whose middle is the adjoint with respect to ⟨u, W v⟩, a plain
    operator like A.

    **Arguments:**

    - `solve`: of a plain operator B, v -> B⁻¹ v or something near it.
    """
    grid = operator.grid
    form = operator.form if isinstance(operator, Stencil) else "plain"
    if isinstance(operator, Diffusion) and operator.row_weights:
        form = "weighted"
    factors = [weight for weight in grid.weights() if not np.all(weight == 1)]
    if form == "plain" or not factors:
        return solve(operator)
    inverse = solve(
        operator.unweighted() if isinstance(operator, Diffusion) else _plain(operator, factors)
    )
    weight = functools.reduce(operator_module.mul, factors)

    def apply(v: Array) -> Array:
        at_points = jnp.asarray(weight, v.dtype)
        solved = inverse(v / at_points)
        return solved * at_points if form == "transposed" else solved

    return apply


def without_mean(grid: Grid, v: Array) -> Array:
    """V less its mean over the domain."""
    share = volume_shares(grid).astype(v.dtype)
    return v - jnp.sum(share * v)


def volume_shares(grid: Grid) -> np.ndarray:
    """The part of the domain that each point stands for."""
    weight = np.broadcast_to(functools.reduce(operator_module.mul, grid.weights()), grid.shape)
    return weight / weight.sum()


def _plain(operator: Stencil, factors: list[np.ndarray]) -> Stencil:
    """W⁻¹ C of a weighted C, W⁻¹ C W of a transposed one."""
    grid = operator.grid
    periodic = tuple(grid.is_periodic(axis) for axis in range(grid.ndim))
    terms: dict[tuple[int, ...], tuple[Any, ...]] = {}
    for offset, parts in operator.terms.items():
        found = parts
        for weight in factors:
            factor = 1.0 / weight
            if operator.form == "transposed":
                factor = factor * shift_piece(weight, offset, periodic)
            found = tuple(part * factor for part in found)
        terms[offset] = found
    known = Definiteness(None, None, operator.definiteness.singular)
    return Stencil.folded(grid, terms, None, known)
