"""Diagnostics: what a history says went wrong or was wasted, in words."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from bilevel.outer import course, text
from bilevel.outer.finding import Finding, Kind, Weight, count_of, part_of, places, times
from bilevel.outer.history import History
from bilevel.outer.run import COMPLETED, FAILED, INTERRUPTED, NONFINITE, Run, Summary

CAPPED = 0.05
"""Part of the solves that may stop at their cap before that is said."""

SMALL = 0.1
"""A truncation error below this part of the gradient's norm is no shortage."""

LOPSIDED = 10.0
"""How many times the other part of the error one part may be."""


def diagnose(history: History, summary: Summary | None = None) -> list[Finding]:
    """What a history says went wrong or was wasted, the worst first.

    Nothing is computed anew: each finding follows from the numbers of the records.

    **Arguments:**

    - `history`: of a run.
    - `summary`: of the same run, for how it ended and how often it compiled.

    **Returns:** the findings; none for a run with nothing to say about.

    >>> import bilevel as bl
    >>> records = [
    ...     bl.Record(
    ...         epoch=epoch,
    ...         metric=1.0,
    ...         primal_iterations=80,
    ...         adjoint_budget_rtol=1e-6,
    ...         solves=8,
    ...         adjoint_capped=3,
    ...     )
    ...     for epoch in (1, 2)
    ... ]
    >>> for finding in diagnose(bl.History(records)):
    ...     print(finding)
    The adjoint stopped at its cap in 38 % of solves (6 of 16), above its tolerance. Raise the
    adjoint's iterations, precondition it, or loosen its tolerance.
    """
    found = [] if summary is None else [rule(summary) for rule in _OF_SUMMARY]
    if not any(record.epoch for record in history):
        what = "No epoch was finished, so there is nothing to judge."
        found.append(Finding(Kind.EMPTY, Weight.NOTE, what))
    else:
        found += [rule(history) for rule in _OF_HISTORY]
    weights = list(Weight)
    known = [finding for finding in found if finding is not None]
    return sorted(known, key=lambda finding: weights.index(finding.weight))


def diagnose_seeds(runs: Sequence[Run]) -> list[Finding]:
    """What several seeds of one policy say, each kind of finding once.

    **Arguments:**

    - `runs`: of one policy.

    **Returns:** the findings of the first run that has them, with how many runs do.
    """
    found: dict[Kind, list[Finding]] = {}
    for run in runs:
        for finding in diagnose(run.history, run.summary):
            found.setdefault(finding.kind, []).append(finding)
    weights = list(Weight)
    merged = [
        each[0]
        if len(runs) == 1
        else dataclasses.replace(
            each[0],
            what=f"{each[0].what} ({len(each)} of {len(runs)} seeds; numbers of the first.)",
        )
        for each in found.values()
    ]
    return sorted(merged, key=lambda finding: weights.index(finding.weight))


# Of the summary.


def _ended(summary: Summary) -> Finding | None:
    if summary.status == COMPLETED or summary.status not in (INTERRUPTED, NONFINITE, FAILED):
        return None
    ended = f"The run ended as {summary.status} after {count_of(summary.epochs, 'epoch')}"
    what = f"{ended}: {summary.message.rstrip('.')}." if summary.message else f"{ended}."
    if summary.status == INTERRUPTED:
        return Finding(Kind.ENDED, Weight.NOTE, what, "Go on with --resume.")
    return Finding(Kind.ENDED, Weight.PROBLEM, what, "Its last numbers are no result.")


def _compiled(summary: Summary) -> Finding | None:
    if summary.compilations <= 1:
        return None
    return Finding(
        Kind.COMPILED,
        Weight.ADVICE,
        f"The update was compiled {summary.compilations} times, which took part of "
        f"{text.seconds(summary.compile_seconds)} s.",
        "Expected once for each static part of a level; otherwise shapes or dtypes of the "
        "batches change.",
    )


_OF_SUMMARY: tuple[Callable[[Summary], Finding | None], ...] = (_ended, _compiled)


# Of the records.


def _failures(history: History) -> Finding | None:
    failed = history.column("failures")
    if not np.nansum(failed) > 0:
        return None
    return Finding(
        Kind.FAILURES,
        Weight.PROBLEM,
        f"{part_of(np.nansum(failed), history.total('solves'), 'solves')} ended with a status that "
        f"is a failure, in {places(history, failed > 0)}.",
        "Their gradients were not used; look at one of these solves with bl.hypergradient, whose "
        "status says why.",
    )


def _skipped(history: History) -> Finding | None:
    skipped = history.column("nonfinite")
    if not np.nansum(skipped) > 0:
        return None
    steps = np.nansum(skipped) + (history.total("updates") or 0)
    return Finding(
        Kind.SKIPPED,
        Weight.PROBLEM,
        f"{part_of(np.nansum(skipped), steps, 'updates')} were skipped because a loss, a gradient "
        f"or the next parameters were not finite, in {places(history, skipped > 0)}.",
        "Take a smaller step, or give the first epochs a finer budget.",
    )


def _refused(history: History) -> Finding | None:
    counts = history.column("rejected")
    most = np.nanmax(counts) if np.isfinite(counts).any() else 0
    if not most > 0:
        return None
    return Finding(
        Kind.REFUSED,
        Weight.ADVICE,
        f"The controller refused {count_of(most, 'measurement')}, which did not count towards "
        "refinement.",
        "They were not finite: refinement comes later than it should.",
    )


def _primal_cap(history: History) -> Finding | None:
    return _cap(history, "primal", Kind.PRIMAL_CAP)


def _adjoint_cap(history: History) -> Finding | None:
    return _cap(history, "adjoint", Kind.ADJOINT_CAP)


def _cap(history: History, side: str, kind: Kind) -> Finding | None:
    """Where a tolerance was set; else where the estimate says that the cap was too low.

    A budget of iterations alone is meant to be used up.
    """
    name = {"primal": "The primal solve", "adjoint": "The adjoint"}[side]
    capped, solves = history.column(f"{side}_capped"), history.column("solves")
    asked = _tolerance(history, side) > 0
    if side == "adjoint":
        # The estimator's own default has a tolerance.
        asked |= np.isnan(history.column("adjoint_budget_iterations"))
    stopped, among = np.nansum(capped[asked]), np.nansum(solves[asked])
    if among > 0 and stopped / among > CAPPED:
        return Finding(
            kind,
            Weight.ADVICE,
            f"{name} stopped at its cap in {100 * stopped / among:.0f} % of solves "
            f"({stopped:,.0f} of {among:,.0f}), above its tolerance.",
            f"Raise the {side}'s iterations, precondition it, or loosen its tolerance.",
        )
    error, norm = history.column(f"{side}_error"), history.column("gradient_norm")
    judged = (capped > 0) & ~asked & np.isfinite(error) & (norm > 0) & ~_drowned(history)
    short = judged & (error > SMALL * norm)
    if not judged.any() or short.sum() <= CAPPED * judged.sum():
        return None
    share = np.median(error[short] / norm[short])
    return Finding(
        kind,
        Weight.ADVICE,
        f"{name} stopped at its cap with {100 * share:.0f} % of the gradient's norm (median) as "
        f"its part of the error, in {places(history, short)}.",
        f"Raise the {side}'s iterations or precondition it.",
    )


def _primal_tolerance(history: History) -> Finding | None:
    return _missed(history, "primal", Kind.PRIMAL_TOLERANCE)


def _adjoint_tolerance(history: History) -> Finding | None:
    return _missed(history, "adjoint", Kind.ADJOINT_TOLERANCE)


def _missed(history: History, side: str, kind: Kind) -> Finding | None:
    """Residuals above the tolerance of solves that did not stop at their cap."""
    prefix = "budget" if side == "primal" else "adjoint_budget"
    wanted = history.column(f"{prefix}_rtol")
    absolute = np.nan_to_num(history.column(f"{prefix}_atol"))
    reached = history.column(f"{side}_residual")
    uncapped = np.nan_to_num(history.column(f"{side}_capped")) == 0
    beyond = (wanted > 0) & (absolute == 0) & uncapped & (reached > 1.01 * wanted)
    if not beyond.any():
        return None
    worst = np.max(reached[beyond] / wanted[beyond])
    name = {"primal": "The primal solve's", "adjoint": "The adjoint's"}[side]
    return Finding(
        kind,
        Weight.ADVICE,
        f"{name} mean residual was up to {times(worst)} its tolerance, though no solve stopped "
        f"at its cap, in {places(history, beyond)}.",
        "Rounding stops it there: loosen the tolerance, or use double precision.",
    )


def _error(history: History) -> Finding | None:
    error, norm = history.column("error"), history.column("gradient_norm")
    judged = ~np.isnan(error) & ~np.isnan(norm)
    above = judged & (error > norm)
    if not above.any():
        return None
    return Finding(
        Kind.ERROR,
        Weight.ADVICE,
        f"The estimated truncation error was above the gradient's norm in "
        f"{part_of(above.sum(), judged.sum(), 'epochs')}: {places(history, above)}.",
        "There the gradient may point anywhere: refine earlier, or start from a finer budget.",
    )


def _drowned(history: History) -> np.ndarray:
    """Where the noise is above the error, so that a finer solve would not be seen."""
    noise, error = history.column("gradient_noise"), history.column("error")
    return np.isfinite(noise) & (noise > error)


def _lopsided(history: History) -> Finding | None:
    primal, adjoint = history.column("primal_error"), history.column("adjoint_error")
    norm = history.column("gradient_norm")
    usable = (primal > 0) & (adjoint > 0) & (norm > 0)
    usable &= np.isfinite(primal) & np.isfinite(adjoint) & ~_drowned(history)
    if not usable.any():
        return None
    ratio = float(np.median(primal[usable] / adjoint[usable]))
    larger, smaller = ("primal", "adjoint") if ratio > 1 else ("adjoint", "primal")
    worst = np.maximum(primal, adjoint)
    factor = max(ratio, 1 / ratio)
    if factor < LOPSIDED or np.median(worst[usable] / norm[usable]) < SMALL:
        return None
    return Finding(
        Kind.LOPSIDED,
        Weight.ADVICE,
        f"The {larger} solve's part of the gradient's error is {times(factor)} the {smaller}'s "
        "(median over the epochs).",
        f"Iterations are better spent on the {larger} solve.",
    )


def _noise(history: History) -> Finding | None:
    noise, error = history.column("gradient_noise"), history.column("error")
    norm = history.column("gradient_norm")
    both = np.isfinite(noise) & np.isfinite(error) & (noise > 0)
    if both.any():
        above = both & (noise > error)
        if above.sum() <= both.sum() / 2:
            return None
        ratios = noise[above] / np.maximum(error[above], np.finfo(float).tiny)
        factor = float(np.median(ratios))
        how = f", {times(factor)} as large in the median," if factor < 1e6 else ""
        return Finding(
            Kind.NOISE,
            Weight.ADVICE,
            f"The noise of one batch's gradient was above its truncation error{how} in "
            f"{part_of(above.sum(), both.sum(), 'epochs')}.",
            "Refining further buys nothing; a larger batch or a smaller step would.",
        )
    judged = np.isfinite(noise) & np.isfinite(norm)
    above = judged & (noise > norm)
    if above.sum() <= judged.sum() / 2:
        return None
    return Finding(
        Kind.NOISY,
        Weight.NOTE,
        f"The noise of one batch's gradient was above its norm in "
        f"{part_of(above.sum(), judged.sum(), 'epochs')}.",
        "A larger batch or a smaller step makes its direction worth more.",
    )


def _uncounted(history: History) -> Finding | None:
    if history.work is not None:
        return None
    what = "No solve reported its iterations, so neither work nor accuracy is known."
    return Finding(Kind.UNCOUNTED, Weight.NOTE, what, "Pass fidelity=fidelity to bl.solve.")


_OF_HISTORY: tuple[Callable[[History], Finding | None], ...] = (
    _failures,
    _skipped,
    course.not_finite,
    _refused,
    _primal_cap,
    _adjoint_cap,
    _primal_tolerance,
    _adjoint_tolerance,
    _error,
    _lopsided,
    _noise,
    course.still_falling,
    course.standstill,
    course.above_best,
    course.unmeasured,
    _uncounted,
)


def _tolerance(history: History, side: str) -> np.ndarray:
    """The larger of a budget's two tolerances; 0 where there is none."""
    prefix = "budget" if side == "primal" else "adjoint_budget"
    relative, absolute = (history.column(f"{prefix}_{part}") for part in ("rtol", "atol"))
    return np.fmax(np.nan_to_num(relative), np.nan_to_num(absolute))
