"""Grids: spacing and coordinates of each kind of side, and what is no grid."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel_pde as pde

D, N, P, R = pde.Dirichlet(), pde.Neumann(), pde.Periodic(), pde.Robin(1.0, 2.0)


@pytest.mark.parametrize(
    ("boundary", "centering", "expected"),
    [
        (D, "vertex", [0.2, 0.4, 0.6, 0.8]),
        ((D, N), "vertex", [0.25, 0.5, 0.75, 1.0]),
        ((R, D), "vertex", [0.0, 0.25, 0.5, 0.75]),
        (N, "vertex", [0.0, 1 / 3, 2 / 3, 1.0]),
        (P, "vertex", [0.0, 0.25, 0.5, 0.75]),
        (D, "cell", [0.125, 0.375, 0.625, 0.875]),
        ((N, R), "cell", [0.125, 0.375, 0.625, 0.875]),
        (P, "cell", [0.125, 0.375, 0.625, 0.875]),
    ],
)
def test_coordinates(boundary, centering, expected):
    grid = pde.Grid(4, boundary=boundary, centering=centering)
    np.testing.assert_allclose(grid.coordinates()[0], expected, atol=1e-15)
    assert grid.spacing[0] == pytest.approx(expected[1] - expected[0])


@pytest.mark.parametrize(
    ("boundary", "centering", "expected"),
    [
        (D, "vertex", [1 / 8, 3 / 8, 5 / 8, 7 / 8]),
        (N, "vertex", [0.0, 0.25, 0.75, 1.0]),
        (D, "cell", [0.0, 1 / 3, 2 / 3, 1.0]),
        (P, "vertex", [-1 / 6, 1 / 6, 1 / 2]),
        (P, "cell", [0.0, 1 / 3, 2 / 3]),
    ],
)
def test_faces(boundary, centering, expected):
    grid = pde.Grid(3, boundary=boundary, centering=centering)
    np.testing.assert_allclose(grid.face_coordinates(0)[0], expected, atol=1e-15)
    assert grid.face_shape(0) == (len(expected),)


def test_origin_extent_and_mesh():
    grid = pde.Grid((3, 4), (4.0, 10.0), origin=(-1.0, 2.0))
    x, y = grid.mesh()
    assert x.shape == y.shape == (3, 4)
    np.testing.assert_allclose(x[:, 0], [0.0, 1.0, 2.0])
    np.testing.assert_allclose(y[0], [4.0, 6.0, 8.0, 10.0])


@pytest.mark.parametrize("centering", ["vertex", "cell"])
def test_weights_integrate_constants_and_linear_fields(centering):
    grid = pde.Grid((5, 6), (1.0, 3.0), [(N, R), (N, N)], centering)
    x, y = grid.mesh()
    volume = np.prod(grid.spacing) * grid.weights()[0] * grid.weights()[1]
    assert float((volume * jnp.ones_like(x)).sum()) == pytest.approx(3.0)
    assert float((volume * (x + y)).sum()) == pytest.approx(3.0 * (0.5 + 1.5))


def test_dtype_is_that_of_everything_on_it():
    grid = pde.Grid(4, dtype=jnp.float32)
    assert grid.like.dtype == grid.coordinates()[0].dtype == jnp.float32
    operator = pde.laplacian(grid)
    pieces = [piece for parts in operator.coefficients for piece in parts]
    assert all(piece.dtype == jnp.float32 for piece in pieces)
    assert operator.matvec(jnp.ones(4, jnp.float32)).dtype == jnp.float32
    assert operator.to_scipy().dtype == np.float32


def test_it_passes_through_transformations():
    grid = pde.Grid((3, 3), boundary=R)
    assert hash(grid) == hash(pde.Grid((3, 3), boundary=R))
    field = jax.jit(lambda g: pde.laplacian(g) @ jnp.ones(g.shape))(grid)
    assert field.shape == (3, 3)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"shape": ()}, ValueError, "one to three"),
        ({"shape": (2, 2, 2, 2)}, ValueError, "one to three"),
        ({"shape": (4, 0)}, ValueError, "positive"),
        ({"shape": 2.5}, TypeError, "integers"),
        ({"shape": 4, "extent": -1.0}, ValueError, "positive lengths"),
        ({"shape": 4, "extent": 0.0}, ValueError, "positive lengths"),
        ({"shape": 4, "extent": np.inf}, ValueError, "finite"),
        ({"shape": 4, "extent": (1.0, 1.0)}, ValueError, "each of 1"),
        ({"shape": True}, TypeError, "integers"),
        ({"shape": np.ones((1, 2), int)}, TypeError, "integers"),
        ({"shape": np.ones(2)}, TypeError, "integers"),
        ({"shape": 4, "dtype": int}, TypeError, "float32 or float64, got int"),
        ({"shape": 4, "dtype": complex}, TypeError, "float32 or float64, got complex"),
        ({"shape": 4, "dtype": "float16"}, TypeError, "got float16.*tolerance"),
        ({"shape": 4, "dtype": "foo"}, TypeError, "float32 or float64, got 'foo'"),
        ({"shape": 4, "boundary": (P, D)}, ValueError, "both sides or on none"),
        ({"shape": (4, 4), "boundary": [D, (N, P)]}, ValueError, "axis 1 is periodic on both"),
        ({"shape": (4, 4), "boundary": [D, D, D]}, ValueError, "each of 2"),
        ({"shape": (4, 4), "boundary": [D, (D, D, D)]}, ValueError, "pair"),
        ({"shape": 4, "boundary": ["dirichlet"]}, ValueError, "Dirichlet()"),
        ({"shape": 4, "centering": "face"}, ValueError, "'vertex' or 'cell'"),
        ({"shape": 2, "boundary": P}, ValueError, "at least 3 points"),
        ({"shape": 1, "boundary": N}, ValueError, "at least 2 points"),
    ],
)
def test_what_is_no_grid(arguments, error, words):
    with pytest.raises(error, match=words):
        pde.Grid(**arguments)


def test_arrays_for_the_axes():
    grid = pde.Grid(np.array([3, 4]), jnp.array([1.0, 2.0]))
    assert grid == pde.Grid((3, 4), (1.0, 2.0))


def test_a_traced_length_is_refused():
    with pytest.raises(TypeError, match="known before tracing"):
        jax.jit(lambda length: pde.laplacian(pde.Grid(3, length)) @ jnp.ones(3))(1.0)


@pytest.mark.parametrize(
    ("centering", "expected"), [("vertex", -2 / 0.5**2), ("cell", -4 / 1.0**2)]
)
def test_one_point(centering, expected):
    operator = pde.laplacian(pde.Grid(1, centering=centering))
    assert float(operator.matvec(jnp.ones(1))[0]) == expected
    assert (-operator).positive_definite
    assert operator.to_scipy().toarray().tolist() == [[expected]]
