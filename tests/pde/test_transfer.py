"""Transfer between grids: the fast path against the table, the adjoint, constants and lines."""

import functools
import itertools

import jax
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
# Even and odd numbers of intervals are there with every pair of sides.
FEW = [axis if axis.fine < 16 else pytest.param(axis, marks=pytest.mark.slow) for axis in AXES]


@functools.cache
def dense(axis):
    """Prolongation along rows and along columns, and restriction, compiled as one."""

    @jax.jit
    def apply(coarse, fine):
        return axis.prolong(coarse, 0), axis.prolong(coarse, 1), axis.restrict(fine, 0)

    return [np.asarray(part) for part in apply(np.eye(axis.coarse), np.eye(axis.fine))]


def label(axis):
    return f"{axis.fine} {'cells' if axis.cells else 'vertices'} {' '.join(axis.sides)}"


def shares(axis, count):
    """Control volumes over the spacing."""
    weights = np.ones(count)
    if not axis.cells:
        weights[0] /= 1 + (axis.sides[0] == "slope")
        weights[-1] /= 1 + (axis.sides[1] == "slope")
    return weights


@pytest.mark.parametrize("axis", FEW, ids=label)
def test_prolongation_is_the_matrix_and_restriction_its_weighted_adjoint(axis):
    matrix = axis.matrix()
    prolonged, along_columns, restricted = dense(axis)
    np.testing.assert_allclose(prolonged, matrix, atol=1e-14)
    np.testing.assert_allclose(along_columns, matrix.T, atol=1e-14)
    expected = np.diag(1 / shares(axis, axis.coarse)) @ matrix.T @ np.diag(shares(axis, axis.fine))
    np.testing.assert_allclose(restricted, expected / 2, atol=1e-14)


@pytest.mark.parametrize("axis", FEW, ids=label)
def test_linear_functions_that_the_sides_allow_are_kept(axis):
    fine, coarse = axis.positions(axis.fine), axis.positions(axis.coarse)
    np.testing.assert_allclose(np.diff(fine), fine[1] - fine[0])
    assert axis.coarse < axis.fine
    inner = (fine >= coarse[0]) & (fine <= coarse[-1])
    lines = dense(axis)[0] @ np.stack([np.ones_like(coarse), coarse], 1)
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


@pytest.mark.parametrize("axis", [a for a in AXES if a.nested and a.fine < 16], ids=label)
def test_averages_of_nested_points_keep_constants(axis):
    averaged = dense(axis)[2].sum(axis=1)
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
    u = np.random.default_rng(0).standard_normal(coarse.shape)
    v = np.random.default_rng(1).standard_normal(grid.shape)
    weigh = {g: np.prod(np.broadcast_arrays(*g.weights()), axis=0) for g in (grid, coarse)}
    prolonged, restricted = jax.jit(lambda u, v: (transfer.prolong(u), transfer.restrict(v)))(u, v)
    fine = np.sum(weigh[grid] * prolonged * v)
    adjoint = np.sum(weigh[coarse] * u * restricted) * 4
    np.testing.assert_allclose(fine, adjoint, rtol=1e-12)


def test_small_axes_stay():
    assert coarse_grid(pde.Grid((15, 5))).shape == (7, 5)
    assert coarse_grid(pde.Grid((5, 5))) is None


def test_coefficients_are_sampled_at_the_coarse_points():
    grid = pde.Grid((15, 16), 1.0, [D, N])
    coarse = coarse_grid(grid)
    transfer = Transfer(grid, coarse)
    (x, y), (X, Y) = (np.meshgrid(*g.coordinates(), indexing="ij") for g in (grid, coarse))
    faces = np.broadcast_to(np.asarray(grid.face_coordinates(0)[0])[:, None], grid.face_shape(0))
    sample = jax.jit(lambda k, f: (transfer.sample(k), transfer.sample(f, 0)))
    at_points, at_faces = sample(1 + x + 2 * y, faces)
    np.testing.assert_allclose(at_points, 1 + X + 2 * Y, atol=1e-12)
    expected = np.clip(np.asarray(coarse.face_coordinates(0)[0]), 1 / 32, 31 / 32)[:, None]
    np.testing.assert_allclose(
        at_faces, np.broadcast_to(expected, coarse.face_shape(0)), atol=1e-12
    )
