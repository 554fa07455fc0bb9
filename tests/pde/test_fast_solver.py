"""The fast solver inverts what it takes, to rounding, and refuses the rest."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel as bl
import bilevel_pde as pde
from bilevel_pde import axis_transform
from tests.pde.cases import few
from tests.pde.manufactured import D, N, P, R, normal

PAIRS = [(D, D), (N, N), (R, R), (P, P), (D, N), (N, R)]
GRIDS = [
    pde.Grid((6, 5), (1.0, 2.0), [first, second], centering)
    for (first, second), centering in itertools.product(
        zip(PAIRS, PAIRS[3:] + PAIRS[:3], strict=True), ["vertex", "cell"]
    )
]
GRIDS += [pde.Grid((7, 7), 1.0, N), pde.Grid(8), pde.Grid((5, 4, 3), 1.0, [(D, R), P, (N, D)])]


def label(grid):
    sides = ["".join(type(s).__name__[0] for s in pair) for pair in grid.boundary]
    return f"{' '.join(sides)} {grid.centering[0]}"


def inverse(operator, b):
    return pde.FastSolver().at(bl.LinearSystem(operator, b).at(None), b)


def solved(operator, b, preconditioner=None, budget=None):
    preconditioner = pde.FastSolver() if preconditioner is None else preconditioner
    return bl.solve(
        bl.LinearSystem(operator, b),
        None,
        jnp.zeros_like(b),
        solver=bl.Richardson(1.0, preconditioner=preconditioner),
        budget=bl.Budget(5, rtol=1e-10) if budget is None else budget,
    )


def consistent(operator, b):
    """Without what is in the kernel of the transpose."""
    matrix = operator.to_scipy().toarray()
    left, values, _ = np.linalg.svd(matrix)
    null = left[:, values < 1e-10 * values[0]]
    flat = b.ravel() - null @ (null.T @ b.ravel())
    return jnp.asarray(flat.reshape(b.shape))


# Of the two centerings one each, turn about; one line, and no solid.
FEW = [*GRIDS[0:12:4], *GRIDS[3:12:4], *GRIDS[12:14]]


@pytest.mark.parametrize("grid", few(lambda grid: grid in FEW, GRIDS), ids=label)
def test_it_is_the_inverse(grid):
    laplacian = -pde.laplacian(grid)
    k = tuple(1.0 + d for d in range(grid.ndim))
    operators = [laplacian, pde.Diffusion(grid, k, reaction=2.0)]
    if any(np.any(weight != 1) for weight in grid.weights()):
        operators += [laplacian.transposed(), laplacian.weighted(), operators[1].weighted()]
    given = [np.asarray(consistent(operator, normal(grid.shape))) for operator in operators]

    @jax.jit
    def inverses(given):
        return [inverse(operator, b)(b) for operator, b in zip(operators, given, strict=True)]

    for operator, b, x in zip(operators, given, inverses(given), strict=True):
        residual = operator.to_scipy() @ np.ravel(x) - np.ravel(b)
        assert np.linalg.norm(residual) < 1e-11 * np.linalg.norm(b) + 1e-10
        if operator.singular and operator is laplacian:
            weights = np.prod(np.broadcast_arrays(*grid.weights()), axis=0)
            np.testing.assert_allclose(np.sum(weights * x), 0, atol=1e-12)


@pytest.mark.parametrize("grid", few(lambda grid: grid == GRIDS[1], GRIDS[1:3]), ids=label)
def test_as_a_solver_it_takes_one_iteration(grid):
    operator = pde.Diffusion(grid, (1.0, 2.0), reaction=2.0)
    solution = solved(operator, consistent(operator, normal(grid.shape)))
    assert int(solution.iterations) == 1
    assert solution.status == bl.Status.CONVERGED


@pytest.mark.parametrize(
    ("points", "side", "centering"),
    few(
        lambda points, side, _: points == (6 if side == D else 7),
        [6, 7],
        [D, N],
        ["vertex", "cell"],
    ),
)
def test_fast_transforms_are_the_dense_ones(monkeypatch, points, side, centering):
    grid = pde.Grid((points, 5), (1.0, 3.0), [side, P], centering)
    operator = 0.5 * pde.identity(grid) - pde.laplacian(grid)
    b = jnp.asarray(normal(grid.shape))
    dense = jax.jit(inverse(operator, b))(b)
    monkeypatch.setattr(axis_transform, "LONG", 0)
    transform = axis_transform.AxisTransform(grid, 0)
    assert transform.kind.endswith("sine")
    apply = inverse(operator, b)
    back = jax.jit(transform.backward)(jax.jit(transform.forward)(b))
    fast = jax.jit(apply)(b)
    np.testing.assert_allclose(back, b, atol=1e-13)
    np.testing.assert_allclose(fast, dense, atol=1e-12)
    values = np.sort(transform.eigenvalues)
    line = pde.Grid(points, 1.0, side, centering)
    matrix = pde.Stencil(line, {(-1,): 1.0, (1,): 1.0}).to_scipy().toarray()
    np.testing.assert_allclose(values, np.sort(np.linalg.eigvals(matrix).real), atol=1e-12)


def test_periodic_axes_take_advection():
    grid = pde.Grid((6, 5), boundary=P)
    flow = pde.advection(grid, (3.0, -2.0))
    operator = pde.identity(grid) - 0.1 * pde.laplacian(grid) + flow
    for which in (operator, operator.transposed()):
        assert int(solved(which, jnp.asarray(normal(grid.shape))).iterations) == 1


def test_single_precision():
    grid = pde.Grid((8, 9), dtype="float32")
    b = jnp.asarray(normal(grid.shape), "float32")
    solution = solved(-pde.laplacian(grid), b, budget=bl.Budget(5, rtol=1e-5))
    assert solution.value.dtype == jnp.float32
    assert int(solution.iterations) == 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fast", "multigrid", "none"])
def test_the_mean_of_a_regular_system_in_single_precision(kind):
    """It is what the identity makes of it, beside differences of half a million."""
    grid = pde.Grid(512, boundary=pde.Periodic(), dtype="float32")
    step = pde.identity(grid) - pde.laplacian(grid)
    wave = jnp.sin(2 * jnp.pi * grid.coordinates()[0])
    b = jnp.asarray(1.0 + wave, "float32")
    solver = {
        "fast": bl.Richardson(1.0, preconditioner=pde.FastSolver()),
        "multigrid": bl.ConjugateGradient(preconditioner=pde.Multigrid()),
        "none": bl.ConjugateGradient(),
    }[kind]
    budget = bl.Budget(iterations=2 if kind == "fast" else 1000, rtol=1e-2)
    solution = bl.solve(bl.LinearSystem(step, b), None, 0 * b, solver=solver, budget=budget)
    assert solution.status != bl.Status.INCONSISTENT
    expected = 1.0 + wave / (1 + 4 * jnp.pi**2)
    np.testing.assert_allclose(solution.value, expected, atol=2e-2)


def test_traced_coefficients_and_adjoint():
    grid = pde.Grid((6, 7), 1.0, [D, P])
    laplacian = -pde.laplacian(grid)
    b, weights = normal((2, *grid.shape))
    solver = bl.Richardson(1.0, preconditioner=pde.FastSolver())
    problem = bl.LinearSystem(
        lambda t: t[0] * laplacian + t[1] * pde.identity(grid), lambda t: t[2] * jnp.asarray(b)
    )

    @jax.jit
    def loss(theta):
        estimator = bl.Implicit(solver=solver)
        start = jnp.zeros(grid.shape)
        solution = bl.solve(problem, theta, start, solver=solver, estimator=estimator)
        return jnp.sum(weights * solution.value)

    matrix = laplacian.to_scipy().toarray()

    def dense(theta):
        a = theta[0] * matrix + theta[1] * jnp.eye(grid.size)
        return jnp.ravel(weights) @ jnp.linalg.solve(a, theta[2] * b.ravel())

    theta = jnp.array([0.7, 3.0, 2.0])
    got, expected = jax.grad(loss)(theta), jax.grad(dense)(theta)
    np.testing.assert_allclose(got, expected, rtol=1e-8)


def test_averaged_coefficients_precondition_varying_ones():
    grid = pde.Grid((24, 24))
    k = jnp.asarray(np.random.default_rng(1).uniform(0.7, 1.4, grid.shape))
    problem = bl.LinearSystem(pde.Diffusion(grid, k), jnp.ones(grid.shape))

    def count(preconditioner):
        solver = bl.ConjugateGradient(preconditioner=preconditioner)
        start = jnp.zeros(grid.shape)
        solution = bl.solve(problem, None, start, solver=solver, budget=bl.Budget(99, rtol=1e-8))
        return int(solution.iterations)

    # The condition number is that of k, 2, whatever the grid.
    assert count(pde.FastSolver(-pde.laplacian(grid))) < 15 < count(None)


def test_refusals():
    grid = pde.Grid((6, 6))
    varying = jnp.asarray(np.random.default_rng(1).uniform(1.0, 2.0, grid.shape))
    b = jnp.ones(grid.shape)
    with pytest.raises(bl.IncompatibleError, match="Multigrid"):
        solved(pde.Diffusion(grid, varying), b)
    with pytest.raises(bl.IncompatibleError, match=r"varies.*number"):
        solved(pde.identity(grid) + pde.Stencil(grid, {(0, 0): varying}), b)
    oblique = pde.Stencil(grid, {(0, 0): 9.0, (1, 1): -1.0, (-1, -1): -1.0})
    with pytest.raises(bl.IncompatibleError, match=r"\(1, 1\)|\(-1, -1\)"):
        solved(oblique, b)
    with pytest.raises(bl.IncompatibleError, match="at least 3"):
        solved(-pde.laplacian(pde.Grid((2, 6))), jnp.ones((2, 6)))
    with pytest.raises(bl.IncompatibleError, match="regular grid"):
        solved(pde.from_scipy(oblique.to_scipy()), jnp.ones(36))
    line = pde.Grid(6)
    with pytest.raises(bl.IncompatibleError, match="vary"):
        pde.FastSolver(pde.Diffusion(line, jnp.linspace(1.0, 2.0, 6)).stencil())
    with pytest.raises(bl.IncompatibleError, match="directions"):
        pde.FastSolver(-pde.laplacian(line) + pde.advection(line, 1.0))
    with pytest.raises(bl.IncompatibleError, match="SparseDirect"):
        pde.FastSolver(pde.from_scipy(oblique.to_scipy()))


def test_what_varies_and_cannot_be_seen_is_nan():
    line = pde.Grid(6)
    operator = pde.Diffusion(line, jnp.linspace(1.0, 2.0, 6)).stencil()
    solution = solved(operator, jnp.ones(6))
    assert solution.status == bl.Status.NONFINITE
