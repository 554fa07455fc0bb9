"""Policies: what they are called, and which controller they stand for."""

from collections.abc import Callable
from typing import Any

import jax
import pytest

from bilevel.budget import Budget
from bilevel.outer.assignment import controller_for, default_policy
from bilevel.outer.policy import MEANING, SYNTAX, Policy, parse_policies, parse_policy
from bilevel.outer.task import Task
from bilevel.refinement.fidelity import Fidelity
from bilevel.refinement.fixed import FixedFidelity
from bilevel.refinement.ladder import Ladder
from bilevel.refinement.progressive import ProgressiveRefinement


@pytest.mark.parametrize(
    ("written", "policy"),
    [
        ("full", Policy("full", "full")),
        (" prdp ", Policy("prdp", "prdp")),
        ("fixed=25", Policy("fixed=25", "fixed", (25, 25))),
        ("fixed=25:100", Policy("fixed=25:100", "fixed", (25, 100))),
        ("best-fixed", Policy("best-fixed", "best-fixed", (8,))),
        ("best-fixed=5", Policy("best-fixed=5", "best-fixed", (5,))),
        ("schedule=linear:3", Policy("schedule=linear:3", "schedule", (3,))),
        (
            "schedule=iterations:5",
            Policy("schedule=iterations:5", "schedule", (5,), "iterations"),
        ),
        ("hoag=cubic", Policy("hoag=cubic", "hoag", (), "cubic")),
    ],
)
def test_policies_are_taken_apart(written: str, policy: Policy):
    assert parse_policy(written) == policy


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("", "unknown"),
        ("fixd=3", "did you mean fixed"),
        ("fixed", "its value is missing; write fixed=K"),
        ("fixed=", "its value is missing"),
        ("fixed=0", "'0' is no whole number"),
        ("fixed=1.5", "'1.5' is no whole number"),
        ("fixed=-3", "'-3' is no whole number"),
        ("fixed=1_0", "'1_0' is no whole number"),
        ("fixed=3:", "'' is no whole number"),
        ("best-fixed=2", "at least 3 runs"),
        ("schedule=linear", "STEP is missing"),
        ("schedule=cosine:3", "'cosine' is no shape"),
        ("hoag=qubic", "did you mean cubic"),
        ("prdp=3", "takes no value"),
        ("full=", "takes no value"),
    ],
)
def test_what_is_wrong_is_said(written: str, message: str):
    with pytest.raises(ValueError, match=message) as caught:
        parse_policy(written)
    assert "\n" not in str(caught.value)


def test_lists_of_policies():
    assert [policy.text for policy in parse_policies("full, fixed=3,")] == ["full", "fixed=3"]
    with pytest.raises(ValueError, match="given twice"):
        parse_policies("full,full")
    with pytest.raises(ValueError, match="no policy"):
        parse_policies(" ,")


def test_every_kind_is_explained():
    assert set(SYNTAX) == set(MEANING)


def fidelities(controller: Any, updates: int) -> list[Fidelity]:
    state, found = controller.init(), []
    for _ in range(updates):
        found.append(jax.device_get(controller.fidelity(state)))
        state = controller.update(state, 1.0, gradient_norm=1.0, error=0.1)
    return found


@pytest.mark.parametrize(
    ("written", "budgets"),
    [
        ("full", [(12, 12)] * 3),
        ("fixed=4", [(4, 4)] * 3),
        ("fixed=4:7", [(4, 7)] * 3),
        ("schedule=linear:5", [(1, 1), (6, 6), (11, 11), (12, 12)]),
        ("schedule=iterations:4", [(1, 1), (5, 5), (9, 9), (12, 12), (12, 12)]),
    ],
)
def test_each_policy_asks_for_its_budgets(
    make_task: Callable[..., Task], written: str, budgets: list[tuple[int, int]]
):
    found = fidelities(controller_for(parse_policy(written), make_task()), len(budgets))
    assert [
        (int(f.budget.iterations), int(f.adjoint_budget.iterations))
        for f in found
        if f.adjoint_budget is not None
    ] == budgets


def test_hoag_tightens_both_tolerances_under_the_full_cap(make_task: Callable[..., Task]):
    task = make_task(full=Fidelity(Budget(70), Budget(70), static=(("grid", 8),)))
    found = fidelities(controller_for(parse_policy("hoag=quadratic"), task), 3)
    assert [float(f.budget.rtol) for f in found] == pytest.approx([1e-3, 1e-3 / 4, 1e-3 / 9])
    assert all(f.adjoint_budget is not None for f in found)
    assert {int(f.budget.iterations) for f in found} == {70}
    assert found[0]["grid"] == 8


def test_steps_of_iterations_keep_the_ladder_s_tolerance(make_task: Callable[..., Task]):
    """On a ladder of tens they are in between its levels."""
    ladder = Ladder.iterations(10, 10, 30).with_tolerances(Budget(rtol=1e-3))
    task = make_task(ladder=ladder)
    found = fidelities(controller_for(parse_policy("schedule=iterations:5"), task), 6)
    assert [int(f.budget.iterations) for f in found] == [10, 15, 20, 25, 30, 30]
    assert [float(f.budget.rtol) for f in found] == pytest.approx([1e-3] * 6)


def test_hoag_ends_at_the_full_solve_s_own_tolerances(make_task: Callable[..., Task]):
    """Below them it would do more than full."""
    task = make_task(full=Fidelity(Budget(70, rtol=1e-4), Budget(60, rtol=1e-2)))
    found = fidelities(controller_for(parse_policy("hoag=cubic"), task), 9)
    assert [float(f.budget.rtol) for f in found][:2] == pytest.approx([1e-3, 1.25e-4])
    assert float(found[-1].budget.rtol) == pytest.approx(1e-4)
    assert [float(f.adjoint_budget.rtol) for f in found] == pytest.approx([1e-2] * 9)
    assert {int(f.adjoint_budget.iterations) for f in found} == {60}


def test_prdp_takes_the_task_s_settings(make_task: Callable[..., Task]):
    task = make_task(refinement={"ema_window": None, "error_window": 5})
    controller = controller_for(parse_policy("prdp"), task)
    assert isinstance(controller, ProgressiveRefinement)
    assert (controller.ema_window, controller.error_window) == (None, 5)


def test_a_large_linear_step_does_not_leave_the_ladder(make_task: Callable[..., Task]):
    controller = controller_for(parse_policy(f"schedule=linear:{2**27}"), make_task())
    assert [int(f.budget.iterations) for f in fidelities(controller, 20)] == [1] + [12] * 19


@pytest.mark.parametrize(
    ("written", "fields", "message"),
    [
        ("full", {"ladder": None}, "needs a full fidelity or ladder"),
        ("prdp", {"ladder": None}, "needs a ladder"),
        ("schedule=linear:1", {"ladder": None}, "needs a ladder"),
        ("schedule=iterations:1", {"ladder": Ladder.tolerances()}, "is none of iterations"),
        ("task", {}, "no controller of its own"),
        ("error", {"ladder": None}, "needs a ladder"),
        ("auto", {"ladder": None}, "needs a ladder"),
        ("best-fixed", {}, "only a comparison"),
    ],
)
def test_a_policy_that_the_task_cannot_serve_is_refused(
    make_task: Callable[..., Task], written: str, fields: dict[str, Any], message: str
):
    with pytest.raises(ValueError, match=message):
        controller_for(parse_policy(written), make_task(**fields))


def test_the_default_is_the_most_specific(make_task: Callable[..., Task]):
    own = FixedFidelity(Budget(3))
    assert default_policy(make_task(controller=own)) == "task"
    assert default_policy(make_task()) == "prdp"
    assert default_policy(make_task(ladder=None, full=Budget(3))) == "full"
    with pytest.raises(ValueError, match="fixed=100"):
        default_policy(make_task(ladder=None))
    assert controller_for(parse_policy("task"), make_task(controller=own)) is own


def test_a_schedule_in_a_run_begins_at_the_coarsest_level(train: Any, make_task: Any):
    controller = controller_for(
        parse_policy("schedule=linear:2"), make_task(ladder=Ladder.iterations(1, 1, 5))
    )
    run = train(controller=controller, epochs=4)
    assert [record.level for record in run.history[1:]] == [0, 2, 4, 4]
