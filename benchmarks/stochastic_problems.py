"""Problems that are sums over samples, inner and outer, for stochastic bilevel methods."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

import bilevel as bl


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Inner objective and outer loss on minibatches, and how good a θ is.

    - `objective`, `outer_loss`: (x, θ, batch) -> real scalar.
    - `inner_batch`, `outer_batch`: from the numbers of terms to a batch.
    - `curvature`: of the inner objective, its largest; `outer_step`: unit of a step of θ.
    - `samples`: that a method may look at.
    - `value`: of θ, exactly; `best`: the lowest, as far as it is known.
    - `nested`: the task on all samples, for the library.
    """

    name: str
    what: str
    objective: Callable[[Array, Array, Any], Array]
    outer_loss: Callable[[Array, Array, Any], Array]
    inner_batch: Callable[[Array], Any]
    outer_batch: Callable[[Array], Any]
    inner_terms: int
    outer_terms: int
    theta0: Array
    x0: Array
    curvature: float
    outer_step: float
    samples: int
    value: Callable[[Array], Array]
    best: float
    nested: Callable[[], bl.Task]


def _spd(random: np.random.Generator, terms: int, size: int, low: float, high: float) -> np.ndarray:
    """Symmetric matrices whose mean has eigenvalues from `low` to `high`."""
    basis = np.linalg.qr(random.standard_normal((size, size)))[0]
    mean = (basis * np.geomspace(low, high, size)) @ basis.T
    noise = random.standard_normal((terms, size, 4)) / np.sqrt(size)
    ranks = np.einsum("nik,njk->nij", noise, noise) * high
    return mean + 0.5 * (ranks - ranks.mean(0))


def quadratic(quick: bool) -> Problem:
    """n = 1024 terms, dimensions 100 and 100, inner curvature 0.1 to 1, crossed terms 0.1."""
    terms, size = (256, 20) if quick else (1024, 100)
    random = np.random.default_rng(0)
    inner, outer, square = (_spd(random, terms, size, low, 1.0) for low in (0.1, 0.1, 0.1))
    crossed, mixed = 0.1 * random.standard_normal((2, terms, size, size)) / (2 * np.sqrt(size))
    shift, pull, tilt = random.standard_normal((3, terms, size))
    data = tuple(
        jnp.asarray(part) for part in (inner, crossed, shift, outer, mixed, pull, square, tilt)
    )

    def objective(x: Array, theta: Array, batch: Any) -> Array:
        A, C, b = batch
        half = 0.5 * jnp.einsum("i,nij,j->n", x, A, x)
        return jnp.mean(half + jnp.einsum("i,nij,j->n", theta, C, x) + b @ x)

    def outer_loss(x: Array, theta: Array, batch: Any) -> Array:
        F, D, d, H, e = batch
        half = 0.5 * jnp.einsum("i,nij,j->n", x, F, x)
        other = 0.5 * jnp.einsum("i,nij,j->n", theta, H, theta)
        return jnp.mean(half + other + jnp.einsum("i,nij,j->n", theta, D, x) + d @ x + e @ theta)

    A, C, b, F, D, d, H, e = (np.asarray(part).mean(0) for part in data)
    # x* = -A⁻¹ (Cᵀ θ + b) is affine in θ, and so h is a quadratic.
    slope, offset = -np.linalg.solve(A, C.T), -np.linalg.solve(A, b)
    hessian = slope.T @ F @ slope + H + D @ slope + slope.T @ D.T
    linear = slope.T @ (F @ offset + d) + D @ offset + e
    optimum = np.linalg.solve(hessian, -linear)
    start = np.zeros(size)

    def height(theta: Any) -> Any:
        return 0.5 * (theta - optimum) @ hessian @ (theta - optimum)

    def nested() -> bl.Task:
        whole = tuple(jnp.asarray(part)[None] for part in (F, D, d, H, e))
        problem = bl.Minimization(
            lambda x, theta: objective(
                x, theta, tuple(jnp.asarray(part)[None] for part in (A, C, b))
            )
        )

        def loss(theta: Array, batch: None, fidelity: bl.Fidelity) -> Array:
            del batch
            solution = bl.solve(
                problem,
                theta,
                jnp.zeros(size),
                solver=bl.GradientDescent(step_size=1.0 / float(np.linalg.norm(A, 2))),
                estimator=bl.Implicit(bl.ConjugateGradient()),
                fidelity=fidelity,
            )
            return outer_loss(solution.value, theta, whole)

        step = 1.0 / float(np.linalg.norm(hessian, 2))
        return _task(jnp.asarray(start), loss, height, optax.sgd(step), 100)

    return Problem(
        name="quadratic",
        what="h(θ) − min h",
        objective=objective,
        outer_loss=outer_loss,
        inner_batch=lambda index: tuple(part[index] for part in data[:3]),
        outer_batch=lambda index: tuple(part[index] for part in data[3:]),
        inner_terms=terms,
        outer_terms=terms,
        theta0=jnp.asarray(start),
        x0=jnp.zeros(size),
        curvature=float(np.linalg.norm(A, 2)),
        outer_step=1.0 / float(np.linalg.norm(hessian, 2)),
        samples=(100 if quick else 1000) * terms,
        value=jax.jit(height),
        best=0.0,
        nested=nested,
    )


def penalties(quick: bool) -> Problem:
    """A penalty for each of 22 features of a logistic regression, shapes of ijcnn1."""
    train, unseen, features = (2000, 2000, 22) if quick else (49990, 91701, 22)
    random = np.random.default_rng(1)
    weights = random.standard_normal(features) * (np.arange(features) < 8)

    def drawn(count: int) -> tuple[Array, Array]:
        X = random.standard_normal((count, features))
        chance = 1 / (1 + np.exp(-X @ weights))
        return jnp.asarray(X), jnp.asarray(np.where(random.random(count) < chance, 1.0, -1.0))

    inner_data, outer_data = drawn(train), drawn(unseen)

    def misfit(x: Array, batch: Any) -> Array:
        X, y = batch
        return jnp.mean(jax.nn.softplus(-y * (X @ x)))

    def objective(x: Array, theta: Array, batch: Any) -> Array:
        return misfit(x, batch) + 0.5 * jnp.sum(jnp.exp(theta) * x**2)

    def outer_loss(x: Array, theta: Array, batch: Any) -> Array:
        del theta
        return misfit(x, batch)

    curvature = 0.25 * float(np.linalg.norm(np.asarray(inner_data[0]), 2)) ** 2 / train + 1.0
    return _learned(
        "penalties of a logistic regression",
        objective,
        outer_loss,
        inner_data,
        outer_data,
        theta0=jnp.zeros(features),
        x0=jnp.zeros(features),
        curvature=curvature,
        outer_step=100.0,
        rate=0.3,
        samples=(50 if quick else 20) * train,
    )


def cleaning(quick: bool) -> Problem:
    """A weight for each of the training samples, half of them mislabelled, shapes of MNIST."""
    train, unseen, features, classes = (500, 500, 20, 4) if quick else (20000, 5000, 784, 10)
    random = np.random.default_rng(2)
    centres = random.standard_normal((classes, features)) * 3 / np.sqrt(features)

    def drawn(count: int, wrong: float) -> tuple[np.ndarray, np.ndarray]:
        labels = random.integers(classes, size=count)
        X = centres[labels] + random.standard_normal((count, features)) / np.sqrt(features)
        spoilt = random.random(count) < wrong
        return X, np.where(spoilt, random.integers(classes, size=count), labels)

    inner_data = (*map(jnp.asarray, drawn(train, 0.5)), jnp.arange(train))
    outer_data = tuple(map(jnp.asarray, drawn(unseen, 0.0)))

    def each(x: Array, X: Array, y: Array) -> Array:
        scores = jax.nn.log_softmax(X @ x.reshape(features, classes))
        return -jnp.take_along_axis(scores, y[:, None], 1)[:, 0]

    def objective(x: Array, theta: Array, batch: Any) -> Array:
        X, y, index = batch
        weighted = jnp.mean(jax.nn.sigmoid(theta[index]) * each(x, X, y))
        return weighted + 0.05 * jnp.sum(x**2)

    def outer_loss(x: Array, theta: Array, batch: Any) -> Array:
        del theta
        X, y = batch
        return jnp.mean(each(x, X, y))

    curvature = 0.5 * float(np.linalg.norm(np.asarray(inner_data[0]), 2)) ** 2 / train + 0.1
    return _learned(
        "weights of mislabelled samples",
        objective,
        outer_loss,
        inner_data,
        outer_data,
        theta0=jnp.zeros(train),
        x0=jnp.zeros(features * classes),
        curvature=curvature,
        outer_step=100.0 * train,
        rate=0.3,
        samples=(50 if quick else 20) * train,
    )


def _learned(
    name: str,
    objective: Any,
    outer_loss: Any,
    inner_data: Any,
    outer_data: Any,
    *,
    theta0: Array,
    x0: Array,
    curvature: float,
    outer_step: float,
    rate: float,
    samples: int,
) -> Problem:
    exact = bl.Budget(iterations=300, rtol=1e-6)

    # The data are arguments: as constants the compiler would multiply with them, for minutes.
    def attained(theta: Array, data: Any, fidelity: bl.Fidelity) -> Array:
        inner, outer = data
        solution = bl.solve(
            bl.Minimization(lambda x, theta: objective(x, theta, inner)),
            theta,
            x0,
            solver=bl.LBFGS(),  # Curvature grows with the penalties: it finds its own steps.
            estimator=bl.Implicit(bl.ConjugateGradient()),
            fidelity=fidelity,
        )
        return outer_loss(solution.value, theta, outer)

    data = inner_data, outer_data
    evaluate = jax.jit(attained)

    def value(theta: Array) -> Array:
        return evaluate(theta, data, bl.Fidelity(exact))

    def nested(epochs: int = 40) -> bl.Task:
        return _task(theta0, attained, value, optax.adam(rate), epochs, batches=[data])

    best = bl.optimize(nested(150), controller=bl.FixedFidelity(exact), progress=False)
    return Problem(
        name=name,
        what="outer loss",
        objective=objective,
        outer_loss=outer_loss,
        inner_batch=lambda index: tuple(part[index] for part in inner_data),
        outer_batch=lambda index: tuple(part[index] for part in outer_data),
        inner_terms=len(inner_data[0]),
        outer_terms=len(outer_data[0]),
        theta0=theta0,
        x0=x0,
        curvature=curvature,
        outer_step=outer_step,
        samples=samples,
        value=value,
        best=float(best.summary.best_metric or np.nan),
        nested=nested,
    )


def _task(
    theta0: Array, loss: Any, value: Any, optimizer: Any, epochs: int, batches: Any = None
) -> bl.Task:
    tolerance = bl.Budget(rtol=1e-5)
    return bl.Task(
        theta0,
        loss,
        batches=batches,
        validate=value,
        optimizer=optimizer,
        epochs=epochs,
        ladder=bl.Ladder.iterations(1, 1, 300).with_tolerances(tolerance),
    )
