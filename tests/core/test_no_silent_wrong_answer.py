"""What cannot be solved says so: no plausible number marked converged, no zero that is none."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel as bl
from tests.core.cases import EXAMPLES, FAMILIES, SOLVERS, N, by_name, loss
from tests.core.compiling import jitted
from tests.marks import others_slow

FAILED = {status for status in bl.Status if status.failed}
HONEST = {bl.Status.BUDGET, bl.Status.ROUNDING, *FAILED}


def evaluate(
    problem: Any, theta: Any, x0: Any = None, outer: Any = loss, **options: Any
) -> tuple[Any, Any, bl.Probe]:
    """Solution, gradient, and report of the backward pass."""
    start = jnp.zeros(N) if x0 is None else x0

    def value(theta: Any, probe: Any) -> Any:
        solution = bl.solve(problem, theta, start, probe=probe, **options)
        return outer(solution.value, theta), solution

    (gradient, report), solution = jitted(jax.grad(value, argnums=(0, 1), has_aux=True))(
        theta, bl.Probe.zeros()
    )
    return solution, gradient, report


def status_of(solution: Any) -> bl.Status:
    return bl.Status(int(solution.status))


def assert_honest(problem: Any, theta: Any, solution: Any) -> None:
    """Never converged with a true residual above ten times the tolerance."""
    residual = problem.at(theta).residual(solution.value)
    if status_of(solution) is bl.Status.CONVERGED:
        assert float(jnp.linalg.norm(residual)) <= 10 * float(solution.tolerance)


# -------------------------------------------------------------------- NaN and infinity in data


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize(
    "case", others_slow(SOLVERS, *FAMILIES, "Newton", "LBFGS", "FISTA"), ids=by_name
)
def test_non_finite_data_end_as_failure_and_in_no_gradient(case: Any, bad: float):
    if np.isinf(bad) and case.name not in {
        "GradientDescent",
        "ConjugateGradient",
        "GMRES",
        "Newton",
    }:
        pytest.skip("one of each kind is enough")
    example = case.example
    theta = example.theta.at[0].set(bad)
    solution, gradient, report = evaluate(
        example.problem, theta, example.x0, solver=case.make(), budget=case.budget
    )
    assert status_of(solution) in FAILED
    assert not np.any(np.isfinite(gradient)), gradient
    assert int(report.failures) == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_constant_matrix_that_is_not_finite_is_not_called_unsymmetric(bad: float):
    problem = bl.LinearSystem(np.diag([1.0, bad, 2.0, 3.0]), np.ones(N))
    solution = bl.solve(problem, None, jnp.zeros(N), solver=bl.ConjugateGradient())
    assert status_of(solution) is bl.Status.NONFINITE


@pytest.mark.parametrize(
    "name",
    others_slow(
        ["ConjugateGradient", "MINRES", "BiCGStab", "GMRES", "Direct", "Richardson"],
        "ConjugateGradient",
        "GMRES",
    ),
)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_non_finite_outer_loss_is_no_zero_gradient(name: str, bad: float):
    """The adjoint's right-hand side is not finite: other libraries return zeros here."""
    adjoint = bl.Richardson(0.3) if name == "Richardson" else getattr(bl, name)()
    _, gradient, report = evaluate(
        EXAMPLES["ridge"].problem,
        EXAMPLES["ridge"].theta,
        outer=lambda x, theta: jnp.sum(x * jnp.array([1.0, bad, 1.0, 1.0])) + 0 * theta[0],
        estimator=bl.Implicit(solver=adjoint),
    )
    assert not np.any(np.isfinite(gradient))
    assert int(report.failures) == 1


@pytest.mark.parametrize(
    "name",
    others_slow(
        ["ConjugateGradient", "MINRES", "SteepestDescent", "Chebyshev"], "ConjugateGradient"
    ),
)
def test_symmetry_that_nobody_declared_is_looked_at(name: str):
    skew = np.triu(np.random.default_rng(0).standard_normal((N, N)), 1)
    definite = jnp.asarray(6.0 * np.eye(N) + skew @ skew.T)
    general = definite + 1e-3 * jnp.asarray(skew)

    def solve(matrix: Any, **declared: Any) -> Any:
        problem = bl.LinearSystem(lambda _: lambda v: matrix @ v, jnp.ones(N), **declared)
        return bl.solve(problem, 1.0, jnp.zeros(N), solver=getattr(bl, name)())

    def adjoint(matrix: Any) -> Any:
        problem = bl.LinearSystem(lambda theta: lambda v: theta * (matrix @ v), jnp.ones(N))
        return bl.hypergradient(
            lambda x, theta: jnp.sum(x**2),
            problem,
            1.0,
            jnp.zeros(N),
            solver=bl.GMRES(),
            estimator=bl.Implicit(solver=getattr(bl, name)()),
        )

    assert status_of(solve(definite)) is bl.Status.CONVERGED
    found = solve(general)
    assert status_of(found) is bl.Status.NOT_SYMMETRIC
    assert int(found.iterations) == 0
    # Who declares it is taken at his word, and pays for no look.
    assert status_of(solve(general, symmetric=True)) is not bl.Status.NOT_SYMMETRIC
    declared = solve(definite, symmetric=True, positive_definite=True)
    assert int(solve(definite).applications) == int(declared.applications) + 2
    result = adjoint(general)
    assert status_of(result.adjoint) is bl.Status.NOT_SYMMETRIC
    assert np.isnan(result.gradient)
    assert np.isinf(result.error.total)


@pytest.mark.parametrize("estimator", ["Unrolled", "OneStep"])
@pytest.mark.parametrize("linear", others_slow(["ConjugateGradient", "GMRES"], "GMRES"))
def test_a_non_finite_outer_loss_comes_through_the_linear_solves_of_newton(
    linear: str, estimator: str
):
    """Their transposes have a right-hand side that is not finite, and make no step."""
    example = EXAMPLES["convex"]
    _, gradient, _ = evaluate(
        example.problem,
        example.theta,
        outer=lambda x, theta: jnp.sum(x * jnp.array([1.0, jnp.nan, 1.0, 1.0])),
        solver=bl.Newton(linear=getattr(bl, linear)()),
        estimator=getattr(bl, estimator)(),
    )
    assert not np.any(np.isfinite(gradient))


def test_a_non_finite_start_is_said():
    example = EXAMPLES["convex"]
    solution, gradient, _ = evaluate(example.problem, example.theta, jnp.full(N, jnp.nan))
    assert status_of(solution) is bl.Status.NONFINITE
    assert not np.any(np.isfinite(gradient))


def test_one_bad_sample_of_a_batch_leaves_the_others_alone():
    example = EXAMPLES["ridge"]
    thetas = jnp.stack([example.theta, example.theta * jnp.nan, example.theta])

    def value(theta: Any) -> Any:
        solution = bl.solve(example.problem, theta, example.x0, solver=bl.GradientDescent(0.3))
        return loss(solution.value, theta), solution.status

    gradients, statuses = jitted(jax.vmap(jax.grad(value, has_aux=True)))(thetas)
    np.testing.assert_allclose(gradients[0], example.hypergradient, rtol=1e-6)
    np.testing.assert_array_equal(gradients[0], gradients[2])
    assert not np.any(np.isfinite(gradients[1]))
    assert [bl.Status(int(status)).name for status in statuses] == [
        "CONVERGED",
        "NONFINITE",
        "CONVERGED",
    ]


# ------------------------------------------------------------- operators of the wrong kind

SINGULAR = np.diag([1.0, 2.0, 3.0, 0.0])
INDEFINITE = np.diag([1.0, -2.0, 3.0, 4.0])
SKEWED = np.diag([1.0, 2.0, 3.0, 4.0]) + np.triu(np.full((N, N), 3.0), 1)
LINEAR = {
    "ConjugateGradient": bl.ConjugateGradient,
    "SteepestDescent": bl.SteepestDescent,
    "Chebyshev": bl.Chebyshev,
    "MINRES": bl.MINRES,
    "BiCGStab": bl.BiCGStab,
    "GMRES": bl.GMRES,
    "Jacobi": bl.Jacobi,
    "Richardson": lambda: bl.Richardson(0.3),
    "Direct": bl.Direct,
    "default": lambda: None,
}


def system(matrix: Any, **declared: Any) -> Any:
    """A(θ) = A diag(1 + θ) and b(θ) = 1 + θ, so that everything depends on θ."""
    return bl.LinearSystem(lambda theta: matrix * (1 + theta), lambda theta: 1 + theta, **declared)


@pytest.mark.parametrize(
    "name",
    others_slow(LINEAR, "ConjugateGradient", "MINRES", "GMRES", "Jacobi", "Direct", "default"),
)
def test_a_singular_operator_is_not_solved(name: str):
    problem, theta = system(SINGULAR), jnp.zeros(N)
    solution, gradient, report = evaluate(problem, theta, solver=LINEAR[name]())
    assert status_of(solution) in HONEST
    assert_honest(problem, theta, solution)
    # The adjoint cannot be solved either: no gradient may come out that looks like one.
    norm = float(jnp.linalg.norm(gradient))
    assert not np.isfinite(norm) or int(report.adjoint_capped) == 1
    assert norm != 0


@pytest.mark.parametrize(
    "name",
    others_slow(
        ["ConjugateGradient", "SteepestDescent", "Chebyshev", "Direct"],
        "ConjugateGradient",
        "Direct",
    ),
)
def test_an_indefinite_operator_declared_definite_breaks_down(name: str):
    problem = system(INDEFINITE, positive_definite=True)
    solution, gradient, report = evaluate(problem, jnp.zeros(N), solver=LINEAR[name]())
    assert status_of(solution) in FAILED
    assert not np.any(np.isfinite(gradient))
    assert int(report.failures) == 1


def test_an_indefinite_operator_of_unknown_kind_breaks_conjugate_gradients_down():
    solution, gradient, _ = evaluate(
        system(INDEFINITE), jnp.zeros(N), solver=bl.ConjugateGradient()
    )
    assert status_of(solution) is bl.Status.BREAKDOWN
    assert "MINRES" in solution.diagnosis
    assert not np.any(np.isfinite(gradient))


@pytest.mark.parametrize(
    "name",
    others_slow(
        ["ConjugateGradient", "MINRES", "SteepestDescent", "Chebyshev"], "ConjugateGradient"
    ),
)
def test_a_non_symmetric_operator_is_not_marked_converged(name: str):
    """Undeclared, so the solver may start; the true residual tells."""
    problem, theta = system(SKEWED), jnp.zeros(N)
    options = {"solver": LINEAR[name](), "budget": bl.Budget(200, rtol=1e-8)}
    solution = bl.solve(problem, theta, jnp.zeros(N), **options)
    assert status_of(solution) in HONEST
    assert_honest(problem, theta, solution)


@pytest.mark.parametrize("name", others_slow(["ConjugateGradient", "MINRES"], "MINRES"))
def test_an_adjoint_solver_of_the_wrong_kind_gives_no_gradient_that_looks_right(name: str):
    problem, theta = system(SKEWED), jnp.zeros(N)
    expected = jax.grad(lambda t: loss(jnp.linalg.solve(SKEWED * (1 + t), 1 + t), t))(theta)
    _, gradient, report = evaluate(problem, theta, estimator=bl.Implicit(solver=LINEAR[name]()))
    error = float(jnp.linalg.norm(gradient - expected))
    assert np.isnan(error) or error > 1e-6
    assert int(report.failures) == 1 or int(report.adjoint_capped) == 1


def test_wrong_pairings_are_refused_before_anything_runs():
    nonsymmetric = system(SKEWED, symmetric=False)
    root = EXAMPLES["root"].problem
    ridge = EXAMPLES["ridge"].problem
    refused = [
        (bl.ConjugateGradient(), nonsymmetric, "symmetric", "GMRES"),
        (bl.MINRES(), nonsymmetric, "symmetric", "GMRES"),
        (bl.GradientDescent(0.1), root, "objective", "Newton"),
        (bl.FixedPointIteration(), ridge, "mapping", "Gradient"),
        (bl.GMRES(), root, "linear system", "Newton"),
        (bl.Jacobi(), bl.LinearSystem(lambda _: lambda v: 2 * v, jnp.ones(N)), "diagonal", "GMRES"),
        (bl.ProximalGradient(), ridge, "proximal", "LBFGS"),
    ]
    for solver, problem, reason, instead in refused:
        with pytest.raises(bl.IncompatibleError, match=reason) as caught:
            bl.solve(problem, jnp.zeros(N), jnp.zeros(N), solver=solver)
        assert instead in str(caught.value)
        assert type(solver).__name__ in str(caught.value)
    with pytest.raises(bl.IncompatibleError, match="does not solve linear systems"):
        bl.Implicit(solver=bl.GradientDescent(0.1))


# ------------------------------------------------------------------- zeros, rates, no budget


@pytest.mark.parametrize("name", others_slow(LINEAR, "ConjugateGradient", "Jacobi", "default"))
def test_a_zero_right_hand_side_has_the_zero_solution(name: str):
    problem = bl.LinearSystem(
        lambda theta: jnp.diag(jnp.array([1.0, 1.2, 1.4, 1.6]) + theta),
        lambda theta: 0 * theta,
        symmetric=True,
        positive_definite=True,
    )
    theta = jnp.zeros(N)
    for start in (jnp.zeros(N), jnp.ones(N)):
        solution, gradient, report = evaluate(
            problem, theta, start, solver=LINEAR[name](), budget=bl.Budget(200, rtol=1e-10)
        )
        assert status_of(solution) is bl.Status.CONVERGED
        np.testing.assert_allclose(solution.value, 0.0, atol=1e-8)
        # d/dθ of sin(x - 0.3) + θx/2 at x = 0 with ∂x = 0: nothing, and truly so.
        np.testing.assert_allclose(gradient, 0.0, atol=1e-7)
        assert int(report.failures) == 0


def test_a_zero_gradient_is_zero_only_where_it_is():
    """An outer loss that does not look at x has a true zero; it costs no adjoint failure."""
    example = EXAMPLES["ridge"]
    _, gradient, report = evaluate(
        example.problem, example.theta, outer=lambda x, theta: 0.0 * jnp.sum(x) + jnp.sum(theta)
    )
    np.testing.assert_array_equal(gradient, 1.0)
    assert int(report.failures) == 0


@pytest.mark.parametrize("factor", [1.0, 1.5])
def test_a_mapping_that_does_not_contract_diverges(factor: float):
    rotation = factor * np.array([[0.0, -1.0], [1.0, 0.0]])
    problem = bl.FixedPoint(lambda x, theta: rotation @ x + theta)
    solution, gradient, report = evaluate(
        problem,
        jnp.ones(2),
        jnp.zeros(2),
        solver=bl.FixedPointIteration(),
        budget=bl.Budget(500, rtol=1e-6),
    )
    assert status_of(solution) is bl.Status.DIVERGED
    assert "contraction" in solution.diagnosis
    assert not np.any(np.isfinite(gradient))
    assert int(report.failures) == 1


@pytest.mark.parametrize("factor", [1.0, 1.5])
def test_a_neumann_series_that_does_not_contract_diverges(factor: float):
    rotation = factor * np.array([[0.0, -1.0], [1.0, 0.0]])
    problem = bl.FixedPoint(lambda x, theta: rotation @ x + theta)
    solution, gradient, report = evaluate(
        problem,
        jnp.ones(2),
        jnp.zeros(2),
        estimator=bl.Neumann(),
        adjoint_budget=bl.Budget(500, rtol=1e-6),
    )
    assert status_of(solution) is bl.Status.CONVERGED  # the default solver does not mind
    assert not np.any(np.isfinite(gradient))
    assert int(report.failures) == 1


@pytest.mark.parametrize("estimator", others_slow(["Implicit", "Neumann", "Nystrom"], "Implicit"))
def test_an_adjoint_without_a_budget_gives_no_gradient(estimator: str):
    example = EXAMPLES["ridge"]
    _, gradient, report = evaluate(
        example.problem,
        example.theta,
        estimator=getattr(bl, estimator)(),
        adjoint_budget=bl.Budget(iterations=0),
    )
    assert not np.any(np.isfinite(gradient))
    assert int(report.failures) == 1
    result = bl.hypergradient(
        loss,
        example.problem,
        example.theta,
        example.x0,
        estimator=getattr(bl, estimator)(),
        adjoint_budget=bl.Budget(iterations=0),
    )
    assert status_of(result.adjoint) is bl.Status.NOT_STARTED
    assert "at least one iteration" in result.adjoint.diagnosis
    assert result.error is not None
    assert np.isinf(result.error.total)


def test_an_adjoint_guess_of_zeros_is_no_gradient_either():
    example = EXAMPLES["ridge"]

    def gradient(guess: Any) -> Any:
        cap = bl.Budget(iterations=0)
        options: dict[str, Any] = {"adjoint_budget": cap, "adjoint_guess": guess}
        _, gradient, report = evaluate(example.problem, example.theta, **options)
        return gradient, int(report.failures)

    nothing, failures = gradient(jnp.zeros(N))
    assert np.all(np.isnan(nothing))
    assert failures == 1
    # A guess that is one is an adjoint: that of the solve before.
    something, failures = gradient(jnp.ones(N))
    assert np.all(np.isfinite(something))
    assert failures == 0


ITERATION = {
    "Unrolled": bl.Unrolled,
    "Unrolled, last": lambda: bl.Unrolled(last=2),
    "Unrolled, all": lambda: bl.Unrolled(store="all"),
    "Unrolled, forward": lambda: bl.Unrolled(mode="forward"),
    "OneStep": bl.OneStep,
}


@pytest.mark.parametrize("name", others_slow(ITERATION, "Unrolled", "OneStep"))
def test_an_iteration_without_a_budget_gives_no_gradient(name: str):
    example = EXAMPLES["ridge"]
    result = bl.hypergradient(
        loss,
        example.problem,
        example.theta,
        example.x0,
        solver=bl.GradientDescent(0.3),
        estimator=ITERATION[name](),
        budget=bl.Budget(iterations=0),
    )
    assert not np.any(np.isfinite(result.gradient))
    assert status_of(result.primal) is bl.Status.BUDGET
    assert status_of(result.adjoint) is bl.Status.NOT_STARTED
    assert result.error is not None
    assert np.isinf(result.error.total)


def test_an_adjoint_within_a_loose_absolute_tolerance_still_makes_a_step():
    """A primal's absolute tolerance handed to a tiny adjoint must not return zero."""
    example = EXAMPLES["ridge"]
    _, gradient, report = evaluate(
        example.problem,
        example.theta,
        outer=lambda x, theta: 1e-9 * loss(x, theta),
        estimator=bl.Implicit(solver=bl.ConjugateGradient()),
        adjoint_budget=bl.Budget(100, atol=1e-3),
    )
    assert int(report.adjoint_iterations) >= 1
    assert float(jnp.linalg.norm(gradient)) > 0


@pytest.mark.parametrize("estimator", ["Implicit", "Unrolled", "OneStep"])
def test_a_diverged_primal_gives_no_gradient(estimator: str):
    example = EXAMPLES["ridge"]
    solution, gradient, report = evaluate(
        example.problem,
        example.theta,
        solver=bl.GradientDescent(20.0),
        estimator=getattr(bl, estimator)(),
        budget=bl.Budget(300),
    )
    assert status_of(solution) is bl.Status.DIVERGED
    assert not np.any(np.isfinite(gradient))
    assert int(report.failures) == 1


@pytest.mark.parametrize("estimator", ["Implicit", "Unrolled"])
def test_a_primal_that_broke_down_gives_no_gradient(estimator: str):
    solution, gradient, report = evaluate(
        system(INDEFINITE, positive_definite=True),
        jnp.zeros(N),
        solver=bl.ConjugateGradient(),
        estimator=getattr(bl, estimator)(),
    )
    assert status_of(solution) is bl.Status.BREAKDOWN
    assert not np.any(np.isfinite(gradient))
    assert int(report.failures) == 1


def test_running_out_of_budget_is_no_failure():
    example = EXAMPLES["ridge"]
    solution, gradient, report = evaluate(
        example.problem,
        example.theta,
        solver=bl.GradientDescent(0.1),
        estimator=bl.Implicit(solver=bl.ConjugateGradient()),
        budget=bl.Budget(2),
        adjoint_budget=bl.Budget(2),
    )
    assert status_of(solution) is bl.Status.BUDGET
    assert np.all(np.isfinite(gradient))
    assert int(report.failures) == 0
    assert int(report.primal_capped) == int(report.adjoint_capped) == 1


def test_no_solver_claims_more_than_its_true_residual():
    """A tolerance below what the operator's condition allows: 1e-15 at a condition of 1e10."""
    matrix = 1.0 / (np.arange(7)[:, None] + np.arange(7) + 1.0)
    problem = bl.LinearSystem(matrix, np.ones(7), positive_definite=True)
    for name in ("ConjugateGradient", "MINRES", "BiCGStab", "GMRES", "SteepestDescent"):
        solution = bl.solve(
            problem,
            None,
            jnp.zeros(7),
            solver=getattr(bl, name)(),
            budget=bl.Budget(300, rtol=1e-15),
        )
        true_norm = float(jnp.linalg.norm(problem.at(None).residual(solution.value)))
        np.testing.assert_allclose(solution.residual_norm, true_norm, rtol=0.5)
        assert_honest(problem, None, solution)


# -------------------------------------------------------------- metrics handed to a controller


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_non_finite_metric_does_not_wedge_a_controller(bad: float):
    """It neither refines nor stays deaf to the finite metrics that follow."""
    controller = bl.ProgressiveRefinement(bl.Ladder.iterations(start=1, step=1, stop=9))
    state = controller.init()
    for metric in (1.0, bad, *[0.9] * 30):
        state = controller.update(state, metric)
    assert int(controller.fidelity(state).budget.iterations) > 1
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(controller.fidelity(state)))
