"""Advection–diffusion: orders, conservation, gradients, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel as bl
import bilevel_pde as pde
from bilevel.testing import taylor_test

pytestmark = pytest.mark.slow

D, N, P = pde.Dirichlet(), pde.Neumann(), pde.Periodic()
ORDERS = {"implicit_euler": 1, "crank_nicolson": 2}


def slope(errors):
    return np.log2(errors[-2] / errors[-1])


@pytest.mark.parametrize("scheme", ORDERS)
@pytest.mark.parametrize("shape", [(16,), (8, 6), (5, 4, 4)])
def test_wave_moves_and_decays_with_the_order_of_the_scheme(scheme, shape):
    """A discrete Fourier mode is an eigenfunction: what is left is the error in time."""
    grid = pde.Grid(shape, boundary=P)
    speed, k, differences = (0.3, -0.2, 0.1)[: grid.ndim], 0.02, "central"
    wave = 2 * jnp.pi * sum(grid.mesh())
    rate = 0.0
    for v, h in zip(speed, grid.spacing, strict=True):
        rate += 1j * v * np.sin(2 * np.pi * h) / h + k * 4 / h**2 * np.sin(np.pi * h) ** 2
    exact = jnp.real(jnp.exp(1j * wave - rate))
    errors = []
    for steps in (16, 32):
        stepper = pde.AdvectionDiffusion(
            grid, speed, k, 1.0 / steps, scheme=scheme, differences=differences
        )
        last = pde.rollout(stepper, jnp.cos(wave), steps)[-1]
        errors.append(float(jnp.max(jnp.abs(last - exact))))
    assert abs(slope(errors) - ORDERS[scheme]) < 0.1, errors


@pytest.mark.parametrize(("differences", "order"), [("upwind", 1), ("central", 2)])
def test_order_in_space(differences, order):
    """The steady state of v u' = k u'' between 0 and 1, reached by steps of any length."""
    errors = []
    for n in (63, 127):
        grid = pde.Grid(n)
        stepper = pde.AdvectionDiffusion(
            grid, 1.0, 0.2, 1e6, differences=differences, boundary_values={(0, 1): 1.0}
        )
        x = grid.coordinates()[0]
        exact = jnp.expm1(x / 0.2) / np.expm1(1 / 0.2)
        errors.append(float(jnp.max(jnp.abs(pde.rollout(stepper, x, 2)[-1] - exact))))
    assert abs(slope(errors) - order) < 0.1, errors


@pytest.mark.parametrize("differences", ["upwind", "central"])
def test_conservative_form_conserves_in_a_compressible_flow(differences):
    grid = pde.Grid((7, 6), boundary=P)
    keys = jax.random.split(jax.random.key(0), 3)
    v = tuple(pde.sine_waves(key, grid, 2) for key in keys[:2])
    u = 1.0 + pde.boxes(keys[2], grid)

    def drift(conservative):
        stepper = pde.AdvectionDiffusion(
            grid, v, 0.01, 0.05, differences=differences, conservative=conservative
        )
        return abs(float(jnp.sum(stepper.step(u)) - jnp.sum(u)))

    assert drift(True) < 1e-8
    assert drift(False) > 1e-3


def test_upwind_steps_make_no_new_extrema():
    grid = pde.Grid(40, boundary=P)
    u = pde.boxes(jax.random.key(1), grid, height=(1.0, 1.0))
    upwind = pde.AdvectionDiffusion(grid, 1.0, 0.0, 0.05).step(u)
    central = pde.AdvectionDiffusion(grid, 1.0, 0.0, 0.05, differences="central").step(u)
    assert -1e-9 < float(jnp.min(upwind)) <= float(jnp.max(upwind)) < 1.0 + 1e-9
    assert float(jnp.min(central)) < -1e-3  # what the upwind scheme is for


@pytest.mark.parametrize("scheme", ORDERS)
def test_gradient_is_that_of_dense_algebra_and_passes_taylor(scheme):
    grid = pde.Grid((4, 5), boundary=[(D, N), P])
    keys = jax.random.split(jax.random.key(2), 4)
    point = {
        "velocity": (0.5 + pde.sine_waves(keys[0], grid), jnp.asarray(-0.3)),
        "diffusivity": 0.2 + jnp.abs(pde.sine_waves(keys[1], grid)),
        "dt": jnp.asarray(0.1),
        "forcing": pde.truncated_fourier(keys[2], grid, 2),
        "boundary_values": {(0, 0): jnp.asarray(0.5), (0, 1): jnp.linspace(0.0, 1.0, 5)},
    }
    u0 = pde.truncated_fourier(keys[3], grid, 2)

    def loss(point, u0):
        stepper = pde.AdvectionDiffusion(grid, scheme=scheme, differences="central", **point)
        return jnp.sum(pde.rollout(stepper, u0, 3)[-1] ** 3)

    def dense(point, u0):
        stepper = pde.AdvectionDiffusion(grid, scheme=scheme, differences="central", **point)
        spatial = stepper.spatial()
        eye = jnp.eye(grid.size)
        matrix = jax.vmap(spatial.matvec)(eye.reshape(-1, *grid.shape)).reshape(grid.size, -1).T
        source = (point["forcing"] - spatial.boundary_term(point["boundary_values"])).ravel()
        share = {"implicit_euler": 1.0, "crank_nicolson": 0.5}[scheme]
        u, dt = u0.ravel(), point["dt"]
        for _ in range(3):
            rhs = u - (1 - share) * dt * matrix @ u + dt * source
            u = jnp.linalg.solve(eye + share * dt * matrix, rhs)
        return jnp.sum(u**3)

    gradient = jax.jit(jax.grad(loss, (0, 1)))(point, u0)
    expected = jax.jit(jax.grad(dense, (0, 1)))(point, u0)
    for got, want in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-8 * float(jnp.max(jnp.abs(want))))
    both = (point, u0)
    direction = jax.tree.map(lambda leaf: 0.3 * leaf, both)
    result = taylor_test(jax.jit(lambda p: loss(*p)), both, direction, derivative=gradient)
    assert result.slope >= 1.95


def test_solver_and_estimator_may_be_chosen():
    grid = pde.Grid(12)
    u = jnp.sin(jnp.pi * grid.coordinates()[0])

    def gradient(**options):
        def loss(v):
            return jnp.sum(pde.AdvectionDiffusion(grid, v, 0.1, 0.05, **options).step(u) ** 2)

        return jax.grad(loss)(0.7)

    expected = gradient()
    for options in (
        {"solver": bl.GMRES()},
        {"solver": bl.Jacobi(), "estimator": bl.Unrolled()},
        {"estimator": bl.Implicit(bl.GMRES())},
    ):
        np.testing.assert_allclose(gradient(**options), expected, rtol=1e-6)


def test_bad_input():
    grid = pde.Grid((4, 4))
    with pytest.raises(ValueError, match="one component for each of 2 axes, got 1"):
        pde.AdvectionDiffusion(grid, 1.0, 0.1, 0.1)
    with pytest.raises(ValueError, match="velocity should be a number or a field"):
        pde.AdvectionDiffusion(grid, (jnp.ones(3), 0.0), 0.1, 0.1)
    with pytest.raises(ValueError, match="differences should be"):
        pde.AdvectionDiffusion(grid, (1.0, 0.0), 0.1, 0.1, differences="quick")
    with pytest.raises(ValueError, match="diffusivity should not be negative"):
        pde.AdvectionDiffusion(grid, (1.0, 0.0), -0.1, 0.1)
    with pytest.raises(ValueError, match="mean should be"):
        pde.AdvectionDiffusion(grid, (1.0, 0.0), 0.1, 0.1, mean="geometric")
