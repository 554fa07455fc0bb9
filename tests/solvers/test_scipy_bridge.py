"""scipy_objective: hypergradients on flat vectors of double precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import check_grad, minimize

import bilevel as bl
from bilevel_solvers import NonFiniteEvaluationError, ScipyObjective, scipy_objective
from bilevel_solvers.scipy_bridge import Evaluation

TARGET = jnp.arange(3.0)
RIDGE = bl.Minimization(
    lambda x, theta: jnp.sum((x - theta["a"]) ** 2) + jnp.exp(theta["b"]) * jnp.sum(x**2)
)


def outer(x, theta):
    return jnp.sum((x - TARGET) ** 2)


def ridge(**settings):
    theta = {"a": jnp.ones(3), "b": -1.0, "order": 2}
    return scipy_objective(outer, RIDGE, theta, jnp.zeros(3), **settings)


def test_value_and_gradient_are_those_of_the_closed_form():
    objective = ridge()
    a, b = np.array([0.5, -1.0, 2.0]), 0.3
    value, gradient = objective(np.append(a, b))
    shrink = 1 / (1 + np.exp(b))
    left = a * shrink - np.arange(3.0)
    slope = 2 * left @ a * -np.exp(b) * shrink**2
    np.testing.assert_allclose(value, left @ left, rtol=1e-12)
    np.testing.assert_allclose(gradient, np.append(2 * left * shrink, slope), rtol=1e-10)
    assert type(value) is float
    assert gradient.dtype == np.float64


def test_a_theta_with_nones_of_its_own():
    problem = bl.Minimization(lambda x, theta: jnp.sum((x - theta["a"]) ** 2))
    objective = scipy_objective(outer, problem, {"a": jnp.zeros(3), "b": None}, jnp.zeros(3))
    _, gradient = objective(np.ones(3))
    np.testing.assert_allclose(gradient, 2 * (1 - np.asarray(TARGET)), rtol=1e-6, atol=1e-12)


def test_gradient_agrees_with_differences():
    objective = ridge()
    point = np.array([0.5, -1.0, 2.0, 0.3])
    assert check_grad(lambda p: objective(p)[0], lambda p: objective(p)[1], point) < 1e-5


def test_scipy_finds_the_minimum_and_the_pytree_comes_back():
    objective = ridge()
    found = minimize(objective, objective.start, jac=True, method="L-BFGS-B")
    theta = objective.theta(found.x)
    assert found.fun < 1e-8
    assert theta["order"] == 2
    np.testing.assert_allclose(theta["a"] / (1 + np.exp(theta["b"])), TARGET, atol=1e-4)
    assert len(objective.history) == found.nfev
    assert objective.history[-1].gradient_norm < 1e-3
    np.testing.assert_array_equal(objective.flat(theta), found.x)


def test_single_precision_inside_double_outside():
    theta = {"a": jnp.ones(3, jnp.float32), "b": jnp.float32(0.0)}
    objective = scipy_objective(outer, RIDGE, theta, jnp.zeros(3, jnp.float32))
    value, gradient = objective(objective.start)
    assert objective.x.dtype == jnp.float32
    assert gradient.dtype == np.float64
    np.testing.assert_allclose(value, np.sum((0.5 - np.arange(3.0)) ** 2), rtol=1e-5)


def descent(**settings):
    problem = bl.Minimization(
        lambda x, theta: 0.5 * jnp.sum(jnp.array([1.0, 0.1]) * (x - theta) ** 2)
    )
    return scipy_objective(
        lambda x, theta: jnp.sum(x**2),
        problem,
        jnp.ones(2),
        jnp.zeros(2),
        solver=bl.GradientDescent(0.5),
        **settings,
    )


def test_both_solves_start_where_the_last_ended():
    tolerance = bl.Budget(rtol=1e-9)
    settings = {
        "budget": tolerance,
        "adjoint_budget": tolerance,
        "estimator": bl.Implicit(bl.ConjugateGradient()),
    }
    warm, cold = descent(**settings), descent(**settings, warm_start=False)
    point = np.array([1.0, 2.0])
    for objective in (warm, cold):
        objective(point)
        objective(point)
    assert [entry.primal_iterations > 100 for entry in cold.history] == [True, True]
    assert warm.history[0].primal_iterations == cold.history[0].primal_iterations
    assert warm.history[1].primal_iterations == 0
    # An adjoint solve does one iteration at least.
    assert [entry.adjoint_iterations for entry in warm.history] == [2, 1]
    assert [entry.adjoint_iterations for entry in cold.history] == [2, 2]


def test_the_error_in_the_history_is_what_the_short_budget_costs():
    objective = descent(budget=bl.Budget(5), adjoint_budget=bl.Budget(rtol=1e-12), warm_start=False)
    point = np.array([1.0, 2.0])
    _, short = objective(point)
    objective.budget = bl.Budget(rtol=1e-13)
    _, exact = objective(point)
    np.testing.assert_allclose(exact, 2 * point, rtol=1e-8)
    first, second = objective.history
    # What it costs, and the margin of a twentieth.
    np.testing.assert_allclose(first.error, 1.05 * np.linalg.norm(short - exact), rtol=1e-6)
    assert second.error < 1e-8


def test_budgets_change_without_compiling(monkeypatch):
    traces = []

    def counted(x, theta):
        traces.append(None)
        return jnp.sum(x**2)

    problem = bl.Minimization(lambda x, theta: jnp.sum((x - theta) ** 2))
    objective = scipy_objective(
        counted, problem, jnp.ones(2), jnp.zeros(2), solver=bl.GradientDescent(0.1),
        budget=bl.Budget(5), adjoint_budget=bl.Budget(5), error=False,
    )  # fmt: skip
    objective(np.ones(2))
    before = len(traces)
    assert before > 0
    objective.budget = bl.Budget(iterations=7, rtol=1e-3)
    objective.adjoint_budget = bl.Budget(rtol=1e-9)
    objective(np.array([2.0, 3.0]))
    assert len(traces) == before


def test_a_controller_refines_within_a_call_until_it_accepts():
    controller = bl.ErrorControlled(bl.Ladder.iterations(start=1, step=1, stop=400), eta=0.9)
    objective = descent(controller=controller)
    _, gradient = objective(np.array([1.0, 2.0]))
    assert bool(objective.state.accepted)
    assert int(objective.state.level) > 0
    assert np.linalg.norm(gradient - [2.0, 4.0]) <= 0.1 * np.linalg.norm(gradient) * (1 + 1e-6)
    assert objective.history[0].error <= 0.1 * objective.history[0].gradient_norm


def test_a_controller_at_its_top_ends_the_call():
    controller = bl.ErrorControlled(bl.Ladder.iterations(start=1, step=1, stop=3), eta=0.99)
    objective = descent(controller=controller, warm_start=False)
    objective(np.array([1.0, 2.0]))
    assert not bool(objective.state.accepted)
    assert int(objective.state.level) == 2


@pytest.mark.parametrize("estimator", [bl.Unrolled(), bl.OneStep()])
def test_estimators_without_an_adjoint(estimator):
    objective = descent(estimator=estimator, budget=bl.Budget(60), error=False)
    value, gradient = objective(np.array([1.0, 2.0]))
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


def test_a_failed_solve_is_an_error_and_leaves_no_trace():
    problem = bl.Minimization(lambda x, theta: jnp.sum((x - jnp.sqrt(theta)) ** 2))
    objective = scipy_objective(lambda x, theta: jnp.sum(x), problem, jnp.ones(2), jnp.zeros(2))
    objective(np.ones(2))
    before = np.asarray(objective.x)
    with pytest.raises(
        NonFiniteEvaluationError, match=r"gradient has norm nan.*Primal: NONFINITE"
    ) as failed:
        objective(np.array([1.0, -1.0]))
    assert failed.value.result is not None
    assert len(objective.history) == 1
    np.testing.assert_array_equal(objective.x, before)
    value, _ = objective(np.full(2, 4.0))
    assert value == pytest.approx(4.0)


def test_a_point_that_is_not_finite_is_refused():
    with pytest.raises(NonFiniteEvaluationError, match="not finite"):
        ridge()(np.full(4, np.inf))


@pytest.mark.parametrize(
    ("theta", "settings", "expected"),
    [
        ({"order": 2}, {}, ValueError),
        (jnp.ones(2, complex), {}, TypeError),
        (1.0, {"adjoint_budget": bl.Budget(5)}, ValueError),
        (1.0, {"budget": bl.Budget(5), "controller": bl.FixedFidelity(bl.Budget(5))}, ValueError),
        (
            1.0,
            {"error": False, "controller": bl.ErrorControlled(bl.Ladder.iterations())},
            ValueError,
        ),
    ],
)
def test_bad_arguments(theta, settings, expected):
    problem = bl.Minimization(lambda x, theta: jnp.sum(x**2))
    with pytest.raises(expected, match="scipy_objective"):
        scipy_objective(outer, problem, theta, jnp.zeros(3), **settings)


@pytest.mark.parametrize("flat", [np.ones(3), np.ones((4, 1)), np.ones(4, complex)])
def test_a_vector_of_another_kind_is_refused(flat):
    with pytest.raises(ValueError, match="expected a real vector"):
        ridge()(flat)


def test_history_entries_are_what_the_page_says():
    objective = ridge()
    objective(objective.start)
    (entry,) = objective.history
    assert isinstance(entry, Evaluation)
    assert isinstance(objective, ScipyObjective)
    np.testing.assert_array_equal(entry.theta, [1, 1, 1, -1])
    assert jax.tree.structure(objective.theta(entry.theta)) == jax.tree.structure(
        {"a": 0, "b": 0, "order": 0}
    )
