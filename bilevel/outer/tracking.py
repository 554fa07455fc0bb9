"""Tracking: a record's numbers under the names that trackers show them by."""

from collections.abc import Mapping
from typing import Any

from bilevel.outer.callbacks import Event
from bilevel.outer.history import Record

SERIES = {
    "metric": "metric",
    "loss": "loss",
    "gradient_norm": "gradient/norm",
    "gradient_noise": "gradient/noise",
    "error": "gradient/error",
    "primal_error": "gradient/primal_error",
    "adjoint_error": "gradient/adjoint_error",
    "level": "budget/level",
    "budget_iterations": "budget/iterations",
    "budget_rtol": "budget/rtol",
    "adjoint_budget_iterations": "budget/adjoint_iterations",
    "primal_iterations": "primal/iterations",
    "primal_residual": "primal/residual",
    "primal_capped": "primal/stopped_on_the_budget",
    "adjoint_iterations": "adjoint/iterations",
    "adjoint_residual": "adjoint/residual",
    "adjoint_capped": "adjoint/stopped_on_the_budget",
    "nonfinite": "updates/skipped",
    "failures": "updates/failed_solves",
    "seconds": "time/updates",
    "validation_seconds": "time/validation",
}
"""Field of a record: name of its series."""


def scalars(record: Record) -> dict[str, float]:
    """What was measured in an epoch, by the name of its series.

    >>> scalars(Record(epoch=1, metric=0.5, primal_iterations=20))["primal/iterations"]
    20.0
    """
    found = {series: getattr(record, field) for field, series in SERIES.items()}
    return {series: float(value) for series, value in found.items() if value is not None}


def parameters_of(event: Event, given: Mapping[str, Any]) -> dict[str, str]:
    """What a run is of, in words by name.

    **Arguments:**

    - `event`: of its start.
    - `given`: more of it; tables in it are told key by key.
    """
    own = {
        "task": event.task.name,
        "metric": event.task.metric_name,
        "epochs": event.epochs,
    }
    return {name: str(value) for name, value in {**own, **_flat(given)}.items()}


def _flat(given: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in given.items():
        if isinstance(value, Mapping):
            inner = _flat(value)
            found |= {f"{name}.{key}": part for key, part in inner.items()}
        else:
            found[str(name)] = value
    return found
