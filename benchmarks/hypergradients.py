"""Implicit hypergradients against code by hand, SciPy, and other libraries."""

import contextlib
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

import bilevel as bl
from benchmarks import handwritten, harness, peers, problems, torch_peers
from benchmarks.handwritten import AnyProblem, Hypergradient
from benchmarks.harness import Report
from benchmarks.problems import Logistic, PoissonControl, Ridge
from benchmarks.same_work import attained, error_against_work, same_work


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
        return attained(
            problem,
            inner,
            theta,
            solver=solver,
            estimator=bl.Implicit(solver=linear),
            budget=budget,
            adjoint_budget=backward,
        )

    return jax.jit(jax.value_and_grad(loss))


def relative_error(hypergradient: Callable[[], Any], problem: AnyProblem) -> float:
    """‖G − G_exact‖ / ‖G_exact‖ of the hypergradient at the problem's θ."""
    _, exact = problem.exact()
    _, gradient = hypergradient()
    return float(np.linalg.norm(np.asarray(gradient) - exact) / np.linalg.norm(exact))


@dataclass(frozen=True)
class Race:
    """The same iterations, by the library, by hand and by other libraries.

    - `makers`: by name, what makes the jitted hypergradient; "library" and "by hand" are
        among them.
    - `step_size`: of descent; `None` where the inner problem is solved by CG.
    - `inner`, `adjoint`: iterations.
    - `limit`: of the time by hand; `None` where nothing is claimed, and other frameworks
        are left out.
    """

    name: str
    problem: AnyProblem
    makers: dict[str, Callable[[], Hypergradient]]
    limit: float | None
    step_size: float | None = None
    inner: int = 100
    adjoint: int = 100

    def run(self, report: Report, rounds: int, first_rounds: int, *, held: bool) -> None:
        """Time everything in turn, tabulate it, and hold the library against its limits."""
        report.say(self.name)
        theta = self.problem.theta
        steps = self.step_size, self.inner, self.adjoint
        made: dict[str, Callable[[], Any]] = {
            name: partial(make(), theta) for name, make in self.makers.items()
        }
        with contextlib.ExitStack() as stack:
            if self.limit is not None:
                made["SciPy by hand"] = handwritten.by_scipy(self.problem, *steps)
            if self.limit is not None and peers.available("torch") is not None:
                other = harness.beside(torch_peers.makers, self.problem, *steps)
                made |= stack.enter_context(other)
            errors = {name: relative_error(made[name], self.problem) for name in made}
            timings = harness.round_robin(made, rounds=rounds)
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
                first[name].median if name in first else None,
                first[name].ratio(first["by hand"]) if name in first else None,
                errors[name],
            )
        if not held or self.limit is None:
            return
        ratio = timings["library"].ratio(timings["by hand"])
        report.check(f"{self.name}: time of by hand", ratio, self.limit)
        for name in [name for name in made if "by hand" not in name and name != "library"]:
            ratio = timings["library"].ratio(timings[name])
            report.check(f"{self.name}: time of {name}", ratio, 1.0)
        ratio = first["library"].ratio(first["by hand"])
        report.check(f"{self.name}: first call of by hand", ratio, 1.5)
        if "jaxopt" in first:
            ratio = first["library"].ratio(first["jaxopt"])
            report.check(f"{self.name}: first call of jaxopt", ratio, 1.0)


def _fresh(make: Callable[[], Hypergradient], theta: Array) -> Callable[[], Callable[[], Any]]:
    return lambda: partial(make(), theta)


def conjugate_gradients(name: str, problem: Ridge | PoissonControl, steps: int) -> Race:
    """CG forward and backward."""
    if isinstance(problem, Ridge):
        inner, limit = normal_equations(problem), 1.05
        by_hand = partial(handwritten.ridge_conjugate_gradients, problem, steps, steps)
    else:
        inner, limit = inner_problem(problem), 1.1
        by_hand = partial(handwritten.poisson_adjoint, problem, "cg", steps, steps)
    budget = bl.Budget(iterations=steps)
    makers = {
        "by hand": by_hand,
        "library": partial(by_library, problem, inner, bl.ConjugateGradient(), budget),
        **peers.conjugate_gradients(problem, steps, steps),
    }
    return Race(
        f"{name}, CG + CG, K = M = {steps}", problem, makers, limit, inner=steps, adjoint=steps
    )


def descent(name: str, problem: Ridge | Logistic, inner: int, adjoint: int) -> Race:
    """Gradient descent forward, CG backward."""
    step_size = 1.0 / problem.lipschitz
    steps = problem, step_size, inner, adjoint
    makers = {
        "by hand": partial(handwritten.descent_with_conjugate_gradients, *steps),
        "library": partial(
            by_library,
            problem,
            inner_problem(problem),
            bl.GradientDescent(step_size=step_size),
            bl.Budget(iterations=inner),
            bl.ConjugateGradient(),
            bl.Budget(iterations=adjoint),
        ),
        **peers.descent_with_conjugate_gradients(*steps),
    }
    title = f"{name}, descent + CG, K = {inner}, M = {adjoint}"
    return Race(title, problem, makers, 1.05, step_size, inner, adjoint)


def jacobi(name: str, problem: PoissonControl, steps: int) -> Race:
    """Jacobi forward and backward: so cheap an iteration that looking at its residual shows."""
    by_hand = partial(handwritten.poisson_adjoint, problem)
    budget = bl.Budget(iterations=steps)
    makers = {
        "by hand": partial(by_hand, "jacobi", steps, steps),
        "by hand, with a test": partial(by_hand, "tested jacobi", steps, steps),
        "library": partial(by_library, problem, inner_problem(problem), bl.Jacobi(), budget),
    }
    return Race(f"{name}, Jacobi, K = M = {steps}", problem, makers, None)


def races(quick: bool) -> list[Race]:
    """Ridge, logistic regression, and Poisson control on two grids."""
    ridge = problems.ridge(400, 100) if quick else problems.ridge()
    logistic = problems.logistic(1000, 50) if quick else problems.logistic()
    sizes = ((32, 100),) if quick else ((64, 100), (256, 600))
    poisson = {points: problems.poisson_control(points) for points, _ in sizes}
    regression = "ridge {}×{}".format(*ridge.design.shape)
    return [
        conjugate_gradients(regression, ridge, 100),
        descent(regression, ridge, 100, 20),
        descent("logistic {}×{}".format(*logistic.design.shape), logistic, 100, 20),
        *(
            conjugate_gradients(f"Poisson control {points}²", poisson[points], steps)
            for points, steps in sizes
        ),
        jacobi(f"Poisson control {sizes[0][0]}²", poisson[sizes[0][0]], 100),
    ]


def all_problems(quick: bool) -> dict[str, AnyProblem]:
    """Ridge, logistic regression and Poisson control."""
    return {
        "P1 ridge": problems.ridge(400, 100) if quick else problems.ridge(),
        "P2 logistic": problems.logistic(1000, 50) if quick else problems.logistic(),
        "P3 Poisson control": problems.poisson_control(32 if quick else 64),
    }


GOAL = 1e-7
"""Error to which everything with default methods is timed."""


def defaults(report: Report, quick: bool) -> None:
    """What comes out where nothing is chosen, and the time that each needs to be right."""
    table = report.table(
        f"No solver and no tolerance given, and with the first tolerance that gives {GOAL:g}",
        "problem",
        "by",
        "error as it is",
        "ms as it is",
        "tolerance",
        "error",
        "ms",
    )
    for name, problem in all_problems(quick).items():
        report.say(f"{name} with default settings")
        library = by_library(problem, inner_problem(problem))
        found: dict[str, Hypergradient | None] = {"library": library}
        tolerances = {"library": None} | dict.fromkeys(peers.defaults(problem))
        plain = {"library": library} | {
            peer: make() for peer, make in peers.defaults(problem).items()
        }
        for peer in list(plain)[1:]:
            tolerances[peer], found[peer] = _tight_enough(problem, peer)
        timings = harness.round_robin(_at(problem, plain), rounds=5)
        exact = harness.round_robin(
            _at(problem, {key: made for key, made in found.items() if made is not None}),
            rounds=5,
        )
        for key, made in plain.items():
            tight = found[key]
            table.add(
                name,
                key,
                relative_error(partial(made, problem.theta), problem),
                timings[key].median * 1e3,
                tolerances[key],
                None if tight is None else relative_error(partial(tight, problem.theta), problem),
                None if tight is None else exact[key].median * 1e3,
            )
        error = relative_error(partial(library, problem.theta), problem)
        report.check(f"{name}: error with default settings", error, GOAL)
        for key in list(exact)[1:]:
            ratio = exact["library"].ratio(exact[key])
            if not quick:
                report.check(f"{name}, default methods to {GOAL:g}: time of {key}", ratio, 1.0)


def _at(problem: AnyProblem, made: dict[str, Hypergradient]) -> dict[str, Callable[[], Any]]:
    return {name: partial(function, problem.theta) for name, function in made.items()}


def _tight_enough(problem: AnyProblem, peer: str) -> tuple[float | None, Hypergradient | None]:
    """The loosest power of ten, and what it makes; `None` where none is enough."""
    for power in range(3, 16):
        tolerance = 10.0**-power
        made = peers.defaults(problem, tolerance)[peer]()
        if relative_error(partial(made, problem.theta), problem) <= GOAL:
            return tolerance, made
    return None, None


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
        race.run(report, 5 if quick else 15, 1 if quick else 5, held=not quick)
    same_work(report, all_problems(quick))
    error_against_work(report, all_problems(quick))
    defaults(report, quick)
    against_cholesky(report, quick)
    return report
