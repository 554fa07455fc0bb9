"""Published figures reproduced: a penalty search, and the tightness of error bounds."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

import bilevel as bl
from benchmarks.bounded_quadratic import BoundedQuadratic
from benchmarks.harness import Report
from benchmarks.penalty_search import PenaltySearch

OUTER_STEPS = (0, 10, 20, 30, 50, 100)
PUBLISHED_LOSSES = (0.574399, 0.533768, 0.361522, 0.322504, 0.294467, 0.285354)
"""Validation losses of the penalty search before these outer steps."""

PUBLISHED_NORM = 5322.447
"""Norm of the exact hypergradient of the quadratic."""


def penalty_search(report: Report) -> None:
    """The published losses, by hand and by the library."""
    report.say("penalty search")
    search = PenaltySearch.create()
    steps = list(OUTER_STEPS)
    by_hand = search.losses_by_hand(max(OUTER_STEPS))
    by_library = search.losses(max(OUTER_STEPS))
    table = report.table(
        "Logistic regression, truncated back-propagation: validation loss",
        "outer step", "published", "by hand", "library",
    )  # fmt: skip
    for step, published in zip(steps, PUBLISHED_LOSSES, strict=True):
        losses = (published, by_hand[step], by_library[step])
        table.add(str(step), *(f"{loss:.6f}" for loss in losses))
    for name, losses in (("by hand", by_hand), ("library", by_library)):
        distance = np.max(np.abs(losses[steps] - np.array(PUBLISHED_LOSSES)))
        report.check(f"penalty search, {name}: distance to the published losses", distance, 1e-5)
    distance = np.max(np.abs(by_library - by_hand))
    report.check("penalty search: distance of library and by hand", distance, 1e-12)


def judged_hypergradient(
    quadratic: BoundedQuadratic, error: bl.ErrorEstimator | bool
) -> Callable[[int, int], tuple[Array, Array]]:
    """(heavy-ball steps, CG steps) -> (hypergradient, its error as judged)."""
    step_size, momentum = quadratic.heavy_ball
    start = jnp.zeros(quadratic.hessian.shape[0])

    @jax.jit
    def judge(inner: Any, adjoint: Any) -> tuple[Array, Array]:
        result = bl.hypergradient(
            quadratic.outer_loss,
            bl.Minimization(quadratic.inner_objective),
            jnp.asarray(quadratic.parameters),
            start,
            solver=bl.HeavyBall(step_size=step_size, momentum=momentum),
            estimator=bl.Implicit(solver=bl.ConjugateGradient()),
            budget=bl.Budget(iterations=inner),
            adjoint_budget=bl.Budget(iterations=adjoint),
            error=error,
        )
        assert result.error is not None
        return result.gradient, result.error.total

    return judge


def error_bounds(report: Report, inner_counts: range, adjoint_counts: range) -> None:
    """True error, estimate and certified bound over many pairs of budgets."""
    report.say("error bounds")
    quadratic = BoundedQuadratic.create()
    exact = quadratic.exact_gradient()
    norm = float(np.linalg.norm(exact))
    report.check("quadratic: ‖G‖ off the published one", abs(norm - PUBLISHED_NORM), 5e-4)
    estimate = judged_hypergradient(quadratic, error=True)
    bound = judged_hypergradient(
        quadratic,
        bl.CertifiedBound(
            strong_convexity=quadratic.spectrum[0],
            outer_lipschitz=quadratic.outer_lipschitz,
            cross_norm=float(np.linalg.norm(quadratic.cross, 2)),
        ),
    )
    table = report.table(
        f"Quadratic, ‖G‖ = {norm:.3f}: truncation error",
        "heavy ball", "CG", "true", "estimate", "estimate / true", "bound", "bound / true",
    )  # fmt: skip
    estimated, certified = [], []
    for inner in inner_counts:
        for adjoint in adjoint_counts:
            gradient, guess = estimate(inner, adjoint)
            limit = float(bound(inner, adjoint)[1])
            true = float(np.linalg.norm(np.asarray(gradient) - exact))
            estimated.append(float(guess) / true)
            certified.append(limit / true)
            if inner in (10, 50, 100, 200) and adjoint in (2, 5, 10):
                table.add(
                    str(inner), adjoint, true, float(guess), estimated[-1], limit, certified[-1]
                )
    within = np.mean([0.1 <= ratio <= 10 for ratio in estimated])
    spread = report.table(
        f"Quadratic, {len(estimated)} pairs of budgets: judged error over true error",
        "by", "least", "median", "largest",
    )  # fmt: skip
    for name, ratios in (("estimate", estimated), ("certified bound", certified)):
        spread.add(name, float(np.min(ratios)), float(np.median(ratios)), float(np.max(ratios)))
    failures = sum(ratio < 1 for ratio in certified)
    report.check("quadratic: cases where the certified bound fails", failures, 0)
    report.check("quadratic: share within a factor 10", float(within), 0.95, at_least=True)


def benchmark(quick: bool) -> Report:
    """Both reproductions; quickly, with fewer pairs of budgets."""
    report = Report("published")
    penalty_search(report)
    error_bounds(report, range(10, 201, 50 if quick else 10), range(2, 11, 4 if quick else 1))
    return report
