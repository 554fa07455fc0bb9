"""Entries, triangles, norms, and what is claimed of symmetry, of every kind of operator."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse as sp
from jax.flatten_util import ravel_pytree

import bilevel as bl
import bilevel_pde as pde
from bilevel.solver.base import IncompatibleError
from tests.pde.cases import few
from tests.pde.manufactured import D, N, P, R


def field(grid, seed=0):
    return jnp.asarray(np.random.default_rng(seed).uniform(0.5, 2.0, grid.shape))


def random_matrix(rows, columns, seed=0):
    generator = np.random.default_rng(seed)
    return sp.random_array((rows, columns), density=0.4, rng=generator, format="csr")


GRID = pde.Grid((3, 4), 1.0, [(N, D), P])
WALL = pde.Staggered((3, 2))


def operators():
    corners = {o: 0.3 + i for i, o in enumerate(itertools.product((-1, 0, 1), repeat=2))}
    matrix = random_matrix(12, 12)
    diffusion = pde.Diffusion(GRID, field(GRID), reaction=field(GRID, 1))
    slope = pde.advection(GRID, (field(GRID, 2), -1.0))
    yield "stencil", slope
    yield "corners", pde.Stencil(pde.Grid((4, 3), boundary=P), corners)
    yield "wide", pde.Stencil(pde.Grid(7, boundary=P), {(-2,): 1.0, (1,): 2.0, (3,): 3.0})
    yield "one point", 2.0 * pde.identity(pde.Grid(1)) - pde.laplacian(pde.Grid(1))
    yield "cells", pde.laplacian(pde.Grid((2, 3, 3), 1.0, [(D, R), (N, R), P], "cell"))
    yield "diffusion", diffusion
    yield "weighted", diffusion.weighted()
    for name in ("diagonals", "padded_columns", "segment_sum"):
        yield name, pde.from_scipy(matrix, format=name)
    yield "rectangular", pde.from_scipy(random_matrix(5, 7))
    flat = pde.from_scipy(matrix)
    yield "scaled", jnp.float64(-2.0) * flat
    yield "sum", flat + 0.5 * flat.T
    yield "product", slope @ slope
    yield "block", pde.Block([[diffusion, slope], [None, pde.identity(GRID)]])
    yield "gradient", pde.Gradient(WALL)
    yield "divergence", pde.Divergence(WALL)
    velocity = -1.0 * pde.velocity_laplacian(WALL)
    yield "Stokes", pde.Block([[velocity, pde.Gradient(WALL)], [-1.0 * pde.Divergence(WALL), None]])


OPERATORS = dict(operators())
# Other grids, offsets or factors of what is there.
VARIANTS = {"corners", "wide", "one point", "cells", "weighted", "scaled", "Stokes"}


def flat_matrix(apply, like):
    """Dense, of what a function does to fields."""
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like)
    start, unflatten = ravel_pytree(zeros)
    return jax.vmap(lambda v: ravel_pytree(apply(unflatten(v)))[0], out_axes=1)(jnp.eye(start.size))


def same(found, expected):
    np.testing.assert_allclose(found, expected, atol=1e-13 * np.abs(expected).max())


@pytest.mark.parametrize("name", few(lambda name: name not in VARIANTS, OPERATORS))
def test_every_operator_applies_its_matrix_its_entries_and_its_transpose(name):
    """With its numbers traced; equal matrices give ⟨A x, y⟩ = ⟨x, Aᵀ y⟩ for all x and y."""
    given, places = OPERATORS[name], []

    @jax.jit
    def everything(operator):
        flipped = operator.transposed()
        rows, columns, values = operator.entries()
        places.append((rows, columns))
        return (
            flat_matrix(operator.matvec, operator.like),
            flat_matrix(operator.rmatvec, operator.range_like),
            flat_matrix(flipped.matvec, operator.range_like),
            (rows, columns, values),
            operator.norm_bound(),
            pde.norm_estimate(operator, 100),
            pde.transpose_defect(operator),
        )

    forward, backward, transposed, listed, bound, estimate, defect = everything(given)
    expected = given.to_scipy().toarray()
    same(forward, expected)
    same(backward, expected.T)
    same(transposed, expected.T)
    rows, columns, values = (np.asarray(part) for part in listed)
    same(sp.coo_array((values, (rows, columns)), given.shape).toarray(), expected)
    norm = np.linalg.norm(expected, 2)
    # Of these matrices; a sum where a maximum should be is far off.
    assert norm <= bound * (1 + 1e-12) < 4 * norm
    assert 0.95 * norm < estimate <= norm * (1 + 1e-12)
    assert defect < 1e-12


@pytest.mark.parametrize("name", few(lambda name: name not in VARIANTS, OPERATORS))
def test_triangles(name):
    operator = OPERATORS[name]
    if operator.shape[0] != operator.shape[1]:
        with pytest.raises(ValueError, match="is rectangular"):
            operator.lower()
        return

    @jax.jit
    def triangles(operator):
        parts = operator.lower(), operator.upper(diagonal=False)
        assert not any(part.symmetric for part in parts)
        dense = [flat_matrix(part.matvec, operator.like) for part in parts]
        return *dense, flat_matrix(parts[1].rmatvec, operator.like)

    dense = operator.to_scipy().toarray()
    upper = np.triu(dense, 1)
    expected = [np.tril(dense), upper, upper.T]
    if name == "one point":  # a number is its own triangle
        np.testing.assert_array_equal(operator.lower().to_scipy().toarray(), expected[0])
        return
    for found, wanted in zip(triangles(operator), expected, strict=True):
        same(found, wanted) if wanted.any() else np.testing.assert_array_equal(found, 0)
    other = operator.lower(diagonal=False).to_scipy() + operator.upper().to_scipy()
    same(other.toarray(), dense)


@pytest.mark.parametrize("factors", [
    ("product", "product"), ("corners", "corners"), ("wide", "wide"), ("stencil", "diffusion"),
    ("padded_columns", "sum"), ("divergence", "gradient"),
])  # fmt: skip
def test_diagonals_of_products(factors):
    left, right = (OPERATORS[name] for name in factors)
    product = left @ right
    same(ravel_pytree(product.diagonal())[0], product.to_scipy().diagonal())


def test_a_traced_product_has_a_diagonal_on_grids():
    def diagonal(k):
        operator = pde.Diffusion(GRID, k)
        return (operator @ operator).diagonal()

    matrix = pde.Diffusion(GRID, field(GRID)).to_scipy()
    same(np.ravel(jax.jit(diagonal)(field(GRID))), (matrix @ matrix).diagonal())
    flat = OPERATORS["segment_sum"]
    assert jax.jit(lambda operator: (operator @ operator).diagonal())(flat) is None
    assert (OPERATORS["rectangular"] @ OPERATORS["rectangular"].T).diagonal().shape == (5,)


def test_triangles_add_up_while_traced_and_differentiate():
    def applied(k, v):
        operator = pde.Diffusion(GRID, k)
        parts = operator.lower(), operator.upper(diagonal=False)
        return sum(part.matvec(v) for part in parts), operator.matvec(v)

    v = field(GRID, 3)
    derivative = jax.jit(jax.jacobian(applied))(field(GRID), v)
    np.testing.assert_allclose(derivative[0], derivative[1], atol=1e-10)
    assert np.abs(derivative[0]).max() > 1


def test_stencil_entries_are_few_and_keep_their_place_while_traced():
    """Rows and columns are of NumPy, so that nothing is moved; a value each that is inside."""
    seen = []

    @jax.jit
    def listed(k):
        rows, columns, values = pde.Diffusion(GRID, k).entries()
        seen.append((rows, columns))
        return values

    k = field(GRID)
    values = listed(k)
    assert all(isinstance(part, np.ndarray) for part in seen[0])
    assert values.shape == (12 * 5 - 2 * 4,)  # two sides of four points have no neighbour
    expected = pde.Diffusion(GRID, k).to_scipy().toarray()
    listed_again = sp.coo_array((values, seen[0]), (12, 12)).toarray()
    np.testing.assert_allclose(listed_again, expected, rtol=1e-14)


def test_claims_that_are_wrong_are_found_out():
    slope = pde.advection(pde.Grid(5), 1.0)
    wrong = slope.declared(symmetric=True)
    with pytest.raises(ValueError, match=r"transposed\(\) is not the transpose"):
        wrong.check_transpose()
    with pytest.raises(ValueError, match="is not symmetric: A x and Aᵀ x differ by"):
        wrong.check_symmetry()
    with pytest.raises(ValueError, match="is rectangular"):
        pde.Gradient(WALL).check_symmetry()
    with pytest.raises(ValueError, match="Gradient is rectangular"):
        pde.symmetry_defect(pde.Gradient(WALL))
    half = pde.laplacian(pde.Grid(5, boundary=N))
    with pytest.raises(ValueError, match="weighted"):
        half.check_symmetry()
    half.weighted().check_symmetry()
    zero = 0.0 * slope
    zero.check_symmetry()
    zero.check_transpose()
    assert float(pde.norm_estimate(zero)) == 0 == float(zero.norm_bound())
    single = pde.laplacian(pde.Grid((9, 9), dtype=np.float32))
    single.check_symmetry()
    single.check_transpose()


def test_definiteness_of_multiples_and_sums():
    matrix = sp.csr_array(np.diag([3.0, 2.0]) + 0.5 * np.ones((2, 2)))
    definite = pde.from_scipy(matrix, positive_definite=True)
    unknown = pde.from_scipy(matrix)
    skew = pde.from_scipy(sp.csr_array([[1.0, 2.0], [-2.0, 1.0]]))
    assert (2.0 * definite).positive_definite is True
    assert (jnp.asarray(2.0) * definite).positive_definite is True
    assert (-1.0 * definite).positive_definite is False
    assert (0.0 * definite).positive_definite is False
    assert (-1.0 * (-1.0 * definite)).positive_definite is True
    assert (-1.0 * unknown).positive_definite is None
    assert (2.0 * unknown).positive_definite is None
    assert (2.0 * skew).positive_definite is False
    assert (2.0 * skew).symmetric is False
    assert (definite + definite).positive_definite is True
    assert (definite + unknown).positive_definite is None
    assert (definite + skew).symmetric is False
    assert (definite + skew).positive_definite is False
    assert (skew + skew.T).symmetric is None  # it is, but that would take a look
    assert (definite + -1.0 * definite).positive_definite is None
    claims = []

    @jax.jit
    def scaled(c):
        made = (c * definite, c * definite + definite, -c * skew)
        claims.extend((operator.symmetric, operator.positive_definite) for operator in made)
        return c

    scaled(2.0)
    assert claims == [(True, None), (True, None), (False, False)]


def test_constants_in_the_kernel_of_multiples_sums_and_products():
    grid = pde.Grid(5, boundary=N, centering="cell")
    lap, one = pde.laplacian(grid), pde.identity(grid)
    matrix = pde.from_scipy(lap.to_scipy())
    for operator in (matrix, -2.0 * matrix, lap @ lap, one @ lap, lap @ lap + lap):
        assert operator.singular
        np.testing.assert_array_equal(operator.kernel(), np.ones(5))
    for operator in (lap @ one, lap @ lap + one, pde.Mean(grid), lap + pde.Mean(grid)):
        assert not operator.singular
        assert operator.kernel() is None


def test_the_mean_has_no_triangle():
    grid = pde.Grid(5, boundary=N, centering="cell")
    shifted = -pde.laplacian(grid) + 2.0 * pde.Mean(grid)
    with pytest.raises(IncompatibleError, match=r"Mean is full and has no sparse lower triangle"):
        shifted.lower()
    assert float(shifted.norm_bound()) >= np.linalg.norm(shifted.to_scipy().toarray(), 2)


@pytest.mark.parametrize(
    "name",
    few(lambda name: name in {"diffusion", "Stokes"}, ["diffusion", "sum", "product", "Stokes"]),
)
def test_sparse_direct_takes_every_operator_inside_jit(name):
    """With coefficients that are traced, their gradient, and the transposed system's."""
    operator = OPERATORS[name]
    generator = np.random.default_rng(0)
    b = jax.tree.map(lambda leaf: jnp.asarray(generator.standard_normal(leaf.shape)), operator.like)
    flat = ravel_pytree(b)[0]
    solver = pde.SparseDirect()
    shift = 30.0  # keeps the pure Neumann problem of the pressure and products regular

    def system(t):
        moved = t[0] * operator
        one = pde.identity(GRID)
        if name in {"diffusion", "product"}:
            return moved + t[1] * shift * one
        if name == "sum":
            return moved + t[1] * shift * pde.from_scipy(sp.eye_array(12))
        pressure = pde.identity(WALL.cells)
        velocity = pde.block_diagonal(*map(pde.identity, WALL.components))
        return moved + t[1] * shift * pde.block_diagonal(velocity, pressure)

    @jax.jit
    @jax.value_and_grad
    def loss(t):
        start = jax.tree.map(jnp.zeros_like, b)
        solution = bl.solve(
            bl.LinearSystem(system, b), t, start, solver=solver, estimator=bl.Implicit(solver)
        )
        return jnp.sum(ravel_pytree(solution.value)[0] ** 3)

    t = jnp.array([1.0, 1.0])
    value, gradient = loss(t)
    dense = system(t).to_scipy().toarray()
    x = np.linalg.solve(dense, flat)
    np.testing.assert_allclose(value, np.sum(x**3), rtol=1e-9)
    adjoint = np.linalg.solve(dense.T, 3 * x**2)
    moved = operator.to_scipy().toarray() @ x
    rest = dense @ x - moved
    expected = [-adjoint @ moved, -adjoint @ rest]
    np.testing.assert_allclose(gradient, expected, rtol=1e-8, atol=1e-10 * abs(value))
