"""Ridge regression with one penalty for every feature, learnt from validation data.

    bilevel run examples/ridge.py
    bilevel compare examples/ridge.py --policies full,fixed=12,prdp

The inner problem fits the weights to the training data under 500 penalties exp(θⱼ); the
outer loss is the error of those weights on the validation data.  Only 50 of the features
matter, and their penalties come out small.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel as bl


def task(features: int = 500, relevant: int = 50, seed: int = 0) -> bl.Task:
    """Learn the penalties of a ridge regression with 4 training samples a feature."""
    random = np.random.default_rng(seed)
    weights = np.where(np.arange(features) < relevant, random.standard_normal(features), 0.0)

    def sample(count: int) -> tuple[jax.Array, jax.Array]:
        inputs = random.standard_normal((count, features))
        noise = random.standard_normal(count)
        return jnp.asarray(inputs, "float32"), jnp.asarray(inputs @ weights + noise, "float32")

    inputs, targets = sample(4 * features)
    unseen, expected = sample(2 * features)

    def objective(w: jax.Array, theta: jax.Array) -> jax.Array:
        misfit = jnp.mean((inputs @ w - targets) ** 2)
        return 0.5 * misfit + 0.5 * jnp.sum(jnp.exp(theta) * w**2)

    problem = bl.Minimization(objective)
    start = jnp.zeros(features)

    def loss(theta: jax.Array, batch: None, fidelity: bl.Fidelity) -> jax.Array:
        del batch
        solution = bl.solve(
            problem,
            theta,
            start,
            solver=bl.ConjugateGradient(),
            estimator=bl.Implicit(solver=bl.ConjugateGradient()),
            fidelity=fidelity,
        )
        return jnp.mean((unseen @ solution.value - expected) ** 2)

    def validate(theta: jax.Array) -> jax.Array:
        """The validation error of the exact fit: the default solver factorises."""
        return jnp.mean((unseen @ bl.solve(problem, theta, start).value - expected) ** 2)

    return bl.Task(
        jnp.full(features, -2.0),
        loss,
        validate=validate,
        name="ridge",
        metric_name="validation error",
        optimizer=optax.adam(0.1),
        epochs=100,
        ladder=bl.Ladder.iterations(start=4, step=4, stop=40),
        full=bl.Budget(iterations=40),
    )
