"""Comparisons: fair counts, the same target for all, the best constant level."""

import json
import math
import os
from collections.abc import Callable
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.console import Console

from bilevel.outer.compare import compare
from bilevel.outer.comparison import Comparison
from bilevel.outer.spread import Spread
from bilevel.outer.task import Task
from bilevel.refinement.ladder import Ladder

MakeTask = Callable[..., Task]


def printed(comparison: Comparison) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(comparison.table())
    return capture.get()


def test_policies_are_timed_to_the_final_metric_of_full(make_task: MakeTask):
    comparison = compare(make_task(epochs=8), ["full", "fixed=6", "fixed=1"], progress=False)
    full, close, far = comparison.rows
    assert (full.policy, close.policy, far.policy) == ("full", "fixed=6", "fixed=1")
    target = comparison.target_of(0)
    metric = comparison.runs["full"][0].summary.final_metric
    assert metric is not None
    assert target == pytest.approx(1.02 * metric)
    assert full.primal_iterations == Spread(96, None, 1)
    assert full.work_to_target is not None
    # K primal and 2 adjoint iterations an epoch, as the task reports them.
    assert full.epochs_to_target is not None
    assert full.work_to_target.mean == full.epochs_to_target.mean * 14
    assert full.seconds_to_target is not None
    assert full.seconds_to_target_without_compile is not None
    assert 0 < full.seconds_to_target_without_compile.mean < full.seconds_to_target.mean
    assert close.reached == 0
    assert far.reached == 0
    assert "not reached" in printed(comparison)


def test_a_target_of_one_s_own(make_task: MakeTask):
    comparison = compare(make_task(), ["fixed=12"], target=1.0, progress=False)
    # 3 -> 3/2 -> 3/4 with sgd(0.5) on half a square.
    assert comparison.rows[0].epochs_to_target == Spread(2, None, 1)
    assert compare(make_task(), ["fixed=12"], progress=False).rows[0].reached is None


def test_seeds_give_means_and_spreads(make_task: MakeTask, tmp_path: Path):
    built: list[int] = []

    def task(seed: int) -> Task:
        built.append(seed)
        return make_task(theta0=5.0 + seed, epochs=2)

    comparison = compare(
        task, ["fixed=12", "fixed=3"], seeds=[3, 5], directory=tmp_path, progress=False
    )
    assert set(built) == {3, 5}
    row = comparison.rows[0]
    assert row.runs == 2
    metrics = [run.summary.final_metric for run in comparison.runs["fixed=12"]]
    assert row.final_metric is not None
    assert row.final_metric.mean == pytest.approx(np.mean(np.array(metrics, dtype=float)))
    assert row.final_metric.deviation == pytest.approx(np.std(np.array(metrics, float), ddof=1))
    assert "±" in printed(comparison)
    assert (tmp_path / "fixed-12" / "seed-5" / "theta.npz").is_file()


def test_a_comparison_is_read_back(make_task: MakeTask, tmp_path: Path):
    task = make_task(epochs=3)
    comparison = compare(task, ["full", "prdp"], directory=tmp_path / "c", progress=False)
    read = Comparison.read(tmp_path / "c")
    assert read.rows == comparison.rows
    assert printed(read) == printed(comparison)
    assert (tmp_path / "c" / "comparison.md").read_text() == comparison.to_markdown() + "\n"
    stored = json.loads((tmp_path / "c" / "comparison.json").read_text())
    assert stored["rows"][1]["policy"] == "prdp"
    assert stored["runs"]["full"][0]["compilations"] == 1
    with pytest.raises(FileExistsError, match="overwrite=True"):
        compare(task, ["full"], directory=tmp_path / "c", progress=False)
    (tmp_path / "c" / "comparison.json").unlink()
    with pytest.raises(FileExistsError, match="seed-0 holds results already"):
        compare(task, ["full"], directory=tmp_path / "c", progress=False)
    (tmp_path / "c" / "comparison.json").write_text("[]")
    with pytest.raises(ValueError, match="no comparison that bilevel wrote"):
        Comparison.read(tmp_path / "c")
    with pytest.raises(FileNotFoundError, match="holds no comparison"):
        Comparison.read(tmp_path)


def level_of(comparison: Comparison, policy: str) -> float | None:
    return comparison.runs[policy][0].history[-1].budget_iterations


def test_the_file_says_what_made_it(make_task: MakeTask, tmp_path: Path):
    comparison = compare(
        make_task(epochs=3),
        ["full", "best-fixed=3"],
        directory=tmp_path / "c",
        progress=False,
        command="bilevel compare two.py",
        margin=0.5,
    )
    stored = json.loads((tmp_path / "c" / "comparison.json").read_text())
    assert stored["margin"] == 0.5
    assert stored["confidence"] == 0.95
    origin = stored["origin"]
    assert origin["command"] == "bilevel compare two.py"
    assert abs(date.today() - date.fromisoformat(origin["date"])) <= timedelta(days=1)  # noqa: DTZ011
    assert origin["machine"] == {
        "processor": origin["machine"]["processor"],
        "cores": len(os.sched_getaffinity(0)),
        "devices": sorted({device.device_kind for device in jax.devices()}),
        "dtype": "float64",
    }
    assert origin["machine"]["processor"]
    assert origin["versions"]["jax"] == jax.__version__
    levels = [candidate["level"] for candidate in stored["search"]]
    assert levels == sorted(set(levels))
    assert 2 <= len(levels) <= 4
    for candidate in stored["search"]:
        assert candidate["budget"] == str(candidate["level"] + 1)
        assert candidate["work"] == 3 * (candidate["level"] + 1 + 2)
    assert stored["budgets"]["full"][0][0]["budget_iterations"] == 12
    written = (tmp_path / "c" / "comparison.md").read_text()
    assert "Made by `bilevel compare two.py`, " in written
    assert f"jax {jax.__version__}" in written
    read = Comparison.read(tmp_path / "c")
    assert read.origin == comparison.origin
    assert read.search == comparison.search


def test_a_failed_candidate_is_kept_in_the_file(make_task: MakeTask, tmp_path: Path):
    def loss(theta: Any, batch: Any, fidelity: Any) -> Any:
        return jnp.where(fidelity.budget.iterations < 12, jnp.nan, 1.0) * theta**2

    comparison = compare(
        make_task(loss=loss, validate=lambda theta: theta**2, epochs=2),
        ["full", "best-fixed=3"],
        directory=tmp_path / "c",
        max_nonfinite=1,
        progress=False,
    )
    assert [each.excess for each in comparison.search[:-1]] == [math.inf] * 3
    assert Comparison.read(tmp_path / "c").search == comparison.search
    assert comparison.rows[1].status == "completed"


def test_the_best_constant_level_is_the_cheapest_that_ends_at_the_target(make_task: MakeTask):
    # The gradient of K steps leads to 2 / (1 - 2^-K), which is within 0.1 of 2 from K = 5 on:
    # 0.065 there and 0.133 for K = 4.
    comparison = compare(make_task(epochs=12), ["best-fixed=4", "full"], target=0.1, progress=False)
    assert [row.policy for row in comparison.rows] == ["best-fixed=4", "full"]
    assert level_of(comparison, "best-fixed=4") == 5
    # full is level 11 of the ladder, and cost no trial.
    tried = {candidate.level: candidate for candidate in comparison.search}
    assert len(tried) <= 5
    assert tried[11].metric == comparison.runs["full"][0].summary.final_metric
    assert tried[4].excess <= 0 < tried[3].excess
    # 12 epochs of 5 primal and 2 adjoint iterations.
    assert tried[4].work == 84
    shown = printed(comparison)
    assert "best-fixed: the cheapest constant budget whose final metric is at most" in shown
    assert "best-fixed=4 stands for 5 iterations." in shown


def test_the_search_ends_where_full_does_but_for_the_margin(make_task: MakeTask):
    # K steps end at 2 / (2^K - 1) but for what 0.5^15 leaves, full's 12 at 4.9e-4.
    # 5 % more allow K = 12 only, and 110 % more K = 11, which ends at 9.8e-4.
    found = {
        margin: level_of(
            compare(make_task(epochs=30), ["full", "best-fixed=5"], margin=margin, progress=False),
            "best-fixed=5",
        )
        for margin in (0.05, 1.1)
    }
    assert found == {0.05: 12, 1.1: 11}


def test_where_no_level_gets_there_the_full_solve_is_what_is_left(make_task: MakeTask):
    comparison = compare(make_task(epochs=3), ["full", "best-fixed=3"], target=1e-9, progress=False)
    runs = comparison.runs
    assert runs["best-fixed=3"][0].history[-1] == runs["full"][0].history[-1]
    assert "12 iterations, the full solve's, for no level tried gets there" in printed(comparison)


def test_one_lucky_seed_does_not_decide_the_search(make_task: MakeTask):
    # With seed 0 every level ends at the target, with seed 1 only full's.
    def task(seed: int) -> Task:
        # Nothing to learn for the first: it starts where it should end.
        return make_task(theta0=2.0 if seed == 0 else 5.0, epochs=12, validate=worth)

    def worth(theta: Any) -> Any:
        return 1.0 + jnp.abs(theta - 2.0)

    comparison = compare(task, ["full", "best-fixed=4"], [0, 1], progress=False)
    chosen = level_of(comparison, "best-fixed=4")
    assert chosen is not None
    judged = {candidate.level: candidate for candidate in comparison.search}[int(chosen) - 1]
    assert judged.runs == 2
    assert judged.excess <= 0
    assert any(each.runs == 1 for each in comparison.search)
    assert "(1 of 2 seeds)" in printed(comparison)


def test_a_run_that_is_given_up_stays_in_the_table(make_task: MakeTask):
    def loss(theta: Any, batch: Any, fidelity: Any) -> Any:
        return jnp.where(fidelity.budget.iterations < 3, jnp.nan, 1.0) * theta**2

    comparison = compare(
        make_task(loss=loss, validate=lambda theta: theta**2, epochs=20),
        ["fixed=1", "full"],
        max_nonfinite=2,
        progress=False,
    )
    first, second = comparison.rows
    assert first.status == "nonfinite"
    assert second.status == "completed"
    assert "fixed=1 (nonfinite)" in printed(comparison)
    # It did a tenth of the work, for nothing.
    assert first.saved is None
    assert first.relative_metric is None


def test_ctrl_c_ends_the_comparison(make_task: MakeTask, tmp_path: Path):
    calls: list[int] = []

    def batches(epoch: int, key: Any) -> list[np.ndarray]:
        calls.append(epoch)
        if len(calls) == 6:  # one of them for the shapes, before the first run
            raise KeyboardInterrupt
        return [np.ones(1)]

    def loss(theta: Any, batch: Any, fidelity: Any) -> Any:
        return jnp.mean((theta - batch) ** 2)

    comparison = compare(
        make_task(loss=loss, batches=batches, epochs=3),
        ["full", "fixed=1", "fixed=2"],
        directory=tmp_path,
        progress=False,
    )
    assert comparison.interrupted
    assert [len(runs) for runs in comparison.runs.values()] == [1, 1, 0]
    assert Comparison.read(tmp_path).interrupted
    assert "Interrupted" in printed(comparison)


def test_an_error_leaves_the_finished_runs_on_record(make_task: MakeTask, tmp_path: Path):
    calls: list[int] = []

    def batches(epoch: int, key: Any) -> list[np.ndarray]:
        calls.append(epoch)
        if len(calls) == 6:  # one of them for the shapes, before the first run
            msg = "disk gone"
            raise OSError(msg)
        return [np.ones(1)]

    def loss(theta: Any, batch: Any, fidelity: Any) -> Any:
        return jnp.mean((theta - batch) ** 2)

    with pytest.raises(OSError, match="disk gone"):
        compare(
            make_task(loss=loss, batches=batches, epochs=3),
            ["full", "fixed=1"],
            directory=tmp_path,
            progress=False,
        )
    assert len(Comparison.read(tmp_path).runs["full"]) == 1


def test_recommended_policies_are_the_default(make_task: MakeTask):
    task = make_task(policies=("fixed=1", "fixed=2"), epochs=1)
    assert list(compare(task, progress=False).runs) == ["fixed=1", "fixed=2"]
    assert list(compare(make_task(epochs=1), progress=False).runs) == ["full", "prdp"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"policies": ["full", "prpd"]}, "did you mean prdp"),
        ({"policies": "full"}, "policies should be a valid tuple"),
        ({"policies": []}, "policies should have at least 1 item"),
        ({"policies": ["best-fixed"]}, "needs full among the policies"),
        ({"policies": ["full", "task"]}, "brings no controller of its own"),
        ({"seeds": 0}, "seeds should have at least 1 item"),
        ({"seeds": [1, 1]}, "seeds should differ"),
        ({"margin": -1.0}, "margin should be greater"),
        ({"target": math.nan}, "target should be a finite number"),
    ],
)
def test_bad_arguments_are_refused_before_training(
    make_task: MakeTask, arguments: dict[str, Any], message: str
):
    with pytest.raises(ValueError, match=message):
        compare(make_task(optimizer=optax.sgd(0.1)), progress=False, **arguments)


def test_a_builder_that_returns_no_task_is_refused():
    with pytest.raises(TypeError, match="should return a Task"):
        compare(lambda seed: 3, ["full"], progress=False)  # pyright: ignore[reportArgumentType]


def test_a_ladder_of_tolerances_may_be_searched(make_task: MakeTask):
    ladder = Ladder.tolerances(1e-1, 0.1, 1e-3, iterations=9)
    comparison = compare(
        make_task(ladder=ladder, epochs=3), ["full", "best-fixed=3"], progress=False
    )
    assert comparison.rows[1].status == "completed"


def test_what_costs_more_is_said_in_words(make_task: MakeTask):
    comparison = compare(make_task(epochs=8), ["full", "fixed=24"], progress=False)
    # 26 iterations an epoch instead of 14, and the same epochs.
    assert "86 % more" in printed(comparison)
    assert "-86" not in printed(comparison)


def test_the_spread_over_seeds_is_explained_where_there_is_one(make_task: MakeTask):
    explained = "± half the 95 % confidence interval of the mean (Student's t)"
    assert explained not in printed(compare(make_task(epochs=2), ["full"], progress=False))
    assert explained in printed(compare(make_task(epochs=2), ["full"], seeds=2, progress=False))


def test_a_metric_that_ends_at_nan_has_saved_nothing(make_task: MakeTask):
    def validate(theta: Any) -> Any:
        return jnp.where(theta < 2.3, jnp.abs(theta - 2.0), jnp.nan)

    comparison = compare(make_task(validate=validate), ["full", "fixed=1"], progress=False)
    full, coarse = comparison.rows
    assert full.status == "completed"
    assert math.isnan(comparison.runs["fixed=1"][0].summary.final_metric or 0.0)
    assert coarse.status == "ended not finite"
    assert coarse.saved is None
    assert coarse.relative_metric is None


def test_a_target_met_before_training_took_no_work(make_task: MakeTask):
    """None would mean that it is not known."""
    row = compare(make_task(), ["fixed=12"], target=1e9, progress=False).rows[0]
    assert row.epochs_to_target == Spread(0, None, 1)
    assert row.work_to_target == Spread(0, None, 1)


def test_the_search_names_the_static_parts_of_its_candidates(make_task: MakeTask):
    ladder = Ladder.iterations(11, 1, 12).with_static(cells=[8, 16])
    comparison = compare(
        make_task(ladder=ladder), ["full", "best-fixed=3"], target=1.0, progress=False
    )
    assert {candidate.budget for candidate in comparison.search} <= {"cells 8, 11", "cells 16, 12"}
    assert comparison.search


def test_the_first_policy_does_not_pay_what_a_process_pays_once(
    make_task: MakeTask, monkeypatch: pytest.MonkeyPatch
):
    """The task is traced before the first run begins to be timed, and its errors are the run's."""
    order: list[str] = []
    monkeypatch.setattr(
        "bilevel.outer.compare.optimize", lambda *args, **kwargs: order.append("run") or 1 / 0
    )

    def loss(theta: Any, batch: Any, fidelity: Any) -> Any:
        order.append("traced")
        return theta**2

    with pytest.raises(ZeroDivisionError):
        compare(make_task(loss=loss), ["full"], progress=False)
    assert order[0] == "traced"
    assert order[-1] == "run"
    monkeypatch.undo()

    def broken(theta: Any, batch: Any, fidelity: Any) -> Any:
        msg = "mine"
        raise KeyError(msg)

    with pytest.raises(KeyError, match="mine"):
        compare(make_task(loss=broken), ["full"], progress=False)
