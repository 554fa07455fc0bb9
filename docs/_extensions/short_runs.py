"""What the pages of the gallery share: an example as a module, and how its runs are drawn."""

import importlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
_COLOURS = {"full": "#0072B2", "prdp": "#009E73", "auto": "#000000", "error": "#7B3FA0"}


def example(name: str) -> Any:
    """The module of one example; files beside it can be imported, as where it is run."""
    if str(EXAMPLES) not in sys.path:
        sys.path.insert(0, str(EXAMPLES))
    return importlib.import_module(name)


def draw_metric(axes: Any, runs: Mapping[str, Sequence[Any]], metric_name: str) -> None:
    """The metric of the first run of each policy over what its solves took."""
    for policy, (run, *_) in runs.items():
        work = run.history.cumulative("primal_iterations")
        work = work + run.history.cumulative("adjoint_iterations")
        colour = _COLOURS.get(policy, "#D55E00")
        axes.loglog(work[1:], run.history.column("metric")[1:], label=policy, color=colour)
    axes.set(xlabel="Σ primal and adjoint iterations", ylabel=metric_name)
    axes.legend()


def said(runs: Mapping[str, Sequence[Any]]) -> None:
    """Print where each policy ended, and what it took."""
    for policy, (run, *_) in runs.items():
        summary = run.summary
        print(  # noqa: T201
            f"{policy:5} {summary.metric_name} {summary.final_metric:.4g}, "
            f"{summary.primal_iterations:,} primal and {summary.adjoint_iterations:,} adjoint "
            f"iterations, {summary.compilations} compilation{'s'[: summary.compilations > 1]}"
        )
