"""Limits: the numbers of a fidelity, as fields of a record."""

import jax

from bilevel.refinement.fidelity import Fidelity
from bilevel.refinement.namespace import on_host


def limits(fidelity: Fidelity) -> dict[str, float | int | None]:
    """The numbers of a fidelity as fields of a record."""
    host: Fidelity = fidelity if on_host(fidelity) else jax.device_get(fidelity)
    level = None if host.level is None else int(host.level)
    fields: dict[str, float | int | None] = {"level": level}
    for prefix, budget in (("budget", host.budget), ("adjoint_budget", host.adjoint_budget)):
        if budget is not None:
            fields[f"{prefix}_iterations"] = int(budget.iterations)
            fields[f"{prefix}_rtol"] = float(budget.rtol)
            fields[f"{prefix}_atol"] = float(budget.atol)
    return fields
