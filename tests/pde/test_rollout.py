"""Rollouts: trajectories, checkpoints, budgets that compile nothing anew, and controls."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel as bl
import bilevel_pde as pde

GRID = pde.Grid(10)
U = jnp.sin(jnp.pi * GRID.coordinates()[0]) + 0.2
HEAT = pde.Heat(GRID, 0.3, 0.02)
WAVE = pde.Burgers(GRID, 0.1, 0.02, linearization="newton")


@pytest.mark.parametrize(
    "stepper", [pytest.param(HEAT, marks=pytest.mark.slow), WAVE], ids=["heat", "burgers"]
)
def test_states_are_those_of_single_steps(stepper):
    trajectory, solutions = pde.rollout_with_solutions(stepper, U, 3)
    u = U
    for state in trajectory:
        u = stepper.step(u)
        np.testing.assert_allclose(state, u, rtol=1e-9)
    np.testing.assert_array_equal(solutions.value, trajectory)
    assert solutions.status.tolist() == [bl.Status.CONVERGED] * 3


@pytest.mark.parametrize(
    "stepper", [HEAT, pytest.param(WAVE, marks=pytest.mark.slow)], ids=["heat", "burgers"]
)
def test_checkpoints_change_no_gradient(stepper):
    def gradient(checkpoint):
        def loss(u):
            return jnp.sum(pde.rollout(stepper, u, 4, checkpoint=checkpoint) ** 3)

        return jax.jit(jax.grad(loss))(U)

    np.testing.assert_allclose(gradient(True), gradient(False), rtol=1e-13)


def test_checkpoints_keep_one_state_a_step():
    """What the forward pass hands to the backward pass, in states."""

    def kept(checkpoint):
        def run(u):
            return pde.rollout(WAVE, u, 50, checkpoint=checkpoint)

        _, pull = jax.vjp(run, U)
        return sum(leaf.size for leaf in jax.tree.leaves(pull)) / (50 * U.size)

    assert kept(True) < 2.0
    assert kept(False) > 3.0


def test_a_new_fidelity_compiles_nothing():
    """The correction is traced with the rollout, and only then."""
    traces = []

    def correct(u):
        traces.append(1)
        return u

    def states(budget):
        return pde.rollout(HEAT, U, 3, fidelity=bl.Fidelity(budget, budget), correct=correct)

    coarse = states(bl.Budget(iterations=1, rtol=1e-3))
    first = len(traces)
    fine = states(bl.Budget(iterations=9, rtol=1e-9))
    assert len(traces) == first > 0
    assert float(jnp.max(jnp.abs(fine - coarse))) > 1e-4


def test_outer_budgets_are_traced_too():
    traces = []

    @jax.jit
    def states(count):
        traces.append(1)
        stepper = pde.Burgers(GRID, 0.1, 0.05, outer_budget=bl.Budget(iterations=count))
        return pde.rollout_with_solutions(stepper, U, 2)[1].iterations

    assert states(1).tolist() == [1, 1]
    assert states(3).tolist() == [3, 3]
    assert len(traces) == 1


def test_probe_counts_over_all_steps():
    def loss(u, probe):
        budget = bl.Budget(iterations=2)
        fidelity = bl.Fidelity(budget, bl.Budget(iterations=3), probe=probe)
        return jnp.sum(pde.rollout(HEAT, u, 4, fidelity=fidelity)[-1])

    counts = jax.grad(loss, argnums=1)(U, bl.Probe.zeros())
    assert int(counts.solves) == 4
    assert int(counts.primal_iterations) == 8
    assert int(counts.adjoint_iterations) == 12


def test_controls_and_theta_replace_parameters():
    forcing = jnp.arange(3.0)[:, None] * jnp.ones((3, 10))
    got = pde.rollout(HEAT, U, 3, controls={"forcing": forcing}, theta={"diffusivity": 0.5})
    u = U
    for f, state in zip(forcing, got, strict=True):
        u = pde.Heat(GRID, 0.5, 0.02, forcing=f).step(u)
        np.testing.assert_allclose(state, u, rtol=1e-9)


def test_gradient_with_respect_to_controls_stays_causal():
    """The state after two steps does not depend on what is forced in the third."""

    def loss(forcing):
        return jnp.sum(pde.rollout(HEAT, U, 3, controls={"forcing": forcing})[1])

    sizes = jnp.abs(jax.grad(loss)(jnp.zeros((3, 10)))).sum(axis=1)
    assert sizes[0] > 0
    assert sizes[1] > 0
    assert sizes[2] == 0


def test_correction_is_applied_after_each_step_and_differentiated():
    def loss(c):
        return jnp.sum(pde.rollout(HEAT, U, 2, correct=lambda u: c * u)[-1])

    np.testing.assert_allclose(jax.grad(loss)(1.5), 3.0 * loss(1.0), rtol=1e-8)


def test_batches_by_vmap():
    batch = jnp.stack([U, 2 * U])
    got = jax.vmap(lambda u: pde.rollout(HEAT, u, 2))(batch)
    np.testing.assert_allclose(got[1], pde.rollout(HEAT, 2 * U, 2), rtol=1e-9)


def test_from_a_failed_step_on_states_are_nan():
    """Traced forcing cannot be looked at beforehand."""

    def states(forcing):
        return pde.rollout_with_solutions(HEAT, U, 3, controls={"forcing": forcing})

    def loss(forcing):
        trajectory, solutions = states(forcing)
        return jnp.sum(trajectory[-1]), (trajectory, solutions)

    forcing = jnp.array([0.0, jnp.nan, 0.0])
    gradient, (trajectory, solutions) = jax.jit(jax.grad(loss, has_aux=True))(forcing)
    assert solutions.status.tolist() == [bl.Status.CONVERGED, *[bl.Status.NONFINITE] * 2]
    np.testing.assert_array_equal(np.isnan(trajectory[:, 0]), [False, True, True])
    np.testing.assert_array_equal(solutions.value, trajectory)
    assert np.isnan(gradient).all()
    state, solution = HEAT.step_with_solution(jnp.full(10, jnp.inf))
    assert solution.status >= bl.Status.DIVERGED
    assert np.isnan(state).all()


def test_only_a_budget_that_was_given_may_run_out():
    """Picard's iteration is no contraction here: 50 linearisations leave 5e-3 of the residual."""
    grid = pde.Grid(16, boundary=pde.Periodic())
    u = 10 * jnp.sin(2 * jnp.pi * grid.coordinates()[0])
    options = {"differences": "central", "solver": pde.SparseDirect()}
    state, solution = pde.Burgers(grid, 1e-3, 5.0, **options).step_with_solution(u)
    assert solution.status == bl.Status.DIVERGED
    assert np.isnan(state).all()
    given = pde.Burgers(grid, 1e-3, 5.0, outer_budget=50, **options)
    state, solution = given.step_with_solution(u)
    assert solution.status == bl.Status.BUDGET
    assert np.isfinite(state).all()


def test_bad_input():
    with pytest.raises(ValueError, match="steps should be an integer of at least 1, got 0"):
        pde.rollout(HEAT, U, 0)
    with pytest.raises(TypeError, match="stepper should be a Stepper"):
        pde.rollout(jnp.sin, U, 1)
    with pytest.raises(ValueError, match="axis of 3 steps in front"):
        pde.rollout(HEAT, U, 3, controls={"forcing": jnp.ones((2, 10))})
    with pytest.raises(ValueError, match="theta may replace"):
        pde.rollout(HEAT, U, 3, theta={"speed": 1.0})
    with pytest.raises(ValueError, match="u0 should have the grid's shape"):
        pde.rollout(HEAT, jnp.ones(3), 3)
    with pytest.raises(TypeError, match="fidelity already holds both budgets"):
        pde.rollout(HEAT, U, 3, fidelity=bl.Fidelity(bl.Budget(3)), budget=bl.Budget(2))
    with pytest.raises(ValueError, match="correct: its result should have the grid's shape"):
        pde.rollout(HEAT, U, 2, correct=lambda u: u[:3])
    with pytest.raises(TypeError, match=r"correct: its result .* got float32\. Use \.astype"):
        pde.rollout(HEAT, U, 2, correct=lambda u: u.astype("float32"))
    for controls, message in (
        ({"forcing": jnp.array([0.0, jnp.inf, 0.0])}, r"controls\['forcing'\] should be finite"),
        ({"dt": jnp.array([0.1, 0.0, 0.1])}, "dt should be positive"),
        ({"speed": jnp.ones(3)}, "controls may replace"),
    ):
        with pytest.raises(ValueError, match=message):
            pde.rollout(HEAT, U, 3, controls=controls)
    for name in ("theta", "controls"):
        with pytest.raises(TypeError, match=f"{name} should be a mapping from names"):
            pde.rollout(HEAT, U, 3, **{name: jnp.ones(3)})
