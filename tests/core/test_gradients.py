"""Hypergradients of every solver under every estimator, against the analytic ones."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel as bl
from bilevel.testing import taylor_test
from tests.core.cases import (
    EXAMPLES,
    FAMILIES,
    FEATURES,
    SOLVERS,
    TARGETS,
    THETA,
    Case,
    Example,
    N,
    by_name,
    loss,
)
from tests.core.compiling import jitted
from tests.marks import others_slow

STEPS = 3
"""Truncation at which the quickest solver of the table is not converged."""

LINEAR_SOLVERS = {
    "ConjugateGradient": ("definite", bl.ConjugateGradient),
    "MINRES": ("indefinite", bl.MINRES),
    "BiCGStab": ("general", bl.BiCGStab),
    "GMRES": ("general", bl.GMRES),
    "Direct": ("general", bl.Direct),
    "Richardson": ("general", lambda: bl.Richardson(0.5)),
    "Jacobi": ("definite", bl.Jacobi),
    "Chebyshev": ("definite", lambda: bl.Chebyshev(0.3, 2.8)),
    "SteepestDescent": ("definite", bl.SteepestDescent),
    "Anderson": ("mapping", bl.Anderson),
}


def relative_error(got: Any, expected: Any) -> float:
    return float(jnp.linalg.norm(got - expected) / jnp.linalg.norm(expected))


def outer(example: Example, theta: Any, **options: Any) -> Any:
    solution = bl.solve(example.problem, theta, example.x0, **options)
    return loss(solution.value, theta)


def gradient(example: Example, **options: Any) -> Any:
    return jitted(jax.grad(lambda theta: outer(example, theta, **options)))(example.theta)


@pytest.mark.parametrize(
    "case", others_slow(SOLVERS, *FAMILIES, "Newton", "LBFGS", "FISTA"), ids=by_name
)
def test_implicit_gradient_after_any_solver_is_analytic(case: Case):
    got = gradient(case.example, solver=case.make(), budget=case.budget)
    assert relative_error(got, case.example.hypergradient) <= 1e-8


@pytest.mark.parametrize("case", SOLVERS, ids=by_name)
def test_gradient_of_any_converged_iteration_is_analytic(case: Case):
    options = {"solver": case.make(), "estimator": bl.Unrolled(), "budget": case.budget}
    assert relative_error(gradient(case.example, **options), case.example.hypergradient) <= 1e-8


@pytest.mark.parametrize("name", LINEAR_SOLVERS)
def test_implicit_gradient_by_any_adjoint_solver_is_analytic(name: str):
    example_name, make = LINEAR_SOLVERS[name]
    example = EXAMPLES[example_name]
    got = gradient(
        example,
        estimator=bl.Implicit(solver=make()),
        adjoint_budget=bl.Budget(iterations=300, rtol=1e-12),
    )
    assert relative_error(got, example.hypergradient) <= 1e-8


ESTIMATORS = {
    "all": lambda: bl.Unrolled(store="all"),
    "last": lambda: bl.Unrolled(last=1000),
    "cg": lambda: bl.Implicit(solver=bl.ConjugateGradient()),
    "minres": lambda: bl.Implicit(solver=bl.MINRES()),
    "gmres": lambda: bl.Implicit(solver=bl.GMRES()),
    "bicgstab": lambda: bl.Implicit(solver=bl.BiCGStab()),
    "neumann": bl.Neumann,
    "nystrom": lambda: bl.Nystrom(rank=N, damping=1e-8),
}


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("case", SOLVERS, ids=by_name)
def test_every_solver_with_every_estimator(case: Case, estimator: str):
    example = case.example
    symmetric = case.example_name in {"ridge", "convex", "definite", "lasso"}
    if estimator in {"cg", "nystrom"} and not symmetric:
        pytest.skip("needs a symmetric positive definite operator")
    if estimator == "minres" and not symmetric and case.example_name != "indefinite":
        pytest.skip("needs a symmetric operator")
    if estimator == "neumann" and case.example_name in {"indefinite", "root"}:
        pytest.skip("the series does not converge")
    got = gradient(
        example,
        solver=case.make(),
        estimator=ESTIMATORS[estimator](),
        budget=case.budget,
        adjoint_budget=bl.Budget(iterations=2000, rtol=1e-12),
    )
    # The Nyström inverse is off by its damping.
    tolerance = 1e-5 if estimator == "nystrom" else 1e-8
    assert relative_error(got, example.hypergradient) <= tolerance


@pytest.mark.parametrize(
    "example_name", others_slow(["ridge", "definite", "mapping"], "definite", "mapping")
)
def test_neumann_series_long_enough_is_analytic(example_name: str):
    example = EXAMPLES[example_name]
    budget = bl.Budget(iterations=500, rtol=1e-12)
    got = gradient(example, estimator=bl.Neumann(), adjoint_budget=budget)
    assert relative_error(got, example.hypergradient) <= 1e-8


def test_neumann_series_cut_short_is_its_partial_sum():
    example, step, terms = EXAMPLES["ridge"], 0.3, 4
    got = gradient(
        example, estimator=bl.Neumann(step_size=step), adjoint_budget=bl.Budget(iterations=terms)
    )
    theta, x = example.theta, example.solution(example.theta)
    of_x, of_theta = jax.grad(loss, argnums=(0, 1))(x, theta)
    residual = example.problem.residual
    hessian = jax.jacobian(residual)(x, theta)
    series = sum(np.linalg.matrix_power(np.eye(N) - step * hessian, j) for j in range(terms))
    expected = of_theta - jax.jacobian(residual, argnums=1)(x, theta).T @ (step * series @ of_x)
    np.testing.assert_allclose(got, expected, rtol=1e-9)


@pytest.mark.parametrize("damping", [1e-3, 1e-6])
def test_nystrom_of_full_rank_is_analytic_up_to_its_damping(damping: float):
    example = EXAMPLES["ridge"]
    got = gradient(example, estimator=bl.Nystrom(rank=N, damping=damping))
    assert relative_error(got, example.hypergradient) <= 20 * damping


def test_one_step_after_newton_is_analytic():
    example = EXAMPLES["convex"]
    got = gradient(example, solver=bl.Newton(), estimator=bl.OneStep())
    assert relative_error(got, example.hypergradient) <= 1e-8


def test_one_step_after_gradient_descent_is_the_derivative_of_one_step():
    example, step = EXAMPLES["ridge"], 0.3
    solver = bl.GradientDescent(step)
    got = gradient(example, solver=solver, estimator=bl.OneStep(), budget=bl.Budget(iterations=5))
    x = bl.solve(
        example.problem, example.theta, example.x0, solver=solver, budget=bl.Budget(iterations=5)
    ).value

    def one_step(theta: Any) -> Any:
        return x - step * example.problem.residual(x, theta)

    _, pull = jax.vjp(one_step, example.theta)
    of_x, of_theta = jax.grad(loss, argnums=(0, 1))(x, example.theta)
    np.testing.assert_allclose(got, of_theta + pull(of_x)[0], rtol=1e-12)


# ---------------------------------------------------------------- the truncated computation


def plain_loop(case: Case, theta: Any, steps: int) -> Any:
    """What the solver's own functions compute in a Python loop."""
    example, solver = case.example, case.make()
    bound = solver.prepare(example.problem.at(theta), example.x0)
    state = solver.init(bound, example.x0)
    for _ in range(steps):
        state = solver.step(bound, state, solver.residual(bound, state))
    return loss(solver.value(state), theta)


@pytest.mark.parametrize(
    "case",
    others_slow(
        [case for case in SOLVERS if case.truncated],
        "GradientDescent",
        "HeavyBall",
        "ConjugateGradient",
        "GMRES",
        "Anderson",
        "FixedPointIteration",
        "Direct",
    ),
    ids=by_name,
)
def test_truncated_unrolling_is_the_plain_loop(case: Case):
    steps = min(STEPS, case.truncated)

    def both(theta: Any) -> Any:
        budget = bl.Budget(iterations=steps)
        options = {"solver": case.make(), "estimator": bl.Unrolled(), "budget": budget}
        unrolled = jax.grad(lambda theta: outer(case.example, theta, **options))
        return unrolled(theta), jax.grad(lambda theta: plain_loop(case, theta, steps))(theta)

    got, expected = jitted(both)(case.example.theta)
    assert relative_error(got, expected) <= 1e-12


def ridge_gradient(x: Any, theta: Any) -> Any:
    """By hand: no function of the library takes part."""
    return FEATURES.T @ (FEATURES @ x - TARGETS) / len(TARGETS) + jnp.exp(theta) * x


def gradient_descent_by_hand(theta: Any, steps: int) -> Any:
    x = jnp.zeros(N)
    for _ in range(steps):
        x = x - 0.3 * ridge_gradient(x, theta)
    return loss(x, theta)


def heavy_ball_by_hand(theta: Any, steps: int) -> Any:
    x = before = jnp.zeros(N)
    for _ in range(steps):
        x, before = x - 0.3 * ridge_gradient(x, theta) + 0.5 * (x - before), x
    return loss(x, theta)


def jacobi_by_hand(theta: Any, steps: int) -> Any:
    neighbours = 0.4 * (np.eye(N, k=1) + np.eye(N, k=-1))
    x = jnp.zeros(N)
    for _ in range(steps):
        x = (jnp.cos(theta) + jnp.arange(1.0, N + 1) + neighbours @ x) / (1.5 + theta)
    return loss(x, theta)


BY_HAND = {
    "GradientDescent": ("ridge", lambda: bl.GradientDescent(0.3), gradient_descent_by_hand),
    "HeavyBall": ("ridge", lambda: bl.HeavyBall(0.3, 0.5), heavy_ball_by_hand),
    "Jacobi": ("definite", bl.Jacobi, jacobi_by_hand),
}
LAYOUTS = {
    "checkpoints": {},
    "checkpoints, just room enough": {"max_iterations": 17},
    "all": {"store": "all"},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", others_slow(BY_HAND, "Jacobi"))
def test_truncated_unrolling_is_the_loop_written_by_hand(name: str, layout: str):
    example_name, make, by_hand = BY_HAND[name]
    example = EXAMPLES[example_name]
    estimator = bl.Unrolled(**LAYOUTS[layout])

    def unrolled(theta: Any, count: Any) -> Any:
        budget = bl.Budget(iterations=count)
        return outer(example, theta, solver=make(), estimator=estimator, budget=budget)

    compiled = jitted(jax.grad(unrolled))
    for steps in (1, 7, 17):
        expected = jax.grad(by_hand)(example.theta, steps)
        got = compiled(example.theta, steps)
        np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-14)
    # No step at all: zeros by hand, which would look like a gradient that has vanished.
    assert np.isnan(compiled(example.theta, 0)).all()


@pytest.mark.parametrize("last", [1, 3, 20])
def test_truncated_back_propagation_takes_the_state_before_as_constant(last: int):
    example, steps = EXAMPLES["ridge"], 7

    def by_hand(theta: Any) -> Any:
        x = jnp.zeros(N)
        for step in range(steps):
            frozen = jax.lax.stop_gradient(theta) if step < steps - last else theta
            x = x - 0.3 * ridge_gradient(x, frozen)
        return loss(x, theta)

    got = gradient(
        example,
        solver=bl.GradientDescent(0.3),
        estimator=bl.Unrolled(last=last, max_iterations=20),
        budget=bl.Budget(iterations=steps),
    )
    np.testing.assert_allclose(got, jax.grad(by_hand)(example.theta), rtol=1e-12)


def test_unrolling_differentiates_the_start_and_the_step_size():
    example, steps = EXAMPLES["ridge"], 4

    def unrolled(start: Any, step: Any) -> Any:
        solution = bl.solve(
            example.problem,
            example.theta,
            start,
            solver=bl.GradientDescent(step),
            estimator=bl.Unrolled(),
            budget=bl.Budget(iterations=steps),
        )
        return loss(solution.value, example.theta)

    def by_hand(start: Any, step: Any) -> Any:
        x = start
        for _ in range(steps):
            x = x - step * ridge_gradient(x, example.theta)
        return loss(x, example.theta)

    start = jnp.linspace(-1.0, 1.0, N)
    got = jitted(jax.grad(unrolled, argnums=(0, 1)))(start, 0.3)
    expected = jax.grad(by_hand, argnums=(0, 1))(start, 0.3)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-12), got, expected)


def test_implicit_gradient_does_not_depend_on_the_start():
    example = EXAMPLES["ridge"]

    def value(start: Any) -> Any:
        return loss(bl.solve(example.problem, example.theta, start).value, example.theta)

    np.testing.assert_array_equal(jitted(jax.grad(value))(jnp.ones(N)), np.zeros(N))


def test_jacobi_from_zero_has_the_same_implicit_and_unrolled_gradient_after_k_steps():
    """Symmetric, constant diagonal, A independent of θ: the adjoint is the same iteration."""
    stiffness = 2.0 * np.eye(N) - np.eye(N, k=1) - np.eye(N, k=-1)
    modes = np.sin(np.outer(np.arange(1, N + 1), np.arange(1, N + 1)) * np.pi / (N + 1))
    problem = bl.LinearSystem(stiffness, lambda theta: modes @ theta, positive_definite=True)
    reference = np.linalg.solve(stiffness, modes @ np.ones(N))

    def misfit(theta: Any, count: Any, estimator: Any) -> Any:
        budget = bl.Budget(iterations=count)
        solution = bl.solve(
            problem,
            theta,
            jnp.zeros(N),
            solver=bl.Jacobi(),
            estimator=estimator,
            budget=budget,
            adjoint_budget=budget,
        )
        return jnp.sum((solution.value - reference) ** 2)

    implicit = jitted(jax.grad(lambda *a: misfit(*a, bl.Implicit(solver=bl.Jacobi()))))
    unrolled = jitted(jax.grad(lambda *a: misfit(*a, bl.Unrolled())))
    for steps in (1, 2, 5, 25):
        got = implicit(jnp.asarray(THETA), steps)
        assert relative_error(got, unrolled(jnp.asarray(THETA), steps)) <= 1e-12


# ---------------------------------------------------------------------------- Taylor's test


@pytest.mark.parametrize(
    "example_name",
    others_slow(
        ["ridge", "convex", "general", "mapping", "root", "lasso"], "general", "mapping", "root"
    ),
)
def test_implicit_gradient_passes_taylor(example_name: str):
    example = EXAMPLES[example_name]
    value = jitted(lambda theta: outer(example, theta, budget=bl.Budget(2000, rtol=1e-14)))
    assert taylor_test(value, example.theta, derivative=gradient(example)).slope >= 1.95


@pytest.mark.parametrize("name", others_slow(BY_HAND, "GradientDescent"))
def test_truncated_gradient_passes_taylor_on_the_truncated_loss(name: str):
    example_name, make, _ = BY_HAND[name]
    example = EXAMPLES[example_name]
    options = {"solver": make(), "estimator": bl.Unrolled(), "budget": bl.Budget(iterations=5)}
    value = jitted(lambda theta: outer(example, theta, **options))
    derivative = gradient(example, **options)
    assert taylor_test(value, example.theta, derivative=derivative).slope >= 1.95


# ------------------------------------------------------------- modes, orders, transformations


@pytest.mark.parametrize("example_name", others_slow(["convex", "general", "mapping"], "general"))
def test_forward_mode_of_implicit_is_analytic(example_name: str):
    example = EXAMPLES[example_name]
    got = jitted(jax.jacfwd(lambda theta: outer(example, theta)))(example.theta)
    assert relative_error(got, example.hypergradient) <= 1e-8


@pytest.mark.parametrize("name", BY_HAND)
def test_forward_mode_of_unrolling_is_the_loop_written_by_hand(name: str):
    example_name, make, by_hand = BY_HAND[name]
    example = EXAMPLES[example_name]
    options = {
        "solver": make(),
        "estimator": bl.Unrolled(mode="forward"),
        "budget": bl.Budget(iterations=7),
    }
    got = jitted(jax.jacfwd(lambda theta: outer(example, theta, **options)))(example.theta)
    assert relative_error(got, jax.grad(by_hand)(example.theta, 7)) <= 1e-12


@pytest.mark.parametrize("example_name", others_slow(["convex", "general"], "general"))
def test_hessian_of_implicit_is_analytic(example_name: str):
    example = EXAMPLES[example_name]
    got = jitted(jax.hessian(lambda theta: outer(example, theta)))(example.theta)
    expected = jax.hessian(lambda t: loss(example.solution(t), t))(example.theta)
    assert relative_error(got, expected) <= 1e-8


@pytest.mark.slow
def test_hessian_in_reverse_over_reverse_of_implicit_is_analytic():
    example = EXAMPLES["convex"]
    second = jax.jacrev(jax.jacrev(lambda theta: outer(example, theta)))
    expected = jax.hessian(lambda t: loss(example.solution(t), t))(example.theta)
    assert relative_error(jitted(second)(example.theta), expected) <= 1e-8


@pytest.mark.slow
def test_hessian_of_unrolling_is_that_of_the_loop():
    example = EXAMPLES["ridge"]
    options = {
        "solver": bl.GradientDescent(0.3),
        "estimator": bl.Unrolled(max_iterations=16),
        "budget": bl.Budget(iterations=6),
    }
    got = jitted(jax.hessian(lambda theta: outer(example, theta, **options)))(example.theta)
    expected = jax.hessian(functools.partial(gradient_descent_by_hand, steps=6))(example.theta)
    assert relative_error(got, expected) <= 1e-12


@pytest.mark.parametrize(
    "estimator",
    [bl.Implicit(), pytest.param(bl.Unrolled(), marks=pytest.mark.slow)],
    ids=["implicit", "unrolled"],
)
def test_transformations_compose_in_every_order(estimator: Any):
    example = EXAMPLES["ridge"]
    options = {
        "solver": bl.GradientDescent(0.3),
        "estimator": estimator,
        "budget": bl.Budget(iterations=9),
    }

    def value(theta: Any) -> Any:
        return outer(example, theta, **options)

    thetas = example.theta + jnp.linspace(-0.2, 0.2, 3)[:, None]
    expected = np.stack([jitted(jax.grad(value))(theta) for theta in thetas])
    combinations = {
        "grad": lambda batch: jnp.stack([jax.grad(value)(theta) for theta in batch]),
        "vmap of grad": jax.vmap(jax.grad(value)),
        "jit of vmap of grad": jitted(jax.vmap(jax.grad(value))),
        "grad of sum of vmap": jitted(jax.grad(lambda batch: jnp.sum(jax.vmap(value)(batch)))),
        "map of grad": jitted(lambda batch: jax.lax.map(jax.grad(value), batch)),
    }
    for name, combination in combinations.items():
        np.testing.assert_allclose(combination(thetas), expected, rtol=1e-12, err_msg=name)


# ---------------------------------------------------------------------------- the adjoint


def test_adjoint_has_a_budget_of_its_own():
    """A converged primal with a short adjoint, and the other way round, are told apart."""
    example = EXAMPLES["ridge"]
    solver = bl.GradientDescent(0.3)
    estimator = bl.Implicit(solver=bl.Richardson(0.3))

    @jitted
    def error(primal: Any, adjoint: Any) -> Any:
        value = functools.partial(
            outer,
            example,
            solver=solver,
            estimator=estimator,
            budget=bl.Budget(iterations=primal),
            adjoint_budget=bl.Budget(iterations=adjoint),
        )
        return jnp.linalg.norm(jax.grad(value)(example.theta) - example.hypergradient)

    assert error(400, 400) <= 1e-10
    assert error(5, 400) >= 1e-4
    assert error(400, 5) >= 1e-4
    # Nothing of the primal's budget reaches the adjoint: only its own numbers count.
    np.testing.assert_allclose(error(400, 5), error(10_000, 5), rtol=1e-6)


def test_adjoint_guess_is_where_the_adjoint_starts():
    example = EXAMPLES["ridge"]
    x = example.solution(example.theta)
    hessian = jax.jacobian(example.problem.residual)(x, example.theta)
    adjoint = jnp.linalg.solve(hessian, jax.grad(loss)(x, example.theta))
    got = gradient(
        example,
        estimator=bl.Implicit(solver=bl.Richardson(0.1)),
        adjoint_budget=bl.Budget(iterations=1),
        adjoint_guess=adjoint,
    )
    assert relative_error(got, example.hypergradient) <= 1e-8


def test_preconditioned_adjoint_needs_fewer_iterations():
    """With the exact inverse as preconditioner a single iteration is enough."""
    example = EXAMPLES["definite"]
    inverse = np.linalg.inv(example.problem.operator(example.theta))
    solver = bl.ConjugateGradient(preconditioner=lambda v: inverse @ v)
    budget = bl.Budget(iterations=1)
    got = gradient(example, estimator=bl.Implicit(solver=solver), adjoint_budget=budget)
    assert relative_error(got, example.hypergradient) <= 1e-8
    plain = bl.Implicit(solver=bl.ConjugateGradient())
    short = gradient(example, estimator=plain, adjoint_budget=budget)
    assert relative_error(short, example.hypergradient) >= 1e-4


@pytest.mark.parametrize(
    "name",
    others_slow(["Implicit", "Unrolled", "Neumann", "OneStep", "Nystrom"], "Implicit", "Unrolled"),
)
def test_hypergradient_and_grad_through_solve_are_the_same_numbers(name: str):
    example = EXAMPLES["ridge"]
    options = {
        "solver": bl.GradientDescent(0.3),
        "estimator": getattr(bl, name)(),
        "budget": bl.Budget(iterations=8),
        "adjoint_budget": bl.Budget(iterations=8),
    }
    result = bl.hypergradient(
        loss, example.problem, example.theta, example.x0, error=False, **options
    )
    np.testing.assert_allclose(result.gradient, gradient(example, **options), rtol=1e-12)
    np.testing.assert_allclose(result.value, outer(example, example.theta, **options), rtol=1e-13)
    assert int(result.primal.iterations) == 8


@pytest.mark.parametrize("error", others_slow([False, True], False))
def test_a_hypergradient_differentiates_where_the_outer_loss_is_linear(error: bool):
    """The adjoint's right-hand side is constant there, and its operator is not."""
    problem = bl.RootFinding(lambda x, theta: x**3 - theta)

    def first(theta: Any) -> Any:
        options: dict[str, Any] = {"error": error}
        outer_loss = lambda x, theta: jnp.sum(x)  # noqa: E731
        return bl.hypergradient(outer_loss, problem, theta, jnp.ones(2), **options).gradient

    # x = ∛θ: the sum of two has the second derivative -4/9 θ^(-5/3).
    expected = -4 / 9 * 0.5 ** (-5 / 3)
    np.testing.assert_allclose(jax.grad(first)(0.5), expected, rtol=1e-8)
    np.testing.assert_allclose(jax.jacfwd(first)(0.5), expected, rtol=1e-8)


def test_leaves_of_theta_that_have_no_derivative_are_left_alone():
    problem = bl.Minimization(lambda x, theta: theta["scale"] * jnp.sum((x - theta["n"]) ** 2))
    theta = {"scale": 2.0, "n": 3, "name": None}

    def value(scale: Any) -> Any:
        return jnp.sum(bl.solve(problem, {**theta, "scale": scale}, jnp.zeros(2)).value)

    assert float(jitted(jax.grad(value))(2.0)) == pytest.approx(0.0, abs=1e-12)
    np.testing.assert_allclose(bl.solve(problem, theta, jnp.zeros(2)).value, [3.0, 3.0])
