"""Unrolling with a traced budget against a static scan: time, memory, and the bits."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

import bilevel as bl
from benchmarks import harness, peers, problems
from benchmarks.handwritten import scan_unroll
from benchmarks.harness import Report

CAP = 1000
"""Room for this many steps is kept whatever the budget."""


@dataclass(frozen=True)
class Case:
    """An iteration, as the library sees it and as a scan does."""

    name: str
    problem: bl.InnerProblem
    solver: bl.InnerSolver
    step: Callable[[Any, Any], Any]
    outer_loss: Callable[[Any, Any], Array]
    start: Array
    theta: Any

    def by_library(self, estimator: bl.Estimator) -> Any:
        """(theta, steps) -> (outer loss, gradient), compiled once for all steps."""

        def loss(theta: Any, steps: Any) -> Array:
            solution = bl.solve(
                self.problem,
                theta,
                self.start,
                solver=self.solver,
                estimator=estimator,
                budget=bl.Budget(iterations=steps),
            )
            return self.outer_loss(solution.value, theta)

        return jax.jit(jax.value_and_grad(loss))

    def by_scan(self, steps: int) -> Any:
        """theta -> (outer loss, gradient), compiled for these steps."""
        return scan_unroll(self.step, self.outer_loss, self.start, steps)


def descent_case(name: str, problem: problems.Ridge | problems.Logistic, lipschitz: float) -> Case:
    """Gradient descent of step 1/L."""
    step_size = 1.0 / lipschitz
    slope = jax.grad(problem.objective)
    return Case(
        name,
        bl.Minimization(problem.objective),
        bl.GradientDescent(step_size=step_size),
        lambda w, theta: w - step_size * slope(w, theta),
        problem.outer_loss,
        problem.start,
        problem.theta,
    )


def diffusion_case(points: int) -> Case:
    """Reaction and diffusion on a ring, relaxed explicitly towards a stationary state.

    u ← u + τ (∂ₓ(exp(θ) (1 + u²) ∂ₓu) + u − u³ + source): nonlinear in the diffusivity and
    in the reaction; θ is a field, one parameter a point.
    """
    random = np.random.default_rng(0)
    x = np.arange(points) / points
    source = jnp.asarray(np.sin(2 * np.pi * x) + 0.1 * random.standard_normal(points))
    target = jnp.asarray(0.5 * np.cos(2 * np.pi * x))
    theta = jnp.asarray(0.1 * random.standard_normal(points))

    def relax(u: Float[Array, " n"], theta: Float[Array, " n"]) -> Float[Array, " n"]:
        ahead = jnp.roll(u, -1)
        flux = jnp.exp(theta) * (1.0 + (0.5 * (u + ahead)) ** 2) * (ahead - u)
        return u + 0.1 * (flux - jnp.roll(flux, 1) + 0.1 * (u - u**3 + source))

    return Case(
        "diffusion",
        bl.FixedPoint(relax),
        bl.FixedPointIteration(),
        relax,
        lambda u, theta: 0.5 * jnp.mean((u - target) ** 2),  # noqa: ARG005
        jnp.zeros(points),
        theta,
    )


def cases(quick: bool) -> list[Case]:
    """Ridge, logistic regression and nonlinear diffusion."""
    ridge = problems.ridge(400, 100) if quick else problems.ridge()
    logistic = problems.logistic(1000, 50) if quick else problems.logistic()
    return [
        descent_case("ridge", ridge, ridge.spectrum[1]),
        descent_case("logistic", logistic, logistic.lipschitz),
        diffusion_case(10_000 if quick else 100_000),
    ]


ESTIMATORS = {
    "checkpoints": bl.Unrolled(max_iterations=CAP),
    "every iterate kept": bl.Unrolled(max_iterations=CAP, store="all"),
}
LIMITS = {"checkpoints": 1.5, "every iterate kept": 1.15}


NO_CONTRACTION = "--xla_cpu_max_isa=AVX"
"""Keeps XLA from contracting a·b + c into one rounding.

Where it contracts depends on what it fuses, in a scan as anywhere, so two programs with
the same operations in the same order agree to the last bit only without it.
"""


def bits_differ(quick: bool, steps: Sequence[int]) -> dict[tuple[str, int], tuple[int, float]]:
    """By case and steps: entries that are not the scan's bits, and the largest difference.

    Over both estimators; the difference is relative to the gradient's largest entry.
    """
    found: dict[tuple[str, int], tuple[int, float]] = {}
    for case in cases(quick):
        made = [case.by_library(estimator) for estimator in ESTIMATORS.values()]
        for count in steps:
            expected = np.asarray(case.by_scan(count)(case.theta)[1])
            gradients = [np.asarray(f(case.theta, jnp.int32(count))[1]) for f in made]
            entries = sum(int(np.sum(gradient != expected)) for gradient in gradients)
            distance = max(float(np.max(np.abs(gradient - expected))) for gradient in gradients)
            found[case.name, count] = entries, distance / float(np.max(np.abs(expected)))
    return found


def bits(report: Report, quick: bool) -> None:
    """Compare gradients to the last bit, with and without contraction."""
    report.say("bits of the gradients")
    steps = (7, 100) if quick else (7, 100, CAP)
    table = report.table(
        "entries of the gradient that are not the scan's to the last bit",
        "problem", "steps", "entries", "entries, contracted", "largest difference, contracted",
    )  # fmt: skip
    exact = harness.apart(bits_differ, quick, steps, flags=NO_CONTRACTION)
    contracted = bits_differ(quick, steps)
    for (name, count), (entries, _) in exact.items():
        table.add(name, count, entries, *contracted[name, count])
    entries = sum(entries for entries, _ in exact.values())
    report.check("entries of all gradients that are not the scan's to the last bit", entries, 0)


def time_case(report: Report, case: Case, rounds: int, *, held: bool) -> None:
    """Time 100 and 1000 steps by one executable against a scan of each length."""
    made = {name: case.by_library(estimator) for name, estimator in ESTIMATORS.items()}
    table = report.table(
        f"{case.name}: value and gradient", "candidate", "steps", "ms", "of the scan"
    )
    for steps in (100, CAP):
        report.say(f"{case.name}, {steps} steps")
        scan = case.by_scan(steps)
        count = jnp.int32(steps)
        candidates: dict[str, Callable[[], Any]] = {"scan": partial(scan, case.theta)}
        for name, function in made.items():
            candidates[name] = partial(function, case.theta, count)
        for name, make in peers.unrolled(case.step, case.outer_loss, case.start, steps).items():
            candidates[name] = partial(make(), case.theta)
        timings = harness.round_robin(candidates, rounds=rounds)
        if held and "optimistix" in timings:
            ratio = timings["checkpoints"].ratio(timings["optimistix"])
            claim = f"{case.name}, {steps} steps, checkpoints: time of optimistix'"
            report.check(claim, ratio, 1.0)
        for name, timing in timings.items():
            ratio = timing.ratio(timings["scan"])
            table.add(name, steps, timing.median * 1e3, ratio)
            if held and name in LIMITS:
                report.check(
                    f"{case.name}, {steps} steps, {name}: time of the scan", ratio, LIMITS[name]
                )
    for name, function in made.items():
        compilations = function._cache_size()  # noqa: SLF001
        report.check(f"{case.name}, {name}: compilations for both budgets", compilations, 1)


def run_at_cap(points: int, candidate: str) -> Callable[[], Any]:
    """The diffusion problem, compiled and ready to be watched by `harness.peak_growth`."""
    case = diffusion_case(points)
    if candidate == "scan":
        return partial(case.by_scan(CAP).lower(case.theta).compile(), case.theta)
    others = peers.unrolled(case.step, case.outer_loss, case.start, CAP)
    if candidate in others:
        return partial(others[candidate]().lower(case.theta).compile(), case.theta)
    count = jnp.int32(CAP)
    function = case.by_library(ESTIMATORS[candidate])
    return partial(function.lower(case.theta, count).compile(), case.theta, count)


def memory(report: Report, points: int) -> None:
    """Memory in states, as the compiler plans it and as the operating system sees it."""
    report.say("memory")
    case = diffusion_case(points)
    state = points * case.start.dtype.itemsize
    allowed = 2.0 * math.ceil(math.sqrt(CAP)) + 4.0
    table = report.table(
        f"diffusion, n = {points:,}, {CAP} steps: memory beyond arguments and results",
        "candidate", "states, planned", "states, resident peak", "MB, planned", "MB, resident peak",
    )  # fmt: skip
    planned = {"scan": harness.temporary_bytes(case.by_scan(CAP), case.theta)}
    for name, make in peers.unrolled(case.step, case.outer_loss, case.start, CAP).items():
        planned[name] = harness.temporary_bytes(make(), case.theta)
    for name, estimator in ESTIMATORS.items():
        function = case.by_library(estimator)
        planned[name] = harness.temporary_bytes(function, case.theta, jnp.int32(CAP))
    for name, size in planned.items():
        resident = harness.peak_growth(run_at_cap, points, name)
        table.add(name, size / state, resident / state, size / 1e6, resident / 1e6)
        if name == "checkpoints":
            report.check("diffusion, checkpoints: states planned", size / state, allowed)
            report.check("diffusion, checkpoints: states resident", resident / state, allowed)
            report.check("diffusion, checkpoints: MB resident", resident / 1e6, 80.0)


def benchmark(quick: bool) -> Report:
    """Time and bits on three problems, memory on the largest."""
    report = Report("unrolling")
    for case in cases(quick):
        time_case(report, case, 3 if quick else 7, held=not quick)
    bits(report, quick)
    memory(report, 100_000)
    return report
