"""Giving up: what is said of updates that were not finite."""

from bilevel.outer.history import Record
from bilevel.outer.limits import limits
from bilevel.refinement.fidelity import Fidelity


class NonFiniteStreak(Exception):  # noqa: N818
    """Too many updates in a row were not finite."""


def given_up(limit: int, place: str, fidelity: Fidelity, failures: int) -> NonFiniteStreak:
    """The end of a run after so many updates in a row, and what may help.

    **Arguments:**

    - `limit`: how many.
    - `place`: where the run is, in words.
    - `fidelity`: of the last.
    - `failures`: solves that failed in them.
    """
    spent = limits(fidelity)
    where = "" if spent["level"] is None else f"level {spent['level']}, "
    advice = (
        f"Inner solves failed in these updates ({failures} of them, primal or adjoint), which "
        "a larger budget seldom mends: bl.solve(...).diagnosis says why. Take a smaller step "
        "size of the inner solver, another solver, nearer parameters or a smaller learning "
        "rate."
        if failures
        else "Start with a larger budget or nearer parameters, take a smaller learning rate, "
        "or raise max_nonfinite."
    )
    return NonFiniteStreak(
        f"given up {place}: in {limit} updates in a row the loss, its gradient or the "
        f"next theta was not finite ({where}{spent['budget_iterations']} iterations allowed). "
        f"theta is as the last good update left it. {advice}"
    )


def skipped(record: Record, epochs: int) -> str | None:
    """What an epoch skipped: said of the first such epochs, and then ever more rarely.

    **Arguments:**

    - `record`: of the epoch.
    - `epochs`: that skipped something so far.
    """
    if epochs & (epochs - 1):
        return None
    failed = f"; inner solves failed: {record.failures}" if record.failures else ""
    again = f" ({epochs} epochs so far)" if epochs > 2 else ""
    return (
        f"epoch {record.epoch}: {record.nonfinite} of {record.nonfinite + record.updates} "
        f"updates skipped, for the loss, its gradient or the next theta was not finite"
        f"{failed}{again}"
    )
