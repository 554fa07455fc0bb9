"""What one would write without a library: adjoints by hand and a plain unroll.

Each does exactly the iterations it is asked for, tests nothing, and reports nothing: the
least time the arithmetic can take in JAX.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse.linalg
import scipy.special
from jaxtyping import Array

from benchmarks.problems import Logistic, PoissonControl, Ridge

Hypergradient = Callable[[Array], tuple[Array, Array]]
"""theta -> (outer loss, hypergradient)."""

Linear = Callable[[Array], Array]

AnyProblem = Ridge | Logistic | PoissonControl


def conjugate_gradient(matvec: Linear, rhs: Array, steps: int) -> Array:
    """`steps` iterations of conjugate gradients from zero, without any test."""

    def iterate(_: int, state: tuple[Array, ...]) -> tuple[Array, ...]:
        x, residual, direction, squared = state
        image = matvec(direction)
        length = squared / jnp.vdot(direction, image)
        x = x + length * direction
        residual = residual - length * image
        following = jnp.vdot(residual, residual)
        return x, residual, residual + following / squared * direction, following

    initial = (jnp.zeros_like(rhs), rhs, rhs, jnp.vdot(rhs, rhs))
    return jax.lax.fori_loop(0, steps, iterate, initial)[0]


def jacobi(matvec: Linear, diagonal: Array, rhs: Array, steps: int) -> Array:
    """`steps` iterations of Jacobi from zero, without any test."""
    inverse = 1.0 / diagonal
    return jax.lax.fori_loop(
        0, steps, lambda _, x: x + inverse * (rhs - matvec(x)), jnp.zeros_like(rhs)
    )


def tested_jacobi(matvec: Linear, diagonal: Array, rhs: Array, steps: int) -> Array:
    """The same, stopping where the residual is within rounding: what a test costs by itself."""
    inverse = 1.0 / diagonal
    tolerance = 1e-16 * jnp.linalg.norm(rhs)

    def unfinished(state: tuple[Array, ...]) -> Array:
        _, residual, count = state
        return (count < steps) & (jnp.sqrt(jnp.vdot(residual, residual)) > tolerance)

    def iterate(state: tuple[Array, ...]) -> tuple[Array, ...]:
        x, residual, count = state
        x = x + inverse * residual
        return x, rhs - matvec(x), count + 1

    return jax.lax.while_loop(unfinished, iterate, (jnp.zeros_like(rhs), rhs, jnp.int32(0)))[0]


def ridge_conjugate_gradients(problem: Ridge, inner: int, adjoint: int) -> Hypergradient:
    """Ridge's hypergradient by CG on the normal equations, forward and backward."""
    samples = problem.design.shape[0]

    @jax.jit
    def hypergradient(theta: Array) -> tuple[Array, Array]:
        penalty = jnp.exp(theta)

        def matvec(v: Array) -> Array:
            # u @ X, for X.T @ u is 4.5 times slower on a CPU.
            return (problem.design @ v) @ problem.design / samples + penalty * v

        rhs = problem.response @ problem.design / samples
        w = conjugate_gradient(matvec, rhs, inner)
        loss, outer_gradient = jax.value_and_grad(problem.outer_loss)(w, theta)
        multiplier = conjugate_gradient(matvec, outer_gradient, adjoint)
        return loss, -penalty * w * multiplier

    return hypergradient


def descended(problem: AnyProblem, step_size: float, inner: int, theta: Array) -> Array:
    """Steps of gradient descent on the inner objective."""
    slope = jax.grad(problem.objective)
    return jax.lax.fori_loop(0, inner, lambda _, w: w - step_size * slope(w, theta), problem.start)


def _implicit(
    problem: AnyProblem, step_size: float, inner: int, inverse: Callable[[Linear, Array], Array]
) -> Hypergradient:
    """Gradient descent, then the implicit derivative with `inverse` of the Hessian."""

    @jax.jit
    def hypergradient(theta: Array) -> tuple[Array, Array]:
        slope = jax.grad(problem.objective)
        w = descended(problem, step_size, inner, theta)
        loss, outer_gradient = jax.value_and_grad(problem.outer_loss)(w, theta)
        _, hessian = jax.linearize(lambda w: slope(w, theta), w)
        multiplier = inverse(hessian, outer_gradient)
        _, transposed = jax.vjp(lambda theta: slope(w, theta), theta)
        return loss, -transposed(multiplier)[0]

    return hypergradient


def descent_with_conjugate_gradients(
    problem: AnyProblem, step_size: float, inner: int, adjoint: int
) -> Hypergradient:
    """Gradient descent on the inner objective, CG with its Hessian for the adjoint."""
    inverse = partial(conjugate_gradient, steps=adjoint)
    return _implicit(problem, step_size, inner, inverse)


def descent_with_neumann_series(
    problem: AnyProblem, step_size: float, inner: int, adjoint: int
) -> Hypergradient:
    """Gradient descent, and `adjoint` terms of the Neumann series for the adjoint."""

    def inverse(hessian: Linear, v: Array) -> Array:
        def add(_: int, state: tuple[Array, Array]) -> tuple[Array, Array]:
            total, term = state
            return total + term, term - step_size * hessian(term)

        total, _ = jax.lax.fori_loop(0, adjoint, add, (jnp.zeros_like(v), v))
        return step_size * total

    return _implicit(problem, step_size, inner, inverse)


def descent_with_nystrom(
    problem: AnyProblem, step_size: float, inner: int, rank: int, damping: float
) -> Hypergradient:
    """Gradient descent, and the Nyström inverse of Hataya and Yamada (2023), equation 6."""

    def inverse(hessian: Linear, v: Array) -> Array:
        places = jax.random.choice(jax.random.key(0), v.size, (rank,), replace=False)
        units = jnp.zeros((rank, v.size)).at[jnp.arange(rank), places].set(1.0)
        columns = jax.vmap(lambda unit: hessian(unit.reshape(v.shape)).reshape(-1))(units)
        core = columns[:, places]
        rho = damping * jnp.max(jnp.diagonal(core))
        projected = columns @ v.reshape(-1)
        inside = jnp.linalg.solve(core + columns @ columns.T / rho, projected)
        return v / rho - (inside @ columns).reshape(v.shape) / rho**2

    return _implicit(problem, step_size, inner, inverse)


def descent_with_one_step(problem: AnyProblem, step_size: float, inner: int) -> Hypergradient:
    """Gradient descent, and the derivative of one more step of it at the last iterate."""
    return _implicit(problem, step_size, inner, lambda _, v: step_size * v)


def poisson_adjoint(
    problem: PoissonControl, method: str, inner: int, adjoint: int
) -> Hypergradient:
    """Poisson control's hypergradient; `method` is "cg", "jacobi" or "tested jacobi"."""

    @jax.jit
    def hypergradient(theta: Array) -> tuple[Array, Array]:
        operator = problem.operator(theta)
        if method == "cg":
            solve = partial(conjugate_gradient, operator.matvec)
        else:
            iterate = jacobi if method == "jacobi" else tested_jacobi
            solve = partial(iterate, operator.matvec, operator.diagonal())
        rhs, transposed = jax.vjp(problem.rhs, theta)
        u = solve(rhs, inner)
        loss, outer_gradient = jax.value_and_grad(problem.outer_loss)(u, theta)
        return loss, transposed(solve(outer_gradient, adjoint))[0]

    return hypergradient


def scan_unroll(
    step: Callable[[Any, Any], Any],
    outer_loss: Callable[[Any, Any], Array],
    start: Any,
    length: int,
) -> Callable[[Any], tuple[Array, Any]]:
    """Reverse mode through `length` steps of a static `lax.scan`, every iterate stored."""

    @jax.jit
    def hypergradient(theta: Any) -> tuple[Array, Any]:
        def loss(theta: Any) -> Array:
            x, _ = jax.lax.scan(lambda x, _: (step(x, theta), None), start, None, length=length)
            return outer_loss(x, theta)

        return jax.value_and_grad(loss)(theta)

    return hypergradient


def by_scipy(
    problem: AnyProblem, step_size: float | None, inner: int, adjoint: int
) -> Callable[[], tuple[float, np.ndarray]]:
    """The same iterations with NumPy and SciPy: CG or, with a step size, descent; CG backward."""
    theta, start = np.asarray(problem.theta), np.asarray(problem.start)
    if isinstance(problem, PoissonControl):
        matrix = scipy.sparse.csr_matrix(problem.operator(problem.theta).matrix())
        bumps, reference = np.asarray(problem.bumps), np.asarray(problem.reference)

        def poisson() -> tuple[float, np.ndarray]:
            u = _scipy_cg(matrix, (bumps.T @ theta @ bumps).reshape(-1), inner)
            misfit = u - reference.reshape(-1)
            multiplier = _scipy_cg(matrix, misfit, adjoint).reshape(reference.shape)
            return 0.5 * float(misfit @ misfit), bumps @ multiplier @ bumps.T

        return poisson
    X, y = np.asarray(problem.design), np.asarray(problem.response)
    V, z = np.asarray(problem.validation_design), np.asarray(problem.validation_response)
    penalty = np.exp(theta)
    samples, unseen, linear = len(X), len(V), isinstance(problem, Ridge)

    def link(scores: np.ndarray) -> np.ndarray:
        return scores if linear else scipy.special.expit(scores)

    def operator(weights: np.ndarray | float) -> scipy.sparse.linalg.LinearOperator:
        return scipy.sparse.linalg.LinearOperator(
            (theta.size, theta.size),
            matvec=lambda v: (weights * (X @ v)) @ X / samples + penalty * v,
            dtype=theta.dtype,
        )

    def regression() -> tuple[float, np.ndarray]:
        if step_size is None:
            w = _scipy_cg(operator(1.0), y @ X / samples, inner)
        else:
            w = start
            for _ in range(inner):
                w = w - step_size * ((link(X @ w) - y) @ X / samples + penalty * w)
        scores = V @ w
        misfit = link(scores) - z
        loss = misfit**2 / 2 if linear else np.logaddexp(0.0, scores) - z * scores
        chance = link(X @ w)
        weights = 1.0 if linear else chance * (1.0 - chance)
        multiplier = _scipy_cg(operator(weights), misfit @ V / unseen, adjoint)
        return float(np.mean(loss)), -penalty * w * multiplier

    return regression


def _scipy_cg(operator: Any, rhs: np.ndarray, steps: int) -> np.ndarray:
    return scipy.sparse.linalg.cg(operator, rhs, rtol=0.0, atol=0.0, maxiter=steps)[0]
