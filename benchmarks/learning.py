"""Policies on every learning task: what each ends at, and what it spends."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

import bilevel as bl
from benchmarks.harness import Report
from bilevel.cli.taskfile import TaskFile

TASKS = (
    "denoising",
    "distillation",
    "equilibrium_model",
    "hyper_cleaning",
    "lasso_path",
    "logistic_penalties",
    "meta_learning",
    "stackelberg",
)
"""Of `examples/`."""

POLICIES = (
    "full",
    "hoag=exponential",
    "hoag=quadratic",
    "hoag=cubic",
    "best-fixed=5",
    "prdp",
    "error",
    "auto",
)


def learning(report: Report, quick: bool) -> None:
    """Compare the policies, and count the tasks on which `auto` keeps what it promises.

    In single precision, as the examples run from the command line.
    """
    names = TASKS[-1:] if quick else TASKS
    kept = {"primal iterations": 0, "primal and adjoint iterations": 0}
    with jax.enable_x64(False):
        for name in names:
            task = TaskFile(f"examples/{name}.py").build
            policies = ("full", "auto") if quick else POLICIES
            auto = _compare(report, name, task, policies, range(1 if quick else 3))
            if auto is None or auto["metric"] > 1.01:
                continue
            kept["primal iterations"] += auto["primal"] <= 0.5
            kept["primal and adjoint iterations"] += auto["both"] <= 0.5
    if not quick:
        for what, count in kept.items():
            claim = f"tasks on which auto ends within 1 % of full with half of its {what}"
            report.check(claim, count, 6, at_least=True)


def _compare(
    report: Report,
    name: str,
    task: Callable[[int], bl.Task],
    policies: Sequence[str],
    seeds: Sequence[int],
) -> dict[str, float] | None:
    report.say(f"{name}: {', '.join(policies)}")
    found = bl.compare(task, policies, seeds, progress=False)
    table = report.table(
        f"{name}, seeds {', '.join(map(str, seeds))}",
        "policy",
        found.metric_name,
        "× full",
        "± of it",
        "Σ primal / full",
        "Σ adjoint / full",
        "Σ both / full",
        "budgets",
    )
    rows = {row.policy: row for row in found.rows}
    full, auto = rows["full"], None
    for policy, row in rows.items():
        ratio = row.relative_metric
        parts = [
            _ratio(getattr(row, part), getattr(full, part))
            for part in ("primal_iterations", "adjoint_iterations", "work")
        ]
        table.add(
            policy,
            None if row.final_metric is None else row.final_metric.mean,
            None if ratio is None else ratio.mean,
            None if ratio is None else ratio.confidence,
            *parts,
            row.budgets,
        )
        if policy == "auto" and ratio is not None and None not in parts:
            auto = {"metric": ratio.mean, "primal": parts[0] or 0.0, "both": parts[2] or 0.0}
    return auto


def _ratio(mine: Any, full: Any) -> float | None:
    return None if mine is None or full is None else mine.mean / full.mean
