"""What is chosen where the user says nothing."""

import jax.numpy as jnp
import numpy as np

import bilevel as bl

SCALES = jnp.geomspace(1.0, 1e6, 60)


def adjoint_iterations(solver, problem=None):
    problem = problem or bl.LinearSystem(
        lambda theta: bl.LinearOperator(lambda v: theta * v, symmetric=True),
        jnp.ones(60),
    )
    result = bl.hypergradient(
        lambda x, _: jnp.sum(x**2), problem, SCALES, jnp.zeros(60), solver=solver, error=False
    )
    np.testing.assert_allclose(result.gradient, -2.0 / SCALES**3, atol=1e-9)
    return int(result.adjoint.iterations)


def test_the_adjoint_of_a_linear_system_takes_its_solver_preconditioner_included():
    assert adjoint_iterations(bl.ConjugateGradient(preconditioner=lambda v: v / SCALES)) <= 2
    assert adjoint_iterations(bl.ConjugateGradient()) > 20


def test_the_adjoint_of_a_stationary_solver_is_solved_by_a_better_one():
    problem = bl.LinearSystem(
        lambda theta: bl.LinearOperator(lambda v: theta * v, symmetric=True),
        lambda theta: jnp.ones(60),
    )
    iterations = adjoint_iterations(bl.Richardson(1.0, lambda v: v / SCALES), problem)
    # MINRES, and no Richardson without end.
    assert 20 < iterations < 2000
