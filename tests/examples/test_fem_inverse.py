"""A coefficient field on a triangle mesh."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel as bl

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "fem_inverse.py"
pytest.importorskip("skfem")


@pytest.fixture(scope="module")
def module():
    specification = importlib.util.spec_from_file_location("fem_inverse", EXAMPLE)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_entries_are_those_that_scikit_fem_assembles(module):
    import skfem
    from skfem.helpers import dot, grad

    disc = module.Disc(3)
    theta = np.random.default_rng(0).standard_normal(len(disc.points))
    k = np.exp(theta[disc.triangles].mean(axis=1))
    form = skfem.BilinearForm(lambda u, v, w: k[:, None] * dot(grad(u), grad(v)))
    boundary = np.setdiff1d(np.arange(len(theta)), disc.inner)
    expected = skfem.condense(form.assemble(disc._basis), D=boundary, expand=False)
    got = disc.operator(jnp.asarray(theta)).to_scipy()
    np.testing.assert_allclose(got.toarray(), expected.toarray(), atol=1e-12)


@pytest.mark.slow
def test_the_coefficient_is_recovered_and_refining_saves_work(module):
    with jax.enable_x64(False):
        task = module.task(refinements=4, epochs=100)
        comparison = bl.compare(task, ("full", "prdp"), progress=False)
    full, refined = (comparison.runs[policy][0].summary for policy in ("full", "prdp"))
    assert full.final_metric < 0.5
    assert refined.final_metric < 1.3 * full.final_metric
    assert refined.primal_iterations < 0.9 * full.primal_iterations
    assert refined.compilations == 1
