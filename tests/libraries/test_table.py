"""Every wrapped solver: the core's conformance kit, and derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel as bl
from bilevel.testing import check_inner_solver
from tests.libraries.cases import PROBLEMS, rows

FEW = bl.Budget(iterations=3)


def gradient(row, estimator, **budget):
    problem, theta, x0 = PROBLEMS[row.kind]

    def loss(theta, solver=row.solver):
        solution = bl.solve(problem, theta, x0, solver=solver, estimator=estimator, **budget)
        return jnp.sum(jnp.sin(solution.value))

    return jax.grad(loss)(theta)


def central_difference(row, budget):
    """d loss / dθ of the iteration itself, along ones."""
    problem, theta, x0 = PROBLEMS[row.kind]
    step = 1e-5

    def loss(theta):
        solution = bl.solve(problem, theta, x0, solver=row.solver, budget=budget)
        return float(jnp.sum(jnp.sin(solution.value)))

    return (loss(theta + step) - loss(theta - step)) / (2 * step)


@pytest.mark.parametrize("row", rows())
def test_passes_the_conformance_kit(row):
    check_inner_solver(row.solver, *PROBLEMS[row.kind], budget=row.budget)


@pytest.mark.parametrize("row", rows())
def test_implicit_gradient_is_that_of_the_solution(row):
    problem, theta, x0 = PROBLEMS[row.kind]

    def loss(theta):
        solution = bl.solve(problem, theta, x0, budget=bl.Budget(rtol=1e-13, iterations=2000))
        return jnp.sum(jnp.sin(solution.value))

    expected = jax.grad(loss)(theta)
    # As far as the primal's default tolerance, 1e-6 for SciPy's minimisers, allows.
    np.testing.assert_allclose(gradient(row, bl.Implicit(), budget=row.budget), expected, rtol=1e-5)


@pytest.mark.parametrize("row", rows(lambda row: row.unrolls))
def test_unrolled_gradient_is_that_of_the_iteration(row):
    found = gradient(row, bl.Unrolled(max_iterations=8), budget=FEW)
    np.testing.assert_allclose(jnp.sum(found), central_difference(row, FEW), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("row", rows(lambda row: getattr(row.solver, "black_box", False)))
def test_a_black_box_is_refused_before_it_runs_where_steps_are_differentiated(row):
    problem, theta, x0 = PROBLEMS[row.kind]
    for estimator in (bl.Unrolled(), bl.OneStep()):
        with pytest.raises(bl.IncompatibleError, match=r"black box.*Use Implicit"):
            bl.solve(problem, theta, x0, solver=row.solver, estimator=estimator)


@pytest.mark.parametrize("row", rows(lambda row: row.solver.linear_adjoint))
def test_a_linear_solver_solves_the_adjoint_too(row):
    problem, theta, x0 = PROBLEMS[row.kind]
    cap = bl.Budget(iterations=500, rtol=1e-10)

    def outer(x, theta):
        return jnp.sum(jnp.sin(x))

    exact = bl.hypergradient(outer, problem, theta, x0, budget=cap, adjoint_budget=cap)
    given = {"solver": row.solver, "estimator": bl.Implicit(row.solver), "budget": cap}
    found = bl.hypergradient(outer, problem, theta, x0, **given, adjoint_budget=cap)
    assert int(found.adjoint.status) == bl.Status.CONVERGED
    assert int(found.adjoint.iterations) >= 1
    np.testing.assert_allclose(found.gradient, exact.gradient, rtol=1e-8)
