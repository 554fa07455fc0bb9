"""Long runs: what keeping them costs, and whether they grow."""

import dataclasses
import tempfile
import time
from pathlib import Path
from typing import Any

import bilevel as bl
from benchmarks.harness import Report, Timing
from benchmarks.refinement import Inverse, published_inverse

WARM = 0.2
"""Part of a run after which memory should not grow."""

SECONDS = 60.0
"""Between two checkpoints, unless somebody says otherwise."""


def _resident() -> int:
    """Bytes of this process in memory."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmRSS:")).split()[1])


@dataclasses.dataclass(frozen=True)
class _Trained:
    """Wall seconds of the epochs and of the end, without compilation; memory on the way."""

    epochs: float
    end: float
    memory: tuple[int, ...]

    @property
    def growth(self) -> float:
        warm = self.memory[int(WARM * len(self.memory)) :]
        return warm[-1] / warm[0] - 1.0


def _train(inverse: Inverse, updates: int, each: int, directory: Path | None) -> _Trained:
    memory: list[int] = []
    epochs = updates // each

    def watch(event: Any) -> None:
        if event.epoch % (epochs // 20) == 0:
            memory.append(_resident())

    task = inverse.task
    if each > 1:
        task = dataclasses.replace(task, batches=[None] * each)
    began = time.perf_counter()
    run = bl.optimize(
        task,
        optimizer=inverse.optimizer,
        controller=inverse.controller("full"),
        epochs=epochs,
        directory=directory,
        callbacks=[watch],
        progress=False,
        overwrite=True,
    )
    elapsed = run.history[-1].elapsed
    end = time.perf_counter() - began - elapsed
    return _Trained(elapsed - run.summary.compile_seconds, end, tuple(memory))


def benchmark(quick: bool) -> Report:
    """The published Poisson task: an update an epoch, as published, and ten."""
    report = Report("long_runs")
    updates, rounds = (1000, 2) if quick else (10_000, 7)
    inverse = published_inverse()
    for each in (1, 10):
        kept: list[_Trained] = []
        plain: list[_Trained] = []
        with tempfile.TemporaryDirectory() as folder:
            for turn in range(rounds):
                report.say(f"{each} updates an epoch, round {turn + 1} of {rounds}")
                kept.append(_train(inverse, updates, each, Path(folder) / "run"))
                plain.append(_train(inverse, updates, each, None))
        table = report.table(
            f"{updates:,} updates, {each} an epoch", "directory", "s", "µs an update", "of none",
            "at the end, ms",
        )  # fmt: skip
        base = Timing(tuple(run.epochs for run in plain))
        for name, runs in (("kept", kept), ("none", plain)):
            timing = Timing(tuple(run.epochs for run in runs))
            end = Timing(tuple(run.end for run in runs)).median * 1e3
            per = timing.median / updates * 1e6
            table.add(name, timing.median, per, timing.ratio(base), end)
        # The first run also fills caches.
        growth = max(run.growth for run in kept[1:])
        report.check(f"growth of memory after warm-up, {each} an epoch", growth, 0.01)
        # The end writes what a checkpoint does, and the result.
        saving = Timing(tuple(run.end for run in kept)).median / SECONDS
        cost = Timing(tuple(run.epochs for run in kept)).ratio(base) - 1.0 + saving
        if not quick:
            report.check(f"history, and a checkpoint a minute: part, {each} an epoch", cost, 0.02)
    return report
