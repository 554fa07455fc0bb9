"""The shortest use beyond PDEs."""

import importlib.util
from pathlib import Path

import jax
import numpy as np
import pytest

import bilevel as bl

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "ridge.py"


@pytest.fixture(scope="module")
def runs() -> dict[str, bl.Run]:
    specification = importlib.util.spec_from_file_location("ridge", EXAMPLE)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    with jax.enable_x64(False):
        task = module.task(features=60, relevant=6)
        comparison = bl.compare(task, ("full", "prdp"), epochs=80, progress=False)
    return {policy: group[0] for policy, group in comparison.runs.items()}


@pytest.mark.slow
def test_relevant_features_are_penalised_less(runs):
    # A sign error in the hypergradient would penalise just these.
    theta = np.asarray(runs["full"].theta)
    assert theta[:6].mean() < theta[6:].mean() - 1.0


def test_refinement_reaches_the_same_with_half_of_the_work(runs):
    full, refined = runs["full"].summary, runs["prdp"].summary
    assert refined.final_metric <= 1.05 * full.final_metric
    assert refined.primal_iterations <= 0.5 * full.primal_iterations
    assert refined.compilations == 1
