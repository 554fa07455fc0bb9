"""Smoothers against formulas with dense matrices, their symmetry, and as solvers."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel as bl
import bilevel_pde as pde
from tests.pde.manufactured import D, N, P

RANDOM = np.random.default_rng(0)
GRIDS = [pde.Grid((5, 4)), pde.Grid((4, 6), 1.0, [(D, N), P], "cell"), pde.Grid(7)]


def operators():
    for grid in GRIDS:
        k = jnp.asarray(RANDOM.uniform(0.5, 2.0, grid.shape))
        yield pde.Diffusion(grid, k)
        yield 3.0 * pde.identity(grid) - pde.laplacian(grid)
    corners = dict.fromkeys(itertools.product((-1, 0, 1), repeat=2), -1.0) | {(0, 0): 9.0}
    yield pde.Stencil(pde.Grid((6, 5)), corners)


OPERATORS = list(operators())


def applied(smoother, operator):
    """M⁻¹ as a dense matrix, by `at`."""
    problem = bound(operator)
    shape = operator.grid.shape
    inverse = smoother.at(problem, jnp.zeros(shape))
    columns = jax.jit(jax.vmap(inverse))(jnp.eye(operator.grid.size).reshape(-1, *shape))
    return np.asarray(columns).reshape(operator.grid.size, -1).T


def bound(operator):
    """The problem as solvers see it."""
    seen = []

    class Keep:
        def at(self, problem, x):
            seen.append(problem)
            return lambda v: v

    problem = bl.LinearSystem(operator, jnp.ones(operator.grid.shape))
    solver = bl.Richardson(0.1, preconditioner=Keep())
    with jax.disable_jit():
        bl.solve(problem, None, jnp.zeros(operator.grid.shape), solver=solver, budget=bl.Budget(1))
    return seen[0]


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


@pytest.mark.parametrize("operator", OPERATORS)
def test_weighted_jacobi_is_its_formula(operator):
    matrix = operator.to_scipy().toarray()
    scaled = np.diag(1 / np.diag(matrix))
    identity = np.eye(len(matrix))
    for weight, omega in ((None, {1: 2 / 3, 2: 4 / 5}[operator.grid.ndim]), (0.5, 0.5)):
        error = np.linalg.matrix_power(identity - omega * scaled @ matrix, 3)
        expected = (identity - error) @ np.linalg.inv(matrix)
        got = applied(pde.WeightedJacobi(weight, sweeps=3), operator)
        np.testing.assert_allclose(got, expected, atol=1e-12)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize(("weight", "symmetric"), [(1.0, False), (1.3, True)])
def test_colours_are_sequential_gauss_seidel_in_their_order(operator, weight, symmetric):
    matrix = operator.to_scipy().toarray()
    order = np.argsort(colours_of(operator), kind="stable")
    back = order[::-1]
    smoother = pde.GaussSeidel(weight, sweeps=2, symmetric=symmetric)
    b, start = RANDOM.standard_normal((2, len(matrix)))
    shape = operator.grid.shape
    for x0, backward in itertools.product((None, start), (False, True)):
        expected = np.zeros_like(b) if x0 is None else x0
        for _ in range(2):
            for one in ((back, order) if backward else (order, back))[: 1 + symmetric]:
                expected = sequential(matrix, one, b, weight, expected)
        given = None if x0 is None else jnp.asarray(x0.reshape(shape))
        got = smoother.sweep(operator, given, jnp.asarray(b.reshape(shape)), backward=backward)
        np.testing.assert_allclose(np.ravel(got), expected, atol=1e-11)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("degree", [1, 2, 4])
def test_chebyshev_is_its_polynomial(operator, degree):
    matrix = operator.to_scipy().toarray()
    scaled = matrix / np.diag(matrix)[:, None]
    upper, part = 2.0, 0.25
    centre, radius = upper * (1 + part) / 2, upper * (1 - part) / 2
    values, vectors = np.linalg.eig(scaled)
    polynomial = np.polynomial.chebyshev.Chebyshev.basis(degree)
    errors = polynomial((centre - values.real) / radius) / polynomial(centre / radius)
    expected = vectors @ np.diag((1 - errors) / values) @ np.linalg.inv(vectors)
    expected = expected.real / np.diag(matrix)[None, :]
    got = applied(pde.ChebyshevSmoother(degree), operator)
    np.testing.assert_allclose(got, expected, atol=1e-11)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize(
    "smoother",
    [pde.WeightedJacobi(), pde.GaussSeidel(1.2, symmetric=True), pde.ChebyshevSmoother()],
)
def test_symmetric_smoothers_are_symmetric(operator, smoother):
    inverse = applied(smoother, operator)
    np.testing.assert_allclose(inverse, inverse.T, atol=1e-13)
    assert np.linalg.eigvalsh(inverse)[0] > 0


def test_one_way_gauss_seidel_is_not_symmetric_and_its_reverse_is_the_transpose():
    operator = OPERATORS[0]
    forward, smoother = applied(pde.GaussSeidel(), operator), pde.GaussSeidel()
    shape = operator.grid.shape

    def backward(v):
        return smoother.sweep(operator, None, v, backward=True)

    columns = jax.vmap(backward)(jnp.eye(operator.grid.size).reshape(-1, *shape))
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
    b = jnp.asarray(RANDOM.standard_normal(grid.shape))
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
        (lambda: pde.GaussSeidel(sweeps=0), "sweeps"),
        (lambda: pde.ChebyshevSmoother(0), "degree"),
        (lambda: pde.ChebyshevSmoother(upper=0.0), "upper"),
        (lambda: pde.ChebyshevSmoother(part=0.0), "part"),
    ],
)
def test_refused_parameters(make, name):
    with pytest.raises(ValueError, match=name):
        make()


def test_refuses_an_operator_without_a_grid():
    matrix = OPERATORS[0].to_scipy()
    problem = bl.LinearSystem(pde.from_scipy(matrix), jnp.ones(matrix.shape[0]))
    solver = bl.Richardson(1.0, preconditioner=pde.GaussSeidel())
    with pytest.raises(bl.IncompatibleError, match="AlgebraicMultigrid"):
        bl.solve(problem, None, jnp.zeros(matrix.shape[0]), solver=solver)


def test_odd_periodic_axis_and_two_colours():
    """Neighbours across the seam share a colour: still a convergent iteration, and symmetric."""
    operator = pde.identity(pde.Grid(5, boundary=P)) - 0.1 * pde.laplacian(pde.Grid(5, boundary=P))
    inverse = applied(pde.GaussSeidel(symmetric=True), operator)
    np.testing.assert_allclose(inverse, inverse.T, atol=1e-13)
    error = np.eye(5) - inverse @ operator.to_scipy().toarray()
    assert np.abs(np.linalg.eigvals(error)).max() < 1
