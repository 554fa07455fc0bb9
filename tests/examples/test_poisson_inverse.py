"""The published Poisson experiment, in single precision as published."""

import importlib.util
import itertools
from pathlib import Path
from types import ModuleType

import jax
import numpy as np
import pytest

import bilevel as bl

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "poisson_inverse.py"


def load() -> ModuleType:
    specification = importlib.util.spec_from_file_location("poisson_inverse", EXAMPLE)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def refined() -> bl.Run:
    with jax.enable_x64(False):
        task = load().task()
        controller = bl.ProgressiveRefinement(task.ladder, **task.refinement)
        return bl.optimize(task, controller=controller, progress=False)


def budgets(run: bl.Run) -> list[int]:
    return [record.primal_iterations for record in run.history if record.epoch > 0]


def work_to(run: bl.Run, error: float) -> int:
    done = 0
    for record in run.history:
        done += record.primal_iterations or 0
        if record.metric < error:
            return done
    raise AssertionError(error)


def test_budgets_follow_the_published_path(refined):
    # A rule off by one epoch, by one window entry, or smoothing what should not be
    # smoothed changes the lengths of these plateaus.
    plateaus = [(k, len(list(group))) for k, group in itertools.groupby(budgets(refined))]
    assert plateaus[:6] == [(25, 2), (35, 13), (45, 7), (55, 5), (65, 4), (75, 3)]
    assert max(budgets(refined)) <= 600


def test_work_to_accuracy_is_the_published_one(refined):
    assert work_to(refined, 1e-3) == pytest.approx(23_895, rel=0.02)
    assert work_to(refined, 1e-4) == pytest.approx(37_585, rel=0.02)
    assert work_to(refined, 1e-5) == pytest.approx(54_580, rel=0.02)


def test_all_budgets_share_one_compilation(refined):
    assert len(set(budgets(refined))) >= 50
    assert refined.summary.compilations == 1


def test_the_adjoint_spends_the_same_budget_and_reports_it(refined):
    assert refined.summary.adjoint_iterations == refined.summary.primal_iterations
    assert refined.summary.failures == 0


@pytest.mark.parametrize(
    ("solver", "estimator", "parameters"),
    [
        ("jacobi", "unrolled", 1),
        ("steepest", "implicit", 3),
        pytest.param("steepest", "unrolled", 1, marks=pytest.mark.slow),
    ],
)
def test_every_variant_recovers_the_parameters(solver, estimator, parameters):
    with jax.enable_x64(False):
        task = load().task(parameters, solver, estimator, epochs=60)
        run = bl.optimize(task, progress=False)
    assert run.summary.final_metric < 1e-2
    np.testing.assert_allclose(run.theta, 2.0, atol=5e-2)
