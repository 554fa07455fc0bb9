"""Every estimator at the same iterations as code by hand: the same gradient, and no recompiling."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

import bilevel as bl
from benchmarks import handwritten
from benchmarks.handwritten import AnyProblem, Hypergradient
from benchmarks.harness import Report

INNER, ADJOINT, RANK, DAMPING = 100, 20, 20, 1e-2


@dataclass(frozen=True)
class Pair:
    """An estimator, and the same iterations by hand."""

    name: str
    estimator: bl.Estimator
    by_hand: Callable[[AnyProblem, float], Hypergradient]


def _unrolled(problem: AnyProblem, step_size: float) -> Hypergradient:
    slope = jax.grad(problem.objective)
    return handwritten.scan_unroll(
        lambda w, theta: w - step_size * slope(w, theta),
        problem.outer_loss,
        problem.start,
        INNER,
    )


def pairs() -> list[Pair]:
    """All estimators."""
    both = {"inner": INNER, "adjoint": ADJOINT}
    sketch = {"inner": INNER, "rank": RANK, "damping": DAMPING}
    return [
        Pair("Unrolled", bl.Unrolled(max_iterations=2 * INNER), _unrolled),
        Pair(
            "Implicit, CG",
            bl.Implicit(bl.ConjugateGradient()),
            partial(handwritten.descent_with_conjugate_gradients, **both),
        ),
        Pair("Neumann", bl.Neumann(), partial(handwritten.descent_with_neumann_series, **both)),
        Pair(
            "Nyström",
            bl.Nystrom(rank=RANK, damping=DAMPING),
            partial(handwritten.descent_with_nystrom, **sketch),
        ),
        Pair("OneStep", bl.OneStep(), partial(handwritten.descent_with_one_step, inner=INNER)),
    ]


def attained(problem: AnyProblem, inner: bl.InnerProblem, theta: Array, **settings: Any) -> Array:
    """The outer loss at the inner solution, with the settings of `bl.solve`."""
    solution = bl.solve(inner, theta, problem.start, **settings)
    return problem.outer_loss(solution.value, theta)


def by_library(problem: AnyProblem, step_size: float, estimator: bl.Estimator) -> Any:
    """(theta, budget, adjoint budget) -> (outer loss, hypergradient), all of them traced."""
    inner = bl.Minimization(problem.objective)
    solver = bl.GradientDescent(step_size=step_size)

    @jax.jit
    def hypergradient(theta: Array, budget: bl.Budget, adjoint: bl.Budget) -> Any:
        def loss(theta: Array) -> Array:
            return attained(
                problem,
                inner,
                theta,
                solver=solver,
                estimator=estimator,
                budget=budget,
                adjoint_budget=adjoint if estimator.solves_adjoint else None,
            )

        return jax.value_and_grad(loss)(theta)

    return hypergradient


WORK = (10, 30, 100, 300, 1000)
"""Steps of descent, and as many for the adjoint."""


def error_against_work(report: Report, problems: dict[str, AnyProblem]) -> None:
    """Errors of the hypergradients as primal and adjoint go further; Unrolled at most 1,000."""
    table = report.table(
        "Relative error of the hypergradient after K steps of descent, and K for the adjoint",
        "problem",
        "estimator",
        *(f"K = {count:,}" for count in WORK),
    )
    for name, problem in problems.items():
        _, exact = problem.exact()
        for pair in pairs():
            report.say(f"{name}, {pair.name}: error against work")
            estimator = pair.estimator
            if isinstance(estimator, bl.Unrolled):
                estimator = bl.Unrolled(max_iterations=max(WORK))
            library = by_library(problem, 1.0 / problem.lipschitz, estimator)
            found = [library(problem.theta, _traced(count), _traced(count))[1] for count in WORK]
            errors = [float(np.linalg.norm(g - exact) / np.linalg.norm(exact)) for g in found]
            table.add(name, pair.name, *errors)


def _traced(iterations: int, rtol: float = 0.0) -> bl.Budget:
    return bl.Budget(iterations=jnp.int32(iterations), rtol=jnp.asarray(rtol))


def same_work(report: Report, problems: dict[str, AnyProblem]) -> None:
    """Errors of the hypergradients at equal iterations, and compilations over many budgets."""
    table = report.table(
        f"Every estimator after {INNER} steps of descent, {ADJOINT} for the adjoint",
        "problem",
        "estimator",
        "error, library",
        "error, by hand",
        "apart",
        "compilations",
    )
    worst, compilations = 0.0, 0
    for name, problem in problems.items():
        _, exact = problem.exact()
        scale, step_size = np.linalg.norm(exact), 1.0 / problem.lipschitz
        for pair in pairs():
            report.say(f"{name}, {pair.name}: the same iterations by hand")
            library = by_library(problem, step_size, pair.estimator)
            _, mine = library(problem.theta, _traced(INNER), _traced(ADJOINT))
            _, theirs = pair.by_hand(problem, step_size)(problem.theta)
            for budgets in ((7, 3, 0.0), (INNER, 5, 1e-3), (33, ADJOINT, 1e-8)):
                *counts, rtol = budgets
                library(problem.theta, *(_traced(int(count), rtol) for count in counts))
            errors = [float(np.linalg.norm(g - exact) / scale) for g in (mine, theirs)]
            apart = float(jnp.linalg.norm(mine - theirs) / jnp.linalg.norm(theirs))
            compiled = library._cache_size()  # noqa: SLF001
            table.add(name, pair.name, *errors, apart, compiled)
            worst = max(worst, abs(errors[0] / errors[1] - 1.0))
            compilations = max(compilations, compiled)
    report.check("errors at equal iterations: furthest from by hand", worst, 0.01)
    report.check("compilations of any estimator over all budgets and tolerances", compilations, 1)
