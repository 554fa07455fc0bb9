"""Limits: the numbers of a fidelity, as fields of a record."""

from typing import Any

import jax

from bilevel.refinement.fidelity import Fidelity
from bilevel.refinement.namespace import on_host


def limits(fidelity: Fidelity) -> dict[str, float | int | str | None]:
    """The numbers of a fidelity as fields of a record, and its static parts in words."""
    host: Fidelity = fidelity if on_host(fidelity) else jax.device_get(fidelity)
    level = None if host.level is None else int(host.level)
    fields: dict[str, float | int | str | None] = {"level": level}
    if host.static:
        fields["static"] = in_words(host.static)
    for prefix, budget in (("budget", host.budget), ("adjoint_budget", host.adjoint_budget)):
        if budget is not None:
            fields[f"{prefix}_iterations"] = int(budget.iterations)
            fields[f"{prefix}_rtol"] = float(budget.rtol)
            fields[f"{prefix}_atol"] = float(budget.atol)
    return fields


def in_words(static: tuple[tuple[str, Any], ...]) -> str:
    """Static parts in a few words.

    >>> in_words((("cells", 16), ("precision", "float32")))
    'cells 16, precision float32'
    """
    parts = [f"{name} {getattr(part, '__name__', part)}" for name, part in static]
    # What a user's part calls itself may take several lines.
    return " ".join(", ".join(parts).split())
