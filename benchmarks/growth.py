"""Time and memory of a solve and its gradient while the grid grows."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import bilevel as bl
import bilevel_pde as pde
from benchmarks import harness
from benchmarks.harness import Report

ITERATIONS = 10


def hypergradient(points: int) -> Callable[[], Any]:
    """The gradient of a misfit in every coefficient of a diffusion on points² cells."""
    grid = pde.Grid((points, points), (1.0, 1.0))
    random = np.random.default_rng(0)
    log_coefficient = jnp.asarray(0.3 * random.standard_normal(grid.shape))
    source = jnp.asarray(random.standard_normal(grid.shape))
    budget = bl.Budget(ITERATIONS)
    cg = bl.ConjugateGradient(preconditioner=pde.Multigrid())
    inner = bl.LinearSystem(lambda theta: pde.Diffusion(grid, jnp.exp(theta)), source)

    def loss(theta: Any) -> Any:
        solution = bl.solve(
            inner,
            theta,
            jnp.zeros(grid.shape),
            solver=cg,
            estimator=bl.Implicit(solver=cg),
            budget=budget,
            adjoint_budget=budget,
        )
        return jnp.sum(solution.value**2)

    compiled = jax.jit(jax.grad(loss)).lower(log_coefficient).compile()
    return partial(compiled, log_coefficient)


def _seconds(points: int, rounds: int) -> float:
    timing = harness.round_robin({"": hypergradient(points)}, rounds=rounds, warmup=1)
    return timing[""].median


def slope(sizes: list[int], values: list[float]) -> float:
    """Of log value against log unknowns, by least squares."""
    unknowns = np.log([float(points) ** 2 for points in sizes])
    return float(np.polyfit(unknowns, np.log(values), 1)[0])


def benchmark(quick: bool = False) -> Report:
    """Double the grid from size to size, each in a process of its own."""
    report = Report("growth")
    sizes = [64, 128, 256] if quick else [256, 512, 1024, 2048, 4096]
    table = report.table(
        f"gradient in the coefficient field, {ITERATIONS} + {ITERATIONS} iterations of CG with "
        "multigrid, float64",
        "unknowns",
        "s",
        "µs an unknown",
        "peak, MB",
        "states of peak",
    )
    seconds: list[float] = []
    peaks: list[float] = []
    for points in sizes:
        report.say(f"{points}²")
        seconds.append(harness.apart(_seconds, points, 3))
        peaks.append(float(harness.peak_growth(hypergradient, points)))
        state = 8.0 * points**2
        table.add(
            f"{points}²",
            seconds[-1],
            1e6 * seconds[-1] / points**2,
            peaks[-1] / 1e6,
            peaks[-1] / state,
        )
    report.remarks.append(f"time ~ unknowns^{slope(sizes, seconds):.3f}")
    report.remarks.append(f"memory ~ unknowns^{slope(sizes, peaks):.3f}")
    if not quick:
        # Caches that small grids fit into make the first steps steeper than linear.
        report.check("growth of the time, exponent", slope(sizes, seconds), 1.15)
        report.check("growth of the memory, exponent", slope(sizes, peaks), 1.05)
        report.check("states of n held at the peak", peaks[-1] / (8.0 * sizes[-1] ** 2), 60.0)
    return report
