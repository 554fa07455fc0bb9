"""Multigrid: symmetric cycles, iterations that do not grow, hypergradients, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse.linalg as spla

import bilevel as bl
import bilevel_pde as pde
from tests.pde.manufactured import D, N, P, R, normal

MULTIGRID = pde.Multigrid()
CG = bl.ConjugateGradient(preconditioner=MULTIGRID)
MIXED = [(D, N), P]
SOLID = pde.Grid((10, 8, 9), 1.0, [D, P, (N, D)])


def positive(shape):
    return np.random.default_rng(1).uniform(0.5, 2.0, shape)


def cycle(operator, multigrid=MULTIGRID):
    """M⁻¹ as a dense matrix."""
    inverse = multigrid.inverse(operator)
    size, shape = operator.grid.size, operator.grid.shape
    columns = jax.jit(jax.vmap(inverse))(jnp.eye(size).reshape(-1, *shape))
    return np.asarray(columns).reshape(size, -1).T


def solved(operator, b, solver=CG, rtol=1e-8):
    problem, budget = bl.LinearSystem(operator, b), bl.Budget(60, rtol=rtol)
    solution = bl.solve(problem, None, jnp.zeros_like(b), solver=solver, budget=budget)
    assert solution.status == bl.Status.CONVERGED
    residual = np.ravel(b) - operator.to_scipy() @ np.ravel(solution.value)
    assert np.linalg.norm(residual) < 1.5 * rtol * np.linalg.norm(b)
    return solution


def iterations(operator, b, rtol=1e-8, multigrid=MULTIGRID):
    """Of preconditioned conjugate gradients in NumPy, which spares compiling the solver's."""
    inverse = jax.jit(multigrid.inverse(operator))

    def precondition(r):
        return np.ravel(inverse(r.reshape(b.shape)))

    matrix, residual = operator.to_scipy(), b.ravel()
    direction = z = precondition(residual)
    x, energy, size = np.zeros(b.size), residual @ z, np.linalg.norm(b)
    for count in range(40):
        if np.linalg.norm(residual) <= rtol * size:
            return count, x
        image = matrix @ direction
        step = energy / (direction @ image)
        x, residual = x + step * direction, residual - step * image
        z = precondition(residual)
        energy, before = residual @ z, energy
        direction = z + energy / before * direction
    return 40, x


def volumes(grid):
    return np.prod(np.broadcast_arrays(*grid.weights()), axis=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "smoother"),
    [
        pytest.param("V", pde.ChebyshevSmoother(), marks=pytest.mark.slow),
        ("W", pde.WeightedJacobi()),
        pytest.param("F", pde.WeightedJacobi(), marks=pytest.mark.slow),
        pytest.param("V", pde.GaussSeidel(), marks=pytest.mark.slow),
    ],
)
def test_cycles_are_symmetric_and_contract(kind, smoother):
    grid = pde.Grid((18, 9), 1.0, [(D, N), D], "cell")
    k = jnp.asarray(positive(grid.shape))
    operator = pde.Diffusion(grid, k)
    inverse = cycle(operator, pde.Multigrid(smoother, cycle=kind))
    np.testing.assert_allclose(inverse, inverse.T, atol=1e-13 * np.abs(inverse).max())
    error = np.linalg.eigvals(inverse @ operator.to_scipy().toarray()).real
    assert 0.4 < error.min() < error.max() < 1.4


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda g: -pde.laplacian(g), marks=pytest.mark.slow),
        lambda g: pde.Diffusion(g, 1.0),
    ],
)
def test_weighted_and_transposed_forms_have_the_plain_cycle(make):
    """Vertices on Neumann and Robin sides: rows of half a control volume."""
    grid = pde.Grid((9, 8), 1.0, [(D, N), R])
    operator, weights = make(grid), volumes(grid).ravel()
    plain = cycle(operator)
    scale = np.abs(plain).max()
    # Self-adjoint in the inner product of control volumes.
    symmetric = plain / weights
    np.testing.assert_allclose(symmetric, symmetric.T, atol=1e-12 * scale)
    np.testing.assert_allclose(cycle(operator.weighted()), symmetric, atol=1e-12 * scale)
    np.testing.assert_allclose(cycle(operator.transposed()), plain.T, atol=1e-12 * scale)


@pytest.mark.parametrize(
    ("boundary", "centering"),
    [
        (MIXED, "cell"),
        pytest.param(P, "vertex", marks=pytest.mark.slow),
        pytest.param(D, "vertex", marks=pytest.mark.slow),
        pytest.param(N, "cell", marks=pytest.mark.slow),
    ],
)
def test_iterations_do_not_grow(boundary, centering):
    counts = []
    for n in (8, 32):
        grid = pde.Grid((n, n), 1.0, boundary, centering)
        b = normal(grid.shape)
        operator = -pde.laplacian(grid)
        b = b - b.mean() if operator.singular else b
        count, x = iterations(operator, b)
        if operator.singular:
            np.testing.assert_allclose(np.mean(x), 0, atol=1e-12)
        counts.append(count)
    assert max(counts) <= 9
    assert max(counts) - min(counts) <= 2


@pytest.mark.slow
@pytest.mark.parametrize("boundary", [D, N, P, MIXED])
def test_iterations_do_not_grow_to_fine_grids(boundary):
    counts = []
    for n in (32, 64, 128, 256, 255):
        grid = pde.Grid((n, n), 1.0, boundary, "cell")
        b = normal(grid.shape)
        operator = -pde.laplacian(grid)
        b = b - b.mean() if operator.singular else b
        counts.append(int(solved(operator, jnp.asarray(b)).iterations))
    assert max(counts) <= 12
    assert max(counts) - min(counts) <= 2


@pytest.mark.slow
@pytest.mark.parametrize("boundary", [N, MIXED])
def test_vertices_on_neumann_sides(boundary):
    grid = pde.Grid((17, 16), 1.0, boundary)
    operator, weights = -pde.laplacian(grid), volumes(grid)
    b = normal(grid.shape)
    b = b - np.sum(weights * b) / np.sum(weights) if operator.singular else b
    assert int(solved(operator.weighted(), jnp.asarray(weights * b)).iterations) <= 8


@pytest.mark.slow
@pytest.mark.parametrize("boundary", [N, MIXED])
def test_vertices_on_neumann_sides_unsymmetric(boundary):
    grid = pde.Grid((17, 16), 1.0, boundary)
    operator, weights = -pde.laplacian(grid), volumes(grid)
    b = normal(grid.shape)
    b = b - np.sum(weights * b) / np.sum(weights) if operator.singular else b
    stabilised = bl.BiCGStab(preconditioner=MULTIGRID)
    assert int(solved(operator, jnp.asarray(b), stabilised).iterations) <= 6
    back = b - b.mean() if operator.singular else b
    assert int(solved(operator.transposed(), jnp.asarray(back), stabilised).iterations) <= 6


@pytest.mark.parametrize("grid", [pde.Grid(50), pytest.param(SOLID, marks=pytest.mark.slow)])
def test_one_and_three_dimensions(grid):
    k = jnp.asarray(positive(grid.shape))
    b = jnp.asarray(volumes(grid) * normal(grid.shape))
    assert int(solved(pde.Diffusion(grid, k).weighted(), b).iterations) <= 12


def test_as_a_solver():
    grid = pde.Grid((15, 15))
    b = jnp.asarray(normal(grid.shape))
    solution = solved(-pde.laplacian(grid), b, bl.Richardson(1.0, preconditioner=MULTIGRID))
    assert int(solution.iterations) <= 12


def test_hypergradients_of_source_coefficient_and_boundary_values():
    grid = pde.Grid((12, 11), 1.0, [(D, N), D], "cell")
    k0 = positive(grid.shape)
    b0, weights = normal((2, *grid.shape), 4)
    values = {(0, 0): normal(11, 2), (0, 1): normal(11, 3)}
    theta = jax.tree.map(jnp.asarray, {"k": k0, "b": b0, "g": list(values.values())})

    def system(t):
        operator = pde.Diffusion(grid, t["k"])
        return operator, t["b"] - operator.boundary_term(dict(zip(values, t["g"], strict=True)))

    problem = bl.LinearSystem(lambda t: system(t)[0], lambda t: system(t)[1])
    budget = bl.Budget(40, rtol=1e-12)

    def loss(t):
        solution = bl.solve(
            problem, t, jnp.zeros(grid.shape), solver=CG, estimator=bl.Implicit(solver=CG),
            budget=budget, adjoint_budget=budget,
        )  # fmt: skip
        return 0.5 * jnp.sum(weights * solution.value**2)

    gradient = jax.jit(jax.grad(loss))(theta)

    # By SciPy: λ = A⁻ᵀ ∂L/∂u, and dL = λᵀ (db - dA u).
    operator, rhs = system(theta)
    matrix = operator.to_scipy().tocsc()
    u = spla.spsolve(matrix, np.ravel(rhs))
    adjoint = jnp.asarray(spla.spsolve(matrix.T.tocsc(), weights.ravel() * u)).reshape(grid.shape)
    field = jnp.asarray(u).reshape(grid.shape)

    def pairing(t):
        operator, rhs = system(t)
        return jnp.sum(adjoint * (rhs - operator.matvec(field)))

    expected = jax.jit(jax.grad(pairing))(theta)
    for got, wanted in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-8 * float(jnp.abs(wanted).max()))


@pytest.mark.parametrize(
    ("solver", "boundary"),
    [
        pytest.param(bl.GMRES(preconditioner=MULTIGRID), D, marks=pytest.mark.slow),
        (bl.BiCGStab(preconditioner=MULTIGRID), (N, D)),
    ],
)
def test_adjoint_of_advection_and_diffusion(solver, boundary):
    grid = pde.Grid((9, 8), 1.0, [boundary, D])
    base = -pde.laplacian(grid) + pde.advection(grid, (8.0, -5.0))
    b, weights = jnp.asarray(normal((2, *grid.shape)))
    budget = bl.Budget(25, rtol=1e-12)
    problem = bl.LinearSystem(lambda t: base + t[0] * pde.identity(grid), lambda t: t[1])

    def loss(t):
        solution = bl.solve(
            problem, t, jnp.zeros(grid.shape), solver=solver,
            estimator=bl.Implicit(solver=solver), budget=budget, adjoint_budget=budget,
        )  # fmt: skip
        return jnp.sum(weights * solution.value)

    theta = (jnp.asarray(3.0), b)
    got = jax.jit(jax.grad(loss))(theta)
    matrix = (base + 3.0 * pde.identity(grid)).to_scipy().tocsc()
    adjoint = spla.spsolve(matrix.T.tocsc(), np.ravel(weights))
    expected = (-adjoint @ spla.spsolve(matrix, np.ravel(b)), adjoint.reshape(grid.shape))
    for a, e in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, e, atol=1e-8 * np.abs(e).max())


def test_levels_and_build():
    grid = pde.Grid((16, 16), 1.0, D, "cell")
    operator = -pde.laplacian(grid)
    assert len(MULTIGRID.hierarchy(operator)) == 3
    shapes = [level.grid.shape for level, _ in MULTIGRID.hierarchy(operator)]
    assert shapes == [(16, 16), (8, 8), (4, 4)]
    direct = cycle(operator, pde.Multigrid(levels=1))
    np.testing.assert_allclose(direct @ operator.to_scipy().toarray(), np.eye(256), atol=1e-10)
    # What is found by itself may be given.
    given = pde.Multigrid(build=lambda g: -pde.laplacian(g)).hierarchy(operator)
    for (found, _), (own, _) in zip(given, MULTIGRID.hierarchy(operator), strict=True):
        difference = found.to_scipy() - own.to_scipy()
        assert abs(difference).max() < 1e-12 * abs(own.to_scipy()).max()


GALERKIN = pde.Multigrid(coarse="galerkin")


def checkerboard(grid, ratio):
    x, y = grid.mesh()
    k = jnp.where((jnp.floor(4 * x) + jnp.floor(4 * y)) % 2 == 0, 1.0, ratio)
    return pde.Diffusion(grid, k, mean="harmonic")


@pytest.mark.parametrize(
    "grid",
    [
        pde.Grid((26, 17), 1.0, [P, (D, N)]),  # 13 coarse points on a circle: four colours.
        pytest.param(pde.Grid((23, 22), 1.0, [P, N], "cell"), marks=pytest.mark.slow),
        pytest.param(pde.Grid((10, 8, 9), 1.0, [D, P, (N, D)]), marks=pytest.mark.slow),
        pytest.param(pde.Grid(300), marks=pytest.mark.slow),
    ],
)
def test_galerkin_operators_are_products(grid):
    k = jnp.asarray(np.random.default_rng(1).uniform(0.01, 2.0, grid.shape))
    operator = pde.Diffusion(grid, k)

    def both(operator):
        (fine, transfer), (coarse, _) = pde.Multigrid(coarse="galerkin", levels=2).hierarchy(
            operator
        )
        like = jnp.eye(coarse.grid.size).reshape(-1, *coarse.grid.shape)
        columns = jax.vmap(transfer.prolong)(like)
        return columns, jax.vmap(fine.matvec)(columns), jax.vmap(coarse.matvec)(like)

    columns, images, found = (np.asarray(a) for a in jax.jit(both)(operator))
    count = len(columns)
    wanted = columns.reshape(count, -1) @ images.reshape(count, -1).T
    scale = np.abs(wanted).max()
    np.testing.assert_allclose(found.reshape(count, -1).T, wanted, atol=1e-13 * scale)
    np.testing.assert_allclose(wanted, wanted.T, atol=1e-13 * scale)


@pytest.mark.slow
@pytest.mark.parametrize("grid", [pde.Grid((18, 19), 1.0, [(D, N), P])])
def test_galerkin_cycle_is_symmetric_and_contracts(grid):
    k = jnp.asarray(np.random.default_rng(1).uniform(0.01, 2.0, grid.shape))
    operator = pde.Diffusion(grid, k)
    inverse = cycle(operator, GALERKIN)
    weighted = inverse / volumes(grid).ravel()
    np.testing.assert_allclose(weighted, weighted.T, atol=1e-13 * np.abs(weighted).max())
    error = np.linalg.eigvals(inverse @ operator.to_scipy().toarray()).real
    assert 0.7 < error.min() < error.max() < 1.0 + 1e-9


@pytest.mark.slow
@pytest.mark.parametrize(
    ("boundary", "ratio"),
    [(D, 1e6), pytest.param(P, 1e3, marks=pytest.mark.slow)],
)
def test_galerkin_for_jumps(boundary, ratio):
    grid = pde.Grid((20, 20), 1.0, boundary, "cell")
    operator = checkerboard(grid, ratio)
    b = normal(grid.shape)
    b = b - b.mean() if operator.singular else b
    assert iterations(operator, b, multigrid=GALERKIN)[0] <= 12


@pytest.mark.slow
def test_galerkin_for_several_coefficients_at_once():
    grid = pde.Grid((18, 18))
    b = jnp.asarray(normal(grid.shape))
    k = jnp.asarray(np.random.default_rng(1).uniform(0.01, 2.0, (2, *grid.shape)))
    apply = jax.jit(lambda k: GALERKIN.inverse(pde.Diffusion(grid, k))(b))
    together = jax.jit(jax.vmap(apply))(k)
    for one, wanted in zip(together, map(apply, k), strict=True):
        np.testing.assert_allclose(one, wanted, rtol=1e-9, atol=1e-12)


def test_galerkin_refuses_what_reaches_further():
    grid = pde.Grid((20, 20), boundary=P)
    far = pde.Stencil(grid, {(0, 0): 1.0, (2, 0): -0.1, (-2, 0): -0.1})
    with pytest.raises(bl.IncompatibleError, match="rediscretised"):
        GALERKIN.hierarchy(far)


@pytest.mark.parametrize("extent", [pytest.param(0.1, marks=pytest.mark.slow), 0.01])
def test_thin_domains(extent):
    """Only the axis of the smaller spacing is made coarser until both are alike."""
    grid = pde.Grid((32, 32), (1.0, extent))
    assert iterations(-pde.laplacian(grid), normal(grid.shape))[0] <= 9


def test_strong_advection():
    """Chebyshev is for symmetric operators: here it breaks down."""
    grid = pde.Grid((16, 16))
    operator = -pde.laplacian(grid) + pde.advection(grid, (1000.0, 500.0), "upwind")
    b = jnp.asarray(normal(grid.shape))
    assert int(solved(operator, b, bl.GMRES(preconditioner=MULTIGRID)).iterations) <= 3


@pytest.mark.parametrize("preconditioner", [pde.Multigrid(levels=2), pde.FastSolver()])
@pytest.mark.parametrize("boundary", [N, pytest.param(D, marks=pytest.mark.slow)])
def test_an_operator_and_the_mean(preconditioner, boundary):
    grid = pde.Grid((8, 9), 1.0, boundary, "cell")
    operator = -pde.laplacian(grid) + 2.0 * pde.Mean(grid)
    b = jnp.asarray(normal(grid.shape)) + 1.0
    solver = bl.Richardson(1.0, preconditioner=preconditioner)
    count = int(solved(operator, b, solver).iterations)
    assert count == 1 if isinstance(preconditioner, pde.FastSolver) else count <= 14
    beside = bl.LinearSystem(pde.Mean(grid) + pde.Mean(grid), b)
    with pytest.raises(bl.IncompatibleError, match=r"pde.Mean"):
        bl.solve(beside, None, b, solver=solver)


def test_refusals():
    with pytest.raises(ValueError, match=r"'V', 'W' or 'F'.*'X'"):
        pde.Multigrid(cycle="X")
    for levels in (0, 1.5):
        with pytest.raises(ValueError, match="levels"):
            pde.Multigrid(levels=levels)
    with pytest.raises(TypeError, match=r"smoother.*WeightedJacobi.*got Jacobi"):
        pde.Multigrid(smoother=bl.Jacobi())
    with pytest.raises(ValueError, match=r"'rediscretised' or 'galerkin'.*'petrov'"):
        pde.Multigrid(coarse="petrov")
    with pytest.raises(ValueError, match="build"):
        pde.Multigrid(coarse="galerkin", build=lambda g: -pde.laplacian(g))
    for part in (1.0, 1.5):
        with pytest.raises(ValueError, match="part must be below 1"):
            pde.ChebyshevSmoother(part=part)
    grid = pde.Grid((8, 8))
    operator = -pde.laplacian(grid)
    with pytest.raises(bl.IncompatibleError, match=r"SparseDirect|AlgebraicMultigrid"):
        solved(pde.from_scipy(operator.to_scipy()), jnp.ones(64))
    with pytest.raises(bl.IncompatibleError, match=r"pde.laplacian\(grid\)"):
        bl.solve(bl.LinearSystem(jnp.eye(64), jnp.ones(64)), None, jnp.ones(64), solver=CG)
    wide = pde.Grid((40, 40))
    with pytest.raises(bl.IncompatibleError, match=r"1600 points.*729.*levels"):
        solved(
            -pde.laplacian(wide),
            jnp.ones(wide.shape),
            bl.ConjugateGradient(preconditioner=pde.Multigrid(levels=1)),
        )
