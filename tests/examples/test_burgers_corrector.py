"""The published Burgers experiment, on few points."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel as bl
import bilevel_pde as pde
from tests.examples.loading import example

POINTS = 16


@pytest.fixture(scope="module")
def burgers():
    with example("burgers_corrector") as module:
        yield module


def upwind(u, viscosity, dt):
    """I + dt (u ∂x − ν ∂xx), upwind, periodic, as a dense matrix."""
    n = len(u)
    h = 1.0 / n
    matrix = np.eye(n)
    for i in range(n):
        left, right = (i - 1) % n, (i + 1) % n
        matrix[i, i] += dt * (abs(u[i]) / h + 2 * viscosity / h**2)
        matrix[i, left] -= dt * (max(u[i], 0.0) / h + viscosity / h**2)
        matrix[i, right] -= dt * (max(-u[i], 0.0) / h + viscosity / h**2)
    return matrix


def test_a_converged_step_is_one_picard_step_of_implicit_upwind(burgers):
    grid = pde.Grid(POINTS, boundary=pde.Periodic())
    states = np.random.default_rng(0).standard_normal((2, POINTS)).astype(np.float32)
    fidelity = bl.Fidelity(bl.Budget(400, rtol=1e-7), bl.Budget(400))
    moved = burgers.Flow(grid).solved(jnp.asarray(states), fidelity).value
    for u, w in zip(states, np.asarray(moved), strict=True):
        expected = np.linalg.solve(upwind(u, burgers.VISCOSITY, burgers.DT), u)
        assert np.allclose(w, expected, atol=2e-5)


def test_its_derivative_is_all_of_the_step(burgers):
    """M(u)⁻¹u depends on u twice; a central difference knows both."""
    grid = pde.Grid(POINTS, boundary=pde.Periodic(), dtype="float64")
    flow = burgers.Flow(grid)
    converged = bl.Fidelity(bl.Budget(2000, rtol=1e-13), bl.Budget(2000, rtol=1e-13))
    random = np.random.default_rng(1)
    u, direction = (jnp.asarray(random.standard_normal((1, POINTS))) for _ in range(2))

    def outer(u):
        return jnp.sum(jnp.sin(flow.solved(u, converged).value))

    exact = float(jnp.vdot(jax.grad(outer)(u), direction))
    step = 1e-5
    difference = float(outer(u + step * direction) - outer(u - step * direction)) / (2 * step)
    assert exact == pytest.approx(difference, rel=1e-6)


@pytest.mark.slow
def test_a_full_solve_takes_what_the_paper_says(burgers):
    """A residual of 1e-5 takes about 24 iterations, whatever has become of the waves."""
    data = burgers.trajectories(jax.random.key(0), 64, 5)
    flow = burgers.Flow(pde.Grid(64, boundary=pde.Periodic()))
    full = bl.Fidelity(bl.Budget(60, rtol=1e-5), bl.Budget(60, rtol=1e-5))
    first, last = (int(flow.solved(data[:, k], full).iterations) for k in (0, 5))
    assert 19 <= first <= 29
    assert 19 <= last <= 29


@pytest.mark.slow
def test_auto_trains_under_one_compilation(burgers):
    task = burgers.task(points=16, channels=4, blocks=1, samples=50, epochs=4, seed=1)
    run = bl.optimize(task, controller=bl.AutomaticRefinement(task.ladder), progress=False, seed=1)
    assert run.summary.compilations == 1
    assert run.summary.failures == 0
    assert run.history[-1].budget_iterations > 1
