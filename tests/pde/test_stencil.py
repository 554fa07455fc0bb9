"""Stencils against matrices built point by point, and what is said of them against eigenvalues."""

import itertools
import re

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel_pde as pde
from tests.pde.cases import few
from tests.pde.manufactured import D, N, P, R

PAIRS = [(D, D), (N, N), (R, R), (P, P), (D, N), (N, R), (R, D)]
GRIDS = [
    pde.Grid((5, 4), (1.0, 2.0), [first, second], centering)
    for (first, second), centering in itertools.product(
        zip(PAIRS, PAIRS[3:] + PAIRS[:3], strict=True), ["vertex", "cell"]
    )
]
GRIDS += [pde.Grid(6, 1.0, pair, c) for pair in PAIRS for c in ("vertex", "cell")]
GRIDS += [pde.Grid((3, 4, 3), 1.0, [(D, R), P, (N, D)], ("vertex", "cell", "cell"))]


def label(grid):
    sides = ["".join(type(s).__name__[0] for s in pair) for pair in grid.boundary]
    return f"{' '.join(sides)} {grid.centering[0]}"


def outside(grid, field, axis):
    """The field with a point more at both ends, from the conditions with values zero."""
    u = np.moveaxis(field, axis, 0)
    h = grid.spacing[axis]
    ends = []
    for pair, (first, second, last) in zip(
        grid.boundary[axis], ((u[0], u[1], u[-1]), (u[-1], u[-2], u[0])), strict=True
    ):
        cell = grid.centering[axis] == "cell"
        if isinstance(pair, pde.Periodic):
            ends.append(last)
        elif isinstance(pair, pde.Dirichlet):
            ends.append(-first if cell else 0 * first)
        elif isinstance(pair, pde.Neumann):
            ends.append(first if cell else second)
        elif cell:  # a (g + u)/2 + b (g - u)/h = 0
            a, b = pair.value, pair.slope
            ends.append(-first * (a / 2 - b / h) / (a / 2 + b / h))
        else:  # a u + b (g - v)/(2h) = 0
            ends.append(second - 2 * h * pair.value / pair.slope * first)
    return np.moveaxis(np.concatenate([ends[0][None], u, ends[1][None]]), 0, axis)


def by_hand(grid, coefficients, field):
    padded = field
    for axis in range(grid.ndim):
        padded = outside(grid, padded, axis)
    total = np.zeros(grid.shape)
    for offset, c in coefficients.items():
        window = tuple(slice(1 + o, 1 + o + n) for o, n in zip(offset, grid.shape, strict=True))
        total += np.asarray(c) * padded[window]
    return total


def dense(matvec, grid):
    basis = jnp.eye(grid.size).reshape(-1, *grid.shape)
    return np.asarray(jax.jit(jax.vmap(matvec))(basis)).reshape(grid.size, -1).T


def coefficients_of(grid, generator):
    """Numbers, lines and arrays, at neighbours and obliquely."""
    offsets = [o for o in itertools.product((-1, 0, 1), repeat=grid.ndim) if np.abs(o).sum() < 3]
    shapes = [(), grid.shape, (*grid.shape[:-1], 1), (1,) * (grid.ndim - 1) + grid.shape[-1:]]
    return {
        offset: generator.standard_normal(shapes[i % len(shapes)])
        for i, offset in enumerate(offsets)
    }


# Of the two centerings one each, turn about; a few lines, and no solid.
FEW = [*GRIDS[0:14:4], *GRIDS[3:14:4], *GRIDS[14:28:5]]


@pytest.mark.parametrize("grid", few(lambda grid: grid in FEW, GRIDS), ids=label)
def test_against_ghost_points_by_hand(grid):
    generator = np.random.default_rng(0)
    coefficients = coefficients_of(grid, generator)
    stencil = pde.Stencil(grid, coefficients)
    field = generator.standard_normal(grid.shape)
    expected = by_hand(grid, coefficients, field)
    back = stencil.transposed()
    basis = np.eye(grid.size).reshape(-1, *grid.shape)

    @jax.jit
    def apply(field, basis):
        rows = [jax.vmap(a)(basis) for a in (stencil.rmatvec, back.matvec)]
        return stencil @ field, *rows, stencil.diagonal(), stencil.norm_bound()

    image, *rows, diagonal, bound = apply(field, basis)
    np.testing.assert_allclose(image, expected, atol=1e-11)
    matrix = stencil.to_scipy().toarray()
    np.testing.assert_allclose(matrix @ field.ravel(), expected.ravel(), atol=1e-11)
    np.testing.assert_allclose(back.to_scipy().toarray(), matrix.T, atol=1e-12)
    for found in rows:
        np.testing.assert_allclose(np.reshape(found, (grid.size, -1)).T, matrix.T, atol=1e-12)
    np.testing.assert_allclose(np.ravel(diagonal), np.diag(matrix), atol=1e-12)
    assert float(bound) >= np.linalg.norm(matrix, 2) * (1 - 1e-12)


@pytest.mark.parametrize("grid", GRIDS, ids=label)
def test_what_is_said_of_a_matrix_is_true(grid):
    """And all that matters is said: of Laplacians, and of implicit steps with them."""
    lap = pde.laplacian(grid)
    step = pde.identity(grid) - 0.1 * lap
    shifted = lap + 3.0 * pde.identity(grid)
    mirrored = any(np.any(weight != 1) for weight in grid.weights())
    for operator in (lap, -lap, step, -step, shifted, 0.0 * lap, lap.weighted(), -lap.weighted()):
        matrix = operator.to_scipy().toarray()
        symmetric = np.allclose(matrix, matrix.T, atol=1e-11)
        assert operator.symmetric == symmetric
        smallest = np.linalg.eigvalsh(matrix)[0] if symmetric else np.nan
        if operator.positive_definite is not None:
            assert operator.positive_definite == (symmetric and smallest > 1e-9)
        assert operator.singular == (np.abs(matrix.sum(axis=1)).max() < 1e-9)
    held = any(isinstance(s, pde.Dirichlet | pde.Robin) for pair in grid.boundary for s in pair)
    assert (-lap).positive_definite == (held and not mirrored)
    assert (-lap.weighted()).positive_definite == held
    assert lap.positive_definite is False
    assert step.positive_definite == (not mirrored)
    assert (pde.identity(grid) - 0.1 * lap.weighted()).positive_definite
    # By a number that is traced it is no longer known.
    traced = []
    jax.jit(lambda t: traced.append(t * -lap))(1.0)
    assert traced[0].positive_definite in ({None, False} if mirrored or not held else {None})
    assert traced[0].symmetric == lap.symmetric


CLOSED = [
    pde.Grid((512, 512), boundary=P, dtype="float32"),
    pde.Grid(300, boundary=N, centering="cell", dtype="float32"),
    pde.Grid(513, boundary=N, dtype="float32"),
]


@pytest.mark.parametrize("grid", CLOSED, ids=["periodic", "cells", "vertices"])
def test_a_small_number_beside_large_ones_is_no_rounding(grid):
    """In u - Δu on a fine grid 1 is near the rounding of the diagonal, 4/h²."""
    lap = pde.laplacian(grid)
    step = (pde.identity(grid) - lap).weighted()
    assert not step.singular
    assert step.positive_definite is True
    assert (-lap).weighted().singular
    assert not pde.helmholtz(grid, 0.1).singular
    assert (-pde.helmholtz(grid, 0.1)).positive_definite is not True
    assert not (pde.identity(grid) + pde.Diffusion(grid, 1.0)).singular
    # Multiplied by what may be zero, it may be.
    traced = []
    jax.jit(lambda t: traced.append(-lap + t * pde.identity(grid)))(1.0)
    assert not traced[0].singular
    assert traced[0].positive_definite is not True


def test_a_small_number_among_given_coefficients():
    """Nothing is known of these but the numbers."""
    grid = pde.Grid(300, boundary=P, dtype="float32")
    scale = 300.0**2
    terms = {(0,): 1.0 + 2 * scale, (1,): -scale, (-1,): -scale}
    assert pde.Stencil(grid, terms).positive_definite is True
    assert not pde.Stencil(grid, terms).singular
    terms[0,] = 2 * scale
    assert pde.Stencil(grid, terms).singular


def test_large_grids_are_looked_at_without_being_formed():
    """One row of each kind, or this would take gigabytes."""
    grid = pde.Grid((4096, 4096, 4096), boundary=[(D, R), P, N], centering="cell")
    assert (-pde.laplacian(grid)).positive_definite


def test_one_off_entries_are_seen():
    """A line of coefficients that differs in the middle only."""
    grid = pde.Grid((9, 5))
    line = np.full((9, 1), -1.0)
    line[4] = -1.1
    stencil = pde.Stencil(grid, {(0, 0): 4.5, (1, 0): line, (-1, 0): -1.0, (0, 1): -1, (0, -1): -1})
    assert stencil.symmetric is False


def test_uncoupled_rows_are_not_called_definite():
    """Dominance is strict next to the sides of axis 0 only, and axis 1 couples nothing."""
    grid = pde.Grid((4, 5), boundary=[(D, D), P])
    cut = np.array([[0.0, 1.0, 0.0, 0.0]]).T
    stencil = pde.Stencil(
        grid, {(0, 0): cut, (0, 1): -cut / 2, (0, -1): -cut / 2}, positive_definite=None
    )
    assert stencil.symmetric
    assert stencil.positive_definite is not True


def test_declared_knowledge_wins():
    grid = pde.Grid(4)
    operators = []
    jax.jit(lambda c: operators.append(pde.Stencil(grid, {(0,): c}, positive_definite=True)))(2.0)
    assert operators[0].symmetric
    assert operators[0].positive_definite
    asked = pde.Stencil(grid, {(0,): -1.0}, symmetric=True, positive_definite=False)
    assert asked.positive_definite is False
    assert pde.laplacian(grid).declared(positive_definite=True).positive_definite


@pytest.mark.parametrize("centering", ["vertex", "cell"])
def test_sums_and_multiples_on_a_grid_are_one_stencil(centering):
    grid = pde.Grid((4, 5), boundary=[(D, N), P], centering=centering)
    one, lap = pde.identity(grid), pde.laplacian(grid)
    array = pde.advection(grid, [jnp.asarray(x) for x in grid.mesh()])
    together = (one - 0.1 * (lap - 2.0 * array)) / 3.0
    assert isinstance(together, pde.Stencil)
    expected = sum(
        factor * a.to_scipy().toarray()
        for factor, a in ((1 / 3, one), (-0.1 / 3, lap), (0.2 / 3, array))
    )
    np.testing.assert_allclose(together.to_scipy().toarray(), expected, atol=1e-12)
    # On the same points, with another condition on a side.
    other = pde.laplacian(pde.Grid((4, 5), boundary=[(D, R), P], centering=centering))
    np.testing.assert_allclose(
        (lap + other).to_scipy().toarray(), (lap.to_scipy() + other.to_scipy()).toarray()
    )


def fused(function, field):
    """Fusions that read or write whole fields, and whole arrays outside of them."""

    # An operator's method cannot be hashed, for its arrays.
    def apply(v):
        return function(v)

    text = jax.jit(apply).lower(field).compile().as_text()
    entry = text[text.index("ENTRY") :]
    size = re.escape(",".join(map(str, field.shape)))
    made = re.findall(rf"= f64\[{size}\]\S* (\w+)\(", entry)
    larger = [
        shape
        for shape in re.findall(r"= f64\[([\d,]+)\]", entry)
        if np.prod([int(n) for n in shape.split(",")]) > field.size
    ]
    return [name for name in made if name != "parameter"], larger


@pytest.mark.parametrize("boundary", [D, N, P, R], ids=lambda b: type(b).__name__)
@pytest.mark.parametrize("centering", ["vertex", "cell"])
def test_one_kernel(boundary, centering):
    grid = pde.Grid((33, 47), boundary=boundary, centering=centering)
    field = jnp.ones(grid.shape)
    operator = pde.identity(grid) - 0.1 * pde.laplacian(grid)
    assert fused(operator.matvec, field) == (["fusion"], [])
    assert fused(operator.rmatvec, field) == (["fusion"], [])


def test_no_array_of_the_size_of_the_grid_is_stored_for_constant_coefficients():
    grid = pde.Grid((33, 47), boundary=R, centering="cell")
    operator = pde.identity(grid) - 0.1 * pde.laplacian(grid)
    assert sum(piece.size for parts in operator.coefficients for piece in parts) < 100
    text = jax.jit(lambda v: operator @ v).lower(jnp.ones(grid.shape)).compile().as_text()
    assert "f64[33,47]{1,0} constant" not in text


def test_derivatives_with_respect_to_coefficients():
    grid = pde.Grid((4, 3), boundary=[(N, D), P], centering="cell")
    generator = np.random.default_rng(0)
    weight, field, array = (jnp.asarray(generator.standard_normal(grid.shape)) for _ in range(3))
    line = jnp.asarray(generator.standard_normal((4, 1)))
    theta = (2.0, line, array)

    def made(t):
        number, line, array = t
        return pde.Stencil(grid, {(0, 0): number, (-1, 0): line, (0, 1): array, (1, 1): 3.0})

    def value(t):
        return jnp.sum(weight * made(t).matvec(field))

    got = jax.jit(jax.grad(value))(theta)
    assert [g.shape for g in got] == [(), (4, 1), (4, 3)]
    # A is affine in the coefficients: differences of matrices are derivatives.
    flat, unravel = jax.flatten_util.ravel_pytree(theta)
    start = made(theta).to_scipy()
    for i, derivative in enumerate(jax.flatten_util.ravel_pytree(got)[0]):
        change = made(unravel(flat.at[i].add(1.0))).to_scipy() - start
        expected = weight.ravel() @ (change @ np.asarray(field).ravel())
        assert float(derivative) == pytest.approx(float(expected), abs=1e-11)
    # And with respect to the operator itself, piece by piece.
    operator = made(theta)
    by_piece = jax.jit(jax.grad(lambda a: jnp.sum(weight * a.matvec(field))))(operator)
    for parts, originals in zip(by_piece.coefficients, operator.coefficients, strict=True):
        assert [p.shape for p in parts] == [o.shape for o in originals]


def test_precision_is_that_of_the_field():
    operator = pde.laplacian(pde.Grid((4, 5), boundary=N, centering="cell"))
    field = jnp.ones((4, 5), jnp.float32)
    assert operator.matvec(field).dtype == operator.rmatvec(field).dtype == jnp.float32
    assert operator.matvec(field + 1j).dtype == jnp.complex64


def test_wide_offsets_on_periodic_axes():
    grid = pde.Grid(7, boundary=P)
    stencil = pde.Stencil(grid, {(-2,): 1.0, (1,): 3.0, (3,): -1.0})
    expected = sum(c * np.roll(np.eye(7), o, 1) for o, c in ((-2, 1.0), (1, 3.0), (3, -1.0)))
    np.testing.assert_array_equal(stencil.to_scipy().toarray(), expected)
    np.testing.assert_array_equal(dense(stencil.matvec, grid), expected)
    np.testing.assert_array_equal(dense(stencil.rmatvec, grid), expected.T)


@pytest.mark.parametrize(
    ("coefficients", "error", "words"),
    [
        ({(1,): 1.0}, ValueError, "2 integers"),
        ({(0.5, 0): 1.0}, ValueError, "2 integers"),
        ({(2, 0): 1.0}, ValueError, "reaches 2 points"),
        ({(0, 3): 1.0}, ValueError, "at least 7"),
        ({(0, 0): np.ones((3, 3))}, ValueError, r"broadcast to the grid \(4, 5\)"),
        ({(0, 0): np.ones((2, 4, 5))}, ValueError, "broadcast"),
        ({(0, 0): 1j}, TypeError, "real"),
        ({(0, 0): np.nan}, ValueError, "finite"),
    ],
)
def test_what_is_no_stencil(coefficients, error, words):
    with pytest.raises(error, match=words):
        pde.Stencil(pde.Grid((4, 5), boundary=[D, P]), coefficients)


def test_what_is_no_field():
    operator = pde.laplacian(pde.Grid((4, 5)))
    for apply in (operator.matvec, operator.rmatvec):
        with pytest.raises(ValueError, match=r"\(4, 5\), got \(5, 4\)"):
            apply(jnp.ones((5, 4)))
        with pytest.raises(TypeError, match="floating"):
            apply(jnp.ones((4, 5), int))


def test_integer_coefficients_are_numbers():
    grid = pde.Grid(3)
    stencil = pde.Stencil(grid, {(0,): 2, (1,): np.array([1, 2, 3])})
    assert stencil.to_scipy().toarray().tolist() == [[2, 1, 0], [0, 2, 2], [0, 0, 2]]
