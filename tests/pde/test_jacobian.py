"""Jacobians of nonlinear steps entry by entry, and the sparse direct adjoint made of them."""

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel as bl
import bilevel_pde as pde
from bilevel_pde.jacobian import Jacobian
from bilevel_pde.quasilinear import Quasilinear
from tests.pde.manufactured import N, P

DIRECT = pde.SparseDirect()
TIGHT = bl.Budget(iterations=200, rtol=1e-13)


def waves(like):
    return jax.tree.map(
        lambda leaf: (0.3 + jnp.cos(1.7 * jnp.arange(leaf.size))).reshape(leaf.shape), like
    )


def at(problem, x, theta):
    return Jacobian(problem.system(x, theta)[0], problem.system, x, theta)


def flow(shape, viscosity, **options):
    walls = pde.Staggered(shape)
    lid = ({(1, 1): 1.0}, *[None] * (len(shape) - 1))
    return pde.NavierStokes(walls, viscosity, 0.2, boundary_values=lid, **options)


@pytest.mark.parametrize(
    "stepper",
    [
        pde.Burgers(pde.Grid(5, boundary=P), 0.1, 0.1, differences="central", conservative=True),
        pytest.param(pde.Burgers(pde.Grid((4, 5), boundary=N), 0.1, 0.1), marks=pytest.mark.slow),
        pde.NavierStokes(pde.Staggered((4, 3), boundary=P), 0.1, 0.1, differences="central"),
        pytest.param(
            flow((3, 2, 3), 0.1, conservative=True, solver=DIRECT, adjoint_solver=DIRECT),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            pde.KuramotoSivashinsky(pde.Grid(7, boundary=P), 0.1, linearization="newton"),
            marks=pytest.mark.slow,
        ),
    ],
    ids=lambda stepper: type(stepper).__name__,
)
def test_entries_are_those_of_the_dense_derivative(stepper):
    problem, x = stepper.problem(), waves(stepper.like)
    theta = (stepper._data(), x)
    flat, unflatten = jax.flatten_util.ravel_pytree(x)

    @jax.jit
    def derivative(flat):
        return jax.flatten_util.ravel_pytree(problem.residual(unflatten(flat), theta))[0]

    dense = jax.jacfwd(derivative)(flat)
    scale = float(jnp.max(jnp.abs(dense)))
    rest = jax.jit(lambda x, theta: at(problem, x, theta).rest())(x, theta)
    rows, columns, values = map(np.asarray, rest)
    matrix = at(problem, x, theta).matrix.to_scipy().toarray()
    np.add.at(matrix, (rows, columns), values)
    np.testing.assert_allclose(matrix, dense, rtol=0, atol=1e-13 * scale)


def test_transposes_and_what_reaches_too_far():
    grid = pde.Grid(7, boundary=P)
    x = waves(grid.like)

    def system(w, theta):
        return pde.identity(grid) + pde.Diffusion(grid, theta * (2.0 + w)).stencil(), w**2

    jacobian = at(Quasilinear(system), x, 0.1)
    jacobian.check_transpose()
    matrix = jacobian.to_scipy()
    np.testing.assert_allclose(jacobian.T.to_scipy().toarray(), matrix.toarray().T)
    np.testing.assert_allclose(jacobian @ x, matrix @ x, rtol=1e-12)

    def far(w, theta):
        return pde.identity(grid) + pde.Diffusion(grid, 2.0 + jnp.roll(w, 2)).stencil(), w

    assert np.isnan(at(Quasilinear(far), x, 0.1).rest()[2]).all()


def burgers(viscosity, **options):
    return pde.Burgers(pde.Grid(8, boundary=P), viscosity, 0.05, **options)


def cavity(viscosity, **options):
    return flow((4, 3), viscosity, **options)


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (burgers, {"derivative": "implicit"}),
        pytest.param(cavity, {"derivative": "implicit"}, marks=pytest.mark.slow),
        pytest.param(burgers, {"derivative": "frozen"}, marks=pytest.mark.slow),
        pytest.param(burgers, {"linearization": "newton"}, marks=pytest.mark.slow),
        pytest.param(cavity, {"derivative": "frozen"}, marks=pytest.mark.slow),
        pytest.param(cavity, {"linearization": "newton"}, marks=pytest.mark.slow),
    ],
)
def test_every_step_can_be_checked_against_the_sparse_direct_adjoint(make, options):
    """The solver is direct as well; the other gradient is that of GMRES at the same state."""
    state = waves(make(0.05).like)

    @jax.jit
    def gradients(viscosity, u):
        def loss(viscosity, u, adjoint):
            stepper = make(viscosity, solver=DIRECT, adjoint_solver=adjoint, **options)
            moved = stepper.step(u, adjoint_budget=TIGHT)
            return sum(jnp.sum(leaf**3) for leaf in jax.tree.leaves(moved))

        return [
            jax.grad(loss, argnums=(0, 1))(viscosity, u, adjoint)
            for adjoint in (DIRECT, bl.GMRES(60))
        ]

    direct, iterative = gradients(0.05, state)
    for got, want in zip(jax.tree.leaves(direct), jax.tree.leaves(iterative), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-8 * float(jnp.max(jnp.abs(want))))


@pytest.mark.parametrize("linearization", ["picard", "newton"])
def test_saddle_points_take_it_as_well(linearization):
    """Its numbers take a while to compile and are looked at above; refusals need no numbers."""

    def loss(viscosity, u):
        options = {"linearization": linearization, "outer_budget": 1}
        stepper = cavity(viscosity, solver=DIRECT, adjoint_solver=DIRECT, **options)
        return jnp.sum(stepper.step(u)[1] ** 2)

    gradient = jax.eval_shape(jax.grad(loss), 0.05, waves(cavity(0.05).like))
    assert gradient.shape == ()


@pytest.mark.parametrize("factor", [1.0, -3.0])
def test_a_mean_takes_one_more_unknown_and_fills_nothing(factor):
    """Of 80² points its matrix would have 4e7 entries."""
    closed = pde.Grid((80, 80), boundary=N, centering="cell")
    f = waves(closed.like)
    operator = -pde.laplacian(closed) + factor * pde.Mean(closed)
    solution = bl.solve(bl.LinearSystem(operator, f), None, 0 * f, solver=DIRECT)
    assert solution.status == bl.Status.CONVERGED
    np.testing.assert_allclose(jnp.mean(solution.value), jnp.mean(f) / factor, rtol=1e-9)
