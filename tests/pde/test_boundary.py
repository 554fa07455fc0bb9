"""Boundary conditions: exact for linear fields, differentiable in their values."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel as bl
import bilevel_pde as pde
from tests.pde.cases import few
from tests.pde.manufactured import D, N, R, at, boundary_values

SIDES = [
    [(a, b), (c, d)] for a, b, c, d in [(D, D, D, D), (N, D, R, D), (R, N, D, N), (N, N, R, R)]
]


def linear(p):
    return 1.0 + 2.0 * p[0] - 3.0 * p[1]


@pytest.mark.parametrize(
    ("boundary", "centering"),
    few(
        lambda boundary, centering: (centering == "vertex") == (boundary in SIDES[::2]),
        SIDES,
        ["vertex", "cell", ("vertex", "cell")],
    ),
)
def test_linear_fields_are_exact(boundary, centering):
    """Any error of a ghost value would show undivided in the rows next to its side."""
    grid = pde.Grid((5, 4), (1.0, 2.0), boundary, centering, origin=(0.3, -0.2))
    u, values = at(grid, linear), boundary_values(grid, linear)
    velocity = (0.7, -0.4)
    for operator, expected in [
        (pde.laplacian(grid), 0.0),
        (pde.Diffusion(grid, 2.0), 0.0),
        (pde.advection(grid, velocity, "central"), 0.7 * 2 + 0.4 * 3),
        (pde.advection(grid, velocity), 0.7 * 2 + 0.4 * 3),
    ]:
        image = operator @ u + operator.boundary_term(values)
        np.testing.assert_allclose(image, expected, atol=1e-11)


def test_diffusion_is_the_laplacian_where_the_coefficient_is_constant():
    for boundary, centering in itertools.product(SIDES, ["vertex", "cell"]):
        grid = pde.Grid((5, 4), (1.0, 2.0), boundary, centering)
        k = jnp.full(grid.shape, 1.7)
        expected = (-1.7 * pde.laplacian(grid)).to_scipy().toarray()
        np.testing.assert_allclose(pde.Diffusion(grid, k).to_scipy().toarray(), expected, atol=1e-9)
        values = {(0, 0): jnp.arange(4.0), (1, 1): 2.0}
        np.testing.assert_allclose(
            pde.Diffusion(grid, k).boundary_term(values),
            -1.7 * pde.laplacian(grid).boundary_term(values),
            atol=1e-11,
        )


def test_boundary_values_take_part_in_sums_and_multiples():
    grid = pde.Grid((4, 3), boundary=[(D, R), (D, N)])
    values = {(0, 0): 2.0, (1, 1): jnp.arange(4.0)}
    a, b = pde.laplacian(grid), pde.advection(grid, (1.0, 2.0), "central")
    together = pde.identity(grid) - 0.1 * a + b
    np.testing.assert_allclose(
        together.boundary_term(values),
        -0.1 * a.boundary_term(values) + b.boundary_term(values),
        atol=1e-12,
    )


def test_derivatives_with_respect_to_boundary_values():
    grid = pde.Grid((4, 3), boundary=[(D, R), (D, N)], centering="cell")
    operator = pde.Diffusion(grid, 1.0 + grid.mesh()[0])
    weight = jnp.asarray(np.random.default_rng(0).standard_normal(grid.shape))

    def value(g):
        return jnp.sum(weight * operator.boundary_term({(0, 0): g[:3], (1, 1): g[3:]}))

    # It is linear in g: unit values give the derivatives.
    expected = [value(unit) for unit in jnp.eye(7)]
    np.testing.assert_allclose(jax.grad(value)(jnp.arange(7.0)), expected, rtol=1e-13)


def test_hypergradients_against_the_dense_adjoint():
    """Of source, coefficient and boundary values at a time, through a solve."""
    grid = pde.Grid((5, 4), boundary=[(D, R), (N, D)], centering="cell")
    generator = np.random.default_rng(1)
    weight = jnp.asarray(generator.standard_normal(grid.shape))
    theta = {
        "k": jnp.asarray(generator.uniform(1, 2, grid.shape)),
        "f": jnp.asarray(generator.standard_normal(grid.shape)),
        "g": jnp.asarray(generator.standard_normal(4)),
    }

    def right(t):
        return t["f"] - pde.Diffusion(grid, t["k"]).boundary_term({(0, 0): t["g"]})

    problem = bl.LinearSystem(lambda t: pde.Diffusion(grid, t["k"]), right)

    def solved(t):
        budget = bl.Budget(200, 1e-13)
        x0 = jnp.zeros(grid.shape)
        solution = bl.solve(
            problem, t, x0, solver=bl.ConjugateGradient(), budget=budget, adjoint_budget=budget
        )
        return jnp.sum(weight * solution.value**2)

    def dense(t):
        basis = jnp.eye(grid.size).reshape(-1, *grid.shape)
        rows = jax.vmap(pde.Diffusion(grid, t["k"]).matvec)(basis).reshape(grid.size, -1)
        return jnp.sum(weight.ravel() * jnp.linalg.solve(rows.T, right(t).ravel()) ** 2)

    got, expected = jax.jit(jax.grad(solved))(theta), jax.jit(jax.grad(dense))(theta)
    for name in theta:
        np.testing.assert_allclose(got[name], expected[name], rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({(1, 0): 1.0}, "belong to sides"),
        ({(2, 0): 1.0}, "belong to sides"),
        ({(0, 2): 1.0}, "belong to sides"),
        ({(0, 0): jnp.ones(3)}, r"shape \(4,\)"),
    ],
)
def test_values_that_belong_nowhere(values, words):
    operator = pde.laplacian(pde.Grid((3, 4), boundary=[D, pde.Periodic()]))
    with pytest.raises(ValueError, match=words):
        operator.boundary_term(values)


def test_transposed_and_oblique_stencils_take_no_values():
    grid = pde.Grid((3, 4))
    with pytest.raises(ValueError, match="transposed"):
        pde.advection(grid, (1.0, 1.0)).T.boundary_term({(0, 0): 1.0})
    with pytest.raises(ValueError, match="oblique"):
        pde.Stencil(grid, {(1, 1): 1.0}).boundary_term({(0, 0): 1.0})


@pytest.mark.parametrize("arguments", [(1.0, 0.0), (np.nan, 1.0), (1.0, np.inf)])
def test_what_is_no_robin_condition(arguments):
    with pytest.raises(ValueError, match="Robin"):
        pde.Robin(*arguments)


def test_a_robin_condition_that_cancels_on_the_grid():
    with pytest.raises(ValueError, match="cancel"):
        pde.laplacian(pde.Grid(4, boundary=pde.Robin(8.0, -1.0), centering="cell"))
