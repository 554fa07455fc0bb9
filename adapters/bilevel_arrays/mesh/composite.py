"""Composites on blocks: sums, multiples and products of operators, and the mean."""

import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from bilevel_arrays.mesh.block_diffusion import BlockDiffusion
from bilevel_arrays.mesh.block_stencil import BlockStencil
from bilevel_arrays.mesh.halo import Reach
from bilevel_arrays.mesh.layout import Layout
from bilevel_pde.diffusion import Diffusion
from bilevel_pde.grid import Grid
from bilevel_pde.materialise import materialise
from bilevel_pde.mean_operator import Mean
from bilevel_pde.operator import Operator
from bilevel_pde.product import Product
from bilevel_pde.scaled import Scaled
from bilevel_pde.stencil import Stencil
from bilevel_pde.sum import Sum


class BlockSum(eqx.Module):
    """A + B + ... of blocks."""

    terms: tuple[Any, ...]

    def matvec(self, v: Array) -> Array:
        """A v + B v + ..."""
        return functools.reduce(jnp.add, (term.matvec(v) for term in self.terms))

    def diagonal(self) -> Array:
        """The sum of the diagonals."""
        return functools.reduce(jnp.add, (term.diagonal() for term in self.terms))


class BlockScaled(eqx.Module):
    """C A of blocks."""

    factor: Any
    term: Any

    def matvec(self, v: Array) -> Array:
        """C A v."""
        return jnp.asarray(self.factor).astype(jnp.finfo(v.dtype).dtype) * self.term.matvec(v)

    def diagonal(self) -> Array:
        """C times the diagonal."""
        diagonal = self.term.diagonal()
        return jnp.asarray(self.factor).astype(diagonal.dtype) * diagonal


class BlockProduct(eqx.Module):
    """A B of blocks."""

    left: Any
    right: Any

    def matvec(self, v: Array) -> Array:
        """A (B v)."""
        return self.left.matvec(materialise(self.right.matvec(v)))


class BlockMean(eqx.Module):
    """The mean over all blocks at every point."""

    grid: Grid = eqx.field(static=True)
    layout: Layout = eqx.field(static=True)

    def matvec(self, v: Array) -> Array:
        """The mean of v."""
        mean = self.layout.total(jnp.sum(v)) / self.grid.size
        return jnp.broadcast_to(mean, v.shape)

    def diagonal(self) -> Array:
        """One over the number of points."""
        shape = self.layout.block(self.grid.shape)
        return jnp.full(shape, 1.0 / self.grid.size, self.grid.dtype)


def in_blocks(operator: Operator, layout: Layout, *, within: bool = False) -> Any:
    """An operator as the devices apply it.

    **Arguments:**

    - `within`: whether this is done within `shard_map`, where all of the operator is there.

    **Raises:** `TypeError` for one of another kind, `ValueError` for one on another grid and for
    blocks that are too thin.
    """
    if isinstance(operator, Stencil):
        return BlockStencil.of(operator, layout)
    if isinstance(operator, Diffusion):
        return BlockDiffusion.of(operator, layout, within=within)
    if isinstance(operator, Mean):
        return BlockMean(operator.grid, layout)
    if isinstance(operator, Scaled):
        return BlockScaled(operator.factor, in_blocks(operator.operator, layout, within=within))
    if isinstance(operator, Sum):
        return BlockSum(tuple(in_blocks(term, layout, within=within) for term in operator.terms))
    if isinstance(operator, Product):
        return BlockProduct(
            in_blocks(operator.left, layout, within=within),
            in_blocks(operator.right, layout, within=within),
        )
    msg = (
        "partition: operator should be one on a regular grid, a Stencil, a Diffusion or a Mean, or "
        f"made of those by sums, multiples and products, got {type(operator).__name__}. Matrices "
        "from SciPy, staggered grids and blocks of operators are on one device only."
    )
    raise TypeError(msg)


def grid_of(operator: Operator) -> Grid:
    """The grid of an operator, or of the first part of it.

    **Raises:** `TypeError` where there is none.
    """
    part: Any = operator
    while isinstance(part, Sum | Scaled | Product):
        if isinstance(part, Sum):
            part = part.terms[0]
        else:
            part = part.operator if isinstance(part, Scaled) else part.left
    grid = getattr(part, "grid", None)
    if not isinstance(grid, Grid):
        msg = (
            "partition: operator should be one on a regular grid, such as -pde.laplacian(grid) or "
            f"pde.Diffusion(grid, k), got {type(part).__name__}."
        )
        raise TypeError(msg)
    return grid


def has_diagonal(block: Any) -> bool:
    """Whether an operator on blocks knows its diagonal: not where it has a product in it."""
    if isinstance(block, BlockSum):
        return all(has_diagonal(term) for term in block.terms)
    if isinstance(block, BlockScaled):
        return has_diagonal(block.term)
    return not isinstance(block, BlockProduct)


def reaches(block: Any) -> list[Reach]:
    """What is read of the neighbours, once for each exchange of an application."""
    if isinstance(block, BlockStencil | BlockDiffusion):
        return [block.reach]
    if isinstance(block, BlockSum):
        return [reach for term in block.terms for reach in reaches(term)]
    if isinstance(block, BlockScaled):
        return reaches(block.term)
    if isinstance(block, BlockProduct):
        return [*reaches(block.right), *reaches(block.left)]
    return []


def specs_of(tree: Any, layout: Layout) -> Any:
    """How the arrays of an operator on blocks lie on the mesh."""
    return jax.tree.map(lambda leaf: layout.spec_of(jnp.shape(leaf)), tree)
