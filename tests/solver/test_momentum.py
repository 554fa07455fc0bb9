"""Momentum methods step as published: the iterates of a plain loop."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel as bl
from tests.marks import others_slow

SCALES = jnp.asarray([1.0, 3.0, 0.2])
STEP, MOMENTUM = 0.2, 0.7


def objective(x, theta):
    return 0.5 * jnp.sum(SCALES * (x - theta) ** 2) + 0.1 * jnp.sum(jnp.cosh(x))


SLOPE = jax.grad(objective)
THETA = jnp.asarray([1.0, -2.0, 0.5])
PROBLEM = bl.Minimization(objective)


def heavy_ball(theta, steps):
    x = before = jnp.zeros(3)
    for _ in range(steps):
        x, before = x - STEP * SLOPE(x, theta) + MOMENTUM * (x - before), x
    return x


def gradient_descent(theta, steps):
    x = jnp.zeros(3)
    for _ in range(steps):
        x = x - STEP * SLOPE(x, theta)
    return x


def adam(theta, steps):
    transformation = optax.adam(0.1)
    x = jnp.zeros(3)
    state = transformation.init(x)
    for _ in range(steps):
        updates, state = transformation.update(SLOPE(x, theta), state, x)
        x = optax.apply_updates(x, updates)
    return x


CASES = {
    "gradient descent": (bl.GradientDescent(step_size=STEP), gradient_descent),
    "heavy ball": (bl.HeavyBall(step_size=STEP, momentum=MOMENTUM), heavy_ball),
    "optax": (bl.Optax(optax.adam(0.1)), adam),
}


@pytest.mark.parametrize("name", others_slow(CASES, "heavy ball"))
def test_truncated_value_and_unrolled_gradient_are_those_of_a_plain_loop(name):
    solver, loop = CASES[name]

    def value(theta):
        solution = bl.solve(
            PROBLEM,
            theta,
            jnp.zeros(3),
            solver=solver,
            estimator=bl.Unrolled(max_iterations=16),
            budget=bl.Budget(iterations=7),
        )
        return jnp.sum(solution.value**3)

    got, gradient = jax.value_and_grad(value)(THETA)
    expected, by_loop = jax.value_and_grad(lambda t: jnp.sum(loop(t, 7) ** 3))(THETA)
    np.testing.assert_allclose(got, expected, rtol=1e-12)
    np.testing.assert_allclose(gradient, by_loop, rtol=1e-12)


@pytest.mark.parametrize(
    "solver",
    [
        bl.Nesterov(step_size=STEP),
        bl.ArmijoGradientDescent(),
        pytest.param(bl.LBFGS(), marks=pytest.mark.slow),
    ],
    ids=lambda solver: type(solver).__name__,
)
def test_scale_of_the_objective_changes_no_iteration_of_a_line_search(solver):
    factor = 2.0**-20

    def solved(scale):
        problem = bl.Minimization(lambda x, theta: scale * objective(x, theta))
        own = solver
        if isinstance(solver, bl.Nesterov):
            own = bl.Nesterov(step_size=STEP / scale)
        budget = bl.Budget(iterations=500, rtol=1e-8)
        return bl.solve(problem, THETA, jnp.zeros(3), solver=own, budget=budget)

    plain, tiny = solved(1.0), solved(factor)
    assert int(plain.status) == int(tiny.status) == bl.Status.CONVERGED
    assert int(plain.iterations) == int(tiny.iterations)
    np.testing.assert_allclose(plain.value, tiny.value, rtol=1e-12)
