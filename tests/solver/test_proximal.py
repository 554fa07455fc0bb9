"""Non-smooth inner problems: the solution, its support, and the derivative on it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel as bl

DRAW = np.random.default_rng(3)
FEATURES = jnp.asarray(DRAW.normal(size=(20, 6)))
WEIGHTS = jnp.asarray([2.0, 0.0, -1.5, 0.0, 0.7, 0.0])
TARGETS = FEATURES @ WEIGHTS + 0.05 * jnp.asarray(DRAW.normal(size=20))
BUDGET = bl.Budget(iterations=5000, rtol=1e-13)


def objective(w, theta):
    del theta
    return 0.5 * jnp.mean((FEATURES @ w - TARGETS) ** 2)


LASSO = bl.CompositeMinimization(objective, bl.L1(jnp.exp))
THETA = jnp.log(0.1)


def fitted(theta, **options):
    return bl.solve(LASSO, theta, jnp.zeros(6), budget=BUDGET, **options)


def on_support(theta, support):
    """The closed form, where the support and the signs on it are known."""
    columns = FEATURES[:, support]
    gram = columns.T @ columns / 20
    signs = jnp.sign(WEIGHTS[support])
    return jnp.linalg.solve(gram, columns.T @ TARGETS / 20 - jnp.exp(theta) * signs)


def test_lasso_meets_its_optimality_conditions():
    solution = fitted(THETA)
    slope = jax.grad(objective)(solution.value, None)
    active = np.asarray(solution.value) != 0
    assert list(np.flatnonzero(active)) == [0, 2, 4]
    np.testing.assert_allclose(slope[active], -0.1 * np.sign(solution.value[active]), atol=1e-11)
    assert np.all(np.abs(slope[~active]) < 0.1)


@pytest.mark.parametrize(
    "estimator", [bl.Implicit(), bl.Implicit(solver=bl.ConjugateGradient())], ids=["default", "CG"]
)
def test_lasso_derivative_is_that_of_the_closed_form_on_the_support(estimator):
    support = np.array([0, 2, 4])
    got = jax.grad(lambda t: jnp.sum(fitted(t, estimator=estimator).value ** 2))(THETA)
    expected = jax.grad(lambda t: jnp.sum(on_support(t, support) ** 2))(THETA)
    np.testing.assert_allclose(got, expected, rtol=1e-8)


def test_scaling_objective_and_penalty_changes_neither_solution_nor_count():
    def scaled(factor):
        problem = bl.CompositeMinimization(
            lambda w, theta: factor * objective(w, theta), bl.L1(lambda t: factor * jnp.exp(t))
        )
        return bl.solve(problem, THETA, jnp.zeros(6), budget=bl.Budget(2000, rtol=1e-8))

    plain, tiny = scaled(1.0), scaled(2.0**-26)
    np.testing.assert_allclose(tiny.value, plain.value, rtol=1e-9)
    assert int(tiny.iterations) == int(plain.iterations)


def test_elastic_net_is_lasso_with_a_quadratic():
    net = bl.CompositeMinimization(objective, bl.ElasticNet(0.1, 0.3))
    lasso = bl.CompositeMinimization(
        lambda w, theta: objective(w, theta) + 0.15 * jnp.sum(w**2), bl.L1(0.1)
    )
    first, second = (
        bl.solve(problem, None, jnp.zeros(6), budget=BUDGET).value for problem in (net, lasso)
    )
    np.testing.assert_allclose(first, second, atol=1e-11)


def test_a_negative_weight_is_refused_by_name():
    with pytest.raises(ValueError, match=r"weight must not be negative"):
        bl.L1(-1.0)
