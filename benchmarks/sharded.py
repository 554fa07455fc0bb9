"""Grids cut over several devices: what halos and sums cost, against a model of both."""

import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

import bilevel as bl
import bilevel_pde as pde
from benchmarks import harness
from benchmarks.harness import Report
from benchmarks.scaling_model import (
    Machine,
    Parts,
    Work,
    halo_of_cube,
    levels_of_cube,
    predict,
)
from bilevel_arrays import mesh as over
from bilevel_arrays.mesh.cycle import cut_levels

COUNTS = (1, 2, 4, 8)
FLAGS = "--xla_force_host_platform_device_count=8"
ROUNDS = 9
REPEATED = 200
"""Messages, or sums, one after another in a program that times them."""

H100 = {
    8: Machine(2 / (0.8 * 3.35e12), launch=3e-6, message=8e-6, byte=1 / 450e9, reduction=20e-6),
    64: Machine(2 / (0.8 * 3.35e12), launch=3e-6, message=10e-6, byte=1 / 50e9, reduction=35e-6),
    512: Machine(2 / (0.8 * 3.35e12), launch=3e-6, message=10e-6, byte=1 / 50e9, reduction=50e-6),
}
"""By devices: 80 % of the memory bandwidth of the data sheet; NVLink within a node of eight, one
way, and InfiniBand between nodes; latencies are assumed, not measured."""

KERNELS = {"heat": 8, "poisson": 20}
"""Kernels of an iteration of CG on a GPU, and of a cycle on each level: counted by hand."""

PASSES = {"heat": 6.5, "poisson": 25.0}
"""Copies of a field that these cost where memory is what limits: counted by hand, too."""

STEPS = {"heat": (2, 42), "poisson": (2, 10)}
"""Iterations of the two solves whose difference is timed."""


Levels = tuple[list[int], list[int]]
"""Points of the grids that are cut, and of those that every device holds whole."""
Case = tuple[Callable[[Any, Any], Any], Any, int, Levels]
"""A solve of a field to a budget, the field, in what multiples of bytes is sent, and its levels."""


def benchmark(quick: bool = False) -> Report:
    """Measure the constants, hold the model against solves, and say what it predicts."""
    report = Report("sharded")
    report.say("simulated devices")
    found: dict[str, Any] = harness.apart(measured, quick, flags=FLAGS)
    table = report.table("constants of this machine, CPU time", "what", "value")
    for name, count in found["copies"].items():
        table.add(f"{name}: an iteration costs so many copies of each level's field", count)
        table.add(
            f"{name}: and so many µs a level that is hardly there", 1e6 * found["fixed"][name]
        )
    for count, machine in found["machines"].items():
        if count > 1:
            table.add(f"a message among {count} devices, µs", 1e6 * machine.message)
            table.add("and its bytes, GB/s", 1e-9 / max(machine.byte, 1e-15))
            table.add(f"a sum over {count} devices, µs", 1e6 * machine.reduction)
    for name, rows in found["solves"].items():
        table = report.table(
            f"{name}: CPU ms an iteration of all devices together, measured and by the model",
            "devices", "measured", "model", "compute", "fixed", "halo", "sums", "measured / model",
        )  # fmt: skip
        ratios: list[float] = []
        for count, seconds, parts in rows:
            ratios.append(seconds / parts.total)
            table.add(
                count, 1e3 * seconds, 1e3 * parts.total, *(1e3 * p for p in parts), ratios[-1]
            )
        apart = max(max(ratio, 1 / ratio) for ratio in ratios)
        limit = 1e9 if quick else 2.0
        report.check(f"{name}: model and measurement, at most apart by", apart, limit)
        report.check(f"{name}: bytes sent that are not the surface", found["beyond"][name], 0)
    _predict(report, found["sums"])
    return report


def _predict(report: Report, sums: dict[str, int]) -> None:
    points, item = 512, 4
    table = report.table(
        f"prediction for H100s at {points}³, float32 (constants assumed, nothing measured there)",
        "what", "devices", "blocks", "compute, µs", "launches, µs", "halo, µs", "sums, µs",
        "an iteration, µs",
        "efficiency",
    )  # fmt: skip
    for name, count in PASSES.items():
        for devices, machine in H100.items():
            side = round(devices ** (1 / 3))
            blocks = (side, side, side)
            if name == "heat":
                messages, sent = halo_of_cube(points, blocks, item)
                work = Work(count * item * points**3, KERNELS[name], messages, sent, sums[name])
            else:
                work = _cycle(points, blocks, item, count, sums[name])
            parts = predict(machine, work, devices)
            alone = work
            if name != "heat":
                alone = _cycle(points, (1, 1, 1), item, count, 0)
            best = predict(machine, alone, 1).compute / devices
            table.add(
                name, devices, "×".join(map(str, blocks)), *(1e6 * part for part in parts),
                1e6 * parts.total, best / parts.total,
            )  # fmt: skip


def _cycle(points: int, blocks: tuple[int, int, int], item: int, copies: float, sums: int) -> Work:
    """An iteration of CG with a V cycle: six applications and two transfers a cut level, and one.

    `copies` are of the field of each level, and those of CG on the finest one.
    """
    cut, whole = levels_of_cube(points, GATHER_BELOW)
    devices = math.prod(blocks)
    # What is gathered is done by every device.
    copied = item * PASSES["heat"] * points**3
    copied += item * copies * (sum(n**3 for n in cut) + devices * sum(n**3 for n in whole))
    messages = sent = 0.0
    for n in cut:
        of_level = halo_of_cube(n, blocks, item)
        messages += 8 * of_level[0]
        sent += 7.5 * of_level[1]
    messages += sum(count - 1 for count in blocks)
    sent += item * whole[0] ** 3
    first = halo_of_cube(points, blocks, item)
    launches = KERNELS["heat"] + KERNELS["poisson"] * (len(cut) + len(whole))
    return Work(copied, launches, messages + first[0], sent + first[1], sums)


GATHER_BELOW = 4096


def measured(quick: bool) -> dict[str, Any]:
    """Constants, and solves, on simulated devices; runs in a process that has eight of them."""
    # Programs that run at the same time on simulated devices may wait for each other for ever.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    machines = {count: _machine(count) for count in COUNTS}
    found: dict[str, Any] = {
        "machines": machines, "solves": {}, "beyond": {}, "copies": {}, "fixed": {}, "sums": {},
    }  # fmt: skip
    cases = {"heat": (_heat, 32 if quick else 64), "poisson": (_poisson, 128 if quick else 512)}
    for name, (make, points) in cases.items():
        alone, fixed = _alone(make, points)
        rows: list[tuple[int, float, Parts]] = []
        beyond = 0
        for count in COUNTS:
            seconds, sends, sums, left_over = _iteration(make, points, count)
            beyond += left_over
            cut, whole = make(points, count)[3]
            # What is gathered is done by every device.
            unknowns = sum(cut) + count * sum(whole)
            machine = machines[count]
            work = Work(
                unknowns * alone / machine.copy, fixed * len((*cut, *whole)), len(sends),
                sum(sends) / count, sums if count > 1 else 0,
            )  # fmt: skip
            rows.append((count, seconds, predict(machine, work, count)))
            found["sums"][name] = sums
        found["solves"][name], found["beyond"][name] = rows, beyond
        found["copies"][name] = alone / (8 * _copy(make(points, 1)[1].size))
        found["fixed"][name] = fixed
    return found


def _alone(make: Callable[[int, int], Case], points: int) -> tuple[float, float]:
    """Seconds of a point of each level on one device, and of a level that has next to none."""
    few, many = ((size, *make(size, 1)[3]) for size in (16, points))
    fixed = _iteration(make, few[0], 1)[0] / len((*few[1], *few[2]))
    levels = (*many[1], *many[2])
    rest = _iteration(make, many[0], 1)[0] - fixed * len(levels)
    return max(rest, 0.0) / sum(levels), fixed


def _machine(count: int) -> Machine:
    """What so many simulated devices take; the time of kernels is in CPU seconds itself."""
    if count == 1:
        return Machine(1.0, 1.0, 0.0, 0.0, 0.0, workers=1)
    return Machine(1.0, 1.0, *_messages(count), _reduction(count), workers=1)


def _seconds(function: Callable[..., Any], *arguments: Any, rounds: int = ROUNDS) -> float:
    """CPU seconds of all threads, the least of some rounds.

    Simulated devices share cores, so what they take together is what counts; and it is hardly
    touched by what else runs on the machine.
    """
    jax.block_until_ready(function(*arguments))
    times: list[float] = []
    for _ in range(rounds):
        start = time.process_time()
        jax.block_until_ready(function(*arguments))
        times.append(time.process_time() - start)
    return min(times)


def _copy(count: int) -> float:
    """Seconds for a byte of a field of so many numbers to be read and written, over and over."""
    again = _repeated(lambda x: 0.5 * x + 1.0, 1)
    return _seconds(again, jnp.ones(count)) / (8 * count * REPEATED)


def _repeated(body: Callable[[Any], Any], count: int) -> Callable[[Any], Any]:
    mesh = over.device_mesh(devices=jax.devices()[:count])

    def run(x: Any) -> Any:
        return jax.lax.fori_loop(0, REPEATED, lambda _, x: body(x), x)

    return jax.jit(jax.shard_map(run, mesh=mesh, in_specs=P("devices"), out_specs=P("devices")))


def _messages(count: int) -> tuple[float, float]:
    """CPU seconds of a message, and of a byte of it, when every device sends one to the next."""
    pairs = [(k, (k + 1) % count) for k in range(count)]
    sizes = (2, 2**16)
    times = [
        _seconds(
            _repeated(lambda x: jax.lax.ppermute(x, "devices", pairs), count),
            jnp.ones(count * size),
        )
        for size in sizes
    ]
    message, larger = (seconds / (REPEATED * count) for seconds in times)
    return message, max(larger - message, 0.0) / (8 * (sizes[1] - sizes[0]))


def _reduction(count: int) -> float:
    total = _repeated(lambda x: 0.0 * x + jax.lax.psum(jnp.sum(x), "devices") / count, count)
    return _seconds(total, jnp.ones(count)) / REPEATED


def _heat(points: int, count: int) -> Case:
    grid = pde.Grid((points,) * 3)
    mesh = over.device_mesh(devices=jax.devices()[:count])
    stepper = over.partition(pde.Heat(grid, 1.0, 1.0), mesh)
    u = over.place(np.random.default_rng(0).standard_normal(grid.shape), mesh, "devices")
    surface = over.halo_traffic(stepper.matrix()).total  # pyright: ignore[reportArgumentType]
    step = jax.jit(lambda u, budget: stepper.step(u, budget=budget))
    return step, u, surface, ([grid.size], [])


def _poisson(points: int, count: int) -> Case:
    grid = pde.Grid((points, points))
    mesh = over.device_mesh(devices=jax.devices()[:count])
    operator = over.partition(-pde.laplacian(grid), mesh, gather_below=GATHER_BELOW)
    f = over.place(np.random.default_rng(0).standard_normal(grid.shape), mesh, "devices")
    solver = bl.ConjugateGradient(preconditioner=pde.Multigrid())

    def solve(f: Any, budget: bl.Budget) -> Any:
        problem = bl.LinearSystem(operator, f)
        return bl.solve(problem, None, 0 * f, solver=solver, budget=budget).value

    levels = pde.Multigrid().hierarchy(operator.operator)  # pyright: ignore[reportArgumentType]
    sizes = [level.grid.size for level, _ in levels]
    number = cut_levels(operator.layout, levels)
    # Whole rows of the levels are all that is sent, those of the first gathered one the shortest.
    row = 8 * levels[number][0].grid.shape[1]
    return jax.jit(solve), f, row, (sizes[:number], sizes[number:])


def _iteration(
    make: Callable[[int, int], Case], points: int, count: int
) -> tuple[float, list[int], int, int]:
    """Seconds of an iteration, the bytes of its messages, its sums, and what is no surface."""
    function, field, unit, _ = make(points, count)
    few, many = STEPS["heat" if field.ndim == 3 else "poisson"]
    budgets = [jax.tree.map(jnp.asarray, bl.Budget(n, 0.0, 0.0)) for n in (few, many)]
    times = [_seconds(function, field, budget) for budget in budgets]
    found = over.collectives(function, field, budgets[0])
    deepest = max((one.depth for one in found), default=0)
    inner = [one for one in found if one.depth == deepest]
    sends = [one.sent for one in inner if one.kind == "collective-permute"]
    sums = sum(one.kind == "all-reduce" for one in inner)
    left_over = sum(sends) % unit if unit else sum(sends)
    return (times[1] - times[0]) / (many - few), sends, sums, left_over
