"""The estimate from few steps: how far off it is, what it costs, and where it is infinite."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel as bl
from bilevel import vector
from bilevel.error.spectral import completed, extrapolated, summed_differences
from bilevel.solver.arnoldi import arnoldi
from tests.core.compiling import jitted
from tests.marks import others_slow

STEPS = 10


def poisson(size: int) -> Any:
    class Shifted:
        symmetric = positive_definite = True

        def __init__(self, theta: Any):
            self.theta = theta

        def matvec(self, v: Any) -> Any:
            wide = jnp.pad(v, 1)
            beside = wide[2:, 1:-1] + wide[:-2, 1:-1] + wide[1:-1, 2:] + wide[1:-1, :-2]
            return (4 * v - beside) * (size + 1) ** 2 + jnp.exp(self.theta) * v

    grid = np.linspace(0, 1, size + 2)[1:-1]
    source = np.sin(3 * grid)[:, None] * np.exp(grid)
    target = 0.01 * np.random.default_rng(1).normal(size=(size, size))
    problem = bl.LinearSystem(Shifted, lambda theta: source * (1 + theta))
    theta = jnp.zeros((size, size))
    options = {"solver": bl.ConjugateGradient()}
    adjoint = bl.Implicit(solver=bl.ConjugateGradient())
    return problem, lambda x, _: 0.5 * jnp.sum((x - target) ** 2), theta, theta, options, adjoint


def ridge() -> Any:
    draw = np.random.default_rng(0)
    features, targets = draw.normal(size=(120, 60)), draw.normal(size=120)
    largest = np.linalg.eigvalsh(features.T @ features / 120)[-1] + 0.1

    def objective(x: Any, theta: Any) -> Any:
        misfit = features @ x - targets
        return 0.5 * jnp.mean(misfit**2) + 0.5 * jnp.sum(jnp.exp(theta) * x**2)

    def loss(x: Any, _: Any) -> Any:
        return jnp.sum((features[:20] @ x + targets[:20]) ** 2)

    options = {"solver": bl.GradientDescent(1 / largest)}
    adjoint = bl.Implicit(solver=bl.ConjugateGradient())
    return bl.Minimization(objective), loss, jnp.full(60, -4.0), jnp.zeros(60), options, adjoint


def contraction() -> Any:
    draw = np.random.default_rng(0)
    matrix, shift = draw.normal(size=(40, 40)), draw.normal(size=40)
    matrix = 0.9 * matrix / np.max(np.abs(np.linalg.eigvals(matrix)))
    problem = bl.FixedPoint(lambda x, theta: matrix @ jnp.tanh(x + theta) + 0.3 * shift)
    options = {"solver": bl.FixedPointIteration()}
    adjoint = bl.Implicit(solver=bl.GMRES(restart=5))
    return problem, lambda x, _: jnp.sum(jnp.sin(x)), jnp.zeros(40), jnp.zeros(40), options, adjoint


def root() -> Any:
    draw = np.random.default_rng(0)
    matrix, rhs = np.eye(40) + draw.normal(size=(40, 40)) / 13, draw.normal(size=40)
    problem = bl.RootFinding(lambda x, theta: matrix @ x + 0.1 * x**3 - rhs * jnp.exp(theta))
    options = {"solver": bl.Richardson(0.5)}
    adjoint = bl.Implicit(solver=bl.BiCGStab())
    return problem, lambda x, _: jnp.sum(jnp.sin(x)), jnp.zeros(40), jnp.zeros(40), options, adjoint


# Budgets of both solves, and the range in which the estimate over the true error lies.
MEASURED = {
    "poisson": (poisson(16), (2, 10, 20, 40), (2, 10, 20, 40), (0.8, 4.0)),
    "ridge": (ridge(), (5, 50, 200, 800), (2, 10, 30), (0.5, 1.5)),
    "contraction": (contraction(), (3, 10, 40), (1, 3, 5), (0.4, 4.0)),
    "root": (root(), (3, 10, 40), (1, 5, 15), (0.8, 1.3)),
}


def judged(case: Any, error: Any, estimator: Any = None) -> Any:
    problem, loss, theta, x0, options, adjoint = case

    def evaluate(inner: Any, outer: Any) -> Any:
        result = bl.hypergradient(
            loss,
            problem,
            theta,
            x0,
            estimator=estimator or adjoint,
            budget=bl.Budget(inner),
            adjoint_budget=bl.Budget(outer),
            error=error,
            **options,
        )
        return result.gradient, result.error

    return jitted(evaluate)


def exact(case: Any) -> Any:
    problem, loss, theta, x0, *_ = case
    return bl.hypergradient(loss, problem, theta, x0, error=False).gradient


@pytest.mark.parametrize("name", others_slow(MEASURED, "ridge", "root"))
def test_the_estimate_is_within_the_measured_range_of_the_true_error(name: str):
    """A wrong tail, sign or transpose leaves it: errors span five orders and both parts."""
    case, inner, outer, (low, high) = MEASURED[name]
    evaluate, reference = judged(case, bl.SpectralEstimate(STEPS)), exact(case)
    true, ratios = [], []
    for primal in inner:
        for adjoint in outer:
            gradient, error = evaluate(primal, adjoint)
            true.append(float(jnp.linalg.norm(gradient - reference)))
            ratios.append(float(error.total) / true[-1])
            assert int(error.applications) <= 3 * STEPS
            assert error.total <= (error.primal + error.adjoint) * (1 + 1e-9)
    assert max(true) > 1e3 * min(true)
    assert np.all(np.isfinite(ratios))
    assert low <= min(ratios)
    assert max(ratios) <= high


def test_the_parts_tell_which_solve_was_stopped_early():
    evaluate = judged(MEASURED["poisson"][0], bl.SpectralEstimate(STEPS))
    for budgets, small, large in (((2, 60), "adjoint", "primal"), ((60, 2), "primal", "adjoint")):
        error = evaluate(*budgets)[1]
        assert getattr(error, small) < 1e-6 * getattr(error, large)


def test_unrolling_has_an_estimate_that_is_not_below_the_error():
    case = MEASURED["ridge"][0]
    evaluate, reference = judged(case, bl.SpectralEstimate(20), bl.Unrolled()), exact(case)
    for iterations in (5, 50, 200):
        gradient, error = evaluate(iterations, 0)
        true = float(jnp.linalg.norm(gradient - reference))
        assert 0.7 * true <= float(error.total) <= 20 * true
        assert int(error.applications) <= 4 * 20


def spread(condition: float) -> Any:
    """A quadratic whose eigenvalues fill many orders, with a share in every one of them."""
    values, shares = (
        np.geomspace(1 / condition, 1.0, 100),
        np.random.default_rng(0).normal(size=100),
    )
    return values, shares, jnp.zeros(100), lambda x, _: jnp.sum(values * (x - 1) ** 2)


@pytest.mark.parametrize("kind", ["minimization", "root", "fixed point"])
def test_what_few_steps_cannot_tell_is_infinite(kind: str):
    """Here the least-squares residual of ten steps is small, and the error a million times it."""
    values, shares, zeros, loss = spread(1e8)
    problem, solver, linear = {
        "minimization": (
            bl.Minimization(
                lambda x, theta: jnp.sum(0.5 * values * x**2 - shares * jnp.exp(theta) * x)
            ),
            bl.GradientDescent(1.0),
            bl.ConjugateGradient(),
        ),
        "root": (
            bl.RootFinding(lambda x, theta: values * x - shares * jnp.exp(theta)),
            bl.Richardson(1.0),
            bl.BiCGStab(),
        ),
        "fixed point": (
            bl.FixedPoint(lambda x, theta: x - 0.5 * (values * x - shares * jnp.exp(theta))),
            bl.FixedPointIteration(),
            bl.BiCGStab(),
        ),
    }[kind]
    case = problem, loss, zeros, zeros, {"solver": solver}, bl.Implicit(solver=linear)
    evaluate = judged(case, bl.SpectralEstimate(STEPS))
    for budgets in ((2, 2), (20, 5), (100, 10)):
        assert np.isinf(evaluate(*budgets)[1].total)


def test_an_indefinite_hessian_is_no_place_to_estimate_from():
    well = bl.Minimization(lambda x, theta: jnp.sum(x**4 / 4 - theta * x**2 / 2))
    case = well, lambda x, _: jnp.sum(x), jnp.ones(2), jnp.full(2, 0.1)
    options = {"solver": bl.GradientDescent(0.1)}, bl.Implicit(solver=bl.MINRES())
    assert np.isinf(judged((*case, *options), bl.SpectralEstimate())(1, 9)[1].total)


def test_a_mapping_that_expands_is_infinite():
    rhs = jnp.ones(3)
    assert np.all(np.isinf(summed_differences(lambda v: -0.1 * v, rhs, STEPS)))
    assert np.all(np.isinf(summed_differences(lambda v: 0.005 * v, rhs, STEPS)))


def test_differences_of_one_rate_are_summed_exactly():
    rhs = {"a": jnp.array([1.0, -2.0]), "b": jnp.float32(3.0)}
    for rate in (0.9, 0.5, 1e-3, 0.0):
        found = summed_differences(functools.partial(vector.scale, 1.0 - rate), rhs, 8)
        for leaf, given in zip(jax.tree.leaves(found), jax.tree.leaves(rhs), strict=True):
            np.testing.assert_allclose(leaf, given / (1 - rate), rtol=1e-5)
            assert leaf.dtype == given.dtype


@pytest.mark.parametrize("finish", [completed, extrapolated])
@pytest.mark.parametrize("complex_linear", others_slow([False, True], True))
def test_a_space_that_is_used_up_gives_the_solution(finish: Any, complex_linear: bool):
    draw = np.random.default_rng(3)
    factor = draw.normal(size=(6, 6)) + 1j * draw.normal(size=(6, 6)) * complex_linear
    matrix = factor @ factor.conj().T + np.eye(6)
    rhs = draw.normal(size=6) + 1j * draw.normal(size=6) * complex_linear
    if not complex_linear:
        matrix, rhs = matrix.real, rhs.real
    for given in (rhs, 0 * rhs, np.linalg.eigh(matrix)[1][:, 2]):
        space = arnoldi(
            lambda v: matrix @ v,
            None,
            jnp.asarray(given),
            jnp.float64(0),
            STEPS,
            complex_linear=complex_linear,
            keep=False,
        )
        np.testing.assert_allclose(finish(space), np.linalg.solve(matrix, given), rtol=1e-9, atol=0)


def test_a_solution_has_no_error():
    problem = bl.LinearSystem(2 * jnp.eye(2), lambda theta: theta * jnp.ones(2))
    result = bl.hypergradient(
        lambda x, theta: jnp.sum(x), problem, 1.0, jnp.zeros(2), error=bl.SpectralEstimate()
    )
    assert result.error is not None
    assert float(result.error.total) == 0.0


@pytest.mark.slow
def test_it_serves_gradients_of_ones_own_and_controllers():
    problem = bl.Minimization(lambda x, theta: jnp.sum(jnp.cosh(x - theta)))
    options = {"solver": bl.GradientDescent(0.5), "budget": bl.Budget(6)}

    def outer_loss(x: Any, theta: Any) -> Any:
        return jnp.sum(x**2)

    def loss(theta: Any, probe: Any) -> Any:
        solution = bl.solve(problem, theta, jnp.zeros(1), probe=probe, **options)
        return outer_loss(solution.value, theta), solution

    probe, theta = bl.AdjointProbe.zeros(jnp.zeros(1)), jnp.ones(1)
    (gradient, report), solution = jax.grad(loss, argnums=(0, 1), has_aux=True)(theta, probe)
    judge = bl.SpectralEstimate()
    error = bl.truncation_error(outer_loss, problem, theta, solution, gradient, report, error=judge)
    result = bl.hypergradient(outer_loss, problem, theta, jnp.zeros(1), error=judge, **options)
    assert result.error is not None
    np.testing.assert_allclose(error.total, result.error.total, rtol=1e-12)
    np.testing.assert_allclose(error.total, abs(float(gradient[0]) - 2.0), rtol=0.05)
    controller = bl.ErrorControlled(bl.Ladder.iterations(1, 1, 9), eta=0.9)
    state = controller.update(controller.init(), gradient_norm=2.0, error=error)
    assert bool(state.accepted)


@pytest.mark.slow
def test_samples_and_single_precision():
    matrix = jnp.diag(jnp.arange(1.0, 4.0, dtype=jnp.float32))
    problem = bl.LinearSystem(matrix, lambda theta: theta)

    def total(theta: Any) -> Any:
        result = bl.hypergradient(
            lambda x, theta: jnp.sum(x**2),
            problem,
            theta,
            jnp.zeros(3, jnp.float32),
            solver=bl.Jacobi(),
            estimator=bl.Implicit(solver=bl.ConjugateGradient()),
            budget=bl.Budget(1),
            adjoint_budget=bl.Budget(2),
            error=bl.SpectralEstimate(),
        )
        return result.error.total

    thetas = jnp.array([[1.0, 2.0, 3.0], [-1.0, 0.5, 4.0]], jnp.float32)
    batch = jax.vmap(total)(thetas)
    assert batch.dtype == jnp.float32
    np.testing.assert_allclose(batch, [total(theta) for theta in thetas], rtol=1e-3)


def test_too_few_steps_are_refused():
    with pytest.raises(ValueError, match="steps must be a whole number, at least 8, got 3"):
        bl.SpectralEstimate(steps=3)
