"""Diffusion: symmetric as it stands, definite where it says so, differentiable in k."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel_pde as pde
from tests.pde.cases import few
from tests.pde.manufactured import D, N, P, R
from tests.pde.test_stencil import dense, fused, label

GRIDS = [
    pde.Grid((5, 4), (1.0, 2.0), boundary, centering)
    for boundary, centering in itertools.product(
        [D, N, P, R, [(D, N), P], [(R, D), (N, R)]], ["vertex", "cell"]
    )
]
GRIDS += [pde.Grid((3, 4, 3), 1.0, [(D, R), P, (N, D)], "cell"), pde.Grid(6, boundary=(D, N))]


def coefficient(grid, seed=0):
    return jnp.asarray(np.random.default_rng(seed).uniform(0.5, 2.0, grid.shape))


def face_coefficients(grid):
    generator = np.random.default_rng(1)
    shapes = [grid.face_shape(axis) for axis in range(grid.ndim)]
    return tuple(jnp.asarray(generator.uniform(0.5, 2.0, shape)) for shape in shapes)


# Of the two centerings one each, turn about; one line, and no solid.
FEW = [*GRIDS[0:12:4], *GRIDS[3:12:4], GRIDS[13]]


@pytest.mark.parametrize("grid", few(lambda grid: grid in FEW, GRIDS), ids=label)
def test_matrix_transpose_and_definiteness(grid):
    held = any(isinstance(s, pde.Dirichlet | pde.Robin) for pair in grid.boundary for s in pair)
    mirrored = any(np.any(weight != 1) for weight in grid.weights())
    faces = pde.Diffusion(grid, face_coefficients(grid), at="faces")
    for operator in (faces, 0.5 * faces + 2.0 * pde.identity(grid), faces.weighted()):
        matrix = operator.to_scipy().toarray()
        np.testing.assert_allclose(dense(operator.matvec, grid), matrix, atol=1e-11)
        np.testing.assert_allclose(dense(operator.rmatvec, grid), matrix.T, atol=1e-11)
        np.testing.assert_allclose(operator.T.to_scipy().toarray(), matrix.T, atol=1e-11)
        np.testing.assert_allclose(np.ravel(operator.diagonal()), np.diag(matrix), atol=1e-11)
        assert float(operator.norm_bound()) >= np.linalg.norm(matrix, 2) * (1 - 1e-12)
        assert operator.symmetric == np.allclose(matrix, matrix.T, atol=1e-11)
        if operator.symmetric:
            # To the last bit: both directions read the same face.
            assert np.array_equal(matrix, matrix.T)
            definite = np.linalg.eigvalsh(matrix)[0] > 1e-9
            assert operator.positive_definite == definite
            assert (-operator).positive_definite is False
        assert operator.singular == (np.abs(matrix.sum(axis=1)).max() < 1e-9)
    assert faces.symmetric == (not mirrored)
    assert faces.weighted().positive_definite == held


@pytest.mark.parametrize("mean", ["arithmetic", "harmonic"])
def test_means_of_neighbours(mean):
    grid = pde.Grid(4, extent=5.0)
    k = jnp.array([1.0, 3.0, 5.0, 15.0])
    inner = {"arithmetic": [2.0, 4.0, 10.0], "harmonic": [1.5, 3.75, 7.5]}[mean]
    # Continued linearly, on the left to half of the value at most; or layers up to the side.
    ends = {"arithmetic": [0.5, 20.0], "harmonic": [1.0, 15.0]}[mean]
    expected = [ends[0], *inner, ends[1]]
    operator = pde.Diffusion(grid, k, mean=mean)
    np.testing.assert_allclose(operator.faces[0], expected)
    around = pde.Grid(4, extent=4.0, boundary=P)
    last = {"arithmetic": 8.0, "harmonic": 2 * 15 / 16}[mean]
    np.testing.assert_allclose(pde.Diffusion(around, k, mean=mean).faces[0], [last, *inner])


def test_flux_through_layers_is_exact_with_harmonic_means():
    grid = pde.Grid(4, extent=4.0, centering="cell")
    k = jnp.array([5.0, 0.1, 5.0, 0.1])
    operator = pde.Diffusion(grid, k, mean="harmonic")
    values = {(0, 1): 1.0}
    u = np.linalg.solve(operator.to_scipy().toarray(), -np.asarray(operator.boundary_term(values)))
    assert abs(k[0] * u[0] / 0.5 - 1 / np.sum(1 / k)) < 1e-14


def test_zero_harmonic_mean_is_zero_and_differentiable():
    grid = pde.Grid(4)
    k = jnp.array([0.0, 0.0, 1.0, 1.0])

    def total(k):
        return pde.Diffusion(grid, k, mean="harmonic").matvec(jnp.arange(4.0)).sum()

    assert np.all(np.isfinite(jax.jit(jax.grad(total))(k)))
    assert pde.Diffusion(grid, k).positive_definite is None


def test_numbers_and_a_coefficient_for_each_axis():
    grid = pde.Grid((4, 3), boundary=[(D, N), R], centering="cell")
    both = pde.Diffusion(grid, (2.0, jnp.full(grid.shape, 3.0)))
    across = pde.Diffusion(grid, (2.0, 3.0))
    np.testing.assert_allclose(both.to_scipy().toarray(), across.to_scipy().toarray())
    field = coefficient(grid)
    np.testing.assert_allclose(across @ field, both @ field, rtol=1e-12)


MIXED = {"periodic": [(D, N), P], "held": [(R, D), (N, R)]}
FEW_DERIVATIVES = {("vertex", "held", "points"), ("cell", "periodic", "faces")}


@pytest.mark.parametrize(
    ("centering", "sides", "at"),
    few(lambda *case: case in FEW_DERIVATIVES, ["vertex", "cell"], MIXED, ["points", "faces"]),
)
def test_derivatives_with_respect_to_k(centering, sides, at):
    """A is linear in k here: differences of matrices are derivatives."""
    grid = pde.Grid((4, 3), boundary=MIXED[sides], centering=centering)
    generator = np.random.default_rng(2)
    weight, field = (jnp.asarray(generator.standard_normal(grid.shape)) for _ in range(2))
    k = coefficient(grid) if at == "points" else face_coefficients(grid)

    def made(k):
        return pde.Diffusion(grid, k, at=at)

    got = jax.grad(lambda k: jnp.sum(weight * made(k).matvec(field)))(k)
    flat, unravel = jax.flatten_util.ravel_pytree(k)
    for i, derivative in enumerate(jax.flatten_util.ravel_pytree(got)[0]):
        change = made(unravel(flat.at[i].add(1e-3))).to_scipy() - made(k).to_scipy()
        expected = weight.ravel() @ (change @ np.asarray(field).ravel()) / 1e-3
        assert float(derivative) == pytest.approx(float(expected), abs=1e-8)


def test_traced_k_is_taken_to_be_positive():
    found = []
    for boundary in (D, N):
        grid = pde.Grid((4, 3), boundary=boundary, centering="cell")

        def look(k, grid=grid):
            operator = pde.Diffusion(grid, k)
            found.append((operator.symmetric, operator.positive_definite))
            step = pde.identity(grid) + 0.1 * operator
            found.append((type(step), step.positive_definite))
            return step @ k

        jax.jit(look)(coefficient(grid))
    step = (pde.Diffusion, True)
    assert found == [(True, True), step, (True, False), step]


def test_sums_stay_what_they_are():
    grid = pde.Grid((4, 3), boundary=[(D, N), P], centering="cell")
    a, b = pde.Diffusion(grid, coefficient(grid)), pde.Diffusion(grid, 2.0, reaction=3.0)
    lap, array = pde.laplacian(grid), pde.Stencil(grid, {(0, 0): coefficient(grid, 3)})
    for operator, kind in (
        (a + b, pde.Diffusion),
        (array - 0.5 * b, pde.Diffusion),
        (pde.identity(grid) + b, pde.Diffusion),
        (a - lap, pde.Stencil),
        (lap + a, pde.Stencil),
        (a / 2.0, pde.Diffusion),
    ):
        assert type(operator) is kind
    total = (array + 2.0 * a - 0.5 * b + lap).to_scipy().toarray()
    parts = [array, 2.0 * a, -0.5 * b, lap]
    np.testing.assert_allclose(total, sum(p.to_scipy().toarray() for p in parts), atol=1e-11)
    values = {(0, 0): 2.0, (0, 1): jnp.arange(3.0)}
    np.testing.assert_allclose(
        (array + 2.0 * a - 0.5 * b + lap).boundary_term(values),
        sum(p.boundary_term(values) for p in parts),
        atol=1e-11,
    )


@pytest.mark.parametrize("grid", few(lambda grid: grid in FEW, GRIDS[:8]), ids=label)
def test_stencils_of_it_are_the_same_operator(grid):
    operator = pde.Diffusion(grid, coefficient(grid), reaction=1.5)
    field = coefficient(grid, 5)
    np.testing.assert_allclose(operator.stencil() @ field, operator @ field, atol=1e-11)
    weights = grid.weights()[0] * grid.weights()[1]
    np.testing.assert_allclose(
        operator.weighted() @ field, weights * (operator @ field), atol=1e-11
    )
    values = {(a, s): 1.0 + a + s for a in (0, 1) if not grid.is_periodic(a) for s in (0, 1)}
    term = operator.boundary_term(values)
    np.testing.assert_allclose(
        operator.weighted().boundary_term(values), weights * term, atol=1e-11
    )
    np.testing.assert_allclose(
        operator.stencil().weighted().boundary_term(values), weights * term, atol=1e-11
    )


@pytest.mark.parametrize("boundary", [D, N, R], ids=lambda b: type(b).__name__)
def test_one_kernel(boundary):
    grid = pde.Grid((33, 47), boundary=boundary, centering="cell")
    operator = pde.Diffusion(grid, face_coefficients(grid), at="faces")
    text = jax.jit(lambda o, v: o @ v).lower(operator, jnp.ones(grid.shape)).compile().as_text()
    assert text[text.index("ENTRY") :].count(" fusion(") == 1
    assert fused(pde.Diffusion(grid, 2.0).matvec, jnp.ones(grid.shape)) == (["fusion"], [])


def test_single_precision():
    grid = pde.Grid((4, 3), boundary=R, centering="cell", dtype=jnp.float32)
    operator = pde.Diffusion(grid, np.ones(grid.shape), reaction=1)
    assert {face.dtype for face in operator.faces} == {jnp.dtype("float32")}
    assert (operator @ jnp.ones(grid.shape, jnp.float32)).dtype == jnp.float32
    assert operator.to_scipy().dtype == np.float32
    assert operator.boundary_term({(0, 0): 1.0}).dtype == jnp.float32


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"coefficient": jnp.ones((3, 4))}, ValueError, r"\(4, 3\), got \(3, 4\)"),
        ({"coefficient": -1.0}, ValueError, "positive"),
        ({"coefficient": np.full((4, 3), np.nan)}, ValueError, "finite, got nan"),
        ({"coefficient": np.inf}, ValueError, "finite, got inf"),
        ({"coefficient": (1.0, jnp.full((4, 3), jnp.inf))}, ValueError, "finite, got inf"),
        ({"coefficient": (1.0, 1.0, 1.0)}, ValueError, "each of 2"),
        ({"coefficient": jnp.ones((4, 3)), "at": "faces"}, ValueError, r"\(5, 3\)"),
        ({"coefficient": 1.0, "at": "cells"}, ValueError, "'points' or 'faces'"),
        ({"coefficient": 1.0, "mean": "geometric"}, ValueError, "'harmonic'"),
        ({"coefficient": 1j}, TypeError, "real"),
        ({"coefficient": 1.0, "reaction": jnp.ones(5)}, ValueError, "broadcast"),
    ],
)
def test_what_is_no_diffusion(arguments, error, words):
    with pytest.raises(error, match=words):
        pde.Diffusion(pde.Grid((4, 3)), **arguments)
