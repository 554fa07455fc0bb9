"""Dense factorisation, and the solvers that use the diagonal."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel as bl
from tests.solver.systems import SIZE, solve, system

BREAKDOWN, ROUNDING, CONVERGED = bl.Status.BREAKDOWN, bl.Status.ROUNDING, bl.Status.CONVERGED


@pytest.mark.parametrize("complex_valued", [False, True])
@pytest.mark.parametrize("kind", [pytest.param("definite", marks=pytest.mark.slow), "general"])
def test_one_iteration_solves(kind, complex_valued):
    matrix, rhs, solution = system(kind, complex_valued=complex_valued)
    options = {"symmetric": True, "positive_definite": True} if kind == "definite" else {}
    problem = bl.LinearSystem(jnp.asarray(matrix), jnp.asarray(rhs), **options)
    ours = bl.solve(problem, None, jnp.zeros(SIZE, rhs.dtype), solver=bl.Direct())
    assert (ours.status, ours.iterations) == (CONVERGED, 1)
    np.testing.assert_allclose(ours.value, solution, rtol=1e-12)


def test_a_matvec_is_made_dense_on_real_coordinates():
    matrix, rhs, solution = system("general", complex_valued=True)
    problem = bl.LinearSystem(lambda _: lambda v: matrix @ v, jnp.asarray(rhs))
    ours = bl.solve(problem, None, jnp.zeros(SIZE, complex), solver=bl.Direct())
    np.testing.assert_allclose(ours.value, solution, rtol=1e-12)


@pytest.mark.parametrize(
    "solver",
    [
        bl.Direct(),
        bl.Jacobi(),
        pytest.param(bl.GMRES(restart=5), marks=pytest.mark.slow),
        pytest.param(
            bl.ConjugateGradient(preconditioner=bl.JacobiPreconditioner()), marks=pytest.mark.slow
        ),
    ],
    ids=lambda solver: type(solver).__name__,
)
def test_several_right_hand_sides(solver):
    # As many columns as rows: a diagonal that divided along the wrong axis would go unnoticed.
    matrix = system("definite").matrix + np.diag(np.linspace(40.0, 80.0, SIZE))
    rhs = np.random.default_rng(0).standard_normal((SIZE, SIZE))
    ours = solve(matrix, rhs, solver, iterations=200, rtol=1e-10)
    assert ours.status == CONVERGED
    np.testing.assert_allclose(ours.value, np.linalg.solve(matrix, rhs), atol=1e-9)


def test_a_real_matrix_with_complex_unknowns_and_a_matrix_of_integers():
    matrix = np.array([[0, 2], [1, 0]])
    rhs = np.array([2.0 + 4.0j, 3.0])
    for form in (matrix, matrix.astype(float)):
        problem = bl.LinearSystem(jnp.asarray(form), jnp.asarray(rhs))
        ours = bl.solve(problem, None, jnp.zeros(2, complex), solver=bl.Direct())
        np.testing.assert_allclose(ours.value, [3.0, 1.0 + 2.0j], rtol=1e-14)


@pytest.mark.parametrize("exponent", [-8, 0, 8])
def test_ill_conditioned_systems_stop_where_refinement_stops(exponent):
    vectors = np.linalg.eigh(system("definite").matrix)[1]
    rhs = system("definite").rhs

    def spectrum(values):
        return 10.0**exponent * (vectors * values) @ vectors.T

    small = solve(spectrum(np.logspace(-7, 0, SIZE)), rhs, bl.Direct(), iterations=50, rtol=1e-15)
    assert small.status == ROUNDING
    assert small.iterations < 10
    assert small.residual_norm < 1e-8 * np.linalg.norm(rhs)
    # Singular to within rounding: finite numbers that mean nothing.
    singular = solve(spectrum(np.r_[0.0, np.linspace(1.0, 10.0, SIZE - 1)]), rhs, bl.Direct())
    assert singular.status == BREAKDOWN


def test_singular_and_indefinite_matrices_are_reported():
    rhs = jnp.arange(1.0, 3.0)
    exactly = bl.LinearSystem(jnp.ones((2, 2)), rhs)
    assert bl.solve(exactly, None, jnp.zeros(2), solver=bl.Direct()).status == bl.Status.NONFINITE
    indefinite = bl.LinearSystem(
        jnp.diag(jnp.array([1.0, -1.0])), rhs, symmetric=True, positive_definite=True
    )
    solution = bl.solve(indefinite, None, jnp.zeros(2), solver=bl.Direct())
    assert solution.status == bl.Status.NONFINITE


def test_each_sample_refines_for_itself():
    matrix, rhs, _ = system("definite")
    vectors = np.linalg.eigh(matrix)[1]
    hard = (vectors * np.logspace(-7, 0, SIZE)) @ vectors.T
    stack = jnp.stack([matrix, hard, jnp.nan * matrix])
    batch = jax.vmap(
        lambda a: bl.solve(
            bl.LinearSystem(lambda a: a, jnp.asarray(rhs)),
            a,
            jnp.zeros(SIZE),
            solver=bl.Direct(),
            budget=bl.Budget(iterations=50, rtol=1e-14),
        )
    )(stack)
    assert list(batch.status) == [CONVERGED, ROUNDING, bl.Status.NONFINITE]
    assert batch.iterations[0] < batch.iterations[1]


def test_a_diagonal_that_does_not_fit_is_refused():
    class Short:
        def matvec(self, v):
            return jax.tree.map(lambda leaf: 2.0 * leaf, v)

        def diagonal(self):
            return jnp.ones(3)

    problem = bl.LinearSystem(Short(), jnp.ones(SIZE))
    with pytest.raises(ValueError, match=r"part of shape \(3,\) for an unknown of shape \(12,\)"):
        bl.solve(problem, None, jnp.zeros(SIZE), solver=bl.Jacobi())
    tree = bl.LinearSystem(Short(), {"a": jnp.ones(3)})
    with pytest.raises(ValueError, match="it must be like the unknown"):
        bl.solve(tree, None, {"a": jnp.zeros(3)}, solver=bl.Jacobi())


@pytest.mark.parametrize(
    "solver", [bl.Jacobi(), bl.Richardson(step_size=0.1)], ids=["Jacobi", "Richardson"]
)
def test_a_stationary_iteration_that_does_not_contract_diverges(solver):
    matrix = system("definite").matrix
    slow = matrix + 30.0 * np.eye(SIZE) if isinstance(solver, bl.Jacobi) else matrix
    converging = solve(slow, np.ones(SIZE), solver, iterations=400, rtol=1e-8)
    assert converging.status == CONVERGED
    wild = matrix - 4.0 * np.eye(SIZE) if isinstance(solver, bl.Jacobi) else 3.0 * matrix
    assert solve(wild, np.ones(SIZE), solver, iterations=400).status == bl.Status.DIVERGED
