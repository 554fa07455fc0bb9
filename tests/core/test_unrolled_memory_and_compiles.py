"""What unrolling costs: one compile for all budgets, few states of memory, no bit of accuracy."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel as bl
from tests.core.cases import FEATURES, TARGETS, ridge_objective
from tests.core.compiling import jitted
from tests.marks import others_slow

STEP = 0.1
N = FEATURES.shape[1]


def logistic_objective(x: Any, theta: Any) -> Any:
    margins = np.sign(TARGETS) * (FEATURES @ x)
    return jnp.mean(jnp.logaddexp(0.0, -margins)) + 0.5 * jnp.sum(jnp.exp(theta) * x**2)


def diffusion_objective(u: Any, theta: Any) -> Any:
    """Energy of u ↦ -((κ + u'²) u')' = f with zero ends: κ and f are parameters."""
    slopes = jnp.diff(jnp.pad(u, 1))
    energy = 0.25 * slopes**4 + 0.5 * jnp.exp(theta[0]) * slopes**2
    return jnp.sum(energy) - jnp.sum(theta * u)


OBJECTIVES = {
    "ridge": ridge_objective,
    "logistic": logistic_objective,
    "diffusion": diffusion_objective,
}


def outer(x: Any) -> Any:
    return jnp.sum(jnp.sin(x))


def unrolled(objective: Callable[..., Any], store: str = "checkpoints", cap: int = 100) -> Any:
    problem = bl.Minimization(objective)

    def value(theta: Any, x0: Any, iterations: Any) -> Any:
        solution = bl.solve(
            problem,
            theta,
            x0,
            solver=bl.GradientDescent(STEP),
            estimator=bl.Unrolled(store=store, max_iterations=cap),
            budget=bl.Budget(iterations=iterations),
        )
        return outer(solution.value)

    return value


def test_one_trace_serves_all_budgets():
    traces: list[str] = []

    def counted(x: Any, theta: Any) -> Any:
        traces.append("trace")
        return ridge_objective(x, theta)

    theta, x0 = jnp.zeros(N), jnp.zeros(N)
    gradient = jitted(jax.grad(unrolled(counted)))
    gradient(theta, x0, 1)
    once = len(traces)
    results = [gradient(theta, x0, iterations) for iterations in range(2, 101)]
    assert len(traces) == once
    # Each was the gradient of its own number of steps.
    assert len({result.tobytes() for result in map(np.asarray, results)}) == len(results)


def test_one_trace_serves_all_budgets_outside_jit():
    traces: list[str] = []

    def counted(x: Any, theta: Any) -> Any:
        traces.append("trace")
        return ridge_objective(x, theta)

    problem = bl.Minimization(counted)
    counts: list[int] = []
    for iterations, rtol in ((1, 0.0), (50, 1e-3), (100, 1e-9)):
        budget = bl.Budget(iterations=iterations, rtol=rtol)
        solver = bl.GradientDescent(STEP)
        bl.solve(problem, jnp.zeros(N), jnp.zeros(N), solver=solver, budget=budget)
        counts.append(len(traces))
    assert counts[0] > 0
    assert len(set(counts)) == 1


@pytest.mark.parametrize("cap", [400])
def test_memory_is_that_of_few_states(cap: int):
    """Compiled and not run: the compiler knows what it will allocate."""
    size = 100_000
    arguments = (jnp.zeros(size), jnp.zeros(size), 10)
    gradient = jax.jit(jax.grad(unrolled(diffusion_objective, cap=cap)))
    analysis = gradient.lower(*arguments).compile().memory_analysis()
    states = analysis.temp_size_in_bytes / (8 * size)
    assert states <= 2 * math.sqrt(cap) + 4


@pytest.mark.parametrize("store", ["checkpoints", "all"])
@pytest.mark.parametrize("name", others_slow(OBJECTIVES, "diffusion"))
def test_gradient_is_that_of_a_scan_to_the_last_bit(name: str, store: str):
    objective, iterations = OBJECTIVES[name], 37

    def scanned(theta: Any, x0: Any) -> Any:
        def step(x: Any, _: None) -> tuple[Any, None]:
            return x - STEP * jax.grad(objective)(x, theta), None

        return outer(jax.lax.scan(step, x0, None, length=iterations)[0])

    theta, x0 = jnp.linspace(-0.4, 0.3, N), jnp.linspace(0.5, -0.2, N)
    expected = jax.jit(jax.grad(scanned, argnums=(0, 1)))(theta, x0)
    value = unrolled(objective, store)
    got = jax.jit(jax.grad(value, argnums=(0, 1)))(theta, x0, iterations)
    for ours, theirs in zip(got, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_room_that_runs_out_is_said_before_the_solve_or_after():
    problem = bl.Minimization(ridge_objective)
    options = {
        "solver": bl.GradientDescent(1e-3),
        "estimator": bl.Unrolled(max_iterations=8),
    }
    with pytest.raises(ValueError, match="max_iterations"):
        bl.solve(problem, jnp.zeros(N), jnp.zeros(N), budget=bl.Budget(iterations=9), **options)

    def traced(iterations: Any) -> bl.Solution:
        budget = bl.Budget(iterations=iterations)
        return bl.solve(problem, jnp.zeros(N), jnp.zeros(N), budget=budget, **options)

    solution = jitted(traced)(jnp.int32(9))
    assert int(solution.status) == bl.Status.UNROLL_LIMIT
    assert int(solution.iterations) == 8
    assert "max_iterations" in solution.diagnosis
