"""The heat equation: orders in time, conservation, gradients, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

import bilevel as bl
import bilevel_pde as pde
from bilevel.testing import taylor_test
from tests.pde.cases import few

D, N, P, R = pde.Dirichlet(), pde.Neumann(), pde.Periodic(), pde.Robin(1.0, 0.5)
ORDERS = {"implicit_euler": 1, "crank_nicolson": 2}


def slope(errors):
    return np.log2(errors[-2] / errors[-1])


@pytest.mark.parametrize(
    ("scheme", "shape"),
    few(
        lambda scheme, shape: (
            (scheme, len(shape)) in {("implicit_euler", 1), ("crank_nicolson", 2)}
        ),
        ORDERS,
        [(16,), (8, 6), (5, 4, 4)],
    ),
)
def test_mode_decays_with_the_order_of_the_scheme(scheme, shape):
    """A discrete eigenfunction decays exactly exponentially: what is left is the error in time."""
    grid = pde.Grid(shape)
    mode = jnp.ones(shape)
    for x in grid.mesh():
        mode = mode * jnp.sin(jnp.pi * x)
    rate = 0.1 * sum(4 / h**2 * np.sin(np.pi * h / 2) ** 2 for h in grid.spacing)
    errors = []
    for steps in (16, 32):
        stepper = pde.Heat(grid, 0.1, 1.0 / steps, scheme=scheme)
        last = pde.rollout(stepper, mode, steps)[-1]
        errors.append(float(jnp.max(jnp.abs(last - np.exp(-rate) * mode))))
    # The factor's own expansion: rate² dt / 2 exp(-rate) for Euler's.
    assert abs(slope(errors) - ORDERS[scheme]) < 0.1, errors


@pytest.mark.parametrize("scheme", few(lambda scheme: scheme == "crank_nicolson", ORDERS))
def test_order_with_forcing_and_boundary_values_that_vary(scheme):
    """Against the exponential integrator of the same matrix, on mixed sides."""
    grid = pde.Grid(10, boundary=[(D, R)])
    k = 0.05 * (1.5 + jnp.sin(3 * grid.coordinates()[0]))
    matrix = pde.Diffusion(grid, k).to_scipy().toarray()
    left = np.asarray(pde.Diffusion(grid, k).boundary_term({(0, 0): 1.0}))
    shape = np.cos(2 * np.asarray(grid.coordinates()[0]))
    # d/dt (u, s, c) with s = sin 3t, c = cos 3t: f = c·shape, g = s.
    whole = np.zeros((12, 12))
    whole[:10, :10], whole[:10, 10], whole[:10, 11] = -matrix, -left, shape
    whole[10, 11], whole[11, 10] = 3.0, -3.0
    exact = (scipy.linalg.expm(whole) @ np.concatenate([np.zeros(10), [0.0, 1.0]]))[:10]
    errors = []
    for steps in (64, 128):
        dt = 1.0 / steps
        time = dt * (np.arange(steps) + (1.0 if scheme == "implicit_euler" else 0.5))
        controls = {
            "forcing": np.cos(3 * time)[:, None] * shape,
            "boundary_values": {(0, 0): np.sin(3 * time)[:, None]},
        }
        stepper = pde.Heat(grid, k, dt, scheme=scheme)
        last = pde.rollout(stepper, jnp.zeros(10), steps, controls=controls)[-1]
        errors.append(np.max(np.abs(last - exact)))
    assert abs(slope(errors) - ORDERS[scheme]) < 0.1, errors


@pytest.mark.parametrize(
    ("scheme", "centering"),
    few(lambda *case: case == ("crank_nicolson", "vertex"), ORDERS, ["vertex", "cell"]),
)
def test_closed_sides_conserve_heat(scheme, centering):
    grid = pde.Grid((7, 6), boundary=[(N, N), P], centering=centering)
    u = 1.0 + pde.boxes(jax.random.key(0), grid, 2)
    k = 1.0 + u**2
    weight = grid.weights()[0] * grid.weights()[1]
    moved = pde.Heat(grid, k, 0.02, scheme=scheme, mean="harmonic").step(u)
    np.testing.assert_allclose(jnp.sum(weight * moved), jnp.sum(weight * u), rtol=1e-9)
    assert float(jnp.max(jnp.abs(moved - u))) > 0.01


def parts():
    grid = pde.Grid((5, 4), boundary=[(D, N), P])
    keys = jax.random.split(jax.random.key(1), 3)
    point = {
        "diffusivity": 0.3 + jnp.abs(pde.sine_waves(keys[0], grid, 2)),
        "dt": jnp.asarray(0.05),
        "forcing": pde.truncated_fourier(keys[1], grid, 2),
        "boundary_values": {(0, 0): jnp.linspace(0.0, 1.0, 4)},
        "u": pde.truncated_fourier(keys[2], grid, 2),
    }
    return grid, point


def settings(point):
    return {name: value for name, value in point.items() if name != "u"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "scheme", [pytest.param("implicit_euler", marks=pytest.mark.slow), "crank_nicolson"]
)
def test_gradient_of_a_rollout_is_that_of_dense_algebra_and_passes_taylor(scheme):
    grid, point = parts()

    def loss(point):
        stepper = pde.Heat(grid, scheme=scheme, **settings(point))
        return jnp.sum(pde.rollout(stepper, point["u"], 3)[-1] ** 3)

    def dense(point):
        stepper = pde.Heat(grid, scheme=scheme, **settings(point))
        spatial = stepper.spatial()
        eye = jnp.eye(grid.size).reshape(-1, *grid.shape)
        matrix = jax.vmap(spatial.matvec)(eye).reshape(grid.size, -1).T
        source = (point["forcing"] - spatial.boundary_term(point["boundary_values"])).ravel()
        share = {"implicit_euler": 1.0, "crank_nicolson": 0.5}[scheme]
        u, dt, one = point["u"].ravel(), point["dt"], jnp.eye(grid.size)
        for _ in range(3):
            rhs = u - (1 - share) * dt * matrix @ u + dt * source
            u = jnp.linalg.solve(one + share * dt * matrix, rhs)
        return jnp.sum(u**3)

    gradient, expected = jax.jit(jax.grad(loss))(point), jax.jit(jax.grad(dense))(point)
    for got, want in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-9 * float(jnp.max(jnp.abs(want))))
    direction = jax.tree.map(lambda leaf: 0.3 * leaf, point)
    assert taylor_test(jax.jit(loss), point, direction, derivative=gradient).slope >= 1.95


def test_dtype_stays():
    grid = pde.Grid(8, dtype="float32")
    u = jnp.ones(8, "float32")
    gradient = jax.grad(lambda u: jnp.sum(pde.Heat(grid, 0.1, 0.1).step(u) ** 2))(u)
    assert gradient.dtype == jnp.float32


@pytest.mark.slow
def test_multigrid_preconditions_the_step_and_its_adjoint():
    grid = pde.Grid((15, 15))
    u = pde.boxes(jax.random.key(0), grid)

    def iterations(solver):
        stepper = pde.Heat(grid, 1.0, 0.1, solver=solver)
        probe = bl.Probe.zeros()

        def loss(u, probe):
            fidelity = bl.Fidelity(
                bl.Budget(200, rtol=1e-8), bl.Budget(200, rtol=1e-8), probe=probe
            )
            return jnp.sum(stepper.step(u, fidelity=fidelity) ** 2)

        counts = jax.grad(loss, argnums=1)(u, probe)
        return int(counts.primal_iterations), int(counts.adjoint_iterations)

    plain = iterations(None)
    fast = iterations(bl.ConjugateGradient(preconditioner=pde.Multigrid()))
    assert max(fast) <= 12 < min(plain)


def test_theta_replaces_parameters_for_one_step():
    grid = pde.Grid(8)
    u = jnp.ones(8)
    changed = pde.Heat(grid, 0.1, 0.1).step(u, theta={"diffusivity": 0.3, "forcing": 2.0})
    expected = pde.Heat(grid, 0.3, 0.1, forcing=2.0).step(u)
    np.testing.assert_array_equal(changed, expected)


def test_guess_is_where_a_truncated_solve_starts():
    grid = pde.Grid(8)
    stepper = pde.Heat(grid, 0.1, 0.1)
    u, none = jnp.ones(8), bl.Budget(iterations=0)
    np.testing.assert_array_equal(stepper.step(u, budget=none), u)
    np.testing.assert_array_equal(stepper.step(u, budget=none, guess=3 * u), 3 * u)


def test_bad_input():
    grid = pde.Grid((4, 5))
    with pytest.raises(ValueError, match=r"diffusivity should be positive, got -1\.0"):
        pde.Heat(grid, -1.0, 0.1)
    with pytest.raises(ValueError, match="dt should be positive"):
        pde.Heat(grid, 1.0, 0.0)
    with pytest.raises(ValueError, match="scheme should be"):
        pde.Heat(grid, 1.0, 0.1, scheme="leapfrog")
    with pytest.raises(ValueError, match="one for each of 2 axes, got 3"):
        pde.Heat(grid, (1.0, 1.0, 1.0), 0.1)
    with pytest.raises(ValueError, match=r"forcing should be .* shape \(4, 5\)"):
        pde.Heat(grid, 1.0, 0.1, forcing=jnp.ones(4))
    with pytest.raises(ValueError, match="sides"):
        pde.Heat(grid, 1.0, 0.1, boundary_values={(2, 0): 1.0})
    with pytest.raises(TypeError, match="grid should be a Grid"):
        pde.Heat(5, 1.0, 0.1)
    for name, value in (("diffusivity", np.inf), ("dt", np.inf), ("forcing", np.nan)):
        with pytest.raises(ValueError, match=f"{name} should be finite"):
            pde.Heat(grid, **{"diffusivity": 1.0, "dt": 0.1, name: value})
        with pytest.raises(TypeError, match=f"{name} should be a number or an array, got 'a'"):
            pde.Heat(grid, **{"diffusivity": 1.0, "dt": 0.1, name: "a"})
    with pytest.raises(ValueError, match=r"boundary_values\[\(0, 1\)\] should be finite"):
        pde.Heat(grid, 1.0, 0.1, boundary_values={(0, 1): jnp.nan})
    with pytest.raises(ValueError, match=r"among \[\(0, 0\).*got left"):
        pde.laplacian(grid).boundary_term({"left": 1.0})
    with pytest.raises(TypeError, match="should be a mapping from sides"):
        pde.laplacian(grid).boundary_term(1.0)
    stepper = pde.Heat(grid, 1.0, 0.1)
    with pytest.raises(TypeError, match=r"got int64\. Use \.astype\(float64\)\.$"):
        stepper.step(jnp.ones((4, 5), int))
    with pytest.raises(ValueError, match="forcing should be finite"):
        stepper.step(jnp.ones((4, 5)), theta={"forcing": np.inf})
    with pytest.raises(ValueError, match=r"u should have the grid's shape \(4, 5\)"):
        stepper.step(jnp.ones(5))
    with pytest.raises(TypeError, match="u should be float64 as the grid is, got float32"):
        stepper.step(jnp.ones((4, 5), "float32"))
    with pytest.raises(ValueError, match="theta may replace diffusivity"):
        stepper.step(jnp.ones((4, 5)), theta={"velocity": 1.0})
    with pytest.raises(TypeError, match="fidelity should be a Fidelity"):
        stepper.step(jnp.ones((4, 5)), fidelity=bl.Budget(3))
    with pytest.raises(TypeError, match="budget should be a Budget"):
        stepper.step(jnp.ones((4, 5)), budget=3)
