"""Long runs: what keeping them costs, and whether they grow."""

import tempfile
import time
from pathlib import Path
from typing import Any

import bilevel as bl
from benchmarks.harness import Report, Timing
from benchmarks.refinement import Inverse, published_inverse

WARM = 0.2
"""Part of a run after which memory should not grow."""


def _resident() -> int:
    """Bytes of this process in memory."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmRSS:")).split()[1])


def _train(inverse: Inverse, epochs: int, directory: Path | None) -> tuple[float, list[int]]:
    """Wall seconds without compilation, and memory twenty times on the way."""
    memory: list[int] = []

    def watch(event: Any) -> None:
        if event.epoch % (epochs // 20) == 0:
            memory.append(_resident())

    began = time.perf_counter()
    run = bl.optimize(
        inverse.task,
        optimizer=inverse.optimizer,
        controller=inverse.controller("full"),
        epochs=epochs,
        directory=directory,
        callbacks=[watch],
        progress=False,
        overwrite=True,
    )
    return time.perf_counter() - began - run.summary.compile_seconds, memory


def benchmark(quick: bool) -> Report:
    """The published Poisson task, an update an epoch: as much to keep as there can be."""
    report = Report("long_runs")
    epochs, rounds = (1000, 2) if quick else (10_000, 7)
    inverse = published_inverse()
    kept: list[float] = []
    plain: list[float] = []
    growth: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(rounds):
            report.say(f"round {turn + 1} of {rounds}")
            seconds, memory = _train(inverse, epochs, Path(folder) / "run")
            kept.append(seconds)
            warm = memory[int(WARM * len(memory)) :]
            growth.append(warm[-1] / warm[0] - 1.0)
            plain.append(_train(inverse, epochs, None)[0])
    table = report.table(
        f"{epochs:,} updates, each an epoch", "directory", "s", "ms an update", "of none"
    )
    for name, seconds in (("kept", kept), ("none", plain)):
        timing = Timing(tuple(seconds))
        ratio = timing.ratio(Timing(tuple(plain)))
        table.add(name, timing.median, timing.median / epochs * 1e3, ratio)
    cost = Timing(tuple(kept)).ratio(Timing(tuple(plain))) - 1.0
    # The first run also fills caches.
    report.check("growth of memory after warm-up", max(growth[1:]), 0.01)
    if not quick:
        report.check("history and checkpoints: part of the time", cost, 0.02)
    return report
