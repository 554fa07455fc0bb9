"""Which solvers one-step differentiation takes, and how good it is with them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel as bl
from tests.marks import others_slow

VALUES = jnp.array([1.0, 1.5, 2.0])
QUADRATIC = bl.Minimization(lambda x, theta: jnp.sum(0.5 * theta * VALUES * x**2 - x))
SYSTEM = bl.LinearSystem(
    lambda theta: jnp.diag(theta * VALUES), jnp.ones(3), symmetric=True, positive_definite=True
)
FIXED = bl.FixedPoint(lambda x, theta: (1 - 0.5 * theta * VALUES) * x + 0.5)
PENALISED = bl.CompositeMinimization(
    lambda x, theta: jnp.sum(0.5 * theta * VALUES * x**2 - x), bl.L1(0.0)
)

# A step is the same map at every residual: off by the contraction, and Newton's by nothing.
TAKEN: dict[str, tuple[Any, Callable[[], Any], float]] = {
    "GradientDescent": (QUADRATIC, lambda: bl.GradientDescent(0.6), 0.5),
    "HeavyBall": (QUADRATIC, lambda: bl.HeavyBall(0.6, 0.1), 0.5),
    "Nesterov": (QUADRATIC, lambda: bl.Nesterov(0.5), 0.6),
    "Newton": (QUADRATIC, bl.Newton, 1e-8),
    "NewtonKrylov": (QUADRATIC, lambda: bl.Newton(linear=bl.ConjugateGradient()), 1e-3),
    "FixedPointIteration": (FIXED, bl.FixedPointIteration, 0.6),
    "Richardson": (SYSTEM, lambda: bl.Richardson(0.6), 0.5),
    "Jacobi": (SYSTEM, bl.Jacobi, 1e-8),
    "Chebyshev": (SYSTEM, lambda: bl.Chebyshev(1.0, 2.0), 0.5),
    "Direct": (SYSTEM, bl.Direct, 1e-8),
    "NystromInverse": (SYSTEM, lambda: bl.NystromInverse(rank=3, damping=1e-3), 1e-2),
    "ProximalGradient": (PENALISED, bl.ProximalGradient, 0.6),
}
# How far a step goes is made of the residual, which is noise at the solution.
REFUSED: dict[str, tuple[Any, Callable[[], Any]]] = {
    "ConjugateGradient": (SYSTEM, bl.ConjugateGradient),
    "MINRES": (SYSTEM, bl.MINRES),
    "BiCGStab": (SYSTEM, bl.BiCGStab),
    "GMRES": (SYSTEM, bl.GMRES),
    "SteepestDescent": (SYSTEM, bl.SteepestDescent),
    "ArmijoGradientDescent": (QUADRATIC, bl.ArmijoGradientDescent),
    "LBFGS": (QUADRATIC, bl.LBFGS),
    "Anderson": (FIXED, bl.Anderson),
    "Optax": (QUADRATIC, lambda: bl.Optax(optax.adam(0.1))),
}


def total(problem: Any, solver: Any) -> Callable[[Any], Any]:
    def value(theta: Any) -> Any:
        options: dict[str, Any] = {"solver": solver, "estimator": bl.OneStep()}
        return jnp.sum(bl.solve(problem, theta, jnp.zeros(3), **options).value)

    return value


@pytest.mark.parametrize("name", others_slow(TAKEN, "Richardson", "Newton", "Direct"))
def test_one_step_is_right_within_the_contraction(name: str):
    problem, make, contraction = TAKEN[name]
    exact = -float(jnp.sum(1 / VALUES))
    got = float(jax.grad(total(problem, make()))(1.0))
    assert abs(got - exact) <= contraction * abs(exact)


@pytest.mark.parametrize("name", REFUSED)
def test_a_step_made_of_the_residual_is_refused(name: str):
    problem, make = REFUSED[name]
    with pytest.raises(bl.IncompatibleError, match=rf"how far {name} steps.* Use Implicit"):
        total(problem, make())(1.0)


def test_every_solver_is_in_one_of_the_tables():
    known = {*TAKEN, *REFUSED, "InnerSolver"}
    solvers = {
        name
        for name in dir(bl)
        if isinstance(getattr(bl, name), type) and issubclass(getattr(bl, name), bl.InnerSolver)
    }
    assert solvers <= known, solvers - known


def test_one_step_from_a_start_within_the_tolerance_needs_no_budget():
    problem = bl.RootFinding(lambda x, theta: x**2 - theta)

    def value(theta: Any, x0: Any) -> Any:
        options: dict[str, Any] = {"solver": bl.Newton(), "estimator": bl.OneStep()}
        return bl.solve(problem, theta, x0, budget=bl.Budget(0), **options).value

    np.testing.assert_allclose(jax.grad(value)(4.0, 2.0), 0.25)
    assert np.isnan(jax.grad(value)(4.0, 1.0))
