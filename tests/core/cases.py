"""Inner problems with known solutions, and a solver on each: the tables that tests run over.

A new solver is one more row of `SOLVERS`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel as bl

N = 4
DRAW = np.random.default_rng(7)
FEATURES = DRAW.normal(size=(9, N))
TARGETS = DRAW.normal(size=9)
SKEW = 0.15 * DRAW.normal(size=(N, N))
THETA = np.array([0.2, -0.3, 0.4, 0.1])


@dataclasses.dataclass(frozen=True)
class Example:
    """A problem, a θ, a start, and x*(θ) in closed form."""

    problem: Any
    solution: Callable[[Any], Any]
    theta: Any = dataclasses.field(default_factory=lambda: jnp.asarray(THETA))
    x0: Any = dataclasses.field(default_factory=lambda: jnp.zeros(N))

    @functools.cached_property
    def hypergradient(self) -> Any:
        # Asked for inside a trace, it is a number all the same.
        with jax.ensure_compile_time_eval():
            return jax.grad(lambda theta: loss(self.solution(theta), theta))(self.theta)


def by_name(case: Any) -> str:
    """How tests name a row."""
    return case.name


def loss(x: Any, theta: Any) -> Any:
    """An outer loss that depends on θ directly, too."""
    return jnp.sum(jnp.sin(x - 0.3)) + 0.5 * jnp.sum(theta * x)


# Ridge regression with a penalty for each feature: a quadratic objective.


def ridge_objective(x: Any, theta: Any) -> Any:
    return 0.5 * jnp.mean((FEATURES @ x - TARGETS) ** 2) + 0.5 * jnp.sum(jnp.exp(theta) * x**2)


def ridge_solution(theta: Any) -> Any:
    hessian = FEATURES.T @ FEATURES / len(TARGETS) + jnp.diag(jnp.exp(theta))
    return jnp.linalg.solve(hessian, FEATURES.T @ TARGETS / len(TARGETS))


def ridge_extremes() -> tuple[float, float]:
    """Smallest and largest eigenvalue of the Hessian."""
    hessian = FEATURES.T @ FEATURES / len(TARGETS) + np.diag(np.exp(THETA))
    values = np.linalg.eigvalsh(hessian)
    return float(values[0]), float(values[-1])


# A smooth convex objective that is not quadratic, minimal where B x = arsinh(θ).

MIXING = np.eye(N) + 0.3 * DRAW.normal(size=(N, N))


def convex_objective(x: Any, theta: Any) -> Any:
    y = MIXING @ x
    return jnp.sum(jnp.cosh(y) - theta * y)


def convex_solution(theta: Any) -> Any:
    return jnp.linalg.solve(MIXING, jnp.arcsinh(theta))


# Linear systems.


def definite_matrix(theta: Any) -> Any:
    neighbours = np.eye(N, k=1) + np.eye(N, k=-1)
    return jnp.diag(1.5 + theta) - 0.4 * neighbours


def indefinite_matrix(theta: Any) -> Any:
    return definite_matrix(theta) - jnp.diag(jnp.array([0.0, 3.0, 0.0, 0.0]))


def general_matrix(theta: Any) -> Any:
    return definite_matrix(theta) + SKEW


def rhs(theta: Any) -> Any:
    return jnp.cos(theta) + jnp.arange(1.0, N + 1)


def linear_solution(matrix: Callable[[Any], Any], theta: Any) -> Any:
    return jnp.linalg.solve(matrix(theta), rhs(theta))


# An affine contraction, and a root with a Jacobian that is not symmetric.


def mapping(x: Any, theta: Any) -> Any:
    return (0.4 * SKEW + 0.3 * jnp.diag(theta)) @ x + rhs(theta)


def mapping_solution(theta: Any) -> Any:
    return jnp.linalg.solve(jnp.eye(N) - 0.4 * SKEW - 0.3 * jnp.diag(theta), rhs(theta))


def root_residual(x: Any, theta: Any) -> Any:
    return MIXING @ (x**3 - rhs(theta))


def root_solution(theta: Any) -> Any:
    return jnp.cbrt(rhs(theta))


# Lasso: the last two entries are zero, clear of the threshold.

QUADRATIC = np.diag([1.0, 2.0, 1.5, 1.2]) + 0.1
LINEAR = np.array([2.0, -1.5, 0.2, -0.1])
SIGNS = np.array([1.0, -1.0, 0.0, 0.0])


def lasso_objective(x: Any, theta: Any) -> Any:
    return 0.5 * jnp.sum(x * (QUADRATIC @ x)) - jnp.sum((LINEAR + 0.1 * theta) * x)


def lasso_weight(theta: Any) -> Any:
    return 0.5 * jnp.exp(theta[0])


def lasso_solution(theta: Any) -> Any:
    forcing = (LINEAR + 0.1 * theta - lasso_weight(theta) * SIGNS)[:2]
    return jnp.concatenate([jnp.linalg.solve(QUADRATIC[:2, :2], forcing), jnp.zeros(2)])


EXAMPLES: dict[str, Example] = {
    "ridge": Example(bl.Minimization(ridge_objective), ridge_solution),
    "convex": Example(bl.Minimization(convex_objective), convex_solution),
    "definite": Example(
        bl.LinearSystem(definite_matrix, rhs, symmetric=True, positive_definite=True),
        functools.partial(linear_solution, definite_matrix),
    ),
    "indefinite": Example(
        bl.LinearSystem(indefinite_matrix, rhs, symmetric=True),
        functools.partial(linear_solution, indefinite_matrix),
    ),
    "general": Example(
        bl.LinearSystem(general_matrix, rhs), functools.partial(linear_solution, general_matrix)
    ),
    "mapping": Example(bl.FixedPoint(mapping), mapping_solution),
    "lasso": Example(
        bl.CompositeMinimization(lasso_objective, bl.L1(lasso_weight)), lasso_solution
    ),
    "root": Example(bl.RootFinding(root_residual), root_solution, x0=jnp.ones(N)),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A solver on a problem it suits.

    - `iterations`: a budget at which it is converged to 1e-10.
    - `truncated`: most steps of the truncated iteration whose derivative is compared with
        that of a Python loop; 0 where the steps have no reverse mode of their own.
    """

    name: str
    example_name: str
    make: Callable[[], Any]
    iterations: int
    truncated: int = 3

    @property
    def example(self) -> Example:
        return EXAMPLES[self.example_name]

    @property
    def budget(self) -> bl.Budget:
        return bl.Budget(iterations=self.iterations, rtol=1e-13)


LOW, HIGH = ridge_extremes()

SOLVERS = [
    Case("GradientDescent", "ridge", lambda: bl.GradientDescent(2 / (LOW + HIGH)), 200),
    Case(
        "HeavyBall",
        "ridge",
        lambda: bl.HeavyBall(
            4 / (HIGH**0.5 + LOW**0.5) ** 2,
            ((HIGH**0.5 - LOW**0.5) / (HIGH**0.5 + LOW**0.5)) ** 2,
        ),
        150,
    ),
    Case("Nesterov", "ridge", lambda: bl.Nesterov(1 / HIGH, strong_convexity=LOW), 150),
    Case("NesterovSequence", "ridge", lambda: bl.Nesterov(1 / HIGH), 900),
    Case("NesterovRestart", "ridge", lambda: bl.Nesterov(1 / HIGH, restart=True), 250),
    Case("ArmijoGradientDescent", "ridge", bl.ArmijoGradientDescent, 200),
    Case("Optax", "ridge", lambda: bl.Optax(SGD), 300),
    Case("LBFGS", "convex", bl.LBFGS, 60),
    Case("Newton", "convex", bl.Newton, 20, 2),
    Case("NewtonKrylov", "root", lambda: bl.Newton(linear=bl.GMRES()), 25, 2),
    Case("FixedPointIteration", "mapping", bl.FixedPointIteration, 120),
    Case("DampedIteration", "mapping", lambda: bl.FixedPointIteration(damping=0.2), 200),
    Case("Anderson", "mapping", bl.Anderson, 40),
    Case("Richardson", "general", lambda: bl.Richardson(0.5), 250),
    Case("Jacobi", "definite", bl.Jacobi, 250),
    Case("Chebyshev", "definite", lambda: bl.Chebyshev(0.3, 2.8), 120),
    Case("SteepestDescent", "definite", bl.SteepestDescent, 200),
    Case("ConjugateGradient", "definite", bl.ConjugateGradient, 20),
    Case("MINRES", "indefinite", bl.MINRES, 20),
    Case("BiCGStab", "general", bl.BiCGStab, 20),
    Case("GMRES", "general", bl.GMRES, 5, 1),
    Case("GMRES(2)", "general", lambda: bl.GMRES(restart=2), 60),
    Case("Direct", "general", bl.Direct, 5, 1),
    Case("ProximalGradient", "lasso", bl.ProximalGradient, 200),
    Case("FISTA", "lasso", lambda: bl.ProximalGradient(acceleration="fista"), 400),
]

# Made once: what a transformation is made of is part of the compiled program.
SGD = optax.sgd(1.5 / (LOW + HIGH), momentum=0.3)

FAMILIES = (
    "GradientDescent",
    "ConjugateGradient",
    "GMRES",
    "Direct",
    "Chebyshev",
    "FixedPointIteration",
    "Anderson",
)
"""One cheap solver of each family: where every solver is run, these are so by default."""
