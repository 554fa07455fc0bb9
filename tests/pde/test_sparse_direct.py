"""Sparse direct solves on the host: right, differentiable, reused, and honest."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse as sp

import bilevel as bl
import bilevel_pde as pde
from bilevel_pde.factors import Factorization, Factors
from bilevel_pde.sparse_direct import FACTORS

pytestmark = pytest.mark.slow

SIZE = 30
RANDOM = np.random.default_rng(0)
MATRIX = sp.csr_array(
    sp.random_array((SIZE, SIZE), density=0.1, rng=RANDOM) + 3 * sp.eye_array(SIZE)
)
ROWS = np.repeat(np.arange(SIZE), np.diff(MATRIX.indptr))
RHS, WEIGHTS = RANDOM.standard_normal((2, SIZE))
SOLVER = pde.SparseDirect()


@pytest.fixture(autouse=True)
def _no_factors():
    pde.SparseDirect.forget()


def loss(operator, estimator=None, solver=SOLVER):
    """Of entries and right-hand side, by the sparse solver."""
    estimator = bl.Implicit(solver=pde.SparseDirect()) if estimator is None else estimator

    def value(entries, rhs):
        problem = bl.LinearSystem(lambda t: operator.with_values(t[0]), lambda t: t[1])
        start = jnp.zeros_like(rhs)
        solution = bl.solve(problem, (entries, rhs), start, solver=solver, estimator=estimator)
        return (solution.value @ WEIGHTS) ** 2

    return value


def dense_loss(entries, rhs):
    matrix = jnp.zeros((SIZE, SIZE)).at[ROWS, MATRIX.indices].add(entries)
    return (jnp.linalg.solve(matrix, rhs) @ WEIGHTS) ** 2


def close(got, expected, rtol=1e-10):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * np.abs(b).max())


@pytest.mark.parametrize("layout", ["diagonals", "padded_columns", "segment_sum"])
def test_hypergradients_with_respect_to_entries_and_source(layout):
    operator = pde.from_scipy(MATRIX, format=layout)
    before = FACTORS.made
    gradient = jax.jit(jax.grad(loss(operator), (0, 1)))
    close(gradient(operator.values, RHS), jax.grad(dense_loss, (0, 1))(operator.values, RHS))
    # The adjoint found the primal's factors, and so does the next call.
    assert FACTORS.made == before + 1
    gradient(operator.values, 2 * RHS)
    assert FACTORS.made == before + 1
    # Another for each layout: factors made for one of them would be found by the next.
    gradient((1.5 + 0.01 * len(layout)) * operator.values, RHS)
    assert FACTORS.made == before + 2


@pytest.mark.parametrize(
    "estimator", [bl.Implicit(solver=bl.GMRES()), bl.Implicit(solver=bl.BiCGStab())]
)
def test_iterative_adjoints_agree_with_the_direct_one(estimator):
    operator = pde.from_scipy(MATRIX)
    solver = estimator.solver
    iterative = jax.grad(loss(operator, estimator, solver), (0, 1))(operator.values, RHS)
    close(iterative, jax.grad(loss(operator), (0, 1))(operator.values, RHS), rtol=1e-8)


def test_every_way_of_differentiating():
    operator = pde.from_scipy(MATRIX)
    entries = operator.values
    value = loss(operator)
    hessian = jax.hessian(value, 1)(entries, RHS)
    close(hessian, jax.hessian(dense_loss, 1)(entries, RHS))

    def along(function):
        return jax.jvp(lambda e: jax.grad(function)(e, RHS), (entries,), (entries,))[1]

    close(along(value), along(dense_loss))
    unrolled = jax.grad(loss(operator, bl.Unrolled()))(entries, RHS)
    close(unrolled, jax.grad(dense_loss)(entries, RHS))


def test_samples_one_after_another():
    operator = pde.from_scipy(MATRIX)
    entries = jnp.stack([operator.values * (1 + 0.1 * k) for k in range(5)])
    before = FACTORS.made
    got = jax.jit(jax.vmap(jax.grad(loss(operator)), (0, None)))(entries, RHS)
    close(got, jax.vmap(jax.grad(dense_loss), (0, None))(entries, RHS))
    assert FACTORS.made == before + 5
    sources = jnp.stack([RHS, -2 * RHS])
    got = jax.vmap(jax.grad(loss(operator), 1), (None, 0))(operator.values, sources)
    close(got, jax.vmap(jax.grad(dense_loss, 1), (None, 0))(operator.values, sources))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_dtypes_and_several_right_hand_sides(dtype):
    operator = pde.from_scipy(MATRIX.astype(dtype))
    rhs = jnp.asarray(np.stack([RHS, RHS**2], axis=1), dtype)
    for b in (rhs, rhs[:, 0]):
        solution = bl.solve(bl.LinearSystem(operator, b), None, jnp.zeros_like(b), solver=SOLVER)
        assert solution.status == bl.Status.CONVERGED
        assert solution.value.dtype == dtype
        np.testing.assert_allclose(MATRIX @ solution.value, b, atol=100 * jnp.finfo(dtype).eps)


def neumann():
    matrix = sp.lil_array(sp.diags_array([-1.0, 2.0, -1.0], offsets=[-1, 0, 1], shape=(SIZE, SIZE)))
    matrix[0, 0] = matrix[-1, -1] = 1.0
    return matrix


def rounded():
    """Layers between closed ends, whose rows add up to nothing but for rounding."""
    k = np.exp(np.random.default_rng(0).standard_normal(SIZE - 1))
    slopes = sp.diags_array([-1.0, 1.0], offsets=[0, 1], shape=(SIZE - 1, SIZE))
    return (slopes.T @ sp.diags_array(k) @ slopes).astype(np.float32)


@pytest.mark.parametrize(
    "matrix",
    [
        neumann(),
        rounded(),
        sp.csr_array((SIZE, SIZE)),
        sp.diags_array([1.0] * (SIZE - 1) + [0.0]),
    ],
    ids=["Neumann", "float32", "zero", "zero row"],
)
def test_singular_matrices_never_give_a_number(matrix):
    operator = pde.from_scipy(matrix)
    # In the range of the Neumann matrix, where elimination finds one of many solutions.
    rhs = (RHS - RHS.mean()).astype(operator.like.dtype)
    solution = bl.solve(bl.LinearSystem(operator, rhs), None, 0 * rhs, solver=SOLVER)
    # Without an entry nothing reads the solution, so that its residual does not tell.
    assert solution.status == bl.Status.NONFINITE or matrix.nnz == 0
    assert solution.status >= bl.Status.DIVERGED
    assert np.isnan(solution.value).all()
    gradient = jax.grad(loss(operator), 1)(operator.values, rhs)
    assert np.isnan(gradient).all()


def test_entries_that_are_not_finite_give_a_status():
    operator = pde.from_scipy(MATRIX)
    problem = bl.LinearSystem(operator.with_values(operator.values.at[3].set(jnp.nan)), RHS)
    solution = bl.solve(problem, None, jnp.zeros(SIZE), solver=SOLVER)
    assert solution.status == bl.Status.NONFINITE


def test_fine_grids_in_single_precision_are_no_singularity():
    """Their conditions are 10⁶ and more, which float32 entries can still tell."""
    held = pde.Grid(1500, dtype="float32")
    closed = pde.Grid(1000, boundary=pde.Neumann(), centering="cell", dtype="float32")
    for operator in (-pde.laplacian(held), pde.identity(closed) - pde.laplacian(closed)):
        factors = FACTORS.find(operator.to_scipy().tocoo(), definite=True)[-1]
        assert not factors.singular


def test_bad_scaling_is_no_singularity():
    scale = np.logspace(-60, 60, SIZE)
    operator = pde.from_scipy(sp.diags_array(scale) @ MATRIX)
    solution = bl.solve(
        bl.LinearSystem(operator, scale * 1.0), None, jnp.zeros(SIZE), solver=SOLVER
    )
    expected = np.linalg.solve(MATRIX.toarray(), np.ones(SIZE))
    np.testing.assert_allclose(solution.value, expected, rtol=1e-10)


def test_positive_definite_matrices_are_factorised_as_such():
    matrix = sp.csr_array(MATRIX @ MATRIX.T)
    operator = pde.from_scipy(matrix, positive_definite=True)
    solution = bl.solve(bl.LinearSystem(operator, RHS), None, jnp.zeros(SIZE), solver=SOLVER)
    np.testing.assert_allclose(matrix @ solution.value, RHS, atol=1e-10)
    # A wrong declaration costs accuracy at most, and that is seen.
    wrong = pde.from_scipy(sp.csr_array(neumann() - 1.1 * sp.eye_array(SIZE)))
    wrong = wrong.with_values(wrong.values, positive_definite=True)
    solution = bl.solve(bl.LinearSystem(wrong, RHS), None, jnp.zeros(SIZE), solver=SOLVER)
    if solution.status == bl.Status.CONVERGED:
        np.testing.assert_allclose(wrong.matvec(solution.value), RHS, atol=1e-8)


def test_composed_operators_and_stencils():
    operator = pde.from_scipy(MATRIX)
    eye = pde.from_scipy(sp.eye_array(SIZE))
    composed = (operator @ operator.T + 2.0 * eye) / 3.0
    solution = bl.solve(bl.LinearSystem(composed, RHS), None, jnp.zeros(SIZE), solver=SOLVER)
    np.testing.assert_allclose(composed.matvec(solution.value), RHS, atol=1e-10)
    rows, columns, values = composed.entries()
    listed = sp.coo_array((np.asarray(values), (rows, columns)), shape=(SIZE, SIZE))
    np.testing.assert_allclose(listed.toarray(), composed.to_scipy().toarray(), atol=1e-13)
    grid = pde.Grid((5, 6))
    stencil = pde.identity(grid) - 0.1 * pde.laplacian(grid)
    rhs = jnp.asarray(RHS.reshape(5, 6))
    solution = bl.solve(bl.LinearSystem(stencil, rhs), None, jnp.zeros((5, 6)), solver=SOLVER)
    np.testing.assert_allclose(stencil.matvec(solution.value), rhs, atol=1e-10)


def test_only_operators_of_the_adapter():
    for operator in (jnp.eye(SIZE), lambda _: lambda v: v):
        problem = bl.LinearSystem(operator, RHS)
        with pytest.raises(bl.IncompatibleError, match="from_scipy"):
            bl.solve(problem, None, jnp.zeros(SIZE), solver=SOLVER)


def test_factors_are_few_and_found_by_content():
    factors = Factors(kept=2)
    keys = [factors.find(MATRIX * scale, definite=False)[0] for scale in (1.0, 2.0, 3.0)]
    assert factors.made == 3
    assert factors.get(keys[0]) is None
    assert factors.find(sp.csr_array(3.0 * MATRIX.T), definite=False)[:2] == (keys[2], True)
    assert factors.made == 3
    small = Factors(room=0)
    for scale in (1.0, 2.0, 3.0):
        small.find(MATRIX * scale, definite=False)
    assert small.get(keys[0]) is None
    assert small.get(keys[2]) is not None


def test_one_unknown():
    factors = Factorization(sp.csc_array([[4.0]]), definite=False)
    assert factors.solve(np.array([8.0]), transposed=True).tolist() == [2.0]
    operator = pde.from_scipy(sp.csr_array([[4.0]]))
    solution = bl.solve(bl.LinearSystem(operator, jnp.ones(1)), None, jnp.zeros(1), solver=SOLVER)
    assert solution.value.tolist() == [0.25]
