"""Tables of comparisons: what stands where a run failed, never arrived, or is the reference."""

from collections.abc import Callable
from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from bilevel.outer.comparison import Comparison
from bilevel.outer.history import Record
from bilevel.outer.row import Row
from bilevel.outer.run import Run
from bilevel.outer.sheet import Column, Sheet

MadeRun = Callable[..., Run]


def records(*metrics: float, primal: int | None = 10, seconds: float = 1.0) -> list[Record]:
    """The state before training, and epochs of 10 primal and 2 adjoint iterations."""
    return [Record(epoch=0, metric=9.0)] + [
        Record(
            epoch=place,
            metric=metric,
            updates=1,
            budget_iterations=10,
            primal_iterations=primal,
            adjoint_iterations=None if primal is None else 2,
            compile_seconds=0.5 if place == 1 else 0.0,
            elapsed=place * seconds,
        )
        for place, metric in enumerate(metrics, start=1)
    ]


def comparison(**runs: list[Run]) -> Comparison:
    return Comparison("made", "error", runs, None, 0.02, [], interrupted=False)


def rows(made: Comparison) -> dict[str, Row]:
    return {row.policy: row for row in made.rows}


def cells(made: Comparison) -> tuple[dict[str, dict[str, str]], dict[str, list[str]]]:
    """Both tables: by policy and head; the second, which has two heads `saved`, in order."""
    tables: list[list[list[str]]] = []
    for part in made.to_markdown().split("**")[2::2]:
        lines = [line for line in part.splitlines() if line.startswith("|")]
        tables.append([[cell.strip() for cell in line.strip("|").split("|")] for line in lines])
    whole, until = tables
    first = {row[0]: dict(zip(whole[0], row, strict=True)) for row in whole[2:]}
    return first, {row[0]: row[1:] for row in until[2:]}


def test_whole_runs(made_run: MadeRun):
    made = comparison(
        full=[made_run(*records(2.0, 1.0))],
        prdp=[made_run(*records(2.0, 1.25, primal=4))],
    )
    whole, _ = cells(made)
    assert whole["full"] == {
        "policy": "full",
        "final error": "1",
        "× full": "1",
        "Σ primal": "20",
        "Σ adjoint": "4",
        # Nothing is saved against itself.
        "saved": "–",
        "solver, s": "–",
        "wall, s": "2.000",
        "compiles": "1",
    }
    assert whole["prdp"]["× full"] == "1.25"
    assert whole["prdp"]["saved"] == "50 %"


def test_noise_is_told_where_there_is_some(made_run: MadeRun):
    noisy = [
        Record(epoch=0, metric=9.0),
        Record(epoch=1, metric=2.0, gradient_norm=4.0, gradient_noise=8.0),
        Record(epoch=2, metric=1.0, gradient_norm=4.0, gradient_noise=3.0),
    ]
    made = comparison(full=[made_run(*noisy)], prdp=[made_run(*records(1.0))])
    whole, _ = cells(made)
    assert (whole["full"]["noise"], whole["prdp"]["noise"]) == ("0.75", "–")
    assert any(note.startswith("Noise: ") for note in made.notes)


def test_until_the_target(made_run: MadeRun):
    made = comparison(
        full=[made_run(*records(2.0, 1.5, 1.0))],
        quick=[made_run(*records(1.0, 0.9, 0.8))],
        dear=[made_run(*records(2.0, 1.5, 1.0, primal=28, seconds=2.0))],
    )
    _, until = cells(made)
    assert until["full"] == ["3", "36", "–", "3.000", "–", "2.500", "10"]
    assert until["quick"] == ["1", "12", "67 %", "1.000", "67 %", "0.500", "10"]
    assert until["dear"] == ["3", "90", "150 % more", "6.000", "100 % more", "5.500", "10"]
    assert made.goal == "until error ≤ 1.02, full's final one + 2 %"


def test_what_never_arrived(made_run: MadeRun):
    made = comparison(full=[made_run(*records(1.0))], far=[made_run(*records(1.03))])
    _, until = cells(made)
    assert until["far"] == ["not reached", "–", "–", "–", "–", "–", "10"]
    assert rows(made)["far"].reached == 0
    assert rows(made)["far"].saved_to_target is None


def test_a_saving_to_the_target_is_of_seeds_that_both_reached(made_run: MadeRun):
    full = [made_run(*records(1.0)), made_run(*records(3.0, 2.0, 1.5, 1.0))]
    some = [made_run(*records(1.0, primal=4)), made_run(*records(9.0, 9.0, 9.0, 9.0))]
    made = comparison(full=full, some=some)
    _, until = cells(made)
    # Six iterations instead of twelve; the second seed took full 48, and the other for ever.
    assert until["some (1 of 2)"][:3] == ["1", "6", "50 %"]
    assert rows(made)["some"].reached == 1


def test_to_give_up_is_no_saving(made_run: MadeRun):
    full = [made_run(*records(2.0, 1.0)) for _ in range(3)]
    ended = made_run(*records(2.0, 1.0))
    some = [ended, made_run(*records(2.0), status="nonfinite"), ended]
    made = comparison(full=full, some=some, none=[made_run(status="failed")] * 3)
    whole, until = cells(made)
    assert whole["some (1 of 3 nonfinite)"]["× full"] == "–"
    assert whole["some (1 of 3 nonfinite)"]["saved"] == "–"
    failed = whole["none (failed)"]
    assert failed["final error"] == "–"
    assert failed["Σ primal"] == "–"
    assert until["none"][0] == "not reached"


def test_a_failed_full_is_no_reference(made_run: MadeRun):
    full = made_run(*records(2.0, 1.0), status="interrupted")
    made = comparison(full=[full], prdp=[made_run(*records(2.0, 1.0))])
    assert made.target_of(0) is None
    row = rows(made)["prdp"]
    assert row.reached is None
    assert row.saved is None
    assert row.relative_metric is None
    assert "until" not in made.to_markdown()


@pytest.mark.parametrize("reference", [0.0, -2.0])
def test_a_ratio_to_no_positive_number_is_not_shown(made_run: MadeRun, reference: float):
    made = comparison(
        full=[made_run(*records(reference))], prdp=[made_run(*records(-1.0, primal=5))]
    )
    row = rows(made)["prdp"]
    assert row.relative_metric is None
    assert row.saved == pytest.approx(1 - 7 / 12)


def test_the_target_of_a_negative_metric_is_above_it(made_run: MadeRun):
    made = comparison(full=[made_run(*records(-2.0))], prdp=[made_run(*records(-1.97))])
    assert made.target_of(0) == pytest.approx(-1.96)
    assert rows(made)["prdp"].reached == 1


def test_where_no_solve_reports_nothing_is_saved(made_run: MadeRun):
    made = comparison(
        full=[made_run(*records(1.0, primal=None))], prdp=[made_run(*records(1.0, primal=None))]
    )
    whole, until = cells(made)
    assert whole["prdp"]["Σ primal"] == whole["prdp"]["saved"] == "–"
    assert until["prdp"][:4] == ["1", "–", "–", "1.000"]
    assert any("pass fidelity=fidelity" in note for note in made.notes)


def test_budgets_are_told_where_there_is_no_target(made_run: MadeRun):
    for runs in ({"full": [made_run(*records(1.0))]}, {"prdp": [made_run(*records(1.0))]}):
        written = comparison(**runs).to_markdown()
        assert written.count("budgets of the run") == 1
        assert "| 10 |" in written


def test_a_policy_without_a_run_has_no_row(made_run: MadeRun):
    assert list(rows(comparison(full=[made_run(*records(1.0))], prdp=[]))) == ["full"]


def shown(sheet: Sheet, width: int) -> list[str]:
    out = StringIO()
    Console(file=out, width=width).print(sheet)
    return [line.rstrip() for line in out.getvalue().splitlines()]


@pytest.mark.parametrize("width", range(30, 90, 6))
def test_a_sheet_is_folded_and_not_cut(width: int):
    numbers = [f"{10**place:,} ± {place}" for place in range(7)]
    columns = [Column("policy", ["full", "prdp [x]"], words=True)]
    columns += [Column(f"head {place}", [number, "–"]) for place, number in enumerate(numbers)]
    lines = shown(Sheet("title [a]", columns), width)
    assert max(map(len, lines)) <= width
    together = "\n".join(lines)
    for number in numbers:
        assert number in together
    assert "…" not in together
    assert together.count("title [a]") == 1
    assert together.count("prdp [x]") == sum("policy" in line for line in lines)


def test_a_wide_screen_keeps_a_sheet_in_one_piece():
    columns = [Column("policy", ["full"], words=True), Column("a longer head", ["1"])]
    lines = shown(Sheet("title", columns), 100)
    assert sum("full" in line for line in lines) == 1
    # A head is no reason for a column to be wider than its longest word.
    assert all(len(line) < 20 for line in lines)


def test_a_bar_in_a_cell_ends_no_cell_in_markdown():
    lines: Any = Sheet("t", [Column("‖x‖ | y", ["a|b"])]).markdown().splitlines()
    assert [line.count("|") for line in lines] == [2, 2, 2]


def test_without_a_target_it_says_why_and_what_to_do(made_run: MadeRun):
    failed = made_run(*records(2.0, float("nan")), status="nonfinite")
    made = comparison(full=[failed], prdp=[made_run(*records(2.0, 1.0))])
    assert any(
        "full came to no finite error. Give one (target=, --target)" in note for note in made.notes
    )
    fine = comparison(full=[made_run(*records(2.0, 1.0))])
    assert not any("--target" in note for note in fine.notes)


def test_what_error_estimates_took_is_told(made_run: MadeRun):
    spent = Record(epoch=1, metric=1.0, updates=1, primal_iterations=5, error_applications=1240)
    estimating = [Record(epoch=0, metric=9.0), spent]
    made = comparison(full=[made_run(*records(2.0, 1.0))], error=[made_run(*estimating)])
    told = [note for note in made.notes if "estimates" in note]
    assert told == ["Besides Σ, applications for estimates of the gradient's error: error: 1,240."]
