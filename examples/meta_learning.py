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

TOLERANCE = 1e-4
"""Of both full solves, relative: 1e-5 changes the metric by less than a thousandth."""


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
    """x -> scale · mean-field sum of tanh features, two layers of them.

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
    - `step_size`: of Nesterov's method.
    """

    def __init__(self, key: PRNGKeyArray, width: int, scale: float, proximity: float, step_size: float, adj="cg"):
        network = Network(key, width, scale)
        self.start, self._static = eqx.partition(network, eqx.is_inexact_array)
        self._proximity = proximity
        self._solver = bl.Nesterov(step_size, strong_convexity=proximity)
        self._estimator = bl.Implicit(bl.ConjugateGradient() if adj == "cg" else bl.MINRES())
        self.problem = bl.Minimization(self._objective)

    def error(self, phi: PyTree, x: Array, y: Array) -> Array:
        """Mean squared error of a network at the places of one task."""
        return jnp.mean((jax.vmap(eqx.combine(phi, self._static))(x) - y) ** 2)

    def _objective(self, phi: PyTree, known: tuple[PyTree, Array, Array]) -> Array:
        theta, x, y = known
        away = jax.tree.map(lambda a, b: jnp.sum((a - b) ** 2), phi, theta)
        return 0.5 * self.error(phi, x, y) + 0.5 * self._proximity * sum(jax.tree.leaves(away))

    def solved(self, theta: PyTree, x: Array, y: Array, fidelity: bl.Fidelity) -> bl.Solution:
        """The network adapted to one task, as far as the fidelity goes."""
        return bl.solve(
            self.problem,
            (theta, x, y),
            theta,
            solver=self._solver,
            estimator=self._estimator,
            fidelity=fidelity,
        )

    def adapted_error(self, theta: PyTree, sines: Sines, fidelity: bl.Fidelity) -> Array:
        """Mean squared error of each task where it is asked for, after adaptation."""

        def one(x: Array, y: Array, x_query: Array, y_query: Array) -> Array:
            return self.error(self.solved(theta, x, y, fidelity).value, x_query, y_query)

        return jax.vmap(one)(*sines)
