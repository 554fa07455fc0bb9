"""What a GPU makes of it: bandwidth of a stencil, and what refinement saves there."""

import importlib.util
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

import bilevel as bl
import bilevel_pde as pde
from benchmarks import harness
from benchmarks.harness import Report

NO_GPU = (
    "gpu: JAX finds no GPU here ({found} only), so nothing is measured; --device cpu runs the same "
    "at a reduced size on the CPU."
)
SHARE = 0.6
"""Of a copy's bandwidth, what a stencil should reach."""

SAVED = 0.62
"""Of the full solve's training time, compilation included, as published for Navier–Stokes."""

APART = 10
"""Applications in one program, so that starting a kernel counts little."""

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def benchmark(quick: bool = False, device: str | None = None) -> Report:
    """Measure on a GPU.

    **Arguments:**

    - `quick`: whether smaller problems are taken, and no limit is held.
    - `device`: `cpu` for the same at a reduced size on the CPU.
    """
    report = Report("gpu")
    jax.config.update("jax_enable_x64", False)
    found = jax.default_backend()
    if device != "cpu" and found == "cpu":
        report.remarks.append(NO_GPU.format(found=found))
        return report
    small = quick or device == "cpu"
    chosen = jax.devices("cpu" if device == "cpu" else None)[0]
    with jax.default_device(chosen):
        held = chosen.platform != "cpu" and not quick
        report.remarks.append(f"Device: {chosen.device_kind}, {chosen.platform}.")
        bandwidth(report, 256 if small else 4096, held=held)
        trainings(report, chosen, small=small, held=held)
    if not held:
        report.remarks.append("A reduced size: figures show that it runs, and are no claims.")
    return report


def repeated(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """So many times after each other, none of them fused with the next."""

    def whole(x: Any) -> Any:
        for _ in range(APART):
            x = jax.lax.optimization_barrier(function(x))
        return x

    return jax.jit(whole)


def bandwidth(report: Report, points: int, *, held: bool) -> None:
    """A five-point stencil against a copy: both read and write every number once."""
    report.say(f"stencil at {points}²")
    operator = pde.laplacian(pde.Grid((points, points), 1.0, pde.Periodic(), dtype=jnp.float32))
    x = jax.random.normal(jax.random.key(0), (points, points), jnp.float32)
    # Programs of their own: within one, a copy may be left out by the compiler. They are begun
    # without waiting for the one before, which takes longer than to begin the next.
    copied = jax.jit(jnp.copy)
    candidates: dict[str, Callable[[Any], Any]] = {
        "copy": lambda x: [copied(x) for _ in range(APART)],
        "copy with its sign changed": repeated(jnp.negative),
        "five-point stencil": repeated(operator.matvec),
    }
    calls = {name: _bound(function, x) for name, function in candidates.items()}
    times = harness.round_robin(calls, rounds=30 if held else 3)
    moved = 2 * x.nbytes * APART
    table = report.table(
        f"{points}² float32, read once and written once", "what", "µs each", "GB/s", "of a copy"
    )
    rates = {name: moved / timing.median for name, timing in times.items()}
    # The faster of two ways to copy: what the stencil is held against should be no straw man.
    copy = max(rates["copy"], rates["copy with its sign changed"])
    for name, timing in times.items():
        table.add(name, 1e6 * timing.median / APART, rates[name] / 1e9, rates[name] / copy)
    share = rates["five-point stencil"] / copy
    report.check("stencil: part of a copy's bandwidth", share, SHARE if held else 0, at_least=True)


def _bound(function: Callable[[Any], Any], x: Any) -> Callable[[], Any]:
    return lambda: function(x)


def trainings(report: Report, here: Any, *, small: bool, held: bool) -> None:
    """Progressive refinement against the full solve, and an update against the CPU's."""
    flow = _example("navier_stokes_corrector")
    heat = _example("heat_emulator")
    tiny = flow.Size(8, 4, 1, 10, 2, 5, 4)
    size = tiny if small else flow.SIZES["paper"]

    def navier_stokes() -> bl.Task:
        # The data are kept by size, wherever they were made.
        flow.data.cache_clear()
        return flow.build(size, together=jax.default_backend() != "cpu")

    def heat_in_three_dimensions() -> bl.Task:
        given = {"points": 6, "width": 2, "samples": 25, "epochs": 3} if small else {}
        return heat.task(3, **given)

    makers: Mapping[str, Callable[[], bl.Task]] = {
        "Navier–Stokes": navier_stokes,
        "heat 3D": heat_in_three_dimensions,
    }
    table = report.table(
        "Whole runs, compilation included",
        "task",
        "policy",
        "seconds",
        "saved",
        "without compile, s",
        "Σ iterations",
        "final metric",
        "× full",
    )
    for name, make in makers.items():
        report.say(f"{name}: full and prdp")
        comparison = bl.compare(make(), ["full", "prdp"], progress=False)
        full, refined = comparison.rows
        for row in (full, refined):
            saved = 1 - _mean(row.seconds) / _mean(full.seconds)
            table.add(
                name,
                row.policy,
                _mean(row.seconds),
                saved,
                _mean(row.seconds_without_compile),
                _mean(row.work),
                _mean(row.final_metric),
                _mean(row.relative_metric),
            )
        saved = 1 - _mean(refined.seconds) / _mean(full.seconds)
        if name == "Navier–Stokes":
            limit = SAVED if held else -1e9
            report.check(f"{name}: part of full's time saved", saved, limit, at_least=True)
        ratio = _mean(refined.relative_metric)
        report.check(f"{name}: final metric over full's", ratio, 1.1 if held else 1e9)
    _against_the_cpu(report, makers, here, epochs=1 if small else 2)


def _against_the_cpu(
    report: Report, makers: Mapping[str, Callable[[], bl.Task]], here: Any, *, epochs: int
) -> None:
    """Seconds of an update under the full solve, here and on the CPU's cores."""
    columns = ("task", "here", "CPU", "times faster")
    table = report.table("An update under the full solve, ms", *columns)
    for name, make in makers.items():
        report.say(f"{name}: an update here and on the CPU")
        seconds: list[float] = []
        for place in (here, jax.devices("cpu")[0]):
            with jax.default_device(place):
                task = make()
                assert task.full_fidelity is not None
                run = bl.optimize(
                    task,
                    controller=bl.FixedFidelity(task.full_fidelity),
                    epochs=epochs,
                    progress=False,
                )
            seconds.append(run.summary.update_seconds / run.summary.updates)
        table.add(name, 1e3 * seconds[0], 1e3 * seconds[1], seconds[1] / seconds[0])


def _mean(spread: Any) -> float:
    return float("nan") if spread is None else spread.mean


def _example(name: str) -> ModuleType:
    """One of the examples, which import files beside them."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        specification = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        assert specification is not None
        assert specification.loader is not None
        module = importlib.util.module_from_spec(specification)
        sys.modules[name] = module  # dataclasses look their module up
        specification.loader.exec_module(module)
    finally:
        sys.path.remove(str(EXAMPLES))
    return module
