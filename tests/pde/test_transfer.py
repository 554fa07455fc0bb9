"""Transfer between grids: the fast path against the table, the adjoint, constants and lines."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

import bilevel_pde as pde
from bilevel_pde.coarsening import Transfer, coarse_grid
from bilevel_pde.transfer import AxisTransfer, coarser, intervals
from tests.pde.manufactured import D, N, P

SIDES = [
    ("value", "value"),
    ("slope", "slope"),
    ("value", "slope"),
    ("slope", "value"),
    ("wrap", "wrap"),
]
AXES = [
    AxisTransfer(fine, coarser(fine, sides, cells=cells), cells, sides)
    for fine, sides, cells in itertools.product((14, 15, 16, 17), SIDES, (False, True))
]


def label(axis):
    return f"{axis.fine} {'cells' if axis.cells else 'vertices'} {' '.join(axis.sides)}"


def shares(axis, count):
    """Control volumes over the spacing."""
    weights = np.ones(count)
    if not axis.cells:
        weights[0] /= 1 + (axis.sides[0] == "slope")
        weights[-1] /= 1 + (axis.sides[1] == "slope")
    return weights


@pytest.mark.parametrize("axis", AXES, ids=label)
def test_prolongation_is_the_matrix_and_restriction_its_weighted_adjoint(axis):
    matrix = axis.matrix()
    prolonged = axis.prolong(jnp.eye(axis.coarse), 0)
    np.testing.assert_allclose(prolonged, matrix, atol=1e-14)
    along_columns = axis.prolong(jnp.eye(axis.coarse), 1)
    np.testing.assert_allclose(along_columns, matrix.T, atol=1e-14)
    expected = np.diag(1 / shares(axis, axis.coarse)) @ matrix.T @ np.diag(shares(axis, axis.fine))
    np.testing.assert_allclose(axis.restrict(jnp.eye(axis.fine), 0), expected / 2, atol=1e-14)


@pytest.mark.parametrize("axis", AXES, ids=label)
def test_linear_functions_that_the_sides_allow_are_kept(axis):
    fine, coarse = axis.positions(axis.fine), axis.positions(axis.coarse)
    np.testing.assert_allclose(np.diff(fine), fine[1] - fine[0])
    assert axis.coarse < axis.fine
    inner = (fine >= coarse[0]) & (fine <= coarse[-1])
    lines = axis.prolong(jnp.asarray(np.stack([np.ones_like(coarse), coarse], 1)), 0)
    np.testing.assert_allclose(lines[inner, 0], 1.0, atol=1e-13)
    np.testing.assert_allclose(lines[inner, 1], fine[inner], atol=1e-13)
    if "value" not in axis.sides:
        # Constants everywhere, also beyond the outermost coarse points.
        np.testing.assert_allclose(lines[:, 0], 1.0, atol=1e-13)
    elif axis.sides == ("value", "value"):
        # Towards a side of value zero it is the line to it.
        first = np.minimum(fine / coarse[0], 1.0)
        last = np.minimum((1 - fine) / (1 - coarse[-1]), 1.0)
        np.testing.assert_allclose(lines[:, 0], np.minimum(first, last), atol=1e-13)


@pytest.mark.parametrize("axis", [a for a in AXES if a.nested is not None], ids=label)
def test_averages_of_nested_points_keep_constants(axis):
    averaged = np.array(axis.restrict(jnp.ones(axis.fine), 0))
    # Next to a prescribed value a cell's average takes in its odd continuation.
    inner = slice(
        int(axis.cells and axis.sides[0] == "value"),
        axis.coarse - int(axis.cells and axis.sides[1] == "value"),
    )
    np.testing.assert_allclose(averaged[inner], 1.0, atol=1e-13)


@pytest.mark.parametrize("centering", ["vertex", "cell"])
@pytest.mark.parametrize("boundary", [D, N, P, [(D, N), P]])
def test_grids_and_sums(boundary, centering):
    grid = pde.Grid((17, 12), (2.0, 1.0), boundary, centering)
    coarse = coarse_grid(grid)
    assert (coarse.extent, coarse.boundary) == (grid.extent, grid.boundary)
    for axis, sides in enumerate(grid.boundary):
        kinds = (
            ("wrap", "wrap")
            if isinstance(sides[0], pde.Periodic)
            else tuple("slope" if isinstance(s, pde.Neumann) else "value" for s in sides)
        )
        cells = centering == "cell"
        whole = intervals(grid.shape[axis], kinds, cells=cells)
        assert intervals(coarse.shape[axis], kinds, cells=cells) == -(-whole // 2)
    transfer = Transfer(grid, coarse)
    u = jnp.asarray(np.random.default_rng(0).standard_normal(coarse.shape))
    v = jnp.asarray(np.random.default_rng(1).standard_normal(grid.shape))
    weigh = {g: np.prod(np.broadcast_arrays(*g.weights()), axis=0) for g in (grid, coarse)}
    fine = jnp.sum(weigh[grid] * transfer.prolong(u) * v)
    adjoint = jnp.sum(weigh[coarse] * u * transfer.restrict(v)) * 4
    np.testing.assert_allclose(fine, adjoint, rtol=1e-12)


def test_small_axes_stay():
    assert coarse_grid(pde.Grid((15, 5))).shape == (7, 5)
    assert coarse_grid(pde.Grid((5, 5))) is None


def test_coefficients_are_sampled_at_the_coarse_points():
    grid = pde.Grid((15, 16), 1.0, [D, N])
    coarse = coarse_grid(grid)
    transfer = Transfer(grid, coarse)
    x, y = grid.mesh()
    X, Y = coarse.mesh()
    np.testing.assert_allclose(transfer.sample(1 + x + 2 * y), 1 + X + 2 * Y, atol=1e-12)
    faces = jnp.broadcast_to(grid.face_coordinates(0)[0][:, None], grid.face_shape(0))
    expected = np.clip(np.asarray(coarse.face_coordinates(0)[0]), 1 / 32, 31 / 32)[:, None]
    np.testing.assert_allclose(
        transfer.sample(faces, 0), np.broadcast_to(expected, coarse.face_shape(0)), atol=1e-12
    )
