"""Series: what a chart draws of a history, one number an epoch."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np

from bilevel.budget import UNLIMITED
from bilevel.outer.history import History
from bilevel.outer.run import Run

Series: TypeAlias = Callable[[History], np.ndarray]
"""From a history to float64 numbers, one a record; NaN where there is none."""

Runs: TypeAlias = Mapping[str, Sequence[Run]]
"""By policy, one run for each seed."""

REFERENCE = "full"
"""The policy that others save against."""


class Curve(NamedTuple):
    """One line: the median of the seeds, from the lowest to the highest of them.

    - `x`, `y`: where it goes, finite.
    - `low`, `high`: of the seeds; equal to `y` for one.
    """

    x: np.ndarray
    y: np.ndarray
    low: np.ndarray
    high: np.ndarray


def curve(runs: Sequence[Run], x: Series, y: Series) -> Curve | None:
    """The line of one policy, as long as the shortest of its runs; `None` without a point."""
    lines: list[tuple[np.ndarray, np.ndarray]] = []
    for run in runs:
        right, up = x(run.history), y(run.history)
        usable = np.isfinite(right) & np.isfinite(up)
        if usable.any():
            lines.append((right[usable], up[usable]))
    if not lines:
        return None
    length = min(len(right) for right, _ in lines)
    xs, ys = (np.array([line[side][:length] for line in lines]) for side in (0, 1))
    return Curve(np.median(xs, axis=0), np.median(ys, axis=0), ys.min(axis=0), ys.max(axis=0))


def column(name: str) -> Series:
    """A field of the records."""
    return lambda history: history.column(name)


TOLERANCES = column("budget_rtol"), column("adjoint_budget_rtol")


def epochs(history: History) -> np.ndarray:
    """The numbers of the epochs."""
    return history.column("epoch")


def work(history: History) -> np.ndarray:
    """Primal and adjoint iterations so far."""
    spent = history.cumulative("work")
    # The state before training has cost nothing, which a logarithmic axis cannot show.
    return np.where(spent > 0, spent, np.nan)


def seconds(history: History) -> np.ndarray:
    """Wall time so far, without compilation."""
    return history.column("elapsed") - history.cumulative("compile_seconds")


def allowed(history: History) -> np.ndarray:
    """The cap on a primal solve's iterations."""
    return _capped(history.column("budget_iterations"))


def adjoint_allowed(history: History) -> np.ndarray:
    """The cap on an adjoint solve's iterations."""
    return _capped(history.column("adjoint_budget_iterations"))


def primal_residual(history: History) -> np.ndarray:
    """The relative residual that primal solves stopped at."""
    return _positive(history.column("primal_residual"))


def adjoint_residual(history: History) -> np.ndarray:
    """The relative residual that adjoint solves stopped at."""
    return _positive(history.column("adjoint_residual"))


def work_of_step(history: History) -> np.ndarray:
    """Primal and adjoint iterations of an outer step, mean over the epoch's."""
    steps = history.column("updates") + history.column("nonfinite")
    return np.where(steps > 0, history.column("work") / np.maximum(steps, 1), np.nan)


def error_share(history: History) -> np.ndarray:
    """The gradient's estimated truncation error over its norm."""
    return _over_norm(history, "error")


def noise_share(history: History) -> np.ndarray:
    """The noise of one batch's gradient over its norm."""
    return _over_norm(history, "gradient_noise")


def finest_work(history: History) -> np.ndarray:
    """What every outer step would have taken under the finest budget of the run.

    It is the median over the epochs that had it, for a controller may measure in some.
    """
    taken = work_of_step(history)
    caps = np.nan_to_num(history.column("budget_iterations"), nan=-1.0)
    tolerances = np.nan_to_num(history.column("budget_rtol"), nan=np.inf)
    usable = np.isfinite(taken)
    if not usable.any():
        return taken
    finest = usable & (caps == caps[usable].max())
    finest &= tolerances == tolerances[finest].min()
    return np.where(usable, np.median(taken[finest]), np.nan)


def reference(runs: Runs) -> Curve | None:
    """Iterations of an outer step that savings are measured from.

    Those of `full`; for one policy alone, those of its own finest budget.
    """
    if len(runs) == 1:
        return curve(next(iter(runs.values())), epochs, finest_work)
    return curve(runs.get(REFERENCE, []), epochs, work_of_step)


def saved_shares(runs: Runs) -> dict[str, float]:
    """What part of a reference's iterations each policy did not spend, mean over its seeds.

    The reference is the policy `full`; for one policy alone, its own finest budget held
    throughout. Policies that save nothing are left out, and so are those that did not come as
    far as the reference.
    """
    if len(runs) == 1:
        shares = {name: [_saved_of_finest(run.history) for run in runs[name]] for name in runs}
    else:
        full = runs.get(REFERENCE, [])
        shares = {
            name: [_saved(mine, base) for mine, base in zip(group, full, strict=False)]
            for name, group in runs.items()
            if name != REFERENCE
        }
    means: dict[str, float] = {}
    for name, each in shares.items():
        known = [share for share in each if share is not None]
        if known and len(known) == len(each) and sum(known) / len(known) > 0:
            means[name] = sum(known) / len(known)
    return means


def apart(runs: Sequence[Run], primal: Series, adjoint: Series) -> bool:
    """Whether the second series is known in some run, and another than the first."""
    sides = [(primal(run.history), adjoint(run.history)) for run in runs]
    return not all(
        np.isnan(other).all() or np.array_equal(own, other, equal_nan=True) for own, other in sides
    )


def known(runs: Runs, series: Series) -> bool:
    """Whether some run has a finite number of it."""
    return any(np.isfinite(series(run.history)).any() for group in runs.values() for run in group)


def steps_name(runs: Runs) -> str:
    """What an axis of epochs is called."""
    updates = max(
        (record.updates for group in runs.values() for r in group for record in r.history),
        default=0,
    )
    return "outer step" if updates <= 1 else f"epoch ({updates} outer steps each)"


def budget_kinds(runs: Runs) -> tuple[Runs, Runs]:
    """Policies whose caps are drawn, and those whose tolerances are.

    A policy goes by its tolerance where that is positive and the cap does not move.
    """
    by_cap: dict[str, Sequence[Run]] = {}
    by_tolerance: dict[str, Sequence[Run]] = {}
    for name, group in runs.items():
        caps, tolerances = (
            {value for run in group for value in form(run.history) if np.isfinite(value)}
            for form in (allowed, column("budget_rtol"))
        )
        moving = len(tolerances - {0.0}) > 1 or (bool(tolerances - {0.0}) and not caps)
        if moving:
            by_tolerance[name] = group
        if caps and not (moving and len(caps) == 1):
            by_cap[name] = group
    return by_cap, by_tolerance


def _positive(values: np.ndarray) -> np.ndarray:
    """An exact solve has no place on a logarithmic axis."""
    return np.where(values > 0, values, np.nan)


def _capped(caps: np.ndarray) -> np.ndarray:
    return np.where(caps < UNLIMITED, caps, np.nan)


def _over_norm(history: History, name: str) -> np.ndarray:
    norm = history.column("gradient_norm")
    positive = norm > 0
    return np.where(positive, history.column(name) / np.where(positive, norm, 1.0), np.nan)


def _saved_of_finest(history: History) -> float | None:
    taken, most = work_of_step(history), finest_work(history)
    total = float(np.nansum(most))
    return 1 - float(np.nansum(taken)) / total if total > 0 else None


def _saved(run: Run, base: Run) -> float | None:
    mine, full = run.history.work, base.history.work
    if mine is None or not full or len(run.history) < len(base.history):
        return None
    return 1 - mine / full
