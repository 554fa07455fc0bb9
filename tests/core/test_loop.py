"""The one loop: when it stops, and what it says of itself."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import bilevel as bl
from tests.core.compiling import jitted

HALF = 0.5
"""Contraction of the model problem: every iteration halves the residual."""


def halving(x: Any, theta: Any) -> Any:
    return HALF * (x - theta) + theta


PROBLEM = bl.FixedPoint(halving)
SOLVER = bl.FixedPointIteration()


def halve(theta: Any, x0: Any, iterations: Any, rtol: Any, atol: Any) -> bl.Solution:
    budget = bl.Budget(iterations, rtol, atol)
    return bl.solve(PROBLEM, theta, x0, solver=SOLVER, budget=budget, history=8)


run = jitted(halve)


def halved(theta: float, x0: float, iterations: int) -> float:
    return theta + (x0 - theta) * HALF**iterations


# The loop carries squared norms, and those of double precision vanish below 1e-154.
NUMBERS = st.floats(-10, 10).map(lambda number: 0.0 if abs(number) < 1e-150 else number)


@given(st.integers(0, 45), NUMBERS, NUMBERS)
def test_a_budget_of_iterations_is_spent_whole(iterations: int, theta: float, x0: float):
    solution = run(theta, x0, iterations, 0.0, 0.0)
    if abs(x0 - theta) > 1e-6 * max(abs(x0), abs(theta)):  # else rounding comes first
        assert int(solution.iterations) == iterations
        assert int(solution.status) in (bl.Status.BUDGET, bl.Status.CONVERGED)
    expected = halved(theta, x0, int(solution.iterations))
    np.testing.assert_allclose(solution.value, expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(
        solution.residual_norm, HALF * abs(solution.value - theta), rtol=1e-12, atol=1e-13
    )


@given(st.integers(1, 40), st.floats(0.1, 0.9))
def test_a_relative_tolerance_stops_at_the_first_residual_within(steps: int, fraction: float):
    rtol = HALF ** (steps - fraction)  # between the residuals of two steps
    solution = run(1.0, 3.0, 100, rtol, 0.0)
    assert int(solution.iterations) == steps
    assert int(solution.status) == bl.Status.CONVERGED
    np.testing.assert_allclose(solution.tolerance, rtol * 1.0, rtol=1e-12)  # first residual: 1
    np.testing.assert_allclose(solution.scale, 1.0)


@given(st.integers(0, 20), st.integers(0, 20))
def test_cap_and_tolerance_together_stop_at_whichever_comes_first(cap: int, steps: int):
    atol = 1.5 * HALF**steps  # between the residuals of step `steps` and the one before
    solution = run(1.0, 3.0, cap, 0.0, atol)
    assert int(solution.iterations) == min(cap, steps)
    assert (int(solution.status) == bl.Status.CONVERGED) == (cap >= steps)


def test_no_iterations_return_the_start_and_say_so():
    for estimator in (bl.Implicit(), bl.Unrolled()):
        solution = bl.solve(
            PROBLEM, 1.0, 3.0, solver=SOLVER, estimator=estimator, budget=bl.Budget(iterations=0)
        )
        assert float(solution.value) == 3.0
        assert int(solution.iterations) == 0
        assert int(solution.status) == bl.Status.BUDGET
        assert float(solution.residual_norm) == 1.0


def test_a_start_at_the_solution_takes_no_step():
    solution = run(2.0, 2.0, 100, 1e-3, 0.0)
    assert int(solution.iterations) == 0
    assert int(solution.status) == bl.Status.CONVERGED


def test_a_good_start_of_a_linear_system_is_not_held_against_it():
    """The tolerance refers to the right-hand side, not to the first residual."""
    problem = bl.LinearSystem(2.0 * np.eye(2), np.ones(2))
    near = jnp.full(2, 0.5 + 1e-6)
    solution = bl.solve(
        problem, None, near, solver=bl.Richardson(0.1), budget=bl.Budget(50, rtol=1e-4)
    )
    assert int(solution.iterations) == 0
    np.testing.assert_allclose(solution.scale, np.sqrt(2))


def test_history_is_the_residual_norm_after_each_iteration():
    solution = run(1.0, 3.0, 4, 0.0, 0.0)
    assert solution.history is not None
    np.testing.assert_allclose(solution.history, [1, 0.5, 0.25, 0.125, 0.0625, *[np.nan] * 3])
    longer = run(1.0, 3.0, 20, 0.0, 0.0)
    assert longer.history is not None
    np.testing.assert_allclose(longer.history, HALF ** np.arange(8))


def test_rate_is_the_reduction_an_iteration():
    for iterations in (2, 3, 7, 20):
        np.testing.assert_allclose(run(1.0, 3.0, iterations, 0.0, 0.0).rate, HALF, rtol=1e-6)
    assert np.isnan(run(1.0, 3.0, 0, 0.0, 0.0).rate)


def test_every_sample_of_a_batch_has_its_own_count_status_and_value():
    starts = jnp.array([1.0, 3.0, 1.0 + 2.0**-10, jnp.nan])
    batch = jitted(jax.vmap(lambda x0: halve(1.0, x0, 12, 0.0, 2.0**-15)))(starts)
    for index, start in enumerate(starts):
        alone = run(1.0, start, 12, 0.0, 2.0**-15)
        for name in ("value", "status", "iterations", "residual_norm", "rate", "history"):
            np.testing.assert_array_equal(getattr(batch, name)[index], getattr(alone, name), name)
    assert batch.iterations.tolist() == [0, 12, 4, 0]
    statuses = [bl.Status(int(status)).name for status in batch.status]
    assert statuses == ["CONVERGED", "BUDGET", "CONVERGED", "NONFINITE"]
    assert "NONFINITE" in batch.diagnosis
    assert "BUDGET" in batch.diagnosis


def test_budgets_of_a_batch_may_differ():
    caps = jnp.array([0, 3, 9])
    batch = jitted(jax.vmap(lambda cap: halve(1.0, 3.0, cap, 0.0, 0.0)))(caps)
    assert batch.iterations.tolist() == [0, 3, 9]


def test_extrapolated_points_do_not_pass_for_converged_iterates():
    """Nesterov's residual is known at the extrapolated point; the iterate must meet it, too."""
    problem = bl.Minimization(lambda x, theta: 0.5 * jnp.sum(theta * x**2) - jnp.sum(x))
    theta = jnp.array([0.3, 0.6, 1.0])

    @jitted
    def statuses(rtol: Any) -> Any:
        solutions = [
            bl.solve(
                problem,
                theta,
                jnp.zeros(3),
                solver=bl.Nesterov(1.0),
                estimator=estimator,
                budget=bl.Budget(500, rtol=rtol),
            )
            for estimator in (bl.Implicit(), bl.Unrolled())
        ]
        return [(s.status, s.residual_norm / s.tolerance, s.iterations) for s in solutions]

    for rtol in (1e-1, 1e-2, 1e-4, 1e-6, 1e-8):
        (status, ratio, count), (status_unrolled, _, count_unrolled) = statuses(rtol)
        assert int(status) == int(status_unrolled) == bl.Status.CONVERGED
        assert ratio <= 1
        assert int(count) == int(count_unrolled)


# ------------------------------------------------------------------- every status is reached

INDEFINITE = np.diag([1.0, -1.0, 2.0])
HILBERT = 1.0 / (np.arange(8)[:, None] + np.arange(8) + 1.0)


def steep() -> bl.Solution:
    problem = bl.Minimization(lambda x, theta: theta * jnp.sum(x**2))
    return bl.solve(
        problem, 1.0, jnp.ones(2), solver=bl.GradientDescent(1.1), budget=bl.Budget(200)
    )


def linear(matrix: Any, rhs: Any, solver: Any, **options: Any) -> bl.Solution:
    problem = bl.LinearSystem(matrix, rhs)
    return bl.solve(problem, None, jnp.zeros(len(rhs)), solver=solver, **options)


def unrolled_adjoint() -> bl.Solution:
    return bl.hypergradient(
        lambda x, theta: x * theta,
        PROBLEM,
        1.0,
        3.0,
        solver=SOLVER,
        estimator=bl.Unrolled(),
        budget=bl.Budget(3),
        error=False,
    ).adjoint


def idle_adjoint() -> bl.Solution:
    return bl.hypergradient(
        lambda x, theta: x * theta,
        PROBLEM,
        1.0,
        3.0,
        adjoint_budget=bl.Budget(iterations=0),
        error=False,
    ).adjoint


def contradictory() -> bl.Solution:
    """An objective whose derivative is that of its negative."""

    def objective(x: Any, theta: Any) -> Any:
        value = jnp.sum((x - theta) ** 2)
        return jax.lax.stop_gradient(2 * value) - value

    return bl.solve(bl.Minimization(objective), 1.0, jnp.zeros(2), solver=bl.LBFGS())


def undeclared() -> bl.Solution:
    matrix = jnp.array([[3.0, 1.0], [0.0, 3.0]])
    problem = bl.LinearSystem(lambda _: lambda v: matrix @ v, jnp.ones(2))
    return bl.solve(problem, None, jnp.zeros(2), solver=bl.ConjugateGradient())


def no_adjoint() -> bl.Solution:
    matrix = jnp.array([[3.0, 1.0], [0.0, 3.0]])
    functions = (lambda v: matrix @ v), (lambda v: matrix @ v)
    problem = bl.LinearSystem(lambda _: functions, lambda theta: theta)
    return bl.hypergradient(lambda x, _: jnp.sum(x), problem, jnp.ones(2), jnp.zeros(2)).adjoint


def closed(rhs: Any) -> bl.Solution:
    """A ring without boundaries, in which rounding has made 1e-14 of the eigenvalue zero."""
    operator = bl.LinearOperator(
        lambda v: (2.0 + 1e-14) * v - jnp.roll(v, 1) - jnp.roll(v, -1),
        symmetric=True,
        positive_definite=True,
        kernel=jnp.ones(6),
    )
    problem = bl.LinearSystem(lambda _: operator, rhs)
    return bl.solve(problem, None, jnp.zeros(6), solver=bl.ConjugateGradient())


def elsewhere() -> bl.Solution:
    """Somebody else's code that says it is done far from the solution, again and again."""
    from bilevel_solvers import host

    problem = bl.RootFinding(lambda x, _: x - 1.0)
    stubborn = host(lambda problem, x0, iterations, rtol: (np.full(2, 7.0), 1))
    return bl.solve(problem, None, jnp.zeros(2), solver=stubborn)


REACHED = {
    bl.Status.CONVERGED: lambda: run(1.0, 3.0, 100, 1e-3, 0.0),
    bl.Status.BUDGET: lambda: run(1.0, 3.0, 3, 0.0, 0.0),
    bl.Status.ROUNDING: lambda: linear(
        HILBERT, np.ones(8), bl.ConjugateGradient(), budget=bl.Budget(500, rtol=1e-15)
    ),
    bl.Status.UNROLL_LIMIT: lambda: jitted(
        lambda cap: bl.solve(
            PROBLEM,
            1.0,
            3.0,
            solver=SOLVER,
            estimator=bl.Unrolled(max_iterations=2),
            budget=bl.Budget(cap),
        )
    )(5),
    bl.Status.NOT_RUN: unrolled_adjoint,
    bl.Status.DIVERGED: steep,
    bl.Status.NONFINITE: lambda: run(jnp.nan, 3.0, 3, 0.0, 0.0),
    bl.Status.BREAKDOWN: lambda: linear(INDEFINITE, np.ones(3), bl.ConjugateGradient()),
    bl.Status.NOT_STARTED: idle_adjoint,
    bl.Status.NOT_SYMMETRIC: undeclared,
    bl.Status.LINE_SEARCH: contradictory,
    bl.Status.NOT_ADJOINT: no_adjoint,
    bl.Status.INCONSISTENT: lambda: closed(jnp.ones(6)),
    bl.Status.STOPPED: elsewhere,
}


def test_the_table_of_statuses_is_complete():
    assert set(REACHED) == set(bl.Status)


@pytest.mark.parametrize("status", REACHED, ids=lambda status: status.name)
def test_every_status_is_reached_and_explained(status: bl.Status):
    solution = REACHED[status]()
    assert bl.Status(int(solution.status)) is status
    assert solution.diagnosis == f"{status.name}: {status.diagnosis}"


def test_failures_are_those_whose_result_must_not_be_used():
    failed = {status.name for status in bl.Status if status.failed}
    assert failed == {
        "DIVERGED",
        "NONFINITE",
        "BREAKDOWN",
        "NOT_STARTED",
        "LINE_SEARCH",
        "NOT_SYMMETRIC",
        "NOT_ADJOINT",
        "INCONSISTENT",
        "STOPPED",
    }


def test_a_right_hand_side_without_the_kernel_is_solved():
    solution = closed(jnp.array([1.0, -1.0, 2.0, -2.0, 0.5, -0.5]))
    assert solution.status == bl.Status.CONVERGED
    assert np.abs(solution.value).max() < 10


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({}, ValueError, "nothing would stop"),
        ({"iterations": -1}, ValueError, "iterations must be finite and at least 0"),
        ({"iterations": 2.5}, TypeError, "whole number"),
        ({"iterations": 3, "rtol": float("nan")}, ValueError, "rtol"),
        ({"iterations": 3, "rtol": -1e-3}, ValueError, "rtol"),
        ({"iterations": 3, "atol": float("inf")}, ValueError, "atol"),
        ({"iterations": 3, "atol": "tight"}, TypeError, "atol must be a real number"),
    ],
)
def test_budgets_without_sense_are_refused(arguments: Any, error: Any, words: str):
    with pytest.raises(error, match=words):
        bl.Budget(**arguments)
