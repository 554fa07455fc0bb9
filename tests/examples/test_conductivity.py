"""A conductivity found on a coarse grid first, and on finer ones later."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel as bl
import bilevel_pde as pde
from bilevel.testing import taylor_test
from tests.examples.loading import example

FULL = bl.Budget(iterations=60, rtol=1e-11)


@pytest.fixture(scope="module")
def module():
    with example("conductivity") as module:
        yield module


def _level(module, cells, finest=64):
    return module.Level(finest, cells, jnp.dtype("float64"))


def _smooth(grid):
    x, y = grid.mesh()
    return 0.5 * jnp.sin(2 * jnp.pi * x) * jnp.cos(jnp.pi * y), jnp.sin(jnp.pi * x)[None] * y


@pytest.mark.slow
def test_the_finest_level_is_the_equation_itself(module):
    level = _level(module, 32, finest=32)
    theta, source = _smooth(level.grid)
    found = level.fields(theta, source, bl.Fidelity(FULL))
    matrix = pde.Diffusion(level.grid, jnp.exp(theta), mean="harmonic").to_scipy()
    expected = np.linalg.solve(matrix.toarray(), np.ravel(source)).reshape(found.shape)
    np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-12)


@pytest.mark.slow
def test_coarse_levels_are_off_by_the_square_of_their_spacing(module):
    finest = _level(module, 64)
    theta, source = _smooth(finest.grid)
    exact = finest.fields(theta, source, bl.Fidelity(FULL))
    errors = [
        float(jnp.linalg.norm(_level(module, n).fields(theta, source, bl.Fidelity(FULL)) - exact))
        for n in (16, 32)
    ]
    # Against the finest level in place of the truth: (16 - 1) / (4 - 1) for second order.
    assert 4.0 < errors[0] / errors[1] < 6.0


@pytest.mark.slow
def test_the_gradient_goes_through_the_transfers(module):
    task = module.task(cells=32, epochs=1)
    coarse = bl.Fidelity(FULL, FULL, static={"cells": 16})
    theta = 0.3 * jax.random.normal(jax.random.key(1), (32, 32))
    loss = jax.jit(lambda theta: task.loss(theta, None, coarse))
    taylor_test(loss, theta, derivative=jax.jit(jax.grad(loss))(theta))


@pytest.mark.slow
def test_refining_the_grid_trains(module):
    controller = bl.AutomaticRefinement(module.task(cells=32).ladder)
    assert len(controller.ladder) == 2
    task = module.task(cells=32, epochs=25)
    run = bl.optimize(task, controller=controller, progress=False)
    assert run.summary.compilations == 2  # one a grid
    metrics = [record.metric for record in run.history]
    assert metrics[-1] < 0.75 * metrics[0]


@pytest.mark.slow
def test_precisions_go_with_the_levels(module):
    task = module.task(cells=32, precision="mixed", epochs=1)
    coarsest = task.ladder.fidelity(0)
    jaxpr = jax.make_jaxpr(lambda t: task.loss(t, None, coarsest))(task.theta0)
    assert jaxpr.out_avals[0].dtype == jnp.float64
    assert "f32[16,16]" in str(jaxpr)


def test_messages(module):
    with pytest.raises(ValueError, match="16 times a power of two, got 24"):
        module.task(cells=24)
