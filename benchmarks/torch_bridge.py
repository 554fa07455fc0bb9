"""What the way from PyTorch into JAX and back costs a call, against the same call in JAX."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import bilevel as bl
from benchmarks import harness, peers
from benchmarks.harness import Report, Timing

LIMIT = 0.3
"""Milliseconds, of a call and its backward pass together."""


def benchmark(quick: bool) -> Report:
    """A small solve: where it takes next to nothing, what is left is the way."""
    report = Report("torch_bridge")
    torch: Any = peers.available("torch")
    if torch is None:
        report.remarks.append("PyTorch is not installed: pip install torch==2.13.0")
        return report
    torch.set_num_threads(1)
    rounds = 200 if quick else 1000
    report.say(f"{rounds} rounds")
    candidates = _candidates(torch)
    times = harness.round_robin(candidates, rounds=rounds, warmup=5)
    table = report.table(
        "One solve of 30 unknowns, ms",
        "what",
        "calls",
        "median",
        "least",
        "median beyond JAX",
        "beyond JAX a call",
        "CPU beyond JAX",
        "ratio",
    )
    cpu = {name: _cpu(candidate, rounds) for name, candidate in candidates.items()}
    for name, timing in times.items():
        reference = times[name.replace("torch", "JAX")]
        # A backward pass crosses a second time.
        calls = 2 if "gradient" in name else 1
        extra = 1e3 * _difference(timing, reference)
        least, ratio = 1e3 * min(timing.seconds), timing.ratio(reference)
        work = cpu[name] - cpu[name.replace("torch", "JAX")]
        table.add(name, calls, 1e3 * timing.median, least, extra, extra / calls, work, ratio)
        if timing is not reference:
            claim = f"{name}: milliseconds beyond JAX, together"
            report.check(claim, extra, 1e9 if quick else LIMIT)
    return report


def _cpu(candidate: Callable[[], Any], rounds: int) -> float:
    """Milliseconds of processor time that a call takes in the thread that makes it, median.

    On a machine that others use, wall time has their share in it.
    """
    spent: list[int] = []
    for _ in range(rounds):
        start = time.thread_time_ns()
        jax.block_until_ready(candidate())
        spent.append(time.thread_time_ns() - start)
    return 1e-6 * statistics.median(spent)


def _difference(mine: Timing, theirs: Timing) -> float:
    pairs = zip(mine.seconds, theirs.seconds, strict=True)
    return statistics.median(one - other for one, other in pairs)


def _candidates(torch: Any) -> dict[str, Callable[[], Any]]:
    from bilevel_arrays.torch import function  # noqa: PLC0415, only where there is PyTorch

    matrix = np.diag(np.linspace(1.0, 2.0, 30)) + 0.1 * np.eye(30, k=1) + 0.1 * np.eye(30, k=-1)
    problem = bl.LinearSystem(
        jnp.asarray(matrix), lambda theta: theta, symmetric=True, positive_definite=True
    )
    solver, budget = bl.ConjugateGradient(), bl.Budget(iterations=5)

    def solve(theta: Any) -> Any:
        return bl.solve(
            problem,
            theta,
            jnp.zeros(30),
            solver=solver,
            estimator=bl.Implicit(solver),
            budget=budget,
            adjoint_budget=budget,
        ).value

    bridged, plain = function(solve), jax.jit(solve)
    weights = np.arange(30.0)
    here, there = torch.ones(30, dtype=torch.float64), jnp.ones(30)
    moving = torch.ones(30, dtype=torch.float64, requires_grad=True)
    cotangent = torch.tensor(weights)

    def pulled(theta: Any, cotangent: Any) -> Any:
        value, pull = jax.vjp(solve, theta)
        return value, pull(cotangent)[0]

    pulling, pushed = jax.jit(pulled), jnp.asarray(weights)

    def torch_gradient() -> Any:
        return torch.autograd.grad(bridged(moving), moving, cotangent)[0]

    return {
        "solve, JAX": lambda: plain(there),
        "solve, torch": lambda: bridged(here),
        "solve and gradient, JAX": lambda: pulling(there, pushed),
        "solve and gradient, torch": torch_gradient,
    }
