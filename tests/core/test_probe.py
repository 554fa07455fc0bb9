"""Numbers out of a backward pass."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel as bl
from tests.core.cases import EXAMPLES, N, loss
from tests.core.compiling import jitted
from tests.marks import others_slow

RIDGE = EXAMPLES["ridge"]
OPTIONS: dict[str, Any] = {
    "solver": bl.GradientDescent(0.3),
    "estimator": bl.Implicit(solver=bl.Richardson(0.3)),
    "budget": bl.Budget(iterations=7),
    "adjoint_budget": bl.Budget(iterations=5),
}


def value(theta: Any, probe: Any, **changes: Any) -> Any:
    solution = bl.solve(RIDGE.problem, theta, RIDGE.x0, probe=probe, **(OPTIONS | changes))
    return loss(solution.value, theta)


def report(function: Any, *arguments: Any) -> bl.Probe:
    return jitted(jax.grad(function, argnums=1))(*arguments)


def test_a_probe_counts_what_both_solves_did():
    got = report(value, RIDGE.theta, bl.Probe.zeros())
    assert int(got.solves) == 1
    assert int(got.primal_iterations) == 7
    assert int(got.adjoint_iterations) == 5
    assert int(got.primal_applications) == 9  # one more for the scale of the tolerance
    assert int(got.adjoint_applications) == 6
    assert int(got.primal_capped) == int(got.adjoint_capped) == 1
    assert int(got.failures) == 0
    assert 0 < float(got.primal_residual) < 1
    assert 0 < float(got.adjoint_residual) < 1


def test_residuals_are_relative_to_each_solve_s_own_scale():
    """As documented: so the outer loss may have any size."""

    def scaled(theta: Any, probe: Any) -> Any:
        return 1e-6 * value(theta, probe)

    got, expected = (report(f, RIDGE.theta, bl.Probe.zeros()) for f in (scaled, value))
    np.testing.assert_allclose(got.adjoint_residual, expected.adjoint_residual, rtol=1e-9)
    np.testing.assert_allclose(got.primal_residual, expected.primal_residual, rtol=1e-12)


def test_a_probe_changes_neither_value_nor_gradient():
    with_probe = jitted(jax.value_and_grad(value))(RIDGE.theta, bl.Probe.zeros())
    without = jitted(jax.value_and_grad(lambda theta: value(theta, None)))(RIDGE.theta)
    for got, expected in zip(with_probe, without, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-13)


@pytest.mark.parametrize("name", ["Unrolled", "OneStep", "Neumann", "Nystrom"])
def test_every_estimator_reports(name: str):
    got = report(
        lambda theta, probe: value(theta, probe, estimator=getattr(bl, name)()),
        RIDGE.theta,
        bl.Probe.zeros(),
    )
    assert int(got.solves) == 1
    assert int(got.primal_iterations) == 7
    assert int(got.adjoint_iterations) == {"Neumann": 5, "Nystrom": 1}.get(name, 0)


def test_solves_that_share_a_probe_add_up():
    def twice(theta: Any, probe: Any) -> Any:
        other = value(theta, probe, budget=bl.Budget(iterations=3))
        return value(theta, probe) + other

    got = report(twice, RIDGE.theta, bl.Probe.zeros())
    assert int(got.solves) == 2
    assert int(got.primal_iterations) == 10


def test_samples_of_a_batch_add_up_or_report_each_their_own():
    caps = jnp.array([1, 4, 9])
    thetas = jnp.stack([RIDGE.theta] * 3)

    def of_sample(theta: Any, cap: Any, probe: Any) -> Any:
        return value(theta, probe, budget=bl.Budget(iterations=cap))

    def shared(theta: Any, probe: Any) -> Any:
        return jnp.sum(jax.vmap(of_sample, in_axes=(0, 0, None))(theta, caps, probe))

    assert int(report(shared, thetas, bl.Probe.zeros()).primal_iterations) == 14
    own = jitted(jax.vmap(jax.grad(of_sample, argnums=2)))(
        thetas, caps, jax.tree.map(lambda leaf: jnp.zeros(3), bl.Probe.zeros())
    )
    np.testing.assert_array_equal(own.primal_iterations, caps)
    np.testing.assert_array_equal(own.solves, 1)


def test_a_probe_inside_a_fidelity_is_filled():
    def through_fidelity(theta: Any, probe: Any) -> Any:
        fidelity = bl.Fidelity(OPTIONS["budget"], OPTIONS["adjoint_budget"], probe=probe)
        solution = bl.solve(
            RIDGE.problem,
            theta,
            RIDGE.x0,
            solver=OPTIONS["solver"],
            estimator=OPTIONS["estimator"],
            fidelity=fidelity,
        )
        return loss(solution.value, theta)

    assert int(report(through_fidelity, RIDGE.theta, bl.Probe.zeros()).adjoint_iterations) == 5


def test_a_probe_reports_even_if_nothing_else_is_differentiated():
    got = jitted(jax.grad(lambda probe: value(RIDGE.theta, probe)))(bl.Probe.zeros())
    assert int(got.primal_iterations) == 7
    assert int(got.solves) == 1


def test_failures_are_counted_next_to_a_gradient_that_is_nan():
    def failing(theta: Any, probe: Any) -> Any:
        return value(theta, probe, solver=bl.GradientDescent(50.0), budget=bl.Budget(100))

    gradient, got = jitted(jax.grad(failing, argnums=(0, 1)))(RIDGE.theta, bl.Probe.zeros())
    assert int(got.failures) == 1
    assert np.all(np.isnan(gradient))


def test_an_adjoint_probe_is_the_adjoint_solution():
    got = report(value, RIDGE.theta, bl.AdjointProbe.zeros(RIDGE.x0))
    solution = got.solution()
    assert int(solution.iterations) == 5
    assert int(solution.status) == bl.Status.BUDGET
    x = bl.solve(
        RIDGE.problem, RIDGE.theta, RIDGE.x0, solver=OPTIONS["solver"], budget=OPTIONS["budget"]
    )
    of_x = jax.grad(loss)(x.value, RIDGE.theta)
    hessian = jax.jacobian(RIDGE.problem.residual)(x.value, RIDGE.theta)
    np.testing.assert_allclose(got.residual, of_x - hessian @ got.value, atol=1e-12)
    np.testing.assert_allclose(solution.residual_norm, np.linalg.norm(got.residual), rtol=1e-9)
    np.testing.assert_allclose(solution.scale, np.linalg.norm(of_x), rtol=1e-9)
    assert got.value.shape == (N,)


def test_something_else_for_a_probe_is_refused():
    with pytest.raises(TypeError, match="probe must be a Probe or AdjointProbe"):
        value(RIDGE.theta, 0.0)


@pytest.mark.parametrize(
    "name", others_slow(["Implicit", "Unrolled", "OneStep", "Neumann", "Nystrom"], "Implicit")
)
def test_from_inside_grad_the_error_estimate_is_that_of_hypergradient(name: str):
    estimator = getattr(bl, name)()
    options = OPTIONS | {"estimator": estimator}

    def outer(theta: Any, probe: Any) -> Any:
        solution = bl.solve(RIDGE.problem, theta, RIDGE.x0, probe=probe, **options)
        return loss(solution.value, theta), solution

    differentiated = jitted(jax.grad(outer, argnums=(0, 1), has_aux=True))
    (gradient, detail), solution = differentiated(RIDGE.theta, bl.AdjointProbe.zeros(RIDGE.x0))
    got = bl.truncation_error(
        loss, RIDGE.problem, RIDGE.theta, solution, gradient, detail, estimator=estimator
    )
    expected = bl.hypergradient(loss, RIDGE.problem, RIDGE.theta, RIDGE.x0, **options).error
    assert float(got.total) > 1e-6, "the test shows nothing without an error"
    for part in ("primal", "adjoint", "total"):
        np.testing.assert_allclose(
            getattr(got, part), getattr(expected, part), rtol=1e-6, atol=1e-12
        )
