"""What one would write without a library: adjoints by hand and a plain unroll.

Each does exactly the iterations it is asked for, tests nothing, and reports nothing: the
least time the arithmetic can take in JAX.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from benchmarks.problems import Logistic, PoissonControl, Ridge

Hypergradient = Callable[[Array], tuple[Array, Array]]
"""theta -> (outer loss, hypergradient)."""

Linear = Callable[[Array], Array]


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


def descent_with_conjugate_gradients(
    problem: Ridge | Logistic, step_size: float, inner: int, adjoint: int
) -> Hypergradient:
    """Gradient descent on the inner objective, CG with its Hessian for the adjoint."""

    @jax.jit
    def hypergradient(theta: Array) -> tuple[Array, Array]:
        slope = jax.grad(problem.objective)
        w = jax.lax.fori_loop(0, inner, lambda _, w: w - step_size * slope(w, theta), problem.start)
        loss, outer_gradient = jax.value_and_grad(problem.outer_loss)(w, theta)
        _, hessian = jax.linearize(lambda w: slope(w, theta), w)
        multiplier = conjugate_gradient(hessian, outer_gradient, adjoint)
        _, transposed = jax.vjp(lambda theta: slope(w, theta), theta)
        return loss, -transposed(multiplier)[0]

    return hypergradient


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
