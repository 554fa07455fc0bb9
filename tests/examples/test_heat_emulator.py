"""The published heat emulators, on few points."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel as bl
import bilevel_pde as pde
from tests.examples.loading import example
from tests.marks import others_slow


@pytest.fixture(scope="module")
def heat():
    with example("heat_emulator") as module:
        yield module


def eigenvalue(points: int, mode: int) -> float:
    """Of −d²/dx² by three-point differences, on the unit interval."""
    return (2 * (points + 1) * np.sin(np.pi * mode / (2 * (points + 1)))) ** 2


def test_its_data_are_two_exact_steps_apart(heat):
    """A sine of the grid shrinks by 1 / (1 + κΔt λ) in each, whatever the solver."""
    emulation = heat.Emulation(pde.Grid(30), 7, jax.random.key(3))
    start, later = (np.asarray(part) for part in emulation.train)
    x = np.arange(1, 31) / 31
    modes = np.arange(1, 6)
    sines = np.sqrt(2) * np.sin(np.pi * np.outer(modes, x))
    shrunk = 1 / (1 + heat.DT * np.array([eigenvalue(30, mode) for mode in modes])) ** 2
    # Of √2 sin(πk x) on 30 points, the mean square over 31 intervals is 1.
    amplitudes = start @ sines.T / 31
    assert start.shape == (2, 30)
    assert np.allclose(amplitudes @ sines, start, atol=1e-5)
    assert np.allclose((amplitudes * shrunk) @ sines, later, atol=1e-5)


@pytest.mark.parametrize("dimensions", others_slow([1, 2, 3], 2))
def test_a_step_of_k_iterations_is_jacobi_from_zero(heat, dimensions):
    """v ← (u + κΔt N v) / d, written out: N are the neighbours over h², d the diagonal."""
    grid = pde.Grid((5,) * dimensions)
    emulation = heat.Emulation(grid, 6, jax.random.key(0))
    fields = np.asarray(emulation.validation[0])
    fidelity = bl.Fidelity(bl.Budget(3), bl.Budget(3))
    moved = np.asarray(emulation.step(jnp.asarray(fields), fidelity))
    weight = heat.DT * 36.0
    v = np.zeros_like(fields)
    for _ in range(3):
        padded = np.pad(v, [(0, 0)] + [(1, 1)] * dimensions)
        inner = (slice(None),) + (slice(1, -1),) * dimensions
        neighbours = sum(
            np.roll(padded, shift, axis)[inner]
            for axis in range(1, dimensions + 1)
            for shift in (-1, 1)
        )
        v = (fields + weight * neighbours) / (1 + 2 * dimensions * weight)
    assert np.allclose(moved, v, atol=1e-6)


def test_settings_are_the_published_ones(heat):
    for dimensions, full, epochs in ((1, 25, 100), (2, 43, 70), (3, 29, 100)):
        setting = heat.SETTINGS[dimensions, "paper"]
        assert (setting.points, setting.full, setting.epochs) == (30, full, epochs)
    task = heat.task(1)
    assert len(list(task.batches(1, jax.random.key(0)))) == 8
    sizes = [leaf.size for leaf in jax.tree.leaves(task.trainable)]
    assert sum(sizes) == 30 * 64 + 64 + 2 * (64 * 64 + 64) + 64 * 30 + 30


@pytest.mark.parametrize("policy", others_slow(["prdp", "auto", "error"], "auto"))
def test_it_trains_under_one_compilation(heat, policy):
    from bilevel.outer.assignment import controller_for
    from bilevel.outer.policy import parse_policy

    task = heat.task(1, points=10, width=8, samples=50, epochs=20, seed=1)
    run = bl.optimize(
        task, controller=controller_for(parse_policy(policy), task), progress=False, seed=1
    )
    assert run.summary.compilations == 1
    assert run.summary.failures == 0
    assert run.history[-1].metric < 0.97 * run.history[0].metric


def test_its_network_is_in_bfloat16_on_the_lower_half_of_the_ladder(heat):
    task = heat.task(1, points=8, width=4, samples=25, epochs=4, precision="mixed")
    kinds = [fidelity["dtype"] for fidelity in task.ladder]
    assert kinds == ["bfloat16"] * 12 + ["float64"] * 13  # what the tests compute in
    batch = next(task.epoch_batches(1, jax.random.key))
    budget = bl.Budget(25)
    fidelities = [
        bl.Fidelity(budget, budget, static={"dtype": dtype}) for dtype in ("bfloat16", "float64")
    ]
    coarse, fine = (float(task.loss(task.parameters, batch, each)) for each in fidelities)
    assert coarse != fine
    assert coarse == pytest.approx(fine, rel=0.02)
    controller = bl.ScheduledFidelity(task.ladder, lambda updates: 8 * updates)
    run = bl.optimize(task, controller=controller, progress=False)
    assert run.summary.compilations == 2
    assert all(leaf.dtype == jnp.float64 for leaf in jax.tree.leaves(run.theta))


def test_what_is_no_size_is_refused(heat):
    with pytest.raises(ValueError, match="dimensions is 1, 2 or 3 and size is paper or small"):
        heat.task(4)
