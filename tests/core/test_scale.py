"""Multiplying the inner objective, the outer loss or both by a number changes nothing else."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel as bl
from tests.core.cases import (
    THETA,
    N,
    convex_objective,
    definite_matrix,
    general_matrix,
    indefinite_matrix,
    loss,
    rhs,
    ridge_objective,
)
from tests.core.compiling import jitted
from tests.marks import others_slow

# Powers of two next to 1e-8, 1e-4, 1e4, 1e8: multiplying by them rounds nothing, so that not
# even the last iteration may tip.
FACTORS = [2.0**-27, 2.0**-13, 2.0**13, 2.0**27]


def scaled_minimization(objective: Any) -> Any:
    return bl.Minimization(lambda x, theta: theta[1] * objective(x, theta[0]))


def scaled_system(matrix: Any, **declared: Any) -> Any:
    return bl.LinearSystem(
        lambda theta: theta[1] * matrix(theta[0]),
        lambda theta: theta[1] * rhs(theta[0]),
        **declared,
    )


RIDGE = scaled_minimization(ridge_objective)
CONVEX = scaled_minimization(convex_objective)
DEFINITE = scaled_system(definite_matrix, symmetric=True, positive_definite=True)

# Solvers without a number that has units. The solver may depend on the factor, as a step
# size has to.
CASES: dict[str, tuple[Any, Any]] = {
    "default, ridge": (RIDGE, None),
    "default, convex": (CONVEX, None),
    "GradientDescent": (RIDGE, lambda factor: bl.GradientDescent(0.3 / factor)),
    "ArmijoGradientDescent": (CONVEX, lambda _: bl.ArmijoGradientDescent()),
    "LBFGS": (CONVEX, lambda _: bl.LBFGS()),
    "Newton-CG": (CONVEX, lambda _: bl.Newton(linear=bl.ConjugateGradient())),
    "Jacobi": (DEFINITE, lambda _: bl.Jacobi()),
    "Chebyshev": (DEFINITE, lambda _: bl.Chebyshev()),
    "SteepestDescent": (DEFINITE, lambda _: bl.SteepestDescent()),
    "ConjugateGradient": (DEFINITE, lambda _: bl.ConjugateGradient()),
    "MINRES": (
        scaled_system(indefinite_matrix, symmetric=True),
        lambda _: bl.MINRES(),
    ),
    "BiCGStab": (scaled_system(general_matrix), lambda _: bl.BiCGStab()),
    "GMRES": (scaled_system(general_matrix), lambda _: bl.GMRES(restart=2)),
    "Direct": (scaled_system(general_matrix), lambda _: bl.Direct()),
}


def evaluate(
    problem: Any, make: Any, estimator: Any, theta: Any, inner: Any, outer: Any, budgets: Any
) -> Any:
    """Gradient, and the iterations of both solves."""

    def value(theta: Any, probe: Any) -> Any:
        solution = bl.solve(
            problem,
            (theta, inner),
            jnp.zeros(N, theta.dtype),
            solver=None if make is None else make(inner),
            estimator=estimator,
            probe=probe,
            **budgets,
        )
        return outer * loss(solution.value, theta)

    gradient, report = jax.grad(value, argnums=(0, 1))(theta, bl.Probe.zeros())
    return gradient, report.primal_iterations, report.adjoint_iterations, report.failures


BOTH = [(a, b) for f in FACTORS for a, b in ((f, 1.0), (1.0, f), (f, f), (f, 1 / f))]


@pytest.mark.parametrize(
    "name",
    others_slow(
        CASES,
        "default, ridge",
        "GradientDescent",
        "LBFGS",
        "Newton-CG",
        "Jacobi",
        "ConjugateGradient",
        "GMRES",
    ),
)
def test_hypergradient_and_iteration_counts_follow_the_factor(name: str):
    problem, make = CASES[name]
    budgets: dict[str, Any] = {"budget": bl.Budget(200, rtol=1e-9)} if make else {}
    compiled = jitted(functools.partial(evaluate, problem, make, None, budgets=budgets))
    theta = jnp.asarray(THETA)
    expected, *counts = compiled(theta, 1.0, 1.0)
    assert counts[0] >= 1
    assert counts[1] >= 1
    assert counts[2] == 0
    for inner, outer in BOTH:
        got, *others = compiled(theta, inner, outer)
        np.testing.assert_allclose(got, outer * expected, rtol=1e-9, err_msg=f"{inner} {outer}")
        assert others == counts, f"inner factor {inner}, outer factor {outer}"


ADJOINTS = {
    "ConjugateGradient": lambda _: bl.Implicit(solver=bl.ConjugateGradient()),
    "MINRES": lambda _: bl.Implicit(solver=bl.MINRES()),
    "GMRES": lambda _: bl.Implicit(solver=bl.GMRES()),
    "BiCGStab": lambda _: bl.Implicit(solver=bl.BiCGStab()),
    "Neumann": lambda factor: bl.Neumann(step_size=0.3 / factor),
    "Nystrom": lambda _: bl.Nystrom(rank=2),
    "Unrolled": lambda _: bl.Unrolled(),
    "OneStep": lambda _: bl.OneStep(),
}


@pytest.mark.parametrize("name", ADJOINTS)
def test_every_estimator_follows_the_factor(name: str):
    def run(theta: Any, inner: Any, outer: Any) -> Any:
        budgets = {"budget": bl.Budget(40, rtol=1e-6), "adjoint_budget": bl.Budget(40, rtol=1e-6)}

        def make(factor: Any) -> Any:
            return bl.GradientDescent(0.3 / factor)

        return evaluate(RIDGE, make, ADJOINTS[name](inner), theta, inner, outer, budgets)

    compiled, theta = jitted(run), jnp.asarray(THETA)
    expected, *counts = compiled(theta, 1.0, 1.0)
    assert np.all(np.isfinite(expected))
    for inner, outer in BOTH:
        got, *others = compiled(theta, inner, outer)
        np.testing.assert_allclose(got, outer * expected, rtol=1e-9, err_msg=f"{inner} {outer}")
        assert others == counts, f"inner factor {inner}, outer factor {outer}"


def test_decimal_factors_and_single_precision():
    """The factors people write, in the precision they use: rounding may move the last digits."""
    compiled = jitted(functools.partial(evaluate, RIDGE, None, None, budgets={}))
    theta = jnp.asarray(THETA, jnp.float32)
    expected, *counts = compiled(theta, jnp.float32(1), jnp.float32(1))
    assert expected.dtype == jnp.float32
    for inner, outer in ((1e-8, 1), (1e8, 1), (1, 1e-8), (1, 1e8), (1e-4, 1e-4), (1e8, 1e8)):
        got, *others = compiled(theta, jnp.float32(inner), jnp.float32(outer))
        np.testing.assert_allclose(got / outer, expected, rtol=2e-3)
        assert others == counts


@pytest.mark.parametrize("factor", others_slow([1e-8, 1e8], 1e-8))
def test_error_estimates_follow_the_factor(factor: float):
    def result(scale: float) -> Any:
        problem = bl.Minimization(lambda x, theta: scale * ridge_objective(x, theta))
        return bl.hypergradient(
            lambda x, theta: scale * loss(x, theta),
            problem,
            jnp.asarray(THETA),
            jnp.zeros(N),
            solver=bl.GradientDescent(0.3 / scale),
            budget=bl.Budget(10),
        )

    expected, got = result(1.0), result(factor)
    np.testing.assert_allclose(got.error.total, factor * expected.error.total, rtol=1e-6)
    np.testing.assert_allclose(got.gradient, factor * expected.gradient, rtol=1e-6)
