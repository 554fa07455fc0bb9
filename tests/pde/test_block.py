"""Block operators: shapes, transposes, and what is known of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel_pde as pde
from tests.pde.manufactured import D, N, P

GRID = pde.Grid((4, 3), boundary=[(D, N), P], centering="cell")
MINUS_LAPLACIAN = -pde.laplacian(GRID)
WIND = pde.advection(GRID, (1.0, -2.0))


def field(seed):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(GRID.shape))


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


@pytest.mark.parametrize(
    "rows",
    [
        [[MINUS_LAPLACIAN, WIND.T], [WIND, None]],
        [[MINUS_LAPLACIAN, None], [WIND, pde.identity(GRID)]],
        [[WIND, pde.identity(GRID), WIND]],
        [[None, WIND], [MINUS_LAPLACIAN, None], [WIND, WIND]],
    ],
    ids=["saddle", "triangular", "wide", "tall"],
)
def test_matrix_and_transpose(rows):
    block = pde.Block(rows)
    matrix = block.to_scipy().toarray()
    assert matrix.shape == block.shape == (12 * len(rows), 12 * len(rows[0]))
    x, y = (tuple(field(i) for i in range(n)) for n in (len(rows[0]), len(rows)))
    np.testing.assert_allclose(flat(block @ x), matrix @ flat(x), atol=1e-11)
    np.testing.assert_allclose(flat(block.rmatvec(y)), matrix.T @ flat(y), atol=1e-11)
    np.testing.assert_allclose(block.T.to_scipy().toarray(), matrix.T, atol=1e-12)
    assert float(pde.transpose_defect(block)) < 1e-12
    assert float(block.norm_bound()) >= np.linalg.norm(matrix, 2)
    if len(rows) == len(rows[0]):
        np.testing.assert_allclose(flat(block.diagonal()), np.diag(matrix), atol=1e-12)


def test_saddle_points_are_symmetric_and_indefinite():
    saddle = pde.Block([[MINUS_LAPLACIAN, WIND.T], [WIND, None]])
    assert saddle.symmetric
    assert saddle.positive_definite is False
    assert float(pde.symmetry_defect(saddle)) < 1e-12
    assert pde.Block([[MINUS_LAPLACIAN, WIND], [WIND, None]]).symmetric is None
    assert pde.Block([[WIND, None], [None, WIND]]).symmetric is False
    assert pde.Block([[WIND, WIND]]).symmetric is False
    assert pde.Block([[MINUS_LAPLACIAN, WIND], [WIND, None]], symmetric=True).symmetric


def test_block_diagonal_of_definite_ones_is_definite():
    both = pde.block_diagonal(MINUS_LAPLACIAN, pde.identity(GRID))
    assert both.symmetric
    assert both.positive_definite
    assert pde.block_diagonal(MINUS_LAPLACIAN, -MINUS_LAPLACIAN).positive_definite is False
    coupled = pde.Block([[MINUS_LAPLACIAN, pde.identity(GRID)], [pde.identity(GRID)] * 2])
    assert coupled.symmetric
    assert coupled.positive_definite is None


def test_sums_and_multiples_go_block_by_block():
    saddle = pde.Block([[MINUS_LAPLACIAN, WIND.T], [WIND, None]])
    step = 2.0 * saddle - pde.block_diagonal(pde.identity(GRID), WIND)
    expected = 2 * saddle.to_scipy().toarray()
    expected[:12, :12] -= np.eye(12)
    expected[12:, 12:] -= WIND.to_scipy().toarray()
    np.testing.assert_allclose(step.to_scipy().toarray(), expected, atol=1e-12)
    assert isinstance(step.rows[0][0], pde.Stencil)
    assert (2.0 * saddle).symmetric
    both = pde.block_diagonal(MINUS_LAPLACIAN, MINUS_LAPLACIAN)
    assert (both + both).positive_definite
    assert (-both).positive_definite is False
    declared = pde.Block([[WIND]], positive_definite=True)
    assert (3.0 * declared).positive_definite
    assert (-3.0 * declared).positive_definite is False


def test_nested_blocks_and_products():
    inner = pde.block_diagonal(MINUS_LAPLACIAN, MINUS_LAPLACIAN)
    row = pde.Block([[WIND, WIND]])
    nested = pde.Block([[inner @ inner, row.T], [row, None]])
    x = ((field(0), field(1)), (field(2),))
    np.testing.assert_allclose(
        flat(nested @ x), nested.to_scipy().toarray() @ flat(x), rtol=1e-10, atol=1e-9
    )


def test_boundary_values_of_each_field():
    block = pde.Block([[MINUS_LAPLACIAN, WIND], [WIND, None]])
    values = ({(0, 0): 2.0}, {(0, 1): jnp.arange(3.0)})
    top, bottom = block.boundary_term(values)
    expected = MINUS_LAPLACIAN.boundary_term(values[0]) + WIND.boundary_term(values[1])
    np.testing.assert_allclose(top, expected)
    np.testing.assert_allclose(bottom, WIND.boundary_term(values[0]))
    np.testing.assert_array_equal(block.boundary_term((None, None))[0], 0.0)


def test_derivatives_reach_the_blocks():
    def value(nu):
        block = pde.Block([[nu * MINUS_LAPLACIAN, WIND.T], [WIND, None]])
        return sum(jnp.sum(part * field(7)) for part in block @ (field(0), field(1)))

    expected = float(jnp.sum((MINUS_LAPLACIAN @ field(0)) * field(7)))
    assert float(jax.grad(value)(2.0)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("rows", "error", "words"),
    [
        ([[WIND], [WIND, WIND]], ValueError, "one length"),
        ([], ValueError, "one length"),
        ([[WIND, None], [WIND, None]], ValueError, "column 1 has no operator"),
        ([[None, None], [WIND, WIND]], ValueError, "row 0 has no operator"),
        ([[WIND, pde.identity(pde.Grid(5))]], ValueError, "row 0 are about different"),
        ([[WIND], [pde.identity(pde.Grid(5))]], ValueError, "column 0 are about different"),
        ([[WIND, 0.0]], TypeError, "operator or None"),
    ],
)
def test_what_is_no_block_operator(rows, error, words):
    with pytest.raises(error, match=words):
        pde.Block(rows)


def test_what_is_no_tuple_of_fields():
    block = pde.block_diagonal(WIND, WIND)
    for given in (field(0), (field(0),), (field(0),) * 3):
        with pytest.raises(ValueError, match="tuple of 2 fields"):
            block.matvec(given)
