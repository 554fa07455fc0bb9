"""A published penalty search: logistic regression, truncated back-propagation.

The set-up, as far as its figures need it: NumPy's legacy generator, whose state the
split goes on drawing from; labels 0 and 1; the inner objective is the mean logistic loss plus
½ Σ λ_j w_j² with the penalties themselves as λ; the validation loss has no penalty and is taken
before each update; momentum b ← 0.9 b + g, λ ← max(λ - b, 1e-8), which leaves b alone; float64.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jaxtyping import Array
from sklearn.model_selection import train_test_split

import bilevel as bl

Data = tuple[Array, Array, Array, Array]

PUBLISHED = {
    0: 0.574399,
    10: 0.533768,
    20: 0.361522,
    30: 0.322504,
    50: 0.294467,
    100: 0.285354,
}


def mean_logistic(scores: Array, labels: Array) -> Array:
    return jnp.mean(jax.nn.softplus(scores) - labels * scores)


@pytest.fixture(scope="module")
def data():
    saved = np.random.get_state()
    try:
        np.random.seed(1)
        weights = np.random.randn(20)
        design = np.random.randn(1000, 20)
        labels = (design @ weights + 0.1 * np.random.randn(1000) > 0).astype(float)
        split = train_test_split(design, labels, test_size=0.5)
    finally:
        np.random.set_state(saved)
    design, validation, labels, validation_labels = (jnp.asarray(part) for part in split)
    return design, labels, validation, validation_labels


def validation_loss_function(data: Data, estimator: bl.Estimator) -> Callable[[Array], Array]:
    design, labels, validation, validation_labels = data

    def objective(w: Array, penalties: Array) -> Array:
        return mean_logistic(design @ w, labels) + 0.5 * jnp.sum(penalties * w**2)

    def validation_loss(penalties: Array) -> Array:
        solution = bl.solve(
            bl.Minimization(objective),
            penalties,
            jnp.zeros(20),
            solver=bl.GradientDescent(step_size=0.1),
            estimator=estimator,
            budget=bl.Budget(iterations=100),
        )
        return mean_logistic(validation @ solution.value, validation_labels)

    return validation_loss


def test_losses_are_the_published_ones(data: Data):
    evaluate = jax.value_and_grad(validation_loss_function(data, bl.Unrolled(last=10)))
    optimizer = optax.sgd(1.0, momentum=0.9)

    @jax.jit
    def update(penalties: Array, state: Any) -> tuple[Array, Any, Array]:
        loss, gradient = evaluate(penalties)
        change, state = optimizer.update(gradient, state)
        return jnp.maximum(jax.tree.map(jnp.add, penalties, change), 1e-8), state, loss

    penalties = jnp.ones(20)
    state = optimizer.init(penalties)
    losses = {}
    for step in range(101):
        penalties, state, losses[step] = update(penalties, state)
    found = [float(losses[step]) for step in PUBLISHED]
    np.testing.assert_allclose(found, list(PUBLISHED.values()), rtol=0, atol=1e-5)


@pytest.mark.parametrize("last", [1, 10, 100])
def test_only_the_last_steps_are_differentiated(data: Data, last: int):
    """The figures above would hardly tell 10 steps from 9: this does."""
    design, labels, validation, validation_labels = data
    penalties = jnp.linspace(0.5, 2.0, 20)

    def loss_by_hand(penalties: Array) -> Array:
        def objective(w: Array, penalties: Array) -> Array:
            return mean_logistic(design @ w, labels) + 0.5 * jnp.sum(penalties * w**2)

        def step(w: Array, _: None) -> tuple[Array, None]:
            return w - 0.1 * jax.grad(objective)(w, penalties), None

        w, _ = jax.lax.scan(step, jnp.zeros(20), None, length=100 - last)
        w, _ = jax.lax.scan(step, jax.lax.stop_gradient(w), None, length=last)
        return mean_logistic(validation @ w, validation_labels)

    expected = jax.grad(loss_by_hand)(penalties)
    loss = validation_loss_function(data, bl.Unrolled(last=last))
    np.testing.assert_allclose(jax.grad(loss)(penalties), expected, rtol=1e-12, atol=1e-17)
