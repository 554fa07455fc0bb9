"""Learn where to start: few-shot regression of sines by implicit MAML.

    bilevel compare examples/meta_learning.py --policies full,prdp,auto
    bilevel run examples/meta_learning.py --policy auto --set shots=5

A task is a sine of random amplitude and phase, known at `shots` random places.  A network is
adapted to it by

    φ*(θ) = argmin over φ of ½ mean (f_φ(x) - y)² + λ/2 ‖φ - θ‖²,

and θ, what all tasks start from and are held near to, is learnt such that the adapted network
is right at places that it has not seen: the outer loss is ½ mean (f_φ* - y)² there.  This is
implicit MAML (Rajeswaran, Finn, Kakade and Levine, NeurIPS 2019) on the sines of MAML (Finn,
Abbeel and Levine, ICML 2017): amplitudes in [0.1, 5], phases in [0, π], x in [-5, 5].  The
derivative of φ* is that of the solution, by an adjoint solve with I + H/λ, so neither the path
of the adaptation nor its length matters, and both solves can be cut short.

Inside, Nesterov's method starts from θ for every task of a batch by itself: each has a count of
its own, and Σ is over all of them.  The metric is the mean squared error of tasks never trained
on, adapted in full.  The report sets it against joint training: one network for all sines, trained
by as many updates with the same optimizer on the same tasks, and then adapted in the same way.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

import bilevel as bl

QUERIES = 20
"""Places of each task that the outer loss is taken at."""

SCALE = 6.0
"""Of the network's output."""

MARGIN = 1.5
"""By what factor the curvature may grow during an adaptation."""

TASKS, UPDATES, UNSEEN = 8, 20, 50
"""In a batch, batches in an epoch, and tasks validated with."""

TOLERANCE, CAP = 1e-5, 300
"""Of the full solves: relative residual, and the most iterations.  They take about 130;
a task in fifty is not solved when they stop."""

EXACT = bl.Fidelity(bl.Budget(iterations=600, rtol=1e-5), bl.Budget(iterations=1))


class Sines(NamedTuple):
    """Tasks: where each is known, and where it is asked for, all of shape (tasks, places)."""

    x: Float[Array, "tasks shots"]
    y: Float[Array, "tasks shots"]
    x_query: Float[Array, "tasks queries"]
    y_query: Float[Array, "tasks queries"]


def draw(key: PRNGKeyArray, tasks: int, shots: int, queries: int) -> Sines:
    """Random sines at random places."""
    amplitude_key, phase_key, place_key = jax.random.split(key, 3)
    amplitude = jax.random.uniform(amplitude_key, (tasks, 1), minval=0.1, maxval=5.0)
    phase = jax.random.uniform(phase_key, (tasks, 1), maxval=jnp.pi)
    x = jax.random.uniform(place_key, (tasks, shots + queries), minval=-5.0, maxval=5.0)
    y = amplitude * jnp.sin(x + phase)
    return Sines(x[:, :shots], y[:, :shots], x[:, shots:], y[:, shots:])


class Network(eqx.Module):
    """A perceptron with two hidden layers of tanh, in the scaling of the tangent kernel.

    Weights are drawn from the standard normal distribution and divided by √(inputs) where they
    are used.  In this scaling the curvature of f_φ in φ falls like 1/√width next to its slope, so
    that a wide network makes the adaptation's objective convex where it is solved.

    **Arguments:**

    - `key`: of the random weights.
    - `width`: of both hidden layers.
    - `scale`: of the output; the squared slope of f_φ in φ grows with its square.
    """

    first: Float[Array, " width"]
    first_bias: Float[Array, " width"]
    second: Float[Array, "width width"]
    second_bias: Float[Array, " width"]
    last: Float[Array, " width"]
    scale: float = eqx.field(static=True)

    def __init__(self, key: PRNGKeyArray, width: int, scale: float):
        keys = jax.random.split(key, 5)
        self.first = jax.random.normal(keys[0], (width,))
        self.first_bias = jax.random.normal(keys[1], (width,))
        self.second = jax.random.normal(keys[2], (width, width))
        self.second_bias = jax.random.normal(keys[3], (width,))
        self.last = jax.random.normal(keys[4], (width,))
        self.scale = scale

    def __call__(self, x: Float[Array, ""]) -> Float[Array, ""]:
        """The value at one place."""
        root = jnp.sqrt(float(self.last.size))
        h = jnp.tanh(self.first * x + self.first_bias)
        h = jnp.tanh(self.second @ h / root + self.second_bias)
        return self.scale * (self.last @ h) / root


class Adaptation:
    """The network, and how it is adapted to a task.

    - `start`: its parameters before any training.

    **Arguments:**

    - `key`: of the random weights.
    - `width`: of the two hidden layers.
    - `proximity`: λ, in units of squared error over units of squared parameters.
    """

    def __init__(self, key: PRNGKeyArray, width: int, proximity: float):
        network = Network(key, width, SCALE)
        self.start, self._static = eqx.partition(network, eqx.is_inexact_array)
        self._proximity = proximity
        # Where the adaptation stops short the Hessian may be indefinite, on which conjugate
        # gradients break down: in full solves, too, in three of a hundred updates.
        self._estimator = bl.Implicit(bl.MINRES())
        self.problem = bl.Minimization(self._objective)

    def value(self, phi: PyTree, x: Float[Array, ""]) -> Float[Array, ""]:
        """Of a network at one place."""
        return eqx.combine(phi, self._static)(x)

    def error(self, phi: PyTree, x: Array, y: Array) -> Array:
        """Mean squared error of a network at the places of one task."""
        return jnp.mean((jax.vmap(self.value, (None, 0))(phi, x) - y) ** 2)

    def _objective(self, phi: PyTree, known: tuple[PyTree, Array, Array]) -> Array:
        theta, x, y = known
        away = jax.tree.map(lambda a, b: jnp.sum((a - b) ** 2), phi, theta)
        return 0.5 * self.error(phi, x, y) + 0.5 * self._proximity * sum(jax.tree.leaves(away))

    def solver(self, theta: PyTree, x: Array) -> bl.Nesterov:
        """Nesterov's method with a step for the places of one task.

        The curvature is that of the network linearised at θ, from its tangent kernel, and half as
        much again for what it gains on the way.
        """
        slopes = jax.vmap(jax.grad(self.value), (None, 0))(jax.lax.stop_gradient(theta), x)
        flat = jnp.concatenate([leaf.reshape(len(x), -1) for leaf in jax.tree.leaves(slopes)], 1)
        largest = jnp.linalg.eigvalsh(flat @ flat.T / len(x))[-1]
        step_size = 1 / (MARGIN * largest + self._proximity)
        return bl.Nesterov(step_size, strong_convexity=self._proximity)

    def solved(self, theta: PyTree, x: Array, y: Array, fidelity: bl.Fidelity) -> bl.Solution:
        """The network adapted to one task, as far as the fidelity goes."""
        return bl.solve(
            self.problem,
            (theta, x, y),
            theta,
            solver=self.solver(theta, x),
            estimator=self._estimator,
            fidelity=fidelity,
        )

    def adapted_error(self, theta: PyTree, sines: Sines, fidelity: bl.Fidelity) -> Array:
        """Mean squared error of each task where it is asked for, after adaptation."""

        def one(x: Array, y: Array, x_query: Array, y_query: Array) -> Array:
            return self.error(self.solved(theta, x, y, fidelity).value, x_query, y_query)

        return jax.vmap(one)(*sines)


def task(
    shots: int = 10,
    width: int = 64,
    proximity: float = 1.0,
    epochs: int = 20,
    seed: int = 0,
) -> bl.Task:
    """The meta-learning.

    Args:
        shots: places that a task is known at.
        width: of the network's hidden layers.
        proximity: λ.
        epochs: of twenty updates each.
        seed: of the network and of all tasks.

    """
    adaptation = Adaptation(jax.random.key(seed), width, proximity)
    unseen = draw(jax.random.key(1_000 + seed), UNSEEN, shots, QUERIES)

    def loss(theta: PyTree, batch: Sines, fidelity: bl.Fidelity) -> Array:
        return 0.5 * jnp.mean(adaptation.adapted_error(theta, batch, fidelity))

    def validate(theta: PyTree) -> Array:
        return jnp.mean(adaptation.adapted_error(theta, unseen, EXACT))

    def batches(epoch: int, key: PRNGKeyArray) -> Iterator[Sines]:
        del epoch
        for one in jax.random.split(key, UPDATES):
            yield draw(one, TASKS, shots, QUERIES)

    def compared(runs: Sequence[Any], directory: Path | None) -> None:
        del directory
        report(adaptation, runs, shots, epochs * UPDATES)

    ladder = bl.Ladder.geometric(start=4, factor=1.5, stop=CAP)
    return bl.Task(
        adaptation.start,
        loss,
        batches,
        validate,
        name="meta-learning",
        metric_name="squared error after adaptation",
        optimizer=optimizer(epochs * UPDATES),
        epochs=epochs,
        ladder=ladder.with_tolerances(bl.Budget(rtol=TOLERANCE)),
        report=compared,
    )


def optimizer(updates: int) -> optax.GradientTransformation:
    """Of meta-learning and of joint training."""
    return optax.adam(optax.cosine_decay_schedule(5e-3, updates, alpha=0.02))


def joint(adaptation: Adaptation, shots: int, updates: int) -> PyTree:
    """One network trained on all tasks at once, with as many updates of as many tasks."""
    steps = optimizer(updates)

    def pooled(theta: PyTree, sines: Sines) -> Array:
        x = jnp.concatenate([sines.x, sines.x_query], 1)
        y = jnp.concatenate([sines.y, sines.y_query], 1)
        return 0.5 * adaptation.error(theta, jnp.ravel(x), jnp.ravel(y))

    def update(carry: tuple[PyTree, Any], key: PRNGKeyArray) -> tuple[tuple[PyTree, Any], None]:
        theta, state = carry
        gradient = jax.grad(pooled)(theta, draw(key, TASKS, shots, QUERIES))
        step, state = steps.update(gradient, state)
        return (optax.apply_updates(theta, step), state), None

    start = adaptation.start, steps.init(adaptation.start)
    keys = jax.random.split(jax.random.key(2_000), updates)
    return jax.jit(lambda: jax.lax.scan(update, start, keys)[0][0])()


def report(
    adaptation: Adaptation, runs: Sequence[Any], shots: int, updates: int
) -> dict[str, tuple[float, float]]:
    """Print errors on tasks that nothing was trained or chosen on, beside joint training's.

    **Returns:** by name, the mean squared error before and after adaptation.
    """
    sines = draw(jax.random.key(3_000), 8 * UNSEEN, shots, QUERIES)

    @jax.jit
    def errors(theta: PyTree) -> tuple[Array, Array]:
        before = jax.vmap(adaptation.error, (None, 0, 0))(theta, sines.x_query, sines.y_query)
        return jnp.mean(before), jnp.mean(adaptation.adapted_error(theta, sines, EXACT))

    starts = {
        "no training": adaptation.start,
        "joint training": joint(adaptation, shots, updates),
        **{run.summary.policy: run.theta for run in runs},
    }
    lines: dict[str, tuple[float, float]] = {}
    print(f"\n{f'{8 * UNSEEN} unseen tasks, squared error':34} unadapted   adapted")
    for name, theta in starts.items():
        before, after = errors(theta)
        lines[name] = float(before), float(after)
        print(f"{name:34} {lines[name][0]:9.4f} {lines[name][1]:9.4f}")
    return lines


if __name__ == "__main__":
    import sys

    from bilevel.cli import main

    sys.exit(main(["compare", __file__, "--overwrite", *sys.argv[1:]]))
