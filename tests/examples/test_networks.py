"""The networks that the examples share."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.examples.loading import example
from tests.marks import others_slow


@pytest.fixture(scope="module")
def networks():
    with example("networks") as module:
        yield module


def size(network) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(eqx.filter(network, eqx.is_inexact_array)))


@pytest.mark.parametrize("shape", [(30,), (4, 6)])
def test_a_perceptron_keeps_the_shape_and_has_the_layers_it_says(networks, shape):
    network = networks.FieldMLP(jax.random.key(0), shape, width=7, depth=3)
    points = int(np.prod(shape))
    # depth=3 counted as layers instead of hidden layers has 56 parameters less.
    assert size(network) == points * 7 + 7 + 2 * (7 * 7 + 7) + 7 * points + points
    assert network(jnp.ones(shape)).shape == shape


def test_the_published_perceptrons_have_their_sizes(networks):
    def count(shape, width):
        made = eqx.filter_eval_shape(networks.FieldMLP, jax.random.key(0), shape, width, 3)
        return sum(leaf.size for leaf in jax.tree.leaves(made) if hasattr(leaf, "size"))

    assert count((30,), 64) == 12_254
    assert count((30, 30), 3000) == 23_409_900


@pytest.mark.parametrize("dimensions", others_slow([1, 2, 3], 1))
@pytest.mark.parametrize("periodic", [True, False])
def test_only_periodic_padding_commutes_with_shifts(networks, dimensions, periodic):
    network = networks.ResidualConvolution(
        jax.random.key(0), dimensions, 2, 3, channels=4, blocks=2, periodic=periodic
    )
    shape, axes = (5, 6, 4)[:dimensions], tuple(range(1, dimensions + 1))
    field = jax.random.normal(jax.random.key(1), (2, *shape))
    moved = jnp.roll(network(field), (2, 1, 3)[:dimensions], axes)
    again = network(jnp.roll(field, (2, 1, 3)[:dimensions], axes))
    assert again.shape == (3, *shape)
    difference = float(jnp.max(jnp.abs(moved - again)))
    # Zeros at one axis only, or at all, break it by a thousandth and more.
    assert (difference < 1e-12) if periodic else (difference > 1e-3)


@pytest.mark.parametrize("case", others_slow([(1, 3), (2, 3), (2, 5), (3, 3)], (2, 3)))
def test_a_residual_network_is_what_equinox_s_convolutions_make_of_it(networks, case):
    dimensions, kernel = case
    network = networks.ResidualConvolution(
        jax.random.key(0), dimensions, 1, 2, channels=3, blocks=2, kernel=kernel, periodic=False
    )
    window = kernel**dimensions
    assert size(network) == (window * 3 + 3) + 4 * (window * 9 + 3) + (6 + 2)
    field = jax.random.normal(jax.random.key(1), (1, *(5, 6, 4)[:dimensions]))
    h = network.lift(field)
    for block in network.blocks:
        h += block.second(jax.nn.relu(block.first(jax.nn.relu(h))))
    expected = network.projection(jax.nn.relu(h))
    np.testing.assert_allclose(network(field), expected, atol=1e-13)


def test_a_small_final_projection_makes_a_small_network_that_still_learns(networks):
    def made(scale):
        return networks.ResidualConvolution(
            jax.random.key(0), 1, 1, 1, channels=4, blocks=1, final_scale=scale
        )

    field = jax.random.normal(jax.random.key(1), (1, 8))
    np.testing.assert_allclose(made(0.01)(field), 0.01 * made(1.0)(field), rtol=1e-12)
    gradient = eqx.filter_grad(lambda network: jnp.sum(network(field)))(made(0.01))
    assert float(jnp.max(jnp.abs(gradient.lift.weight))) > 0


def test_an_even_kernel_is_refused(networks):
    with pytest.raises(ValueError, match="kernel is odd"):
        networks.ResidualConvolution(jax.random.key(0), 1, 1, 1, kernel=2)


def test_single_precision_stays(networks):
    network = networks.ResidualConvolution(
        jax.random.key(0), 1, 1, 1, channels=2, blocks=1, dtype=jnp.float32
    )
    assert network(jnp.ones((1, 8), jnp.float32)).dtype == jnp.float32
