"""Progressive refinement against full and fixed budgets: wall time to the same error."""

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

import bilevel as bl
from benchmarks.harness import Report, Timing
from benchmarks.problems import Stencil

TRUTH = 2.0
"""The parameter that training should find; it starts at 5."""


@dataclass(frozen=True)
class Inverse:
    """The strength θ of a source found from the state it causes: −Δu = θ s.

    Loss ‖u − u_ref‖²/(2N) with u_ref the direct solve at θ = 2; gradient descent from
    θ = 5, zero start of every solve, the same solver and budget for the adjoint.

    - `name`: for the tables.
    - `stencil`: the operator.
    - `source`: s, like the unknown.
    - `solver`: of the primal and of the adjoint.
    - `full`: budget of the full solve.
    - `learning_rate`: `None` takes the one with the published setting's contraction.
    """

    name: str
    stencil: Stencil
    source: np.ndarray
    solver: bl.InnerSolver
    full: bl.Budget
    learning_rate: float | None = None

    @property
    def ladder(self) -> bl.Ladder:
        """The published one: 25, 35, ... and at most 600 iterations."""
        return bl.Ladder.iterations(start=25, step=10, stop=600)

    @cached_property
    def response(self) -> np.ndarray:
        """The state of a source of strength 1."""
        return self.stencil.solve_directly(self.source)

    @cached_property
    def task(self) -> bl.Task:
        """What is trained; the metric is the relative error of θ."""
        dtype = self.stencil.dtype
        source, reference = (
            jnp.asarray(array, dtype) for array in (self.source, TRUTH * self.response)
        )
        start = jnp.zeros(self.stencil.shape, dtype)
        problem = bl.LinearSystem(self.stencil, lambda theta: theta * source)

        def loss(theta: Array, batch: object, fidelity: bl.Fidelity) -> Array:
            del batch
            solution = bl.solve(
                problem,
                theta,
                start,
                solver=self.solver,
                estimator=bl.Implicit(solver=self.solver),
                fidelity=fidelity,
            )
            return 0.5 * jnp.mean((solution.value - reference) ** 2)

        return bl.Task(
            np.asarray(5.0, dtype)[()],
            loss,
            validate=lambda theta: jnp.abs(theta - TRUTH) / TRUTH,
            name=self.name,
            metric_name="relative error of θ",
        )

    @property
    def optimizer(self) -> optax.GradientTransformation:
        """Plain gradient descent."""
        rate = self.learning_rate
        if rate is None:
            rate = 0.088 / float(np.mean(self.response**2))
        return optax.sgd(rate)

    def controller(self, policy: str | int) -> Any:
        """Of a policy: "full", "refined", or a fixed number of iterations."""
        if policy == "full":
            return bl.FixedFidelity(bl.Fidelity(self.full, self.full))
        if policy == "refined":
            return bl.ProgressiveRefinement(
                self.ladder,
                stepping_threshold=0.92,
                stopping_threshold=0.9,
                ema_window=None,
                error_window=2,
            )
        budget = bl.Budget(iterations=int(policy))
        return bl.FixedFidelity(bl.Fidelity(budget, budget))

    def train(self, policy: str | int, error: float, most_work: float = np.inf) -> bl.Run:
        """Train until θ is known to the error, or the inner iterations pass `most_work`."""
        spent = 0

        def watch(event: Any) -> None:
            nonlocal spent
            spent += event.record.primal_iterations or 0
            if event.record.metric <= error:
                event.stop("the error is reached")
            elif spent > most_work:
                event.stop("this takes more iterations than the best policy so far")

        return bl.optimize(
            self.task,
            optimizer=self.optimizer,
            controller=self.controller(policy),
            epochs=400,
            callbacks=[watch],
            progress=False,
        )


def published_inverse() -> Inverse:
    """The published setting: 30 unknowns, Jacobi, single precision."""
    stencil = Stencil(30, dimensions=1, dtype="float32")
    x = np.arange(1, 31) / 31
    full = bl.Budget(iterations=600)
    return Inverse("30 points, Jacobi", stencil, np.sin(2 * np.pi * x), bl.Jacobi(), full, 275.0)


def square_inverses(points: int) -> list[Inverse]:
    """The same on the unit square by conjugate gradients, which the full solve converges.

    The published source, constant in y, has few of the operator's eigenvectors in it, so
    CG converges early; a local one has them all.
    """
    stencil = Stencil(points)
    x = np.arange(1, points + 1) / (points + 1)
    sine = np.sin(2 * np.pi * x)[:, None] * np.ones(points)
    bump = np.exp(-50.0 * ((x[:, None] - 0.3) ** 2 + (x - 0.6) ** 2))
    full = bl.Budget(iterations=5000, rtol=1e-6)
    solver = bl.ConjugateGradient()
    return [
        Inverse(f"{points}², sin 2πx, CG", stencil, sine, solver, full),
        Inverse(f"{points}², local source, CG", stencil, bump, solver, full),
    ]


def best_fixed(inverse: Inverse, error: float, counts: Sequence[int]) -> int:
    """The fixed number of iterations that reaches the error with the least of them in sum."""
    best, least = counts[-1], np.inf
    tried: set[int] = set()

    def attempt(count: int) -> None:
        nonlocal best, least
        if count in tried or count < 1:
            return
        tried.add(count)
        run = inverse.train(count, error, least)
        if run.summary.final_metric is not None and run.summary.final_metric <= error:
            work = run.summary.primal_iterations or 0
            if work < least:
                best, least = count, work

    for count in sorted(counts, reverse=True):
        attempt(count)
    distance = max(b - a for a, b in itertools.pairwise(counts))
    while distance > 2:
        distance //= 2
        for neighbour in (best - distance, best + distance):
            attempt(neighbour)
    return best


def compare(
    report: Report, inverse: Inverse, error: float, counts: Sequence[int], rounds: int
) -> dict[str, Timing]:
    """Time full, best fixed and refined training to an error, and tabulate them."""
    fixed = best_fixed(inverse, error, counts)
    policies: dict[str, str | int] = {
        "full": "full",
        f"fixed K = {fixed}": fixed,
        "refined": "refined",
    }
    seconds: dict[str, list[float]] = {name: [] for name in policies}
    runs: dict[str, bl.Run] = {}
    for turn in range(rounds):
        names = list(policies)
        for name in names[turn % 3 :] + names[: turn % 3]:
            jax.clear_caches()
            start = time.perf_counter()
            runs[name] = inverse.train(policies[name], error)
            seconds[name].append(time.perf_counter() - start)
    timings = {name: Timing(tuple(values)) for name, values in seconds.items()}
    table = report.table(
        f"{inverse.name}: training to a relative error of {error:g}",
        "policy", "outer steps", "Σ inner iterations", "Σ adjoint iterations", "s, all",
        "s, without compile", "of full", "compilations of the update", "error reached",
    )  # fmt: skip
    for name, run in runs.items():
        summary = run.summary
        table.add(
            name,
            summary.updates,
            summary.primal_iterations,
            summary.adjoint_iterations,
            timings[name].median,
            summary.seconds_without_compile,
            timings[name].ratio(timings["full"]),
            summary.compilations,
            summary.final_metric,
        )
    report.check(
        f"{inverse.name}, error {error:g}: compilations of the update, refined",
        runs["refined"].summary.compilations,
        1,
    )
    return timings


def benchmark(quick: bool) -> Report:
    """Published setting at 30 unknowns, and 256² (64² quickly)."""
    report = Report("refinement")
    inverse = published_inverse()
    for error in (1e-3, 1e-4, 1e-5):
        timings = compare(report, inverse, error, range(300, 601, 20), 2 if quick else 7)
        report.check(
            f"{inverse.name}, error {error:g}: time of refined over full, compile included",
            timings["refined"].ratio(timings["full"]),
            1.0,
        )
    points = 64 if quick else 256
    counts = range(points // 4, 2 * points, points // 4)
    for inverse in square_inverses(points):
        for error in (1e-4,) if quick else (1e-3, 1e-4, 1e-5):
            timings = compare(report, inverse, error, counts, 1 if quick else 3)
            if not quick and "local" in inverse.name:
                report.check(
                    f"{inverse.name}, error {error:g}: time of refined over full",
                    timings["refined"].ratio(timings["full"]),
                    0.7,
                )
    return report
