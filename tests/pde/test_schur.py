"""Saddle points of incompressible flow: their preconditioner, their mean, and their adjoint."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel as bl
import bilevel_pde as pde
from bilevel.bound import BoundProblem
from bilevel.operator import as_operator

P = pde.Periodic()
EXACT = pde.Iterated(bl.BiCGStab(), bl.Budget(200, rtol=1e-12))


def saddle(staggered, velocity, viscosity=0.01, rate=10.0, corner=True, **options):
    blocks = [
        pde.identity(grid) * rate
        - viscosity * pde.laplacian(grid)
        + pde.convection(staggered, velocity, i, **options)
        for i, grid in enumerate(staggered.components)
    ]
    mean = 2.0 * pde.Mean(staggered.cells) if corner else None
    rows = [[pde.block_diagonal(*blocks), pde.Gradient(staggered)]]
    return pde.Block([*rows, [pde.Divergence(staggered), mean]], symmetric=False)


def flow(staggered, seed=0):
    return pde.random_velocity(jax.random.key(seed), staggered, 0.01)


def random_state(staggered, seed=0):
    generator = np.random.default_rng(seed)
    like = (staggered.like, staggered.cells.like)
    return jax.tree.map(lambda leaf: jnp.asarray(generator.standard_normal(leaf.shape)), like)


def bound(operator):
    return BoundProblem("saddle point", lambda x: x, operator=as_operator(operator))


def distance(x, y):
    pairs = zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True)
    return max(float(jnp.max(jnp.abs(a - b))) for a, b in pairs)


def test_mean_is_a_projection():
    grid = pde.Grid((3, 4), boundary=pde.Neumann(), centering="cell")
    mean, v = pde.Mean(grid), jnp.arange(12.0).reshape(3, 4)
    np.testing.assert_allclose(mean @ v, 5.5)
    np.testing.assert_allclose(mean.to_scipy() @ v.ravel(), 5.5)
    np.testing.assert_allclose(mean.diagonal(), 1 / 12)
    assert mean.T is mean
    assert mean.symmetric
    assert not mean.positive_definite
    with pytest.raises(ValueError, match="points of equal volume"):
        pde.Mean(pde.Grid(4, boundary=pde.Neumann()))
    with pytest.raises(ValueError, match="too large to write out"):
        pde.Mean(pde.Grid((65, 65))).to_scipy()


@pytest.mark.parametrize(
    "boundary",
    [
        pytest.param([P, pde.Dirichlet()], marks=pytest.mark.slow),
        pytest.param(pde.Dirichlet(), marks=pytest.mark.slow),
        P,
    ],
)
def test_convection_of_both_forms(boundary):
    """By a flow without divergence: constants stay, sums and, by central fluxes, energy."""
    box = pde.Staggered((6, 8), (1.0, 1.5), boundary)
    w, u = flow(box), flow(box, 1)
    for i in (0, 1):
        fluxes = pde.convection(box, w, i)
        np.testing.assert_allclose(fluxes.T @ u[i], -(fluxes @ u[i]), atol=1e-12)
        if boundary is P:
            for scheme, conservative in itertools.product(("upwind", "central"), (True, False)):
                carried = pde.convection(box, w, i, scheme, conservative=conservative)
                np.testing.assert_allclose(carried @ jnp.ones((6, 8)), 0.0, atol=1e-12)
                assert (abs(float(jnp.sum(carried @ u[i]))) < 1e-11) == conservative


def test_walls_that_move_along_carry_a_uniform_flow():
    """What passes the walls is in w, too: a uniform flow is carried without change."""
    box = pde.Staggered((5, 4))
    sides = [(axis, side) for axis in (0, 1) for side in (0, 1)]
    walls = tuple(dict.fromkeys(sides, speed) for speed in (0.7, -0.2))
    w = tuple(jnp.full(g.shape, s) for g, s in zip(box.components, (0.7, -0.2), strict=True))

    @functools.partial(jax.jit, static_argnums=(1, 2))
    def change(w, i, form):
        carried = pde.convection(box, w, i, conservative=form, walls=walls)
        return carried @ w[i] + carried.boundary_term(walls[i])

    for i in (0, 1):
        for form in (True, False):
            np.testing.assert_allclose(change(w, i, form), 0.0, atol=1e-12)


@pytest.mark.slow
def test_exact_where_the_blocks_commute():
    """Carried by a uniform flow on a periodic grid, M differs from A below the diagonal alone."""
    box = pde.Staggered((6, 8), boundary=P)
    uniform = tuple(jnp.full((6, 8), speed) for speed in (0.3, -0.8))
    A = saddle(box, uniform)
    r = random_state(box)

    @jax.jit
    def image(operator, r):
        return operator @ pde.PressureSchur(EXACT).at(bound(operator), r)(r)

    for operator in (A, A.T):
        # A M⁻¹ = [[1, 0], [X, 1]]: the first row and, for a force of zero, both.
        assert distance(image(operator, r)[0], r[0]) < 1e-8
        zero = (jax.tree.map(jnp.zeros_like, r[0]), r[1])
        assert distance(image(operator, zero), zero) < 1e-8


@pytest.mark.slow
def test_cahouet_and_chabard_is_exact_without_advection():
    box = pde.Staggered((6, 8), boundary=P)
    A = saddle(box, jax.tree.map(jnp.zeros_like, flow(box)), 0.05, 4.0, corner=False)
    r = random_state(box)
    r = (jax.tree.map(jnp.zeros_like, r[0]), r[1] - jnp.mean(r[1]))
    M = pde.PressureSchur(EXACT, rate=4.0, viscosity=0.05).at(bound(A), r)
    assert distance(A @ M(r), r) < 1e-8


@pytest.mark.slow
@pytest.mark.parametrize("boundary", [pde.Dirichlet(), P])
def test_few_iterations_of_flexible_gmres_and_of_its_adjoint(boundary):
    """Unpreconditioned, both take over a hundred."""
    box = pde.Staggered((24, 24), boundary=boundary)
    w, rhs = flow(box), random_state(box)
    solver = bl.GMRES(20, preconditioner=pde.PressureSchur(), flexible=True)

    @jax.jit
    def both(w, rhs):
        A = saddle(box, w, scheme="upwind")
        guess = jax.tree.map(jnp.zeros_like, rhs)
        return [
            bl.solve(
                bl.LinearSystem(operator, rhs),
                None,
                guess,
                solver=solver,
                budget=bl.Budget(5, rtol=1e-8),
            )
            for operator in (A, A.T)
        ]

    for solution in both(w, rhs):
        assert int(solution.status) == 0
        assert int(solution.applications) < 45
        np.testing.assert_allclose(jnp.mean(solution.value[1]), jnp.mean(rhs[1]) / 2, atol=1e-6)


@pytest.mark.slow
def test_velocity_blocks_by_multigrid():
    box = pde.Staggered((16, 16))
    A = saddle(box, jax.tree.map(jnp.zeros_like, flow(box)), 1.0, 1.0)
    solver = bl.GMRES(20, preconditioner=pde.PressureSchur(pde.Multigrid()))
    rhs = random_state(box)
    problem = bl.LinearSystem(A, rhs)
    guess = jax.tree.map(jnp.zeros_like, rhs)
    solution = bl.solve(problem, None, guess, solver=solver, budget=bl.Budget(3, rtol=1e-8))
    assert int(solution.status) == 0


def test_iterated_is_so_many_iterations():
    grid = pde.Grid(5)
    A, v = pde.identity(grid) - 0.01 * pde.laplacian(grid), jnp.arange(5.0)
    M = pde.Iterated(bl.Jacobi(), bl.Budget(iterations=2)).at(bound(A), v)
    D = A.diagonal()
    np.testing.assert_allclose(M(v), v / D + (v - A @ (v / D)) / D, rtol=1e-12)
    with pytest.raises(bl.IncompatibleError, match="one of linear systems"):
        pde.Iterated(bl.LBFGS(), bl.Budget(2))
    with pytest.raises(TypeError, match="should be a Budget"):
        pde.Iterated(bl.Jacobi(), 2)
    without = dataclasses.replace(bound(A), operator=None)
    with pytest.raises(bl.IncompatibleError, match="has no operator"):
        pde.Iterated(bl.Jacobi(), bl.Budget(2)).at(without, v)


def test_bad_input():
    box = pde.Staggered((4, 4))
    one = pde.block_diagonal(*map(pde.identity, box.components))
    with pytest.raises(ValueError, match="belong together"):
        pde.PressureSchur(rate=1.0)
    for operator in (
        pde.identity(box.cells),
        one,
        pde.Block([[one, pde.Gradient(box)], [pde.Divergence(box), pde.identity(box.cells)]]),
    ):
        with pytest.raises(bl.IncompatibleError, match="it needs a saddle point"):
            pde.PressureSchur().at(bound(operator), random_state(box))
