"""Every solver with every preconditioner: the core's conformance kit, and the exact adjoint.

Hypergradients with respect to the source, the coefficient field, the boundary values and the
stored entries against a sparse direct solve of the adjoint.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse.linalg as spla

import bilevel as bl
import bilevel_pde as pde
from bilevel.testing import check_estimator, check_inner_solver
from tests.pde.manufactured import D, N, P, normal

GRID = pde.Grid((6, 5), 1.0, [(D, N), P], "cell")
SIDE = (0, 0)
K = np.random.default_rng(1).uniform(0.5, 1.5, GRID.shape)
FLOW = pde.advection(GRID, (3.0, -2.0))
MATRIX = pde.from_scipy((pde.Diffusion(GRID, K) + pde.identity(GRID)).to_scipy())


def grid_problem(flow):
    """θ: coefficients at points, source, boundary values."""

    def operator(t):
        total = pde.Diffusion(GRID, t["k"]) + pde.identity(GRID)
        return total + FLOW if flow else total

    def rhs(t):
        return t["b"] - operator(t).boundary_term({SIDE: t["g"]})

    symmetric = True if not flow else None
    problem = bl.LinearSystem(operator, rhs, symmetric=symmetric, positive_definite=symmetric)
    theta = {"k": K, "b": normal(GRID.shape), "g": normal(5, 1)}
    return problem, jax.tree.map(jnp.asarray, theta), jnp.zeros(GRID.shape)


def matrix_problem():
    """θ: stored entries, moved together so that the matrix stays symmetric, and source."""
    values = MATRIX.values

    def operator(t):
        return MATRIX.with_values(values * t["scale"])

    problem = bl.LinearSystem(operator, lambda t: t["b"], symmetric=True, positive_definite=True)
    theta = {"scale": jnp.asarray(1.3), "b": jnp.asarray(normal(GRID.size))}
    return problem, theta, jnp.zeros(GRID.size)


def loss(x, theta):
    del theta
    return jnp.sum(jnp.sin(x - 0.25))


@functools.cache
def exact(name):
    """Hypergradient by SciPy: λ = A⁻ᵀ ∂L/∂x, and then of λᵀ (b - A x)."""
    problem, theta, start = PROBLEMS[name]
    bound = problem.at(theta)
    matrix = bound.operator.source.to_scipy().tocsc()
    x = spla.spsolve(matrix, np.ravel(bound.residual(start)))
    slope = jax.grad(loss)(jnp.asarray(x).reshape(start.shape), theta)
    adjoint = jnp.asarray(spla.spsolve(matrix.T.tocsc(), np.ravel(slope))).reshape(start.shape)
    point = jnp.asarray(x).reshape(start.shape)

    @jax.jit
    @jax.grad
    def gradient(theta):
        return jnp.sum(adjoint * problem.at(theta).residual(point))

    return gradient(theta)


PROBLEMS = {
    "symmetric": grid_problem(flow=False),
    "advected": grid_problem(flow=True),
    "assembled": matrix_problem(),
}
STEADY = pde.Diffusion(GRID, 1.0) + pde.identity(GRID)
COLOURS = pde.colouring(MATRIX)


@functools.cache
def hierarchy():
    pytest.importorskip("pyamg")
    return pde.AlgebraicMultigrid(MATRIX)


PRECONDITIONERS = {
    "none": lambda: None,
    "Jacobi": bl.JacobiPreconditioner,
    "weighted Jacobi": pde.WeightedJacobi,
    "Gauss-Seidel": lambda: pde.GaussSeidel(symmetric=True),
    "SSOR": lambda: pde.GaussSeidel(1.3, symmetric=True),
    "multicolour": lambda: pde.GaussSeidel(symmetric=True, colours=COLOURS),
    "Chebyshev": pde.ChebyshevSmoother,
    "multigrid": pde.Multigrid,
    "W-cycles": lambda: pde.Multigrid(pde.WeightedJacobi(), cycle="W"),
    "fast": lambda: pde.FastSolver(STEADY),
    "algebraic": hierarchy,
}
SOLVERS = {
    "CG": lambda p: bl.ConjugateGradient(preconditioner=p),
    "MINRES": lambda p: bl.MINRES(preconditioner=p),
    "BiCGStab": lambda p: bl.BiCGStab(preconditioner=p),
    "GMRES": lambda p: bl.GMRES(preconditioner=p),
    "FGMRES": lambda p: bl.GMRES(preconditioner=p, flexible=True),
    "Richardson": lambda p: bl.Richardson(1.0, preconditioner=p),
}
ON_MATRICES = ("multicolour", "algebraic")
ITERATIONS = {"Richardson": 600}
# One of each solver and of each preconditioner, on each kind of problem.
FEW = {
    ("MINRES", "Chebyshev", "symmetric"),
    ("GMRES", "fast", "advected"),
    ("BiCGStab", "multicolour", "assembled"),
}


def fits(solver, preconditioner, problem):
    """Whether a combination is one that should converge."""
    if problem == "advected" and solver in {"CG", "MINRES"}:
        return False
    if (preconditioner == "multicolour") and problem != "assembled":
        return False
    if problem == "assembled" and preconditioner not in {"none", "Jacobi", *ON_MATRICES}:
        return False
    if solver == "FGMRES" and preconditioner == "none":
        return False
    # Alone these are no convergent iteration.
    return solver != "Richardson" or preconditioner not in {"none", "Jacobi"}


def cases():
    table = itertools.product(SOLVERS, PRECONDITIONERS, PROBLEMS)
    fitting = [case for case in table if fits(*case)] + [("direct", "none", "advected")]
    return [pytest.param(*c, marks=[] if c in FEW else [pytest.mark.slow]) for c in fitting]


def pairs():
    """Each solver with each preconditioner, on one problem."""
    found = [
        (solver, preconditioner, "assembled" if preconditioner in ON_MATRICES else "symmetric")
        for solver, preconditioner in itertools.product(SOLVERS, PRECONDITIONERS)
    ]
    return [pair for pair in found if fits(*pair)] + [("direct", "none", "advected")]


def made(solver, preconditioner):
    if solver == "direct":
        return pde.SparseDirect()
    return SOLVERS[solver](PRECONDITIONERS[preconditioner]())


@pytest.mark.slow
@pytest.mark.parametrize(("solver", "preconditioner", "problem"), pairs())
def test_solver_conforms(solver, preconditioner, problem):
    given, theta, x0 = PROBLEMS[problem]
    budget = bl.Budget(ITERATIONS.get(solver, 120), rtol=1e-11)
    names = check_inner_solver(made(solver, preconditioner), given, theta, x0, budget=budget)
    assert "converged means within tolerance" in names


@pytest.mark.slow
@pytest.mark.parametrize(("solver", "preconditioner", "problem"), cases())
def test_hypergradient_is_that_of_the_exact_adjoint(solver, preconditioner, problem):
    """With respect to the source, the coefficients or entries, and the boundary values."""
    given, theta, x0 = PROBLEMS[problem]
    method = made(solver, preconditioner)
    budget = bl.Budget(ITERATIONS.get(solver, 120), rtol=1e-12)

    @jax.jit
    def gradient(theta):
        result = bl.hypergradient(
            loss, given, theta, x0, solver=method, estimator=bl.Implicit(method),
            budget=budget, adjoint_budget=budget,
        )  # fmt: skip
        return result.gradient

    expected = exact(problem)
    for got, want in zip(jax.tree.leaves(gradient(theta)), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-8 * float(jnp.max(jnp.abs(want))))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("solver", "preconditioner", "problem"),
    [
        ("CG", "multigrid", "symmetric"),
        ("MINRES", "Chebyshev", "symmetric"),
        ("GMRES", "fast", "advected"),
        ("BiCGStab", "multigrid", "advected"),
        ("CG", "algebraic", "assembled"),
        ("direct", "none", "advected"),
    ],
)
def test_estimator_conforms(solver, preconditioner, problem):
    given, theta, x0 = PROBLEMS[problem]
    method, budget = made(solver, preconditioner), bl.Budget(120, rtol=1e-12)
    names = check_estimator(
        bl.Implicit(method),
        given,
        theta,
        x0,
        solver=method,
        budget=budget,
        adjoint_budget=budget,
        outer_loss=loss,
        gradient=exact(problem),
    )
    assert "gradient right" in names


def test_gradient_with_respect_to_every_stored_entry():
    """As long as the entries, and each of them right, also those without a mirror image."""
    matrix = pde.from_scipy((FLOW + STEADY).to_scipy())
    b = jnp.asarray(normal(GRID.size))
    problem = bl.LinearSystem(matrix.with_values, b)
    solver = bl.GMRES(preconditioner=pde.GaussSeidel(colours=pde.colouring(matrix)))
    budget = bl.Budget(120, rtol=1e-12)

    @jax.jit
    def gradient(values):
        return bl.hypergradient(
            loss, problem, values, jnp.zeros(GRID.size), solver=solver,
            estimator=bl.Implicit(bl.GMRES()), budget=budget, adjoint_budget=budget,
        ).gradient  # fmt: skip

    found = gradient(matrix.values)
    csr = matrix.to_scipy()
    assert found.shape == (csr.nnz,)
    x = spla.spsolve(csr.tocsc(), b)
    adjoint = spla.spsolve(csr.T.tocsc(), np.cos(x - 0.25))
    coo = csr.tocoo()
    expected = -adjoint[coo.row] * x[coo.col]
    np.testing.assert_allclose(found, expected, atol=1e-8 * np.abs(expected).max())
