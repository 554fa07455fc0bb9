"""Comparisons: fair counts, the same target for all, the best constant level."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from bilevel.outer.compare import compare
from bilevel.outer.comparison import Comparison, Spread
from bilevel.outer.search import best_level
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
    assert target == pytest.approx(1.05 * metric)
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


def test_the_best_constant_level_is_found(make_task: MakeTask):
    # The gradient of K steps leads to 2 / (1 - 2^-K), which is within 0.1 of 2 from K = 5 on.
    # K = 5 takes 7 epochs of 5 + 2 iterations, K = 6 takes 6 of 6 + 2: one iteration less.
    comparison = compare(make_task(epochs=12), ["best-fixed=9", "full"], target=0.1, progress=False)
    assert [row.policy for row in comparison.rows] == ["best-fixed=9", "full"]
    best = comparison.runs["best-fixed=9"][0].history[-1].budget_iterations
    assert best == 6
    assert len(comparison.search) <= 9
    assert {candidate.work for candidate in comparison.search} != {math.inf}
    assert "best-fixed tried budgets of" in printed(comparison)
    assert "best-fixed=9 stands for 6 iterations" in printed(comparison)


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


def test_ctrl_c_ends_the_comparison(make_task: MakeTask, tmp_path: Path):
    calls: list[int] = []

    def batches(epoch: int, key: Any) -> list[np.ndarray]:
        calls.append(epoch)
        if len(calls) == 5:
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
        if len(calls) == 5:
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
        ({"policies": ["error"]}, "hypergradient="),
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


@given(st.integers(1, 400), st.integers(3, 20), st.data())
def test_the_search_stays_in_its_budget_and_returns_the_best_it_saw(
    levels: int, evaluations: int, data: st.DataObject
):
    optimum = data.draw(st.integers(0, levels - 1))
    asked: list[int] = []

    def cost(level: int) -> tuple[float]:
        asked.append(level)
        return (abs(level - optimum) ** 1.5,)

    level, known = best_level(cost, levels, evaluations)
    assert len(asked) == len(set(asked)) <= evaluations
    assert all(0 <= asked_level < levels for asked_level in asked)
    assert known[level] == min(known.values())
    if evaluations >= 20 and levels <= 100:
        assert level == optimum


def test_a_ladder_of_one_level_is_searched_in_one_run():
    assert best_level(lambda level: (1.0,), 1, 5)[0] == 0


def test_spreads():
    assert Spread.of([None, None]) is None
    assert Spread.of([1.0, None]) == Spread(1.0, None, 1)
    assert Spread.of([1.0, math.inf]) == Spread(math.inf, None, 2)


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
    explained = "± the sample's standard deviation"
    assert explained not in printed(compare(make_task(epochs=2), ["full"], progress=False))
    assert explained in printed(compare(make_task(epochs=2), ["full"], seeds=2, progress=False))
