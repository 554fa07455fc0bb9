"""The published Navier–Stokes experiment, on grids of a few cells."""

from types import ModuleType
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel as bl
import bilevel_pde as pde
from bilevel.testing import taylor_test
from tests.core.compiling import jitted
from tests.examples import loading

# Its compilations take half a minute, whatever the grid.
pytestmark = pytest.mark.slow

SAMPLES, STEPS = 2, 2
SOLVES = SAMPLES * STEPS
CONVERGED = bl.Fidelity(bl.Budget(200, rtol=1e-13), bl.Budget(200, rtol=1e-13))


@pytest.fixture(scope="module")
def example():
    with loading.example("navier_stokes_corrector") as module:
        yield module


class Evaluated:
    """The loss of one batch, its gradient and the report, compiled once for all budgets."""

    def __init__(self, example: ModuleType, derivative: str, **options: Any):
        size = example.Size(8, 4, 1, SAMPLES, 1, SAMPLES, 1)
        self.task = example.build(size, derivative, **options)
        self.batch = next(iter(self.task.batches(1, jax.random.key(0))))
        arrays, static = eqx.partition(self.task.parameters, eqx.is_inexact_array)
        # As a list: a network is a function, too, and would be called as one.
        self.network, structure = jax.tree.flatten(arrays)

        def loss(network: Any, probe: bl.Probe, fidelity: bl.Fidelity) -> Any:
            whole = eqx.combine(jax.tree.unflatten(structure, network), static)
            return self.task.loss(whole, self.batch, fidelity.with_probe(probe))

        self.call = jitted(jax.value_and_grad(loss, argnums=(0, 1)))

    def __call__(self, network: Any, fidelity: bl.Fidelity) -> tuple[Any, Any, bl.Probe]:
        arrays = jax.tree.map(jnp.asarray, fidelity)
        value, (gradient, probe) = self.call(network, bl.Probe.zeros(), arrays)
        return value, gradient, probe


def made_up(size, subsampling, seed, dtype):
    """Velocities that no solve was needed for, in the place of the reference's."""

    random = np.random.default_rng(seed)

    def fields(*shape: int) -> Any:
        return jnp.asarray(random.normal(size=(*shape, 2, size.cells, size.cells)), dtype)

    training = fields(size.samples), fields(size.samples, STEPS)
    return training, (fields(size.validation), fields(size.validation, 5))


@pytest.fixture(scope="module")
def evaluated(example):
    known: dict[str, Evaluated] = {}

    def get(derivative: str) -> Evaluated:
        if derivative not in known:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(example, "data", made_up)
                known[derivative] = Evaluated(example, derivative)
        return known[derivative]

    return get


def slope(evaluated: Evaluated, gradient: Any) -> float:
    def loss(network: Any) -> Any:
        return evaluated(network, CONVERGED)[0]

    # Upwind differences and ReLU have kinks, which long steps cross many of.
    steps = [1e-3 * 0.25**k for k in range(5)]
    return taylor_test(loss, evaluated.network, derivative=gradient, steps=steps).slope


def distance(a: Any, b: Any) -> float:
    a, b = (np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]) for tree in (a, b))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def test_the_gradient_through_the_solver_is_that_of_finite_differences(evaluated):
    # Losing M's dependence on the state before, the adjoint, or a transpose makes it 1.
    kept = evaluated("kept")
    gradient = kept(kept.network, CONVERGED)[1]
    assert slope(kept, gradient) >= 1.9


@pytest.mark.parametrize("derivative", ["detached", pytest.param("frozen", marks=pytest.mark.slow)])
def test_what_is_dropped_is_missing(evaluated, derivative):
    kept, other = evaluated("kept"), evaluated(derivative)
    value, gradient, _ = kept(kept.network, CONVERGED)
    same, dropped, _ = other(other.network, CONVERGED)
    assert float(same) == pytest.approx(float(value), rel=1e-10)
    assert distance(dropped, gradient) > 0.01
    assert slope(kept, dropped) < 1.2


def test_the_report_shows_both_solves(evaluated):
    kept = evaluated("kept")
    _, _, report = kept(kept.network, bl.Fidelity(bl.Budget(3), bl.Budget(2)))
    assert int(report.solves) == SOLVES
    assert int(report.primal_iterations) == 3 * SOLVES
    assert int(report.adjoint_iterations) == 2 * SOLVES
    assert 1e-3 < float(report.adjoint_residual) / SOLVES < 1
    _, _, report = kept(kept.network, CONVERGED)
    assert int(report.adjoint_iterations) > 4 * SOLVES
    assert 0 < float(report.adjoint_residual) / SOLVES <= 1e-13


def test_an_iteration_is_a_restart_cycle_of_eight(evaluated):
    kept = evaluated("kept")
    _, _, report = kept(kept.network, bl.Fidelity(bl.Budget(3), bl.Budget(2)))
    # The eight of each cycle, a true residual after each, and the one at the start.
    assert int(report.primal_applications) == SOLVES * (3 * 8 + 3 + 1)


def test_a_detached_step_reports_what_it_took_and_no_adjoint(evaluated):
    fidelity = bl.Fidelity(bl.Budget(3), bl.Budget(2))
    kept, detached = evaluated("kept"), evaluated("detached")
    (value, _, expected), (same, _, report) = (e(e.network, fidelity) for e in (kept, detached))
    assert float(same) == pytest.approx(float(value), rel=1e-12)
    for name in ("solves", "primal_iterations", "primal_applications", "primal_residual"):
        assert float(getattr(report, name)) == pytest.approx(float(getattr(expected, name)))
    assert int(report.adjoint_iterations) == 0


def test_the_full_solve_is_the_published_one(evaluated):
    ladder = evaluated("kept").task.ladder
    assert [int(f.budget.iterations) for f in ladder][::119] == [1, 120]
    for budget in (ladder.finest.budget, ladder.finest.adjoint_budget):
        assert float(budget.rtol) == pytest.approx(1e-5)
        assert float(budget.atol) == 0.0


def test_means_over_faces_keep_what_flows_through(example):
    def divergence(cells: int, velocity: Any) -> float:
        box = pde.Staggered((cells, cells), boundary=pde.Periodic())
        return float(jnp.max(jnp.abs(pde.Divergence(box) @ tuple(velocity))))

    # The curl of a stream function at the corners: without divergence on any grid.
    corner = np.random.default_rng(0).normal(size=(16, 16))
    u = 16 * (np.roll(corner, -1, axis=1) - corner)
    v = 16 * (corner - np.roll(corner, -1, axis=0))
    fine = jnp.asarray([u, v])
    assert divergence(16, fine) < 1e-10
    assert divergence(8, example.faces(fine, 8)) < 1e-10
    assert divergence(8, example.stride(fine, 8)) > 1.0  # as published
    assert example.stride(jnp.zeros((3, 2, 97, 97)), 48).shape == (3, 2, 48, 48)


def test_shuffles_follow_their_key_and_take_every_sample(evaluated):
    task = evaluated("kept").task
    once, again = (next(iter(task.batches(1, jax.random.key(5)))) for _ in range(2))
    np.testing.assert_array_equal(once[0], again[0])
    assert once[0].shape == (SAMPLES, 2, 8, 8)
    assert len(np.unique(np.asarray(once[0])[:, 0, 0, 0])) == SAMPLES


@pytest.mark.parametrize("name", ["size", "derivative", "subsampling"])
def test_an_unknown_choice_names_what_there_is(example, name):
    with pytest.raises(ValueError, match=f"{name} is .* or "):
        example.task(**{name: "other"})


@pytest.fixture(scope="module")
def tiny(example):
    return example.Size(8, 4, 1, 8, 2, 4, 3)


def test_the_same_seed_makes_the_same_run(example, tiny):
    runs = []
    for seed in (1, 1, 2):
        example.data.cache_clear()
        runs.append(bl.optimize(example.build(tiny, seed=seed), seed=seed, progress=False))
    first, again, other = ([record.metric for record in run.history] for run in runs)
    assert first == again
    assert first != other
    assert runs[0].summary.compilations == 1
    assert runs[0].summary.adjoint_iterations > 0
    assert runs[0].history[-1].adjoint_residual <= 1.0


def test_a_reference_step_is_the_converged_one(example):
    flow = example.stepper(8)
    u = jax.random.normal(jax.random.key(0), (2, 8, 8))
    exact, _ = example.kept(flow, u, CONVERGED)
    np.testing.assert_allclose(example.referred(flow, u), exact, atol=1e-4)


def test_two_grids_compile_once_each(example, tiny):
    task = example.build(tiny, grids=True)
    run = bl.optimize(
        task,
        controller=bl.ScheduledFidelity(task.ladder, lambda epoch: 6 * epoch),
        epochs=4,
        progress=False,
    )
    assert run.summary.compilations == 2
    assert run.summary.failures == 0
