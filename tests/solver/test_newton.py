"""Newton's method counts the work of its linear solver."""

import jax
import jax.numpy as jnp
import numpy as np

import bilevel as bl

CUBIC = bl.RootFinding(lambda x, theta: x**3 + theta * x - jnp.arange(1.0, 6.0))


def test_iterations_of_the_linear_solver_are_counted_apart():
    theta, x0 = jnp.linspace(1.0, 3.0, 5), jnp.zeros(5)
    inner = bl.Budget(iterations=3)
    solver = bl.Newton(linear=bl.BiCGStab(), linear_budget=inner, halvings=0)
    one = bl.solve(CUBIC, theta, x0, solver=solver, budget=bl.Budget(iterations=1))
    two = bl.solve(CUBIC, theta, x0, solver=solver, budget=bl.Budget(iterations=2))
    assert (int(one.iterations), int(one.inner_iterations)) == (1, 3)
    assert (int(two.iterations), int(two.inner_iterations)) == (2, 6)
    assert "inner_iterations=6" in repr(two)
    # Two applications an iteration of BiCGStab, and residuals.
    assert int(two.applications - one.applications) >= 6
    # The cost of both solves is in iterations of linear solvers.
    result = bl.hypergradient(
        lambda x, _: jnp.sum(x),
        CUBIC,
        theta,
        x0,
        solver=solver,
        budget=bl.Budget(iterations=2),
        estimator=bl.Implicit(bl.BiCGStab()),
        adjoint_budget=bl.Budget(iterations=4),
        error=False,
    )
    assert int(result.cost.primal_iterations) == 6
    assert int(result.cost.operator_applications) == int(result.primal.applications)
    probe = bl.Probe.zeros()

    def loss(probe):
        budget = bl.Budget(iterations=2)
        solution = bl.solve(CUBIC, theta, x0, solver=solver, budget=budget, probe=probe)
        return jnp.sum(solution.value)

    assert float(jax.grad(loss)(probe).primal_iterations) == 6


def test_a_solver_with_none_inside_counts_its_own():
    problem = bl.FixedPoint(lambda x, theta: 0.5 * x + theta)
    budget = bl.Budget(iterations=4)
    solution = bl.solve(problem, 1.0, 0.0, solver=bl.FixedPointIteration(), budget=budget)
    np.testing.assert_array_equal(solution.inner_iterations, solution.iterations)
    assert "inner_iterations" not in repr(solution)
