"""Poisson on a square: conjugate gradients with geometric multigrid, against PyAMG."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

import bilevel as bl
import bilevel_pde as pde
from benchmarks import harness
from benchmarks.harness import Report

RTOL = 1e-8
MODES = 10
"""Source parameters along each axis."""
CYCLES: tuple[pde.Multigrid, ...] = (
    pde.Multigrid(),
    pde.Multigrid(pde.GaussSeidel()),
    pde.Multigrid(cycle="W"),
    pde.Multigrid(cycle="F"),
)


def system(points: int) -> tuple[pde.Operator, Array]:
    """−Δ with zero boundary values on points² inner points, and a rough right-hand side."""
    grid = pde.Grid((points, points), (1.0, 1.0))
    rhs = np.random.default_rng(0).standard_normal(grid.shape)
    return -pde.laplacian(grid), jnp.asarray(rhs)


def solver(cycle: pde.Multigrid) -> Callable[[pde.Operator, Array], bl.Solution]:
    """The jitted primal solve by conjugate gradients."""

    def solve(operator: pde.Operator, rhs: Array) -> bl.Solution:
        return bl.solve(
            bl.LinearSystem(operator, rhs),
            None,
            jnp.zeros_like(rhs),
            solver=bl.ConjugateGradient(preconditioner=cycle),
            budget=bl.Budget(100, rtol=RTOL),
        )

    return jax.jit(solve)


def hypergradient(points: int) -> Callable[[Float[Array, "m m"]], Any]:
    """Misfit of the solution to a target, and its gradient in MODES² source parameters."""
    operator, target = system(points)
    along = jnp.arange(1, points + 1) / (points + 1)
    modes = jnp.sin(jnp.pi * jnp.arange(1, MODES + 1) * along[:, None])
    target = target / points**2
    cg = bl.ConjugateGradient(preconditioner=pde.Multigrid())
    budget = bl.Budget(100, rtol=RTOL)
    inner = bl.LinearSystem(operator, lambda theta: modes @ theta @ modes.T)

    def loss(theta: Array) -> Array:
        solution = bl.solve(
            inner,
            theta,
            jnp.zeros_like(target),
            solver=cg,
            estimator=bl.Implicit(solver=cg),
            budget=budget,
            adjoint_budget=budget,
        )
        return 0.5 * jnp.sum((solution.value - target) ** 2)

    return jax.jit(jax.value_and_grad(loss))


def primal(points: int) -> Callable[[Float[Array, "m m"]], Any]:
    """The same misfit alone."""
    operator, target = system(points)
    along = jnp.arange(1, points + 1) / (points + 1)
    modes = jnp.sin(jnp.pi * jnp.arange(1, MODES + 1) * along[:, None])
    target = target / points**2
    cg = bl.ConjugateGradient(preconditioner=pde.Multigrid())
    inner = bl.LinearSystem(operator, lambda theta: modes @ theta @ modes.T)

    def loss(theta: Array) -> Array:
        solution = bl.solve(
            inner, theta, jnp.zeros_like(target), solver=cg, budget=bl.Budget(100, rtol=RTOL)
        )
        return 0.5 * jnp.sum((solution.value - target) ** 2)

    return jax.jit(loss)


def _iterations(report: Report, sizes: list[int]) -> None:
    table = report.table(
        f"iterations of CG to {RTOL:g}", "unknowns", *(_name(cycle) for cycle in CYCLES)
    )
    counts: list[list[int]] = []
    for points in sizes:
        report.say(f"{points}²")
        operator, rhs = system(points)
        found = [solver(cycle)(operator, rhs) for cycle in CYCLES]
        if any(int(solution.status) != bl.Status.CONVERGED for solution in found):
            message = f"multigrid: {points}² did not converge"
            raise RuntimeError(message)
        counts.append([int(solution.iterations) for solution in found])
        table.add(f"{points}²", *counts[-1])
    default = [row[0] for row in counts]
    report.check("most iterations on any grid", max(default), 12)
    report.check("iterations, most less fewest", max(default) - min(default), 2)


def _name(cycle: pde.Multigrid) -> str:
    smoother = "default" if cycle.smoother is None else type(cycle.smoother).__name__
    return f"{cycle.cycle}, {smoother}"


def _against_pyamg(report: Report, points: int, rounds: int, *, held: bool) -> None:
    import pyamg  # noqa: PLC0415

    report.say(f"{points}² against PyAMG")
    operator, rhs = system(points)
    matrix, b = operator.to_scipy().tocsr(), np.ravel(rhs)
    # PyAMG takes indices of 32 bits.
    matrix.indices, matrix.indptr = (
        part.astype(np.int32) for part in (matrix.indices, matrix.indptr)
    )

    def classical(make: Callable[[Any], Any]) -> np.ndarray:
        return make(matrix).solve(b, tol=RTOL, accel="cg", maxiter=100)

    candidates: dict[str, Callable[[], Any]] = {
        f"CG, {_name(cycle)}": partial(solver(cycle), operator, rhs) for cycle in CYCLES
    }
    candidates["PyAMG, Ruge–Stüben"] = partial(classical, pyamg.ruge_stuben_solver)
    candidates["PyAMG, smoothed aggregation"] = partial(
        classical, pyamg.smoothed_aggregation_solver
    )
    timings = harness.round_robin(candidates, rounds=rounds, warmup=1)
    table = report.table(
        f"{points}² to {RTOL:g}, hierarchies included",
        "candidate",
        "s",
        "of PyAMG's best",
        "‖r‖/‖b‖",
    )
    best = min((n for n in timings if n.startswith("PyAMG")), key=lambda n: timings[n].median)
    for name, function in candidates.items():
        result = function()
        x = np.ravel(result.value if isinstance(result, bl.Solution) else result)
        left = float(np.linalg.norm(b - matrix @ x) / np.linalg.norm(b))
        table.add(name, timings[name].median, timings[name].ratio(timings[best]), left)
    if held:
        ratio = timings[f"CG, {_name(CYCLES[0])}"].ratio(timings[best])
        report.check(f"{points}²: time of {best}", ratio, 1.0)


def _gradient(report: Report, points: int, rounds: int, *, held: bool) -> None:
    report.say(f"hypergradient, {points}²")
    theta = jnp.asarray(np.random.default_rng(1).standard_normal((MODES, MODES)))
    timings = harness.round_robin(
        {
            "primal": partial(primal(points), theta),
            "hypergradient": partial(hypergradient(points), theta),
        },
        rounds=rounds,
        warmup=1,
    )
    table = report.table(f"{MODES**2} source parameters, {points}²", "what", "s", "of the primal")
    for name, timing in timings.items():
        table.add(name, timing.median, timing.ratio(timings["primal"]))
    if held:
        ratio = timings["hypergradient"].ratio(timings["primal"])
        report.check(f"hypergradient of {MODES**2} parameters, of one primal solve", ratio, 2.2)


def benchmark(quick: bool = False) -> Report:
    """Count iterations, then time one size."""
    report = Report("multigrid")
    _iterations(report, [64, 128] if quick else [64, 128, 256, 512, 1024, 2048])
    points, rounds = (128, 3) if quick else (1024, 7)
    _against_pyamg(report, points, rounds, held=not quick)
    _gradient(report, points, rounds, held=not quick)
    return report
