"""The heat emulator in torch, on few points."""

import numpy as np
import pytest

import bilevel as bl
from tests.examples.loading import example

torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install torch==2.13.0")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def study():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with example("torch_heat_emulator") as module:
        yield module.Study(points=20, samples=100, seed=1), module
    torch.set_num_threads(threads)


def test_its_solver_is_that_of_the_emulator_in_jax(study):
    """Values and gradients, to the last bit or two."""
    import jax
    import jax.numpy as jnp

    emulation, step = study[0].emulation, study[0].step
    fidelity = bl.Fidelity(bl.Budget(3), bl.Budget(2))
    fields = study[0].starts[:4].clone().requires_grad_()
    found, report = step(fields, fidelity)
    (found**2).sum().backward()
    there = jnp.asarray(fields.detach().numpy())
    value, pull = jax.vjp(lambda fields: emulation.step(fields, fidelity), there)
    np.testing.assert_allclose(found.detach(), value, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(fields.grad, pull(2 * value)[0], rtol=1e-6, atol=1e-6)
    assert (report.probe.primal_iterations, report.probe.adjoint_iterations) == (3, 2)


def test_it_trains_with_fewer_iterations_where_it_refines(study):
    chosen, module = study
    runs = {
        name: chosen.train(controller, epochs=25, width=16, seed=0)
        for name, controller in module.controllers().items()
    }
    assert runs["full"].iterations == 25 * 4 * 2 * 25  # epochs, batches, solves, K
    assert runs["prdp"].budgets[0] == 1
    assert runs["prdp"].iterations < 0.5 * runs["full"].iterations
    for run in runs.values():
        assert run.metrics[-1] < 0.7 * run.metrics[0]
