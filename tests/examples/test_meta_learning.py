"""Implicit MAML on sines."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel as bl
from bilevel.testing import taylor_test
from tests.examples.loading import example

FULL = bl.Fidelity(bl.Budget(5000, rtol=1e-10), bl.Budget(500, rtol=1e-10))


@pytest.fixture(scope="module")
def meta():
    with example("meta_learning") as module:
        yield module


def test_tasks_are_sines_that_one_line_of_cosine_and_sine_explains(meta):
    """Both halves of a task are the same sine, of at most 5 and of a phase in [0, π]."""
    sines = meta.draw(jax.random.key(0), 6, 5, 7)
    x = np.c_[np.asarray(sines.x), np.asarray(sines.x_query)]
    y = np.c_[np.asarray(sines.y), np.asarray(sines.y_query)]
    assert x.shape == (6, 12)
    assert np.abs(x).max() <= 5
    for places, values in zip(x, y, strict=True):
        waves = np.c_[np.sin(places), np.cos(places)]
        (a, b), residual, *_ = np.linalg.lstsq(waves, values, rcond=None)
        assert residual < 1e-20
        assert 0.1 <= np.hypot(a, b) <= 5
        assert b >= 0


@pytest.mark.slow
def test_an_adapted_network_is_stationary(meta):
    """∂/∂φ of ½ mean error + λ/2 ‖φ - θ‖², written out, vanishes at φ*."""
    adaptation = meta.Adaptation(jax.random.key(0), 8, 2.0)
    sines = meta.draw(jax.random.key(1), 1, 5, 1)
    x, y = sines.x[0], sines.y[0]
    solution = adaptation.solved(adaptation.start, x, y, FULL)
    slope = jax.grad(adaptation.error)(solution.value, x, y)
    away = jax.tree.map(jnp.subtract, solution.value, adaptation.start)
    for fit, distance in zip(jax.tree.leaves(slope), jax.tree.leaves(away), strict=True):
        np.testing.assert_allclose(0.5 * fit + 2.0 * distance, 0, atol=1e-7)
    assert adaptation.error(solution.value, x, y) < adaptation.error(adaptation.start, x, y)


def test_the_step_is_that_of_the_linearised_network(meta):
    """1/step = 1.5 ‖JᵀJ‖/n + λ."""
    adaptation = meta.Adaptation(jax.random.key(0), 8, 2.0)
    x = jnp.linspace(-4.0, 4.0, 5)
    slopes = jax.vmap(jax.grad(adaptation.value), (None, 0))(adaptation.start, x)
    flat = np.hstack([np.asarray(leaf).reshape(5, -1) for leaf in jax.tree.leaves(slopes)])
    wanted = 1.5 * np.linalg.norm(flat, 2) ** 2 / 5 + 2.0
    assert 1 / float(adaptation.solver(adaptation.start, x).step_size) == pytest.approx(wanted)


@pytest.mark.slow
def test_the_gradient_is_that_of_the_adapted_error(meta):
    """θ is where adaptation starts, what it is held near to, and sets its step: one counts."""
    adaptation = meta.Adaptation(jax.random.key(0), 8, 2.0)
    sines = meta.draw(jax.random.key(1), 2, 5, 4)
    result = taylor_test(
        lambda theta: jnp.mean(adaptation.adapted_error(theta, sines, FULL)), adaptation.start
    )
    assert result.slope >= 1.95


@pytest.mark.slow
def test_training_helps_tasks_never_seen(meta):
    with jax.enable_x64(False):
        task = meta.task(width=16, proximity=2.0, epochs=3)
        run = bl.optimize(task, controller=bl.AutomaticRefinement(task.ladder), progress=False)
    assert run.summary.compilations == 1
    assert run.summary.final_metric < 0.85 * run.history[0].metric


@pytest.mark.slow
def test_adapted_it_beats_joint_training_by_more_than_two(meta, capsys):
    with jax.enable_x64(False):
        task = meta.task()
        run = bl.optimize(task, controller=bl.FixedFidelity(task.full_fidelity), progress=False)
        task.report([run], None)
    printed = capsys.readouterr().out
    figures = {
        line[:34].strip(): [float(number) for number in line[34:].split()]
        for line in printed.splitlines()[2:]
    }
    joint, own = figures["joint training"], figures[run.summary.policy]
    assert own[1] < 0.5 * joint[1]
    assert own[1] < 0.5 * joint[0]
    assert joint[0] < figures["no training"][0]
