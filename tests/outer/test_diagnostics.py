"""Diagnostics: each finding comes where it should, with its number, and only there."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from bilevel.outer.diagnostics import diagnose, diagnose_seeds
from bilevel.outer.finding import Finding, Kind, Weight, places
from bilevel.outer.history import History, Record
from bilevel.outer.run import INTERRUPTED, NONFINITE, Run

MadeRun = Callable[..., Run]


def history(length: int, **fields: Any) -> History:
    """So many epochs after the start; a field is a list, one an epoch, or the same in all."""

    def at(value: Any, place: int) -> Any:
        return value[place] if isinstance(value, list | np.ndarray) else value

    quiet: dict[str, Any] = {"updates": 1, "solves": 1, "primal_iterations": 4}
    start = Record(epoch=0, metric=3.0)
    return History(
        [
            start,
            *(
                Record(
                    epoch=k + 1,
                    **{name: at(v, k) for name, v in ({"metric": 1.0} | quiet | fields).items()},
                )
                for k in range(length)
            ),
        ]
    )


def found(kind: Kind, records: History, **rest: Any) -> Finding | None:
    return next((each for each in diagnose(records, **rest) if each.kind is kind), None)


def what(kind: Kind, records: History) -> str:
    finding = found(kind, records)
    assert finding is not None
    return finding.what


FALLING = np.geomspace(1.0, 1e-4, 30).tolist()
"""A metric that falls by 27 % an epoch."""


def test_a_run_with_nothing_to_say_about_has_no_finding():
    # Falls, then stands still for too short a time to matter.
    metric = [*np.geomspace(1.0, 0.1, 10).tolist(), 0.1, 0.1, 0.1]
    assert diagnose(history(13, metric=metric)) == []


@pytest.mark.parametrize("records", [History(), History([Record(epoch=0, metric=1.0)])])
def test_without_an_epoch_there_is_one_note(records: History):
    (finding,) = diagnose(records)
    assert (finding.kind, finding.weight) == (Kind.EMPTY, Weight.NOTE)


@pytest.mark.parametrize(
    ("side", "kind"), [("primal", Kind.PRIMAL_CAP), ("adjoint", Kind.ADJOINT_CAP)]
)
def test_a_cap_below_the_tolerance_is_told_in_percent(side: str, kind: Kind):
    budget = {"primal": "budget", "adjoint": "adjoint_budget"}[side]
    fields = {f"{budget}_iterations": 50, f"{budget}_rtol": 1e-6, "solves": 100}
    text = what(kind, history(2, **fields, **{f"{side}_capped": [37, 37]}))
    assert "37 % of solves (74 of 200)" in text
    assert found(kind, history(2, **fields, **{f"{side}_capped": [5, 5]})) is None
    # Iterations alone are meant to be used up.
    fields[f"{budget}_rtol"] = 0.0
    assert found(kind, history(2, **fields, **{f"{side}_capped": [100, 100]})) is None


def test_the_adjoint_s_own_default_has_a_tolerance():
    assert "100 % of solves" in what(Kind.ADJOINT_CAP, history(2, adjoint_capped=1))
    assert found(Kind.PRIMAL_CAP, history(2, primal_capped=1)) is None


def test_a_cap_without_tolerance_is_judged_by_the_error_it_leaves():
    fields = {"adjoint_budget_iterations": 4, "adjoint_capped": 1, "gradient_norm": 2.0}
    text = what(Kind.ADJOINT_CAP, history(4, **fields, adjoint_error=[1.0, 1.0, 0.1, 0.1]))
    assert "50 % of the gradient's norm (median)" in text
    assert "epochs 1–2" in text
    assert found(Kind.ADJOINT_CAP, history(4, **fields, adjoint_error=0.1)) is None


@pytest.mark.parametrize(
    ("side", "kind"), [("primal", Kind.PRIMAL_TOLERANCE), ("adjoint", Kind.ADJOINT_TOLERANCE)]
)
def test_solves_that_end_above_their_tolerance_without_a_cap_are_told(side: str, kind: Kind):
    budget = {"primal": "budget", "adjoint": "adjoint_budget"}[side]
    fields = {f"{budget}_rtol": 1e-8, f"{budget}_iterations": 900, f"{side}_capped": 0}
    text = what(kind, history(3, **fields, **{f"{side}_residual": [1e-9, 4e-8, 1e-9]}))
    assert "up to 4 times" in text
    assert "epoch 2" in text
    assert found(kind, history(3, **fields, **{f"{side}_residual": 1e-9})) is None
    fields[f"{side}_capped"] = 1  # which another finding tells
    assert found(kind, history(3, **fields, **{f"{side}_residual": 1.0})) is None
    fields |= {f"{side}_capped": 0, f"{budget}_atol": 1.0}  # which may be what it met
    assert found(kind, history(3, **fields, **{f"{side}_residual": 1.0})) is None


def test_a_truncation_error_above_the_norm_is_counted():
    text = what(Kind.ERROR, history(4, gradient_norm=1.0, error=[2.0, 0.5, math.inf, 0.9]))
    assert "2 of 4 epochs: epochs 1 and 3" in text
    assert found(Kind.ERROR, history(4, gradient_norm=1.0, error=0.9)) is None


def test_a_lopsided_error_names_the_solve_to_spend_on():
    fields = {"gradient_norm": 1.0, "primal_error": 0.02, "adjoint_error": 0.5}
    text = what(Kind.LOPSIDED, history(3, **fields))
    assert text.startswith("The adjoint solve's part of the gradient's error is 25 times")
    assert found(Kind.LOPSIDED, history(3, **fields | {"adjoint_error": 0.1})) is None
    # Neither is worth speaking of.
    assert found(Kind.LOPSIDED, history(3, **fields | {"gradient_norm": 50.0})) is None


def test_noise_above_the_error_says_that_refining_buys_nothing():
    finding = found(Kind.NOISE, history(4, gradient_noise=1.0, error=[2.0, 0.25, 0.25, 0.25]))
    assert finding is not None
    assert "4 times as large in the median, in 3 of 4 epochs" in finding.what
    assert "Refining further buys nothing" in finding.advice
    assert found(Kind.NOISE, history(4, gradient_noise=1.0, error=[2.0, 2.0, 0.2, 0.2])) is None


def test_nobody_is_told_to_refine_below_the_noise():
    fields = {"adjoint_budget_iterations": 4, "adjoint_capped": 1, "gradient_norm": 2.0}
    fields |= {"primal_error": 0.01, "adjoint_error": 1.0, "error": 1.0}
    kinds = {each.kind for each in diagnose(history(4, **fields, gradient_noise=0.5))}
    assert kinds == {Kind.ADJOINT_CAP, Kind.LOPSIDED}
    assert {each.kind for each in diagnose(history(4, **fields, gradient_noise=1.5))} == {
        Kind.NOISE
    }


def test_noise_above_the_norm_is_told_where_no_error_is_known():
    text = what(Kind.NOISY, history(4, gradient_noise=[2.0, 2.0, 2.0, 0.5], gradient_norm=1.0))
    assert "3 of 4 epochs" in text
    assert found(Kind.NOISY, history(4, gradient_noise=0.5, gradient_norm=1.0)) is None


def test_a_metric_that_still_falls_is_told_by_how_much():
    # Medians six epochs apart: 1 − 0.01**(2 · 6 / 29).
    text = what(Kind.SLOPE, history(30, metric=FALLING))
    assert f"{100 * (1 - (1e-4) ** (6 / 29)):.3g} % over the last 6 epochs" in text
    assert found(Kind.SLOPE, history(9, metric=FALLING[:9])) is None  # too short to tell
    assert found(Kind.SLOPE, history(30, metric=1.0)) is None


@pytest.mark.parametrize(("fall", "told"), [(0.03, True), (0.01, False)])
def test_two_percent_between_two_fifths_are_a_plateau(fall: float, told: bool):
    metric = [*[1.0] * 24, *[1.0 - fall] * 6]
    assert (found(Kind.SLOPE, history(30, metric=metric)) is not None) is told


def test_a_metric_below_zero_falls_too():
    assert found(Kind.SLOPE, history(30, metric=np.linspace(-1, -9, 30).tolist())) is not None
    assert found(Kind.SLOPE, history(30, metric=np.linspace(-9, -1, 30).tolist())) is None


def test_work_on_a_plateau_is_told():
    metric = [*np.geomspace(1.0, 0.1, 10).tolist(), *[0.1] * 30]
    text = what(Kind.PLATEAU, history(40, metric=metric))
    assert "from epoch 10 on: the 30 epochs" in text
    assert "75 % of all iterations" in text
    assert found(Kind.SLOPE, history(40, metric=metric)) is None


def test_a_budget_at_its_largest_without_gain_is_told():
    metric = [*np.geomspace(1.0, 0.1, 10).tolist(), *[0.1] * 30]
    caps = [*range(1, 21), *[20] * 20]
    records = history(40, metric=metric, budget_iterations=caps, primal_iterations=caps)
    # From epoch 20 on at 20 iterations: 21 · 20 of Σ = 190 + 420.
    text = what(Kind.TOP, records)
    assert "for the last 21 epochs, which took 69 % of all iterations" in text
    assert found(Kind.PLATEAU, records) is None
    # At the largest long before the metric came to rest: only the rest is wasted.
    early = history(40, metric=metric, budget_iterations=[1, 2, *[20] * 38])
    assert "for the last 30 epochs, which took 75 %" in what(Kind.TOP, early)
    gaining = history(40, metric=np.geomspace(1, 1e-3, 40).tolist(), budget_iterations=caps)
    assert found(Kind.TOP, gaining) is None


def test_a_metric_that_ended_above_its_best_is_told():
    metric = [*np.geomspace(1.0, 0.1, 15).tolist(), *[0.15] * 15]
    text = what(Kind.WORSE, history(30, metric=metric))
    assert "0.1 in epoch 15: in the last 6 epochs it was 0.15 or more" in text
    noisy = [*np.geomspace(1.0, 0.1, 15).tolist(), *[0.1, 0.2, 0.2] * 5]
    assert found(Kind.WORSE, history(30, metric=noisy)) is None


def test_failures_are_problems_and_come_first():
    records = history(30, metric=FALLING, failures=[0] * 28 + [2, 1], solves=10)
    first = diagnose(records)[0]
    assert (first.kind, first.weight) == (Kind.FAILURES, Weight.PROBLEM)
    assert "3 of 300 solves" in first.what
    assert "epochs 29–30" in first.what


def test_skipped_updates_metrics_that_are_no_numbers_and_refusals_are_told():
    assert "2 of 4 updates were skipped" in what(
        Kind.SKIPPED, history(2, nonfinite=[2, 0], updates=1)
    )
    assert "in epoch 2." in what(Kind.METRIC, history(3, metric=[1.0, math.nan, 1.0]))
    assert "in epoch 3." in what(Kind.METRIC, history(3, metric=[1.0, 1.0, math.inf]))
    assert "refused 3 measurements" in what(Kind.REFUSED, history(3, rejected=[0, 1, 3]))
    calm = history(3, nonfinite=0, rejected=0, failures=0)
    assert diagnose(calm) == []


def test_what_was_not_reported_is_noted():
    assert found(Kind.UNCOUNTED, history(2, primal_iterations=None)) is not None
    silent = History([Record(epoch=1, primal_iterations=3)])
    assert [each.kind for each in diagnose(silent)] == [Kind.UNMEASURED]


def test_the_summary_tells_how_it_ended_and_how_often_it_compiled(made_run: MadeRun):
    record = Record(epoch=1, metric=1.0, primal_iterations=3)
    failed = made_run(record, status=NONFINITE, message="3 updates in a row.", compilations=4)
    problem, advice = diagnose(failed.history, failed.summary)
    assert problem.what == "The run ended as nonfinite after 1 epoch: 3 updates in a row."
    assert problem.weight is Weight.PROBLEM
    assert "compiled 4 times" in advice.what
    stopped = made_run(record, status=INTERRUPTED)
    (note,) = diagnose(stopped.history, stopped.summary)
    assert note.weight is Weight.NOTE
    good = made_run(record)
    assert diagnose(good.history, good.summary) == []


def test_seeds_are_told_together(made_run: MadeRun):
    good = made_run(Record(epoch=1, metric=1.0, primal_iterations=3))
    bad = made_run(Record(epoch=1, metric=1.0, primal_iterations=3, solves=4, failures=1))
    (finding,) = diagnose_seeds([good, bad, bad])
    assert finding.what.startswith("1 of 4 solves")
    assert finding.what.endswith("(2 of 3 seeds; numbers of the first.)")
    assert diagnose_seeds([good, good]) == []


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        ([1], "epoch 1"),
        ([1, 2, 3], "epochs 1–3"),
        ([1, 3, 4], "epochs 1 and 3–4"),
        ([1, 3, 5, 7, 9], "epochs 1, 3, 5 … 9"),
    ],
)
def test_epochs_are_named_in_spans(chosen: Sequence[int], words: str):
    records = History(Record(epoch=epoch) for epoch in range(10))
    assert places(records, np.isin(np.arange(10), chosen)) == words


def test_numbers_that_are_none_or_infinite_break_no_rule():
    odd = [math.nan, math.inf, -math.inf, 0.0, 1.0, None] * 4
    names = ("metric", "loss", "gradient_norm", "gradient_noise", "error", "primal_error")
    names += ("adjoint_error", "budget_rtol", "primal_residual", "adjoint_residual")
    for name in names:
        diagnose(history(24, **{name: odd}))
    diagnose(history(24, **dict.fromkeys(names, odd)))
