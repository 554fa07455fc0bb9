"""Mean shift: an operator on a grid plus a multiple of the mean, taken apart and inverted."""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from bilevel.bound import BoundProblem
from bilevel.solver.base import IncompatibleError
from bilevel_pde.diffusion import Diffusion
from bilevel_pde.mean_operator import Mean
from bilevel_pde.operator import Operator
from bilevel_pde.scaled import Scaled
from bilevel_pde.source import grid_operator, source_operator
from bilevel_pde.stencil import Stencil
from bilevel_pde.sum import Sum


def shifted_operator(problem: BoundProblem, name: str) -> tuple[Stencil | Diffusion, Any]:
    """A and c of a problem whose operator is A + c P on a regular grid, P being the mean.

    **Returns:** c is `None` where there is no P.

    **Raises:** `IncompatibleError` for another operator.
    """
    source = source_operator(problem, name)
    parts = [_factor(term) for term in source.terms] if isinstance(source, Sum) else []
    if all(part is None for part in parts):
        return grid_operator(problem, name), None
    assert isinstance(source, Sum)
    others = [term for term, part in zip(source.terms, parts, strict=True) if part is None]
    operator: Operator | None = functools.reduce(lambda a, b: a + b, others) if others else None
    if not isinstance(operator, Stencil | Diffusion):
        msg = (
            f"{name} cannot work on this sum: besides pde.Mean there should be one operator on a "
            "regular grid, a Stencil or a Diffusion. Use pde.SparseDirect."
        )
        raise IncompatibleError(msg)
    return operator, sum(part for part in parts if part is not None)


def with_mean(
    operator: Stencil | Diffusion, factor: Any, inverse: Callable[[Array], Array]
) -> Callable[[Array], Array]:
    """V -> (A + c P)⁻¹ v by v -> A⁻¹ v, or near it as that is.

    Where constants are in the kernel of A, A⁻¹ leaves them out and P is all that acts on
    them; otherwise the formula of Sherman and Morrison.

    **Arguments:**

    - `factor`: c.
    """
    grid = operator.grid
    if operator.singular:
        return lambda v: inverse(v) + jnp.mean(v) / jnp.asarray(factor, v.dtype)
    ones = jnp.ones(grid.shape, grid.dtype)
    of_ones = inverse(ones)
    ratio = factor / (1.0 + factor * jnp.mean(of_ones))

    def apply(v: Array) -> Array:
        solved = inverse(v)
        return solved - (ratio * jnp.mean(solved) * of_ones).astype(v.dtype)

    return apply


def _factor(term: Operator) -> Any:
    """C of c P; `None` of another operator."""
    if isinstance(term, Mean):
        return 1.0
    return term.factor if isinstance(term, Scaled) and isinstance(term.operator, Mean) else None
