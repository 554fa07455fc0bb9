"""Command line: `python -m benchmarks NAME [--quick] [--json FILE] [--device cpu]`."""

import argparse
import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

BENCHMARKS = {
    "unrolling": "Unrolled with a traced budget against a static lax.scan: time, memory, bits",
    "hypergradients": "implicit hypergradients against code by hand, SciPy and other libraries",
    "refinement": "progressive refinement against full and fixed budgets, in wall time",
    "operators": "sparse operators against SciPy's CSR and jax.experimental.sparse",
    "multigrid": "Poisson by multigrid-preconditioned CG against PyAMG; what a hypergradient costs",
    "growth": "time and memory of a solve and its gradient from 256² to 4096² unknowns",
    "flow": "Navier–Stokes: the published data, a cavity, preconditioned and not",
    "search": "BilevelSearch against a grid search: score, and time with the first compilation",
    "bilevel_suite": "SOBA, AmIGO, stocBiO and nested solves on benchmark_bilevel's problems",
    "long_runs": "10,000 updates: memory, and what history and checkpoints cost",
    "torch_bridge": "a solve called from PyTorch against the same call in JAX",
    "gpu": "on a GPU: a stencil's bandwidth, what refinement saves, time against the CPU",
    "sharded": "grids cut over simulated devices: halos and sums, against a model of both",
    "published": "figures from the literature, reproduced",
}

TWO_CORES = {"operators", "multigrid", "growth", "flow"}
"""What is about the throughput of kernels, which share the work; the others keep to one core."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a benchmark; 0 where every claim holds, 1 where one is missed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Benchmarks of bilevel: candidates take turns, medians are told.",
        epilog="Run `python -m benchmarks list` for what there is.",
    )
    parser.add_argument("name", choices=["list", "all", *BENCHMARKS], help="what to run")
    parser.add_argument("--quick", action="store_true", help="smaller problems, fewer rounds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    parser.add_argument(
        "--cores",
        type=int,
        metavar="N",
        help=f"cores to run on (default 1, 2 for {', '.join(sorted(TWO_CORES))}, all for gpu)",
    )
    parser.add_argument(
        "--device",
        choices=["cpu"],
        help="for gpu: run the same at a reduced size on the CPU, to see that it runs",
    )
    chosen = parser.parse_args(arguments)
    if chosen.device is not None and chosen.name != "gpu":
        parser.error("--device is for the benchmark gpu")
    if chosen.cores is None:
        chosen.cores = _cores(chosen.name)
    elif chosen.cores < 1:
        parser.error(f"--cores must be at least 1, got {chosen.cores}")
    if chosen.name == "list":
        width = max(map(len, BENCHMARKS))
        for name, description in BENCHMARKS.items():
            sys.stdout.write(f"{name:<{width}}  {description}\n")
        return 0
    if chosen.name == "all":
        return _run_all(sys.argv[1:] if arguments is None else list(arguments), chosen.json)
    _pin(chosen.cores)
    return _run(chosen)


def _cores(name: str) -> int:
    if name == "gpu":  # its comparison is with all that the CPU has
        return os.cpu_count() or 1
    return 2 if name in TWO_CORES else 1


def _run_all(arguments: list[str], json: Path | None) -> int:
    """Each in a process of its own: cores are settled before any library starts threads."""
    holds = True
    for name in BENCHMARKS:
        words = [name if word == "all" else word for word in arguments]
        if json is not None:
            words += ["--json", str(json.with_name(f"{json.stem}_{name}{json.suffix or '.json'}"))]
        run = subprocess.run([sys.executable, "-m", "benchmarks", *words], check=False)
        holds = holds and run.returncode == 0
    return 0 if holds else 1


def _pin(cores: int) -> None:
    """Keep to a few cores, before any library counts them and starts threads."""
    if hasattr(os, "sched_setaffinity"):
        available = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, set(available[-cores:]))
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(variable, str(cores))


def _run(chosen: argparse.Namespace) -> int:
    # JAX is imported only here, after the cores are settled.
    import jax  # noqa: PLC0415
    from rich.console import Console  # noqa: PLC0415

    from benchmarks.harness import Report  # noqa: PLC0415

    jax.config.update("jax_enable_x64", True)
    console = Console(width=None if sys.stdout.isatty() else 120)
    module = importlib.import_module(f"benchmarks.{chosen.name}")
    benchmark: Callable[..., Report] = module.benchmark
    given = {} if chosen.device is None else {"device": chosen.device}
    report = benchmark(chosen.quick, **given)
    report.show(console)
    if chosen.json is not None:
        report.save(chosen.json)
        console.print(f"Figures written to {chosen.json}")
    return 0 if report.holds else 1


if __name__ == "__main__":
    sys.exit(main())
