"""Progressive refinement against full and fixed budgets: wall time to the same error."""

import itertools
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
from benchmarks.learning import learning
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
                event.stop("this takes more iterations than it may")

        return bl.optimize(
            self.task,
            optimizer=self.optimizer,
            controller=self.controller(policy),
            epochs=400,
            callbacks=[watch],
            progress=False,
        )


@dataclass(frozen=True)
class Crossing:
    """What a run had taken when its error first met a target.

    - `steps`: outer steps; `inner`, `adjoint`: iterations in sum.
    - `seconds`: wall time since the start, compilation included; `compiling`: of it.
    """

    steps: int
    inner: int
    adjoint: int
    seconds: float
    compiling: float


def crossing(run: bl.Run, error: float) -> Crossing | None:
    """Where a run first met an error; `None` if it never did."""
    inner = adjoint = 0
    compiling = 0.0
    for record in run.history:
        inner += record.primal_iterations or 0
        adjoint += record.adjoint_iterations or 0
        compiling += record.compile_seconds
        if record.metric is not None and record.metric <= error:
            return Crossing(record.epoch, inner, adjoint, record.elapsed, compiling)
    return None


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


def best_fixed(
    inverse: Inverse, errors: Sequence[float], counts: Sequence[int]
) -> dict[float, int]:
    """For each error, the fixed number of iterations that meets it with the least in sum.

    Tries `counts`, then halves the distance around the best of each error to some per cent.
    """
    work: dict[float, dict[int, float]] = {error: {} for error in errors}
    tried: set[int] = set()

    def attempt(count: int) -> None:
        if count in tried or count < 1:
            return
        tried.add(count)
        known = [min(found.values(), default=np.inf) for found in work.values()]
        run = inverse.train(count, min(errors), max(known))
        for error, found in work.items():
            met = crossing(run, error)
            found[count] = np.inf if met is None else met.inner

    for count in sorted(counts, reverse=True):
        attempt(count)
    distance = max(after - before for before, after in itertools.pairwise(counts))
    while distance > min(counts) // 16:
        distance //= 2
        for found in work.values():
            best = min(found, key=found.__getitem__)
            attempt(best - distance)
            attempt(best + distance)
    return {error: min(found, key=found.__getitem__) for error, found in work.items()}


def compare(
    report: Report,
    inverse: Inverse,
    errors: Sequence[float],
    counts: Sequence[int],
    rounds: int,
    limit: float | None,
) -> None:
    """Time full, best fixed and refined training to each error; hold refined against full."""
    report.say(f"{inverse.name}, looking for the best fixed budgets")
    fixed = best_fixed(inverse, errors, counts)
    policies: list[str | int] = ["full", "refined", *sorted(set(fixed.values()))]
    runs: dict[str | int, list[bl.Run]] = {policy: [] for policy in policies}
    for turn in range(rounds):
        shift = turn % len(policies)
        for policy in policies[shift:] + policies[:shift]:
            report.say(f"{inverse.name}, {policy}, round {turn + 1} of {rounds}")
            jax.clear_caches()
            runs[policy].append(inverse.train(policy, min(errors)))
    for error in errors:
        _tabulate(report, inverse.name, error, fixed[error], runs, limit)
    compilations = max(run.summary.compilations for run in runs["refined"])
    report.check(f"{inverse.name}: compilations of the update, refined", compilations, 1)


def _tabulate(
    report: Report,
    name: str,
    error: float,
    fixed: int,
    runs: dict[str | int, list[bl.Run]],
    limit: float | None,
) -> None:
    labels: dict[str, str | int] = {
        "full": "full", f"K = {fixed}, best fixed": fixed, "refined": "refined"
    }  # fmt: skip
    table = report.table(
        f"{name}: training to a relative error of {error:g}",
        "policy", "steps", "Σ inner", "Σ adjoint", "s", "s, no compile", "s / full",
    )  # fmt: skip
    met = {
        label: [found for run in runs[policy] if (found := crossing(run, error)) is not None]
        for label, policy in labels.items()
    }
    timings = {
        label: Timing(tuple(found.seconds for found in crossings))
        for label, crossings in met.items()
    }
    for label, crossings in met.items():
        table.add(
            label,
            crossings[0].steps,
            crossings[0].inner,
            crossings[0].adjoint,
            timings[label].median,
            Timing(tuple(found.seconds - found.compiling for found in crossings)).median,
            timings[label].ratio(timings["full"]),
        )
    if limit is not None:
        ratio = timings["refined"].ratio(timings["full"])
        report.check(f"{name}, to {error:g}: time of refined over full", ratio, limit)


def benchmark(quick: bool) -> Report:
    """Published setting at 30 unknowns, 256² (64² quickly), and policies on learning tasks."""
    report = Report("refinement")
    errors = (1e-3, 1e-4) if quick else (1e-3, 1e-4, 1e-5)
    limit = None if quick else 1.0
    compare(report, published_inverse(), errors, range(300, 601, 20), 3 if quick else 9, limit)
    points = 64 if quick else 256
    counts = range(points // 4, 2 * points, points // 4)
    sine, local = square_inverses(points)
    compare(report, sine, errors, counts, 1 if quick else 3, None)
    compare(report, local, errors, counts, 1 if quick else 3, None if quick else 0.7)
    learning(report, quick)
    return report
