"""Paths: the budgets that runs went through, as a list and in words."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from bilevel.budget import UNLIMITED
from bilevel.outer.assignment import controller_for
from bilevel.outer.history import Record
from bilevel.outer.path import budget_path, budgets_in_words
from bilevel.outer.policy import parse_policy
from bilevel.outer.run import Run
from bilevel.outer.task import Task
from bilevel.refinement.ladder import Ladder
from bilevel.refinement.scheduled import ScheduledFidelity

MadeRun = Callable[..., Run]
Budgets = Sequence[tuple[int, float]]


def records(primal: Budgets, adjoint: Budgets | None = None) -> list[Record]:
    """An epoch for each budget, after the state before training, which has none."""
    sides = zip(primal, primal if adjoint is None else adjoint, strict=True)
    return [Record(epoch=0, metric=1.0)] + [
        Record(
            epoch=place,
            metric=1.0,
            budget_iterations=mine[0],
            budget_rtol=mine[1],
            budget_atol=0.0,
            adjoint_budget_iterations=other[0],
            adjoint_budget_rtol=other[1],
            adjoint_budget_atol=0.0,
        )
        for place, (mine, other) in enumerate(sides, start=1)
    ]


def test_the_path_has_an_entry_where_the_budget_changes(made_run: MadeRun):
    path = budget_path(made_run(*records([(5, 0.0), (5, 0.0), (9, 0.0), (9, 0.0), (5, 0.0)])))
    assert [(entry["epoch"], entry["budget_iterations"]) for entry in path] == [
        (1, 5),
        (3, 9),
        (5, 5),
    ]


def test_a_move_of_the_adjoint_alone_is_an_entry(made_run: MadeRun):
    path = budget_path(made_run(*records([(5, 0.0)] * 3, [(2, 0.0), (2, 0.0), (4, 0.0)])))
    adjoint = [(entry["epoch"], entry["adjoint_budget_iterations"]) for entry in path]
    assert adjoint == [(1, 2), (3, 4)]


@pytest.mark.parametrize(
    ("caps", "words"),
    [
        ([25], "25"),
        ([25, 25], "25"),
        ([1, 7, 14], "1→14"),
        ([1, 14, 9], "1→14→9"),
        ([14, 1], "14→1"),
        ([14, 1, 14], "14→1→14"),
        ([5, 1, 14, 9], "5→14→9"),
        ([1200, UNLIMITED], "1,200→no limit"),
    ],
)
def test_a_cap_that_moves(made_run: MadeRun, caps: list[int], words: str):
    assert budgets_in_words([made_run(*records([(cap, 0.0) for cap in caps]))]) == words


def test_a_tolerance_that_moves_is_finest_where_it_is_smallest(made_run: MadeRun):
    moves = made_run(*records([(40, 1e-2), (40, 1e-6), (40, 1e-4)]))
    assert budgets_in_words([moves]) == "tol 1e-02→1e-06→1e-04"
    assert budgets_in_words([made_run(*records([(40, 1e-2), (40, 1e-4)]))]) == "tol 1e-02→1e-04"


def test_a_constant_tolerance_under_a_cap(made_run: MadeRun):
    assert budgets_in_words([made_run(*records([(40, 1e-5)]))]) == "40 to 1e-05"


def test_an_adjoint_of_its_own_stands_apart(made_run: MadeRun):
    run = made_run(*records([(1, 0.0), (9, 0.0)], [(1, 0.0), (4, 0.0)]))
    assert budgets_in_words([run]) == "1→9 / 1→4"
    assert budgets_in_words([made_run(*records([(4, 0.0)], [(7, 0.0)]))]) == "4 / 7"


def test_seeds_that_start_or_end_apart(made_run: MadeRun):
    runs = [made_run(*records([(1, 0.0), (last, 0.0)])) for last in (9, 14, 11)]
    assert budgets_in_words(runs) == "1→9…14"
    assert budgets_in_words([*runs, made_run(*records([(2, 0.0), (20, 0.0), (9, 0.0)]))]) == (
        "1…2→20→9…14"
    )
    constant = [made_run(*records([(cap, 0.0)])) for cap in (5, 6)]
    assert budgets_in_words(constant) == "5…6→5…6"


def test_without_budgets_there_is_nothing_to_say(made_run: MadeRun):
    assert budgets_in_words([]) == "–"
    assert budgets_in_words([made_run()]) == "–"
    assert budgets_in_words([made_run(Record(epoch=0, metric=1.0))]) == "–"
    assert budget_path(made_run(Record(epoch=0, metric=1.0))) == []


def test_a_seed_that_failed_at_once_does_not_count(made_run: MadeRun):
    assert budgets_in_words([made_run(), made_run(*records([(1, 0.0), (9, 0.0)]))]) == "1→9"


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        ("fixed=4:7", "4 / 7"),
        ("schedule=linear:2", "1→9"),
        ("hoag=quadratic", "tol 1e-03→4e-05"),
    ],
)
def test_what_training_records(
    make_task: Callable[..., Task], train: Callable[..., Run], policy: str, words: str
):
    fields: dict[str, Any] = {"epochs": 5, "ladder": Ladder.iterations(1, 1, 12)}
    controller = controller_for(parse_policy(policy), make_task(**fields))
    assert budgets_in_words([train(controller=controller, **fields)]) == words


def test_static_parts_that_change_are_told_with_the_budgets(made_run: MadeRun):
    """A path without them would read `5→9→9`, and hide that the last nine are on another grid."""

    def on(cells: int, *caps: int) -> list[Record]:
        return [
            Record(epoch=cells + cap, metric=1.0, static=f"cells {cells}", budget_iterations=cap)
            for cap in caps
        ]

    run = made_run(Record(epoch=0, metric=1.0), *on(8, 5, 9), *on(16, 9))
    assert budgets_in_words([run]) == "cells 8: 5→9, cells 16: 9"
    path = budget_path(run)
    assert [(entry["static"], entry["budget_iterations"]) for entry in path] == [
        ("cells 8", 5),
        ("cells 8", 9),
        ("cells 16", 9),
    ]
    alike = made_run(Record(epoch=0, metric=1.0), *on(8, 9), *on(16, 9))
    assert budgets_in_words([alike]) == "cells 8 → cells 16: 9"
    one = made_run(Record(epoch=0, metric=1.0), *on(8, 5, 9))
    assert budgets_in_words([one]) == "5→9"


def test_training_records_the_static_parts(train: Callable[..., Run]):
    ladder = Ladder.iterations(4, 1, 5).with_static(cells=[8, 16])
    run = train(controller=ScheduledFidelity(ladder), ladder=ladder, epochs=3)
    assert [record.static for record in run.history] == [None, "cells 8", "cells 16", "cells 16"]
    assert budgets_in_words([run]) == "cells 8: 4, cells 16: 5"
