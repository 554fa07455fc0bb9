"""Algebraic multigrid: the cycle against PyAMG's parts, its symmetry, iterations, messages."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse as sp

import bilevel as bl
import bilevel_pde as pde
from tests.pde.manufactured import normal

pytest.importorskip("pyamg")

METHODS = ["ruge_stuben", pytest.param("smoothed_aggregation", marks=pytest.mark.slow)]


def poisson(n):
    return (-pde.laplacian(pde.Grid((n, n)))).to_scipy()


def iterations(operator, b, preconditioner):
    solver = bl.ConjugateGradient(preconditioner=preconditioner)
    problem, budget = bl.LinearSystem(operator, b), bl.Budget(100, rtol=1e-8)
    solution = bl.solve(problem, None, jnp.zeros_like(b), solver=solver, budget=budget)
    assert solution.status == bl.Status.CONVERGED
    residual = np.ravel(operator.matvec(solution.value) - b)
    assert np.linalg.norm(residual) < 1.1e-8 * np.linalg.norm(b)
    return int(solution.iterations)


def inverse(preconditioner, size):
    """M⁻¹ as a dense matrix."""
    return np.asarray(jax.jit(jax.vmap(preconditioner._flat))(jnp.eye(size))).T


@pytest.mark.parametrize("method", METHODS)
def test_symmetric_positive_definite_cycle_that_reduces_errors(method):
    matrix = poisson(12)
    preconditioner = pde.AlgebraicMultigrid(matrix, method=method, options={"max_coarse": 8})
    assert len(preconditioner.levels) >= 1
    cycle = inverse(preconditioner, 144)
    np.testing.assert_allclose(cycle, cycle.T, atol=1e-15)
    assert np.linalg.eigvalsh(cycle)[0] > 0
    error = np.eye(144) - cycle @ matrix.toarray()
    assert np.abs(np.linalg.eigvals(error)).max() < 0.35


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_iterations_do_not_grow(method):
    counts = []
    for n in (16, 48):
        matrix = poisson(n)
        preconditioner = pde.AlgebraicMultigrid(matrix, method=method)
        operator = pde.from_scipy(matrix, positive_definite=True)
        counts.append(iterations(operator, jnp.ones(n * n), preconditioner))
    assert max(counts) <= 12
    assert counts[1] - counts[0] <= 3


@pytest.mark.slow
def test_fields_and_several_right_hand_sides():
    operator = -pde.laplacian(pde.Grid((16, 16)))
    preconditioner = pde.AlgebraicMultigrid(operator)
    b = jnp.asarray(normal((16, 16)))
    assert iterations(operator, b, preconditioner) <= 9
    matrix = pde.from_scipy(operator.to_scipy(), positive_definite=True)
    columns = jnp.asarray(normal((256, 3)))
    assert iterations(matrix, columns, preconditioner) <= 10


@pytest.mark.slow
def test_jumps_in_the_coefficient():
    grid = pde.Grid((20, 20))
    x, y = grid.mesh()
    k = jnp.where((x - 0.5) ** 2 + (y - 0.4) ** 2 < 0.06, 1e4, 1.0)
    operator = pde.Diffusion(grid, k, mean="harmonic")
    assert iterations(operator, jnp.ones(grid.shape), pde.AlgebraicMultigrid(operator)) <= 10


@pytest.mark.slow
def test_singular_matrix():
    grid = pde.Grid((16, 16), boundary=pde.Neumann(), centering="cell")
    operator = -pde.laplacian(grid)
    b = normal(grid.shape)
    preconditioner = pde.AlgebraicMultigrid(operator)
    assert iterations(operator, jnp.asarray(b - b.mean()), preconditioner) <= 10


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_transposed(method):
    grid = pde.Grid((10, 10))
    operator = -pde.laplacian(grid) + pde.advection(grid, (20.0, 10.0))
    preconditioner = pde.AlgebraicMultigrid(operator, method=method, options={"max_coarse": 8})
    cycle = inverse(preconditioner, 100)
    np.testing.assert_allclose(inverse(preconditioner.T, 100), cycle.T, atol=1e-15)
    assert np.abs(cycle - cycle.T).max() > 1e-6


@pytest.mark.slow
def test_hypergradient_with_a_preconditioner_of_another_matrix():
    grid = pde.Grid((10, 10))
    base = -pde.laplacian(grid) + pde.advection(grid, (20.0, 10.0))
    preconditioner = pde.AlgebraicMultigrid(base)
    solver = bl.GMRES(preconditioner=preconditioner)
    adjoint = bl.Implicit(solver=bl.GMRES(preconditioner=preconditioner.T))
    problem = bl.LinearSystem(lambda t: base + t[0] * pde.identity(grid), lambda t: t[1])
    weights, b = jnp.asarray(normal((2, *grid.shape)))
    budget = bl.Budget(20, rtol=1e-12)

    @jax.jit
    def loss(theta):
        solution = bl.solve(
            problem, theta, jnp.zeros(grid.shape), solver=solver, estimator=adjoint,
            budget=budget, adjoint_budget=budget,
        )  # fmt: skip
        return jnp.sum(weights * solution.value)

    matrix = jnp.asarray(base.to_scipy().toarray())

    def dense(theta):
        a = matrix + theta[0] * jnp.eye(grid.size)
        return jnp.ravel(weights) @ jnp.linalg.solve(a, theta[1].ravel())

    theta = (jnp.asarray(5.0), b)
    got, expected = jax.grad(loss)(theta), jax.grad(dense)(theta)
    for a, e in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-8, atol=1e-10 * float(jnp.abs(e).max()))


def test_single_precision():
    grid = pde.Grid((16, 16), dtype="float32")
    preconditioner = pde.AlgebraicMultigrid(-pde.laplacian(grid))
    v = preconditioner._flat(jnp.ones(grid.shape, "float32"))
    assert v.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(preconditioner) if jnp.issubdtype(
        leaf.dtype, jnp.floating)} == {jnp.dtype("float32")}  # fmt: skip


def test_refusals():
    matrix = poisson(4)
    with pytest.raises(ValueError, match="method"):
        pde.AlgebraicMultigrid(matrix, method="classical")
    with pytest.raises(ValueError, match="degree"):
        pde.AlgebraicMultigrid(matrix, degree=0)
    with pytest.raises(ValueError, match=r"square.*\(3, 16\)"):
        pde.AlgebraicMultigrid(matrix[:3])
    with pytest.raises(ValueError, match="diagonal"):
        pde.AlgebraicMultigrid(sp.csr_array([[0.0, 1.0], [1.0, 0.0]]))
    with pytest.raises(TypeError, match="ndarray"):
        pde.AlgebraicMultigrid(np.eye(3))
    for refused, error, match in (
        (matrix.astype(int), TypeError, r"AlgebraicMultigrid.*got int64.*astype\(float\)"),
        (matrix * (1 + 1j), TypeError, "AlgebraicMultigrid.*real system"),
        (matrix * np.nan, ValueError, "AlgebraicMultigrid.*not finite"),
        (np.nan * pde.identity(pde.Grid(3)).to_scipy(), ValueError, "not finite"),
        (sp.csr_array((0, 0)), ValueError, "no rows"),
    ):
        with pytest.raises(error, match=match):
            pde.AlgebraicMultigrid(refused)
    preconditioner = pde.AlgebraicMultigrid(matrix)
    assert repr(preconditioner) == "AlgebraicMultigrid(2 levels of 16 → 8 unknowns, degree=2)"
    with pytest.raises(bl.IncompatibleError, match="16 rows"):
        iterations(pde.from_scipy(sp.eye_array(5)), jnp.ones(5), preconditioner)
    grid = pde.Grid(5)
    with pytest.raises(bl.IncompatibleError, match="Multigrid"):
        jax.jit(lambda t: pde.AlgebraicMultigrid(t * pde.identity(grid))._flat(jnp.ones(5)))(1.0)


def test_a_missing_library_is_named(monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ImportError, match="pip install pyamg"):
        pde.AlgebraicMultigrid(poisson(4))
