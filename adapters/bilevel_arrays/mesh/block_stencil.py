"""Stencils on blocks: what one device does of an operator on a grid."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array

from bilevel_arrays.mesh.halo import Halos, Offset, Reach
from bilevel_arrays.mesh.layout import Layout
from bilevel_pde.grid import Grid
from bilevel_pde.grid_colours import colour_lines
from bilevel_pde.stencil import Stencil

Pieces = tuple[Any, ...]


class BlockStencil(eqx.Module):
    """A stencil whose coefficients lie on the mesh as fields do.

    Outside of `shard_map` coefficients are whole, inside of it they are blocks; so are those
    of the other operators on blocks.
    """

    grid: Grid = eqx.field(static=True)
    layout: Layout = eqx.field(static=True)
    offsets: tuple[Offset, ...] = eqx.field(static=True)
    coefficients: tuple[Pieces, ...]

    @classmethod
    def of(cls, operator: Stencil, layout: Layout) -> "BlockStencil":
        """The stencil in blocks.

        **Raises:** `ValueError` for blocks thinner than what the stencil reads of a neighbour.
        """
        made = cls(operator.grid, layout, operator.offsets, operator.coefficients)
        made.reach.check("Stencil", layout, operator.grid.shape)
        return made

    @property
    def reach(self) -> Reach:
        """What is read of the neighbours."""
        return Reach.of(self.layout, self.offsets)

    def matvec(self, v: Array) -> Array:
        """A v, of blocks."""
        around = Halos(v, self.layout, self.reach, periodic_axes(self.grid))
        total: Any = None
        for offset, parts in zip(self.offsets, self.coefficients, strict=True):
            moved = around.moved(offset) if any(offset) else v
            for piece in parts:
                term = in_precision(piece, v) * moved
                total = term if total is None else total + term
        return total

    def coefficient(self, offset: Offset) -> Array:
        """The coefficient of an offset at the block's points."""
        total = jnp.zeros(self.layout.block(self.grid.shape), self.grid.dtype)
        for known, parts in zip(self.offsets, self.coefficients, strict=True):
            if known == offset:
                for piece in parts:
                    total += piece
        return total

    def diagonal(self) -> Array:
        """The diagonal at the block's points."""
        return self.coefficient((0,) * self.grid.ndim)

    def colours(self) -> tuple[Array, int]:
        """Colours of the block's points for Gauss-Seidel, and how many there are."""
        return block_colours(self.grid, self.layout, self.offsets)


def block_colours(grid: Grid, layout: Layout, offsets: tuple[Offset, ...]) -> tuple[Array, int]:
    """The part of a grid's colours that a block has, within `shard_map`."""
    lines, count = colour_lines(grid.shape, periodic_axes(grid), offsets)
    total: Any = 0
    for axis, line in enumerate(lines):
        shape = tuple(-1 if d == axis else 1 for d in range(grid.ndim))
        field = jnp.asarray(line.reshape(shape), jnp.int32)
        total = total + layout.own(field, layout.spec_of(field.shape))
    return total % count, count


def periodic_axes(grid: Grid) -> tuple[bool, ...]:
    """Which axes close on themselves."""
    return tuple(grid.is_periodic(axis) for axis in range(grid.ndim))


def in_precision(piece: Any, v: Array) -> Any:
    """A coefficient in the precision of the field."""
    return jnp.asarray(piece).astype(jnp.finfo(v.dtype).dtype)
