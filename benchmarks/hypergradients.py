"""Implicit hypergradients against code by hand, SciPy, and other libraries."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

import bilevel as bl
from benchmarks import handwritten, harness, peers, problems
from benchmarks.handwritten import Hypergradient
from benchmarks.harness import Report
from benchmarks.problems import Logistic, PoissonControl, Ridge

AnyProblem = Ridge | Logistic | PoissonControl


def inner_problem(problem: AnyProblem) -> bl.InnerProblem:
    """The inner problem as a user of the library would write it."""
    if isinstance(problem, PoissonControl):
        return bl.LinearSystem(problem.operator, problem.rhs)
    return bl.Minimization(problem.objective)


def normal_equations(problem: Ridge) -> bl.LinearSystem:
    """Ridge's stationarity as the linear system it is, for a linear solver."""
    matvec, rhs = peers.linear_form(problem)
    return bl.LinearSystem(
        lambda theta: lambda v: matvec(v, theta), rhs, symmetric=True, positive_definite=True
    )


def by_library(
    problem: AnyProblem,
    inner: bl.InnerProblem,
    solver: bl.InnerSolver | None = None,
    budget: bl.Budget | None = None,
    adjoint_solver: bl.InnerSolver | None = None,
    adjoint_budget: bl.Budget | None = None,
) -> Hypergradient:
    """The implicit hypergradient; by default nothing is given.

    The adjoint has the primal's solver and budget where it is given none of its own.
    """
    linear = solver if adjoint_solver is None else adjoint_solver
    backward = budget if adjoint_budget is None else adjoint_budget

    def loss(theta: Array) -> Array:
        solution = bl.solve(
            inner,
            theta,
            problem.start,
            solver=solver,
            estimator=bl.Implicit(solver=linear),
            budget=budget,
            adjoint_budget=backward,
        )
        return problem.outer_loss(solution.value, theta)

    return jax.jit(jax.value_and_grad(loss))


def relative_error(hypergradient: Hypergradient, problem: AnyProblem) -> float:
    """‖G − G_exact‖ / ‖G_exact‖."""
    _, exact = problem.exact()
    _, gradient = hypergradient(problem.theta)
    return float(np.linalg.norm(np.asarray(gradient) - exact) / np.linalg.norm(exact))


@dataclass(frozen=True)
class Race:
    """The same iterations, by the library, by hand and by other libraries.

    - `makers`: by name, what makes the jitted hypergradient; "library" and "by hand" are
        among them.
    - `claimed`: whether the library's ratios are held against their limits.
    """

    name: str
    problem: AnyProblem
    makers: dict[str, Callable[[], Hypergradient]]
    claimed: bool = True

    def run(self, report: Report, rounds: int, first_rounds: int, *, held: bool) -> None:
        """Time everything in turn, tabulate it, and hold the library against its limits."""
        report.say(self.name)
        theta = self.problem.theta
        made = {name: make() for name, make in self.makers.items()}
        errors = {name: relative_error(made[name], self.problem) for name in made}
        timings = harness.round_robin(
            {name: partial(function, theta) for name, function in made.items()}, rounds=rounds
        )
        first = harness.first_calls(
            {name: _fresh(make, theta) for name, make in self.makers.items()}, rounds=first_rounds
        )
        table = report.table(
            self.name,
            "candidate",
            "ms",
            "ms / by hand",
            "first call, s",
            "first / by hand",
            "rel. error",
        )
        for name in made:
            table.add(
                name,
                timings[name].median * 1e3,
                timings[name].ratio(timings["by hand"]),
                first[name].median,
                first[name].ratio(first["by hand"]),
                errors[name],
            )
        if held:
            ratio = timings["library"].ratio(timings["by hand"])
            report.check(f"{self.name}: time of by hand", ratio, 1.1)
            ratio = first["library"].ratio(first["by hand"])
            report.check(f"{self.name}: first call of by hand", ratio, 1.5)


def _fresh(make: Callable[[], Hypergradient], theta: Array) -> Callable[[], Callable[[], Any]]:
    return lambda: partial(make(), theta)


def races(quick: bool) -> list[Race]:
    """Ridge by CG, Poisson control by CG and Jacobi, logistic regression by descent and CG."""
    steps, budget = 100, bl.Budget(iterations=100)
    ridge = problems.ridge(400, 100) if quick else problems.ridge()
    poisson = problems.poisson_control(32 if quick else 64)
    cg, jacobi = bl.ConjugateGradient(), bl.Jacobi()
    found = [
        Race(
            f"ridge {ridge.design.shape[0]}×{ridge.design.shape[1]}, CG + CG, K = M = {steps}",
            ridge,
            {
                "by hand": partial(handwritten.ridge_conjugate_gradients, ridge, steps, steps),
                "library": partial(by_library, ridge, normal_equations(ridge), cg, budget),
                **peers.conjugate_gradients(ridge, steps, steps),
            },
        )
    ]
    control = inner_problem(poisson)
    size = f"{poisson.reference.shape[0]}²"
    by_hand = partial(handwritten.poisson_adjoint, poisson)
    found.append(
        Race(
            f"Poisson control {size}, CG + CG, K = M = {steps}",
            poisson,
            {
                "by hand": partial(by_hand, "cg", steps, steps),
                "library": partial(by_library, poisson, control, cg, budget),
                **peers.conjugate_gradients(poisson, steps, steps),
            },
        )
    )
    # An iteration of Jacobi is so cheap here that looking at its residual shows.
    found.append(
        Race(
            f"Poisson control {size}, Jacobi, K = M = {steps}",
            poisson,
            {
                "by hand": partial(by_hand, "jacobi", steps, steps),
                "by hand, with a test": partial(by_hand, "tested jacobi", steps, steps),
                "library": partial(by_library, poisson, control, jacobi, budget),
            },
            claimed=False,
        )
    )
    logistic = problems.logistic(1000, 50) if quick else problems.logistic()
    step_size = 1.0 / logistic.lipschitz
    found.append(
        Race(
            f"logistic {logistic.design.shape[0]}×{logistic.design.shape[1]}, "
            "descent + CG, K = 100, M = 20",
            logistic,
            {
                "by hand": partial(
                    handwritten.descent_with_conjugate_gradients, logistic, step_size, steps, 20
                ),
                "library": partial(
                    by_library,
                    logistic,
                    inner_problem(logistic),
                    bl.GradientDescent(step_size=step_size),
                    budget,
                    cg,
                    bl.Budget(iterations=20),
                ),
            },
            claimed=False,
        )
    )
    return found


def accuracy(report: Report, quick: bool) -> None:
    """What comes out where nothing is chosen, by library."""
    cases: dict[str, AnyProblem] = {
        "P1 ridge": problems.ridge(400, 100) if quick else problems.ridge(),
        "P2 logistic": problems.logistic(1000, 50) if quick else problems.logistic(),
        "P3 Poisson control": problems.poisson_control(32 if quick else 64),
    }
    table = report.table("No solver and no tolerance given", "problem", "by", "rel. error", "ms")
    for name, problem in cases.items():
        report.say(f"{name} with default settings")
        candidates = {"library": by_library(problem, inner_problem(problem))}
        candidates |= {peer: make() for peer, make in peers.defaults(problem).items()}
        timings = harness.round_robin(
            {key: partial(function, problem.theta) for key, function in candidates.items()},
            rounds=3,
        )
        for key, function in candidates.items():
            error = relative_error(function, problem)
            table.add(name, key, error, timings[key].median * 1e3)
            if key == "library":
                report.check(f"{name}: error with default settings", error, 1e-6)


def against_cholesky(report: Report, quick: bool) -> None:
    """Ridge with default settings against SciPy's factorisation."""
    ridge = problems.ridge(400, 100) if quick else problems.ridge()
    default = by_library(ridge, inner_problem(ridge))
    arrays = [np.asarray(array) for array in dataclasses.astuple(ridge)]
    timings = harness.round_robin(
        {
            "SciPy Cholesky": lambda: problems.ridge_by_cholesky(*arrays),
            "library, default": lambda: default(ridge.theta),
        },
        rounds=5 if quick else 15,
    )
    table = report.table("Ridge by a factorisation", "candidate", "ms", "of SciPy")
    for name, timing in timings.items():
        table.add(name, timing.median * 1e3, timing.ratio(timings["SciPy Cholesky"]))
    if not quick:
        ratio = timings["library, default"].ratio(timings["SciPy Cholesky"])
        report.check("ridge with default settings: time of SciPy's Cholesky", ratio, 1.5)


def benchmark(quick: bool) -> Report:
    """Speed at equal iterations, accuracy by default, and the factorisation."""
    report = Report("hypergradients", remarks=peers.missing())
    for race in races(quick):
        race.run(report, 5 if quick else 15, 1 if quick else 5, held=race.claimed and not quick)
    accuracy(report, quick)
    against_cholesky(report, quick)
    return report
