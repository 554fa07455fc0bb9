"""Sweeps: every combination once, the same numbers as a comparison's, and nothing made twice."""

import contextlib
import csv
import functools
import io
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel as bl
from bilevel.outer.compare import compare
from bilevel.outer.report.source import read_sections
from bilevel.outer.run import Run
from bilevel.outer.sweeps import cluster
from bilevel.outer.sweeps.plan import PLAN_FILE, Plan
from bilevel.outer.sweeps.point import Point, points
from bilevel.outer.sweeps.stopping import Process, Stop
from bilevel.outer.sweeps.sweep import OtherSweepError, sweep
from bilevel.outer.sweeps.work import Work

QUIET = {"progress": False, "workers": 1}


def made(rate=0.25, start=3.0, seed=0, epochs=4, watch=None):
    """A task of one compilation, whose metric is known: |θ|, and θ ← (1 − rate) θ."""

    def batches(epoch, key):
        if watch is not None:
            watch(rate, seed, epoch)
        yield jnp.float32(0)

    return bl.Task(
        start + seed,
        lambda theta, batch, fidelity: 0.5 * theta**2,
        batches=batches,
        validate=jnp.abs,
        full=bl.Budget(1),
        ladder=bl.Ladder.iterations(1, 1, 3),
        optimizer=optax.sgd(rate),
        epochs=epochs,
        name="made",
    )


def final(rate, seed, start=3.0, epochs=4):
    return (start + seed) * (1 - rate) ** epochs


GRID = {"rate": [0.25, 0.5], "start": [5.0]}


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    directory = tmp_path_factory.mktemp("sweep") / "s"
    return sweep(made, ["full", "fixed=2"], [0, 4], GRID, directory=directory, **QUIET)


def test_every_combination_is_run_once_in_a_directory_of_its_settings(swept):
    assert list(swept.comparisons) == [
        "rate=0.25, start=5.0",
        "rate=0.5, start=5.0",
    ]
    found = {
        path.parent.relative_to(swept.directory) for path in swept.directory.rglob("theta.npz")
    }
    assert len(found) == 8
    assert Path("rate=0.5,start=5.0/fixed-2/seed-4") in found
    assert not swept.failures
    assert not swept.unfinished
    assert not swept.interrupted


def test_rows_are_means_over_the_seeds_of_what_each_run_came_to(swept):
    for name, row in swept.rows:
        rate, start = (float(part.partition("=")[2]) for part in name.split(", "))
        metrics = [final(rate, seed, start) for seed in (0, 4)]
        assert row.runs == 2
        assert row.final_metric.mean == pytest.approx(np.mean(metrics), rel=1e-6)
        assert row.final_metric.deviation == pytest.approx(np.std(metrics, ddof=1), rel=1e-6)
        assert row.relative_metric.mean == pytest.approx(1)  # to full of the same settings


def test_the_tables_hold_what_a_comparison_of_the_same_says(swept, tmp_path):
    alone = compare(
        functools.partial(_of_seed, 0.5, 5.0), ["full", "fixed=2"], [0, 4], progress=False
    )
    (mine,) = (c for name, c in swept.comparisons.items() if name == "rate=0.5, start=5.0")
    for row, other in zip(mine.rows, alone.rows, strict=True):
        assert row.final_metric == other.final_metric
        assert row.epochs_to_target == other.epochs_to_target
        assert row.budgets == other.budgets
    assert mine.mean_target == alone.mean_target


def _of_seed(rate, start, seed):
    return made(rate, start, seed)


def test_the_merged_tables_are_files(swept):
    rows = list(csv.DictReader(io.StringIO((swept.directory / "sweep.csv").read_text())))
    assert [(row["rate"], row["start"], row["policy"]) for row in rows[:3]] == [
        ("0.25", "5.0", "full"),
        ("0.25", "5.0", "fixed=2"),
        ("0.5", "5.0", "full"),
    ]
    assert float(rows[0]["final_metric"]) == swept.rows[0][1].final_metric.mean
    assert float(rows[0]["final_metric_confidence"]) == swept.rows[0][1].final_metric.confidence
    runs = list(csv.DictReader(io.StringIO((swept.directory / "runs.csv").read_text())))
    assert len(runs) == 8
    assert {(row["seed"], row["status"]) for row in runs} == {
        ("0", "completed"),
        ("4", "completed"),
    }
    (one,) = (row for row in runs if row["directory"] == "rate=0.5,start=5.0/full/seed-4")
    assert float(one["final_metric"]) == pytest.approx(final(0.5, 4, 5.0), rel=1e-6)
    markdown = (swept.directory / "sweep.md").read_text()
    assert "| rate=0.25, start=5.0, fixed=2 |" in markdown
    assert "Means over 2 seeds" in markdown


def test_data_frames_and_json_say_the_same(swept):
    pandas = pytest.importorskip("pandas")
    frame = swept.to_dataframe()
    assert isinstance(frame, pandas.DataFrame)
    assert frame.shape[0] == 4
    assert list(frame["rate"]) == [0.25] * 2 + [0.5] * 2
    assert frame["final_metric"].tolist() == [row.final_metric.mean for _, row in swept.rows]
    runs = swept.to_dataframe(runs=True)
    assert str(runs["seed"].dtype) == "Int64"
    assert runs.shape[0] == 8
    stored = json.loads(swept.to_json())
    assert stored["rows"][1]["settings"] == {"rate": 0.25, "start": 5.0}
    assert stored["rows"][1]["final_metric"]["mean"] == swept.rows[1][1].final_metric.mean


def test_a_sweep_is_read_back_and_each_point_is_a_comparison(swept):
    again = bl.Sweep.read(swept.directory)
    assert again.to_csv() == swept.to_csv()
    point = bl.Comparison.read(swept.directory / "rate=0.25,start=5.0")
    assert point.rows == again.comparisons["rate=0.25, start=5.0"].rows
    (run, _) = point.runs["full"]
    assert float(next(iter(run.theta.values()))) == pytest.approx(final(0.25, 0, 5.0), rel=1e-6)


def test_reports_have_a_section_for_each_choice_of_settings(swept):
    sections = read_sections([swept.directory])
    assert [section.title for section in sections][:2] == [
        "made, rate=0.25, start=5.0",
        "made, rate=0.5, start=5.0",
    ]
    assert sections[0].policies == ["full", "fixed=2"]


def test_what_is_there_is_not_made_again(swept):
    before = {path: path.stat().st_mtime_ns for path in swept.directory.rglob("summary.json")}
    again = sweep(made, ["full", "fixed=2"], [0, 4], GRID, directory=swept.directory, **QUIET)
    after = {path: path.stat().st_mtime_ns for path in swept.directory.rglob("summary.json")}
    assert before == after
    assert again.to_csv() == swept.to_csv()


@pytest.mark.parametrize(
    ("changed", "difference"),
    [
        ({"settings": {**GRID, "rate": [0.25]}}, r"settings.rate was \[0.25, 0.5\], is \[0.25\]"),
        ({"settings": {"rate": [0.25, 0.5]}}, r"settings.start was \[5.0\], is absent"),
        ({"seeds": [0]}, r"seeds was \[0, 4\], is \[0\]"),
        ({"policies": ["full"]}, r"policies was .*, is \[\"full\"\]"),
        ({"epochs": 5}, "training.epochs was null, is 5"),
        ({"margin": 0.1}, "margin was 0.02, is 0.1"),
    ],
)
def test_another_plan_in_the_same_directory_is_refused(swept, changed, difference):
    given = {"policies": ["full", "fixed=2"], "seeds": [0, 4], "settings": GRID} | changed
    with pytest.raises(OtherSweepError, match=f"holds another sweep: {difference}"):
        sweep(made, directory=swept.directory, **QUIET, **given)


def test_another_precision_is_another_plan(swept):
    with (
        jax.enable_x64(False),
        pytest.raises(OtherSweepError, match=r'precision was "float64", is "float32"'),
    ):
        sweep(made, ["full", "fixed=2"], [0, 4], GRID, directory=swept.directory, **QUIET)


def test_a_job_that_loses_its_machine_is_queued_again_as_it_was(tmp_path):
    with contextlib.suppress(ImportError):
        cluster._submitit()  # whose import would configure logging anew
    pytest.importorskip("submitit", exc_type=ImportError)
    stop = Stop(tmp_path)
    work = Work(
        0, made, Point(), "full", 0, tmp_path / "r", stop, Process.this(), wide=True, training={}
    )
    assert work.checkpoint().function == work


def test_a_failed_run_is_recorded_and_tried_again_later(tmp_path):
    calls = []

    def task(rate, seed):
        calls.append((rate, seed))
        if rate == 0.5 and seed == 1 and not (tmp_path / "mended").exists():
            msg = "not today"
            raise ValueError(msg)
        return made(rate, seed=seed)

    given = {"settings": {"rate": [0.5, 0.25]}, "directory": tmp_path / "s", **QUIET}
    found = sweep(task, ["full"], 2, **given)
    assert list(found.failures) == ["rate=0.5, full, seed 1"]
    failure = found.failures["rate=0.5, full, seed 1"]
    assert failure.cause == "ValueError: not today"
    assert failure.directory == tmp_path / "s" / "rate=0.5" / "full" / "seed-1"
    assert "in task\n" in failure.traceback.read_text()
    rows = dict(found.rows)
    assert rows["rate=0.5"].status == "1 of 2 failed"
    assert rows["rate=0.5"].final_metric.mean == pytest.approx(final(0.5, 0), rel=1e-6)
    assert rows["rate=0.25"].status == "completed"
    assert any("Failed: rate=0.5, full, seed 1: ValueError" in note for note in found.notes)
    # A whole comparison for all that: the failed run has its place in it.
    assert len(bl.Comparison.read(tmp_path / "s" / "rate=0.5").runs["full"]) == 2

    (tmp_path / "mended").touch()
    calls.clear()
    again = sweep(task, ["full"], 2, **given)
    assert calls == [(0.5, 0), (0.5, 1)]  # once for what the task recommends, once to run
    assert not again.failures
    assert failure.traceback is None
    assert dict(again.rows)["rate=0.5"].runs == 2


def test_a_failure_within_training_is_recorded_too(tmp_path):
    def watch(rate, seed, epoch):
        if seed == 1 and epoch == 3:
            msg = "the batch is gone"
            raise OSError(msg)

    found = sweep(
        functools.partial(made, watch=watch), ["full"], 2, directory=tmp_path / "s", **QUIET
    )
    (failure,) = found.failures.values()
    assert failure.cause == "OSError: the batch is gone"
    assert "in watch\n" in failure.traceback.read_text()
    (comparison,) = found.comparisons.values()
    assert [len(run.history) for run in comparison.runs["full"]] == [5, 3]
    assert comparison.rows[0].status == "1 of 2 failed"


def test_a_run_that_is_given_up_is_a_result(tmp_path):
    found = sweep(
        made,
        ["full"],
        settings={"rate": [1e300, 0.5]},
        directory=tmp_path,
        max_nonfinite=1,
        **QUIET,
    )
    assert not found.failures
    statuses = [row.status for _, row in found.rows]
    assert statuses == ["nonfinite", "completed"]


def test_an_interrupted_sweep_goes_on_from_checkpoints_to_the_same_numbers(tmp_path):
    seen = []

    def watch(rate, seed, epoch):
        seen.append((rate, seed, epoch))
        if (rate, seed, epoch) == (0.25, 1, 3) and not (tmp_path / "go").exists():
            raise KeyboardInterrupt

    task = functools.partial(made, watch=watch)
    given = {"settings": {"rate": [0.5, 0.25]}, "directory": tmp_path / "s", **QUIET}
    found = sweep(task, ["full"], 2, **given)
    assert found.interrupted
    assert found.unfinished == ["rate=0.25, full, seed 1"]
    assert any("Unfinished: 1 of 4 runs" in note for note in found.notes)
    assert not (tmp_path / "s" / "rate=0.25" / "comparison.json").exists()
    assert (tmp_path / "s" / "rate=0.5" / "comparison.json").exists()
    (tmp_path / "go").touch()
    seen.clear()
    again = sweep(task, ["full"], 2, **given)
    assert set(seen) == {(0.25, 1, 3), (0.25, 1, 4)}
    assert not again.interrupted
    undisturbed = sweep(made, ["full"], 2, {"rate": [0.5, 0.25]}, directory=tmp_path / "t", **QUIET)
    for name, comparison in again.comparisons.items():
        for run, other in zip(
            comparison.runs["full"], undisturbed.comparisons[name].runs["full"], strict=True
        ):
            mine, theirs = (Run.read(each.directory) for each in (run, other))
            np.testing.assert_array_equal(*(next(iter(r.theta.values())) for r in (mine, theirs)))
            assert list(mine.history.column("metric")) == list(theirs.history.column("metric"))


def test_nothing_is_begun_after_an_interruption(tmp_path):
    begun = []

    def watch(rate, seed, epoch):
        begun.append(seed)
        raise KeyboardInterrupt

    found = sweep(functools.partial(made, watch=watch), ["full"], 3, directory=tmp_path, **QUIET)
    # A run that was told to end by itself ends by itself; a signal to the sweep ends all.
    assert begun == [0, 1, 2]
    assert found.interrupted


def test_overwriting_removes_the_runs_of_the_sweep_before(tmp_path):
    sweep(made, ["full"], settings={"rate": [0.5, 0.25]}, directory=tmp_path, **QUIET)
    (tmp_path / "mine.txt").write_text("kept")
    found = sweep(
        made, ["full"], settings={"rate": [0.5]}, directory=tmp_path, overwrite=True, **QUIET
    )
    assert list(found.comparisons) == ["rate=0.5"]
    assert not (tmp_path / "rate=0.25" / "full" / "seed-0").exists()
    assert (tmp_path / "mine.txt").exists()


def test_without_settings_the_directory_is_the_comparison(tmp_path):
    found = sweep(made(), ["full", "fixed=1"], directory=tmp_path, **QUIET)
    assert list(found.comparisons) == [""]
    assert (tmp_path / "fixed-1" / "seed-0" / "summary.json").is_file()
    assert bl.Comparison.read(tmp_path).rows == found.comparisons[""].rows
    assert bl.Sweep.read(tmp_path).to_csv() == found.to_csv()


MISUSES = {
    "no task": ({"task": 3}, TypeError, "task should be a Task or a function"),
    "a Task with settings": (
        {"task": made(), "settings": {"rate": [1]}},
        ValueError,
        r"a Task has nothing to set: make it a function, task\(rate=...\)",
    ),
    "one value": ({"settings": {"rate": 0.5}}, ValueError, r"settings\['rate'\] should be a list"),
    "a word": ({"settings": {"rate": "adam"}}, ValueError, "should be a list of the values"),
    "twice": ({"settings": {"rate": [1.0, 1.0]}}, ValueError, "should differ from each other"),
    "seed": ({"settings": {"seed": [1]}}, ValueError, "seeds are for seeds="),
    "policy": ({"policies": ["prpd"]}, ValueError, "did you mean prdp"),
    "policies": ({"policies": "full"}, TypeError, r"Write \['full'\]"),
    "search": ({"policies": ["best-fixed"]}, ValueError, "a search of runs one after another"),
    "workers": ({"workers": 0}, ValueError, "workers should be 1 or more"),
    "backend": ({"backend": "loki"}, ValueError, "joblib has no backend 'loki'"),
    "slurm": ({"slurm": {"cluster": "local"}}, ValueError, r'slurm= is for backend="slurm"'),
    "address": ({"address": "tcp://a"}, ValueError, 'give backend="dask" or "ray"'),
    "no seed": ({"task": lambda rate=1.0: made(rate), "seeds": 2}, ValueError, "no argument named"),
    "no return": ({"task": lambda: 3}, TypeError, "should return a Task, got 3"),
    "its own": ({"task": lambda: 1 / 0}, ZeroDivisionError, "division"),
}


@pytest.mark.parametrize("name", MISUSES)
def test_misuses_are_told_before_anything_is_written(name, tmp_path):
    changed, error, message = MISUSES[name]
    given = {"task": made, "policies": ["full"], **QUIET, "workers": None, **changed}
    with pytest.raises(error, match=message):
        sweep(directory=tmp_path / "s", **given)
    assert not list(tmp_path.rglob("summary.json"))


def test_a_directory_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("long")
    with pytest.raises(FileExistsError, match="holds something that is no sweep"):
        sweep(made, ["full"], directory=tmp_path, **QUIET)


@pytest.mark.parametrize("content", ["", "[]", '{"task": 1}', "nul"])
def test_a_damaged_plan_is_said_to_be_one(tmp_path, content):
    (tmp_path / PLAN_FILE).write_text(content)
    with pytest.raises(ValueError, match="is no plan of a sweep that bilevel wrote"):
        Plan.read(tmp_path)
    with pytest.raises(FileNotFoundError, match="holds no sweep"):
        bl.Sweep.read(tmp_path / "nowhere")


def test_folders_tell_settings_apart_and_fit_into_paths():
    values = ["a b", "a-b", "a/b", "../x", "x" * 300, "", "1,b=2", "ä", (1, 2), [1, 2, 3], None]
    folders = [point.folder for point in points({"name": values})]
    assert len(set(folders)) == len(folders)
    for folder in folders:
        assert "/" not in folder
        assert len(folder) < 120
        assert folder == Path(folder).name
    assert Point((("a", "1,b=2"),)).folder != Point((("a", 1), ("b", 2))).folder
