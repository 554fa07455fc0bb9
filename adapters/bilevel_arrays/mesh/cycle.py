"""Cycles: geometric multigrid whose fine grids are cut into blocks, and coarse ones gathered."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array

from bilevel.bound import BoundProblem
from bilevel_arrays.mesh.block_diffusion import axis_offsets
from bilevel_arrays.mesh.block_interpolation import BlockInterpolation
from bilevel_arrays.mesh.block_transfer import BlockTransfer, Gathering
from bilevel_arrays.mesh.composite import in_blocks, specs_of
from bilevel_arrays.mesh.halo import Reach
from bilevel_arrays.mesh.layout import Layout
from bilevel_pde.coarsening import Transfer
from bilevel_pde.diffusion import Diffusion
from bilevel_pde.galerkin import Interpolation
from bilevel_pde.mean_shift import shifted_operator, with_mean
from bilevel_pde.multigrid import Levels, Multigrid
from bilevel_pde.smoother import Smoother
from bilevel_pde.smoother import grid_of as grid_of_level
from bilevel_pde.stencil import Stencil


class Plan(eqx.Module):
    """The levels of a cycle as the devices hold them.

    - `cut`: operators and transfers of the grids that are cut into blocks.
    - `gathered`: those of the grids that every device holds whole, and the coarsest inverse.
    """

    cut: list[tuple[Any, Any]]
    gathered: tuple[Any, Any]


def multigrid_inverse(
    multigrid: Multigrid, problem: BoundProblem, partitioned: Any
) -> Callable[[Array], Array]:
    """V -> M⁻¹ v for a problem whose operator is a partitioned one."""
    assert problem.operator is not None
    layout: Layout = partitioned.layout
    whole = dataclasses.replace(problem.operator, source=partitioned.operator)
    operator, factor = shifted_operator(dataclasses.replace(problem, operator=whole), "Multigrid")
    inverse = multigrid.inverse(operator, partial(_descent, layout))
    return inverse if factor is None else with_mean(operator, factor, inverse)


def _descent(
    layout: Layout, multigrid: Multigrid, smoother: Smoother, operator: Stencil | Diffusion
) -> Callable[[Array], Array]:
    """The bare cycle, in blocks."""
    arrays, specs, static = _prepared(layout, multigrid, operator)

    def body(arrays: Any, v: Array) -> Array:
        plan = eqx.combine(arrays, static)
        levels, coarsest = plan.gathered
        if plan.cut:
            return multigrid.descend(smoother, [*plan.cut, *levels], coarsest, v)
        solved = multigrid.descend(smoother, levels, coarsest, layout.whole(v))
        return layout.own(solved, layout.spec)

    # Every result depends on the device, and every sum over devices is in a transpose: what the
    # check of types would find is known, and transposes within it need none.
    cycle = jax.shard_map(
        body,
        mesh=layout.mesh,
        in_specs=(specs, layout.spec),
        out_specs=layout.spec,
        check_vma=False,
    )
    return partial(cycle, arrays)


def _prepared(layout: Layout, multigrid: Multigrid, operator: Any) -> tuple[Any, Any, Any]:
    """The arrays of a plan, how they lie on the mesh, and what of it is no array.

    Coarse operators are made of the whole coefficients, on every device: fields of coefficients are
    gathered for this once, and each device keeps its block.
    """
    given, fixed = eqx.partition(operator, lambda leaf: isinstance(leaf, jax.Array))
    held: list[Any] = []

    def build(given: Any) -> Any:
        levels, coarsest = multigrid.levels_of(eqx.combine(given, fixed))
        plan = arranged(layout, levels, coarsest)
        arrays, static = eqx.partition(plan, eqx.is_array)
        held[:] = [static]
        return jax.tree.map(jnp.asarray, arrays)

    shapes = jax.eval_shape(build, given)
    specs = Plan(
        [(specs_of(block, layout), _specs(transfer, layout)) for block, transfer in shapes.cut],
        everywhere(shapes.gathered),
    )

    def body(given: Any) -> Any:
        return jax.tree.map(layout.own, build(given), specs)

    arrays = jax.shard_map(body, mesh=layout.mesh, in_specs=(everywhere(given),), out_specs=specs)(
        given
    )
    return arrays, specs, held[0]


def everywhere(tree: Any) -> Any:
    """That arrays are whole on every device."""
    return jax.tree.map(lambda _: PartitionSpec(), tree)


def _specs(transfer: Any, layout: Layout) -> Any:
    return everywhere(transfer) if isinstance(transfer, Gathering) else specs_of(transfer, layout)


def arranged(layout: Layout, levels: Levels, coarsest: Any) -> Plan:
    """Which levels are cut into blocks: the first ones, as long as blocks are large enough."""
    count = cut_levels(layout, levels)
    cut: list[tuple[Any, Any]] = []
    for level in range(count):
        operator, transfer = levels[level]
        found = transfer_in_blocks(layout, transfer, gathered=level + 1 == count)
        cut.append((in_blocks(operator, layout, within=True), found or Gathering(layout, transfer)))
    return Plan(cut, (levels[count:], coarsest))


def transfer_in_blocks(
    layout: Layout, transfer: Transfer | Interpolation, *, gathered: bool
) -> BlockTransfer | BlockInterpolation | None:
    """A transfer between two grids that are cut alike; `None` where they cannot be."""
    if isinstance(transfer, Transfer):
        return BlockTransfer.of(layout, transfer, gathered=gathered)
    return BlockInterpolation.of(layout, transfer, gathered=gathered)


def cut_levels(layout: Layout, levels: Levels) -> int:
    """How many of the finest grids are cut into blocks; the coarsest one never is."""
    for level, (operator, transfer) in enumerate(levels[:-1]):
        grid = grid_of_level(operator)
        if (
            not layout.divides(grid)
            or grid.size <= layout.gather_below
            or not _fits(operator, layout)
        ):
            return level
        if transfer_in_blocks(layout, transfer, gathered=False) is None:
            return level + 1
    return len(levels) - 1


def _fits(operator: Any, layout: Layout) -> bool:
    """Whether blocks are as thick as what an operator reads of a neighbour."""
    offsets = operator.offsets if isinstance(operator, Stencil) else axis_offsets(operator.grid)
    reach = Reach.of(layout, offsets)
    block = layout.block(operator.grid.shape)
    return all(max(reach.widths[axis]) <= block[axis] for axis in layout.cut)
