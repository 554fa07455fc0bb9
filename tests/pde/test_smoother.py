"""Smoothers against formulas with dense matrices, their symmetry, and as solvers."""

import functools
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse as sp

import bilevel as bl
import bilevel_pde as pde
from bilevel_pde.grid_colours import grid_colours
from tests.pde.cases import few
from tests.pde.manufactured import D, N, P

GRIDS = [pde.Grid((5, 4)), pde.Grid((4, 6), 1.0, [(D, N), P], "cell"), pde.Grid(7)]


def operators():
    generator = np.random.default_rng(0)
    for grid in GRIDS:
        k = jnp.asarray(generator.uniform(0.5, 2.0, grid.shape))
        yield pde.Diffusion(grid, k)
        yield 3.0 * pde.identity(grid) - pde.laplacian(grid)
    corners = dict.fromkeys(itertools.product((-1, 0, 1), repeat=2), -1.0) | {(0, 0): 9.0}
    yield pde.Stencil(pde.Grid((6, 5)), corners)


OPERATORS = list(operators())


@functools.cache
def applied(smoother, number):
    """M⁻¹ of one of the operators as a dense matrix, by `at`."""
    operator = OPERATORS[number] if isinstance(number, int) else number
    shape = operator.grid.shape

    @jax.jit
    def apply(columns):
        problem = bl.LinearSystem(operator, jnp.ones(shape)).at(None)
        return jax.vmap(smoother.at(problem, jnp.zeros(shape)))(columns)

    columns = apply(np.eye(operator.grid.size).reshape(-1, *shape))
    return np.asarray(columns).reshape(operator.grid.size, -1).T


def colours_of(operator):
    index = np.indices(operator.grid.shape)
    oblique = isinstance(operator, pde.Stencil) and len(operator.offsets) == 9
    if oblique:
        return (2 * (index[0] % 2) + index[1] % 2).ravel()
    return (sum(index) % 2).ravel()


def sequential(matrix, order, b, weight, x):
    """Gauss-Seidel, one unknown after another."""
    x = x.copy()
    for i in order:
        x[i] += weight * (b[i] - matrix[i] @ x) / matrix[i, i]
    return x


@pytest.mark.parametrize("number", few(lambda number: number in {0, 2, 4}, range(len(OPERATORS))))
def test_weighted_jacobi_is_its_formula(number):
    operator = OPERATORS[number]
    matrix = operator.to_scipy().toarray()
    scaled = np.diag(1 / np.diag(matrix))
    identity = np.eye(len(matrix))
    own = {1: 2 / 3, 2: 4 / 5}[operator.grid.ndim]
    for weight, omega in ((None, own), (0.5, 0.5))[: 1 + (number == 0)]:
        error = np.linalg.matrix_power(identity - omega * scaled @ matrix, 3)
        expected = (identity - error) @ np.linalg.inv(matrix)
        got = applied(pde.WeightedJacobi(weight, sweeps=3), number)
        np.testing.assert_allclose(got, expected, atol=1e-12)


@pytest.mark.parametrize("number", range(len(OPERATORS)))
@pytest.mark.parametrize(("weight", "symmetric"), [(1.0, False), (1.3, True)])
def test_colours_are_sequential_gauss_seidel_in_their_order(number, weight, symmetric):
    operator = OPERATORS[number]
    matrix = operator.to_scipy().toarray()
    order = np.argsort(colours_of(operator), kind="stable")
    back = order[::-1]
    smoother = pde.GaussSeidel(weight, sweeps=2, symmetric=symmetric)
    b, start = np.random.default_rng(1).standard_normal((2, len(matrix)))
    shape = operator.grid.shape
    for x0, backward in itertools.product((None, start), (False, True)):
        expected = np.zeros_like(b) if x0 is None else x0
        for _ in range(2):
            for one in ((back, order) if backward else (order, back))[: 1 + symmetric]:
                expected = sequential(matrix, one, b, weight, expected)
        given = None if x0 is None else jnp.asarray(x0.reshape(shape))
        # Not compiled as a whole: that many steps take long.
        got = smoother.sweep(operator, given, jnp.asarray(b.reshape(shape)), backward=backward)
        np.testing.assert_allclose(np.ravel(got), expected, atol=1e-11)


@pytest.mark.parametrize(
    ("degree", "number"),
    few(
        lambda degree, number: degree == 2 or (degree, number) in {(1, 0), (4, 4)},
        [1, 2, 4],
        range(len(OPERATORS)),
    ),
)
def test_chebyshev_is_its_polynomial(degree, number):
    operator = OPERATORS[number]
    matrix = operator.to_scipy().toarray()
    scaled = matrix / np.diag(matrix)[:, None]
    upper, part = 2.0, 0.25
    centre, radius = upper * (1 + part) / 2, upper * (1 - part) / 2
    values, vectors = np.linalg.eig(scaled)
    polynomial = np.polynomial.chebyshev.Chebyshev.basis(degree)
    errors = polynomial((centre - values.real) / radius) / polynomial(centre / radius)
    expected = vectors @ np.diag((1 - errors) / values) @ np.linalg.inv(vectors)
    expected = expected.real / np.diag(matrix)[None, :]
    got = applied(pde.ChebyshevSmoother(degree), number)
    np.testing.assert_allclose(got, expected, atol=1e-11)


SYMMETRIC = {
    "Jacobi": pde.WeightedJacobi(),
    "SSOR": pde.GaussSeidel(1.2, symmetric=True),
    "Chebyshev": pde.ChebyshevSmoother(),
}


@pytest.mark.parametrize(
    ("name", "number"),
    few(lambda name, number: number in {1, 4}, SYMMETRIC, range(len(OPERATORS))),
)
def test_symmetric_smoothers_are_symmetric(name, number):
    smoother = SYMMETRIC[name]
    inverse = applied(smoother, number)
    np.testing.assert_allclose(inverse, inverse.T, atol=1e-13)
    assert np.linalg.eigvalsh(inverse)[0] > 0


def test_one_way_gauss_seidel_is_not_symmetric_and_its_reverse_is_the_transpose():
    operator = OPERATORS[0]
    forward, smoother = applied(pde.GaussSeidel(), 0), pde.GaussSeidel()
    shape = operator.grid.shape

    def backward(v):
        return smoother.sweep(operator, None, v, backward=True)

    columns = jax.jit(jax.vmap(backward))(jnp.eye(operator.grid.size).reshape(-1, *shape))
    reverse = np.asarray(columns).reshape(operator.grid.size, -1).T
    np.testing.assert_allclose(reverse, forward.T, atol=1e-13)
    assert np.abs(forward - forward.T).max() > 1e-3


@pytest.mark.parametrize(
    "smoother",
    [pde.WeightedJacobi(), pde.GaussSeidel(), pde.GaussSeidel(1.5), pde.ChebyshevSmoother()],
)
def test_as_solvers(smoother):
    grid = pde.Grid((7, 7))
    operator = -pde.laplacian(grid)
    b = jnp.asarray(np.random.default_rng(0).standard_normal(grid.shape))
    solution = bl.solve(
        bl.LinearSystem(operator, b),
        None,
        jnp.zeros(grid.shape),
        solver=bl.Richardson(1.0, preconditioner=smoother),
        budget=bl.Budget(500, rtol=1e-10),
    )
    assert solution.status == bl.Status.CONVERGED
    exact = np.linalg.solve(operator.to_scipy().toarray(), np.ravel(b))
    np.testing.assert_allclose(
        np.ravel(solution.value), exact, rtol=1e-7, atol=1e-8 * np.abs(exact).max()
    )
    # Each iteration of SOR with a good weight is worth several of Jacobi.
    limit = {pde.WeightedJacobi: 200, pde.GaussSeidel: 160, pde.ChebyshevSmoother: 90}
    assert int(solution.iterations) < (
        40 if getattr(smoother, "weight", 0) == 1.5 else limit[type(smoother)]
    )


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: pde.WeightedJacobi(0.0), "weight"),
        (lambda: pde.WeightedJacobi(sweeps=0), "sweeps"),
        (lambda: pde.GaussSeidel(-1.0), "weight"),
        (lambda: pde.GaussSeidel(2.0), "weight"),
        (lambda: pde.GaussSeidel(colours=[0, -1]), "count from 0"),
        (lambda: pde.GaussSeidel(sweeps=0), "sweeps"),
        (lambda: pde.ChebyshevSmoother(0), "degree"),
        (lambda: pde.ChebyshevSmoother(upper=0.0), "upper"),
        (lambda: pde.ChebyshevSmoother(part=0.0), "part"),
    ],
)
def test_refused_parameters(make, name):
    with pytest.raises(ValueError, match=name):
        make()


def test_gauss_seidel_of_a_matrix_needs_colours_and_jacobi_does_not():
    matrix = OPERATORS[1].to_scipy()
    operator = pde.from_scipy(matrix)
    problem = bl.LinearSystem(operator, jnp.ones((20, 2)))
    solver = bl.Richardson(1.0, preconditioner=pde.GaussSeidel())
    with pytest.raises(bl.IncompatibleError, match=r"colours=pde.colouring\(matrix\)"):
        bl.solve(problem, None, jnp.zeros((20, 2)), solver=solver)
    inverse = np.asarray(pde.WeightedJacobi(sweeps=1).at(problem.at(None), None)(jnp.ones((20, 2))))
    np.testing.assert_allclose(inverse, np.tile(2 / 3 / matrix.diagonal(), (2, 1)).T)
    # A product of fields of several arrays has no diagonal of one.
    flow = pde.Gradient(pde.Staggered((4, 4))).T
    system = bl.LinearSystem(flow @ flow.T, jnp.ones((4, 4))).at(None)
    with pytest.raises(bl.IncompatibleError, match="colours"):
        pde.GaussSeidel().at(system, None)


def test_one_way_gauss_seidel_is_refused_where_symmetry_is_needed():
    operator = OPERATORS[0]
    problem = bl.LinearSystem(operator, jnp.ones(operator.grid.shape))
    for kind in (bl.ConjugateGradient, bl.MINRES):
        solver = kind(preconditioner=pde.GaussSeidel())
        with pytest.raises(bl.IncompatibleError, match=r"Use GaussSeidel\(symmetric=True\)"):
            bl.solve(problem, None, jnp.zeros(operator.grid.shape), solver=solver)


@functools.cache
def hard_for_two_colours():
    """Symmetric positive definite operators whose red points would see one another."""
    odd, square, even = (pde.Grid(n, boundary=P) for n in (9, (9, 9), (8, 8)))
    fourth = pde.Grid(16, 16.0, P)
    corners = dict.fromkeys(itertools.product((-1, 0, 1), repeat=2), -1.0) | {(0, 0): 8.1}
    return [
        *(
            0.1 * pde.identity(g) - g.spacing[0] ** 2 * pde.laplacian(g)
            for g in (odd, square, even)
        ),
        0.1 * pde.identity(fourth) + pde.biharmonic(fourth),
        pde.Stencil(pde.Grid((5, 6), boundary=P), corners),
    ]


@pytest.mark.parametrize("number", few(lambda number: number in {0, 1, 3}, range(5)))
def test_over_relaxation_converges_wherever_it_must(number):
    """For every positive definite operator SOR does, and SSOR is positive definite."""
    operator = hard_for_two_colours()[number]
    matrix = operator.to_scipy().toarray()
    forward = applied.__wrapped__(pde.GaussSeidel(1.8), operator)
    assert np.abs(np.linalg.eigvals(np.eye(len(matrix)) - forward @ matrix)).max() < 1
    # Symmetric sweeps: M⁻¹ = F + Fᵀ - Fᵀ A F of forward ones F.
    both = forward + forward.T - forward.T @ matrix @ forward
    assert np.linalg.eigvalsh(both)[0] > 0
    if number == 1:
        inverse = applied.__wrapped__(pde.GaussSeidel(1.8, symmetric=True), operator)
        np.testing.assert_allclose(inverse, both, atol=1e-12)


AXES, CORNERS = ((1, 0), (0, 1)), tuple(itertools.product((-1, 0, 1), repeat=2))
FURTHER = (*CORNERS, (2, 0), (0, 2))


@pytest.mark.parametrize(
    ("shape", "periodic", "offsets", "count"),
    [
        ((8, 6), (True, True), AXES, 2),
        ((9, 6), (True, False), AXES, 3),
        ((9, 6), (False, True), AXES, 2),
        ((6, 5), (True, False), CORNERS, 4),
        ((5, 5), (True, True), CORNERS, 5),
        ((7, 9), (True, True), FURTHER, 12),
        ((16, 16), (True, True), FURTHER, 8),
        ((3, 1), (True, False), ((1, 0), (2, 0), (0, 1)), 3),
        ((4, 3), (False, False), ((0, 0),), 1),
        ((3, 3), (False, False), ((5, 0), (1, 1)), 2),
    ],
)
def test_colours_of_a_grid(shape, periodic, offsets, count):
    """No point sees another of its colour, wherever axes close."""
    colours, found = grid_colours(shape, periodic, offsets)
    assert (found, set(np.unique(colours))) == (count, set(range(count)))
    points = np.indices(shape)
    for offset in offsets:
        target = [index + step for index, step in zip(points, offset, strict=True)]
        inside = np.ones(shape, bool)
        for axis, (size, closed) in enumerate(zip(shape, periodic, strict=True)):
            inside &= closed | ((target[axis] >= 0) & (target[axis] < size))
            target[axis] = target[axis] % size
        other = np.any([t != p for t, p in zip(target, points, strict=True)], axis=0)
        assert not np.any(inside & other & (colours[tuple(target)] == colours))


def random_pattern(size=12):
    generator = np.random.default_rng(2)
    matrix = sp.random_array((size, size), density=0.2, rng=generator, format="csr")
    return sp.csr_array(matrix + sp.diags_array(np.full(size, 4.0)))


@pytest.mark.parametrize("order", ["greedy", "natural"])
def test_colours_of_a_matrix(order):
    """No entry joins two of a colour; natural levels come before what they are needed for."""
    matrix = random_pattern()
    colours = pde.colouring(matrix, order)
    rows, columns = (matrix - sp.diags_array(matrix.diagonal())).nonzero()
    assert np.all(colours[rows] != colours[columns])
    assert set(colours) == set(range(colours.max() + 1))
    if order == "natural":
        below = rows > columns
        assert np.all(colours[rows[below]] > colours[columns[below]])
    else:
        assert colours.max() <= np.diff(sp.csr_array(matrix + matrix.T).indptr).max()


@pytest.mark.parametrize("symmetric", [False, True])
def test_natural_colours_solve_with_the_triangles(symmetric):
    """One sweep from zero is (D/ω + L)⁻¹, a symmetric one SSOR, also of several columns."""
    matrix, weight = random_pattern(), 1.2
    operator = pde.from_scipy(matrix)
    colours = pde.colouring(operator, "natural")
    smoother = pde.GaussSeidel(weight, symmetric=symmetric, colours=colours)
    dense, b = matrix.toarray(), np.random.default_rng(3).standard_normal((12, 2))
    scaled = np.diag(np.diag(dense)) / weight
    expected = np.linalg.solve(scaled + np.tril(dense, -1), b)
    if symmetric:
        rest = b - dense @ expected
        expected = expected + np.linalg.solve(scaled + np.triu(dense, 1), rest)

    @jax.jit
    def apply(values, b):
        problem = bl.LinearSystem(operator.with_values(values), b).at(None)
        return smoother.at(problem, b)(b)

    np.testing.assert_allclose(apply(operator.values, b), expected, atol=1e-13)
    back = smoother.sweep(operator, None, jnp.asarray(b[:, 0]), backward=True)
    if not symmetric:
        upper = np.linalg.solve(scaled + np.triu(dense, 1), b[:, 0])
        np.testing.assert_allclose(back, upper, atol=1e-13)


def test_refused_colours():
    with pytest.raises(ValueError, match="'greedy' or 'natural', got 'random'"):
        pde.colouring(random_pattern(), "random")
    with pytest.raises(TypeError, match="got ndarray"):
        pde.colouring(np.eye(3))
    with pytest.raises(ValueError, match="an integer for each unknown"):
        pde.GaussSeidel(colours=np.ones((2, 2)))
    operator = pde.from_scipy(random_pattern())
    problem = bl.LinearSystem(operator, jnp.ones(12)).at(None)
    with pytest.raises(bl.IncompatibleError, match="3 colours do not fit an operator with 12"):
        pde.GaussSeidel(colours=np.arange(3)).at(problem, jnp.ones(12))
    # Red and black for a matrix that reaches across corners, also within someone else's jit.
    corners = pde.from_scipy(OPERATORS[-1].to_scipy())
    wrong = pde.GaussSeidel(colours=np.indices((6, 5)).sum(0).ravel() % 2)
    solver = bl.Richardson(1.0, preconditioner=wrong)

    def solve(b):
        return bl.solve(bl.LinearSystem(corners, b), None, b, solver=solver).value

    for run in (solve, jax.jit(solve)):
        with pytest.raises(ValueError, match="have the same colour"):
            run(jnp.ones(30))
    with pytest.raises(bl.IncompatibleError, match="traced"):
        jax.jit(lambda t: pde.colouring(t * operator))(1.0)


def test_a_stencil_that_reads_what_another_made_is_computed_once():
    """Fused into each other on CPUs they took up to 125 times the work, and 89 operations here."""
    grid = pde.Grid((63, 63))
    operator, b = -pde.laplacian(grid), jnp.ones(grid.shape)
    sweep = partial(pde.ChebyshevSmoother().sweep, backward=True)
    compiled = jax.jit(sweep).lower(operator, b, b).compile()
    assert compiled.cost_analysis()["flops"] / grid.size < 50
