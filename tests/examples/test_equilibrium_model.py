"""A deep equilibrium network on digits, a narrow one."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel as bl
from tests.examples.loading import example
from tests.marks import others_slow

TIGHT = bl.Budget(iterations=2000, rtol=1e-13)


@pytest.fixture(scope="module")
def equilibrium():
    with example("equilibrium_model") as module:
        yield module


@pytest.mark.slow
def test_the_gradient_is_that_of_a_long_written_out_iteration(equilibrium):
    """Back-propagation through 400 applications, 0.95⁴⁰⁰ from the end."""
    task = equilibrium.task(width=6)
    network = equilibrium.contracting(
        eqx.tree_at(lambda n: n.recurrent, task.parameters, 3 * task.parameters.recurrent)
    )
    images, labels = (part[:8] for part in equilibrium.Digits(0).train)

    def written_out(network):
        driven = images @ network.inputs.weight.T + network.inputs.bias
        z = jnp.zeros_like(driven)
        z, _ = jax.lax.scan(
            lambda z, _: (jnp.tanh(z @ network.recurrent.T + driven), None), z, length=400
        )
        logits = z @ network.outputs.weight.T + network.outputs.bias
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1)
        return -jnp.mean(picked)

    expected, wanted = eqx.filter_value_and_grad(written_out)(network)
    tight = bl.Fidelity(TIGHT, TIGHT)
    value, gradient = eqx.filter_value_and_grad(
        lambda network: task.loss(network, (images, labels), tight)
    )(network)
    assert np.isclose(value, expected, rtol=1e-10)
    assert float(jnp.max(jnp.abs(wanted.recurrent))) > 1e-3
    for found, leaf in zip(jax.tree.leaves(gradient), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(found, leaf, rtol=1e-7, atol=1e-10)


def test_the_projection_cuts_singular_values_and_leaves_the_others(equilibrium):
    network = equilibrium.EquilibriumNetwork(jax.random.key(0), 3)
    turn = np.linalg.qr(np.random.default_rng(0).standard_normal((3, 3)))[0]
    given = turn @ np.diag([2.0, 0.7, 0.1]) @ turn
    projected = equilibrium.contracting(
        eqx.tree_at(lambda n: n.recurrent, network, jnp.asarray(given))
    )
    # Scaling the whole matrix down to 0.95 would take the others down, too.
    np.testing.assert_allclose(
        projected.recurrent, turn @ np.diag([0.95, 0.7, 0.1]) @ turn, atol=1e-12
    )
    np.testing.assert_array_equal(projected.inputs.weight, network.inputs.weight)


def test_an_epoch_has_each_image_once(equilibrium):
    task = equilibrium.task(width=4)
    batches = list(task.batches(1, jax.random.key(0)))
    images = np.concatenate([np.asarray(images) for images, _ in batches])
    assert [len(labels) for _, labels in batches] == [100] * 10
    whole = np.asarray(equilibrium.Digits(0).train[0])
    np.testing.assert_array_equal(
        np.sort(images.view().reshape(len(images), -1), 0), np.sort(whole, 0)
    )


@pytest.mark.slow
@pytest.mark.parametrize("policy", others_slow(["full", "prdp", "auto", "error"], "error"))
def test_it_learns_to_tell_digits_apart(equilibrium, policy, capsys):
    from bilevel.outer.assignment import controller_for
    from bilevel.outer.policy import parse_policy

    with jax.enable_x64(False):
        task = equilibrium.task(width=32, epochs=15)
        controller = controller_for(parse_policy(policy), task)
        run = bl.optimize(task, controller=controller, progress=False)
        task.report([run], None)
    # The entropy of ten equal classes is 2.3.
    assert run.summary.final_metric < 0.6
    assert run.summary.compilations == 1
    assert run.summary.failures == 0
    assert np.linalg.norm(run.theta.recurrent, 2) <= equilibrium.STEEPEST * (1 + 1e-5)
    if policy == "error":
        last = run.history[-1]
        assert last.budget_iterations != last.adjoint_budget_iterations
    accuracy = float(capsys.readouterr().out.split("test accuracy ")[1].split("%")[0])
    assert accuracy > 85
