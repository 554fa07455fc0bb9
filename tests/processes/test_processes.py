"""One run in several real processes: the same everywhere, told to leave together, gone on with."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import bilevel as bl
from bilevel.outer.history import History
from bilevel.outer.processes.watch import LOST
from tests.faults import trainee
from tests.processes import worker
from tests.processes.running import ROOT, Group, environment, free_address, run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def told() -> list[dict[str, Any]]:
    """What each of four processes tells of its runs."""
    address = free_address()
    words = [sys.executable, worker.__file__]
    started = [
        subprocess.Popen(
            [*words, str(number), "4", address],
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(4)
    ]
    said = [process.communicate(timeout=400) for process in started]
    assert [process.returncode for process in started] == [0] * 4, said
    return [json.loads(out.splitlines()[-1]) for out, _ in said]


def test_all_processes_take_the_same_decisions(told: list[dict[str, Any]]):
    assert len(set(told[0]["prdp"]["levels"])) > 2  # there was something to decide
    for other in told[1:]:
        for name in told[0]:
            if isinstance(told[0][name], dict):
                other[name]["timed"] = told[0][name]["timed"]
            assert other[name] == told[0][name], name
    assert told[0]["own stop"]["status"] == "stopped"
    assert len(told[0]["own stop"]["levels"]) == 3
    # Found at the same update by all, however soon each device was ready.
    assert told[0]["nonfinite"][1] == 0


@pytest.mark.parametrize("name", ["prdp", "auto", "error"])
def test_they_find_what_one_process_finds(told: list[dict[str, Any]], name: str):
    task = worker.load().task()
    controller = {
        "prdp": lambda: bl.ProgressiveRefinement(task.ladder, **task.refinement),
        "auto": lambda: bl.AutomaticRefinement(task.ladder),
        "error": lambda: bl.ErrorControlled(task.ladder),
    }[name]()
    alone = bl.optimize(task, controller=controller, progress=False)
    assert told[0][name]["levels"] == [record.level for record in alone.history]
    assert told[0][name]["devices"] == 4
    assert told[0][name]["compilations"] == 1
    theta = [np.asarray(leaf) for leaf in jax.tree.leaves(alone.theta)]
    for mine, theirs in zip(theta, told[0][name]["theta"], strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-11, atol=1e-12)


# Long enough for a busy machine: what is seen of a run is seen a second late.
WORDS = ("--quiet", "--epochs", "12", "--set", "pause=0.15")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    with Group(folder, 4, *WORDS) as group:
        assert {code for code, _ in group.codes().values()} == {0}, group.said(0)
        assert not group.said(3)  # process 0 speaks for all
    assert trainee.moments(folder / "run")[-1] == "00000012-00000000"
    return folder / "run"


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_one_that_is_told_to_leave_takes_all_along(
    tmp_path: Path, undisturbed: Path, name: str, code: int
):
    with Group(tmp_path, 4, *WORDS, "--checkpoint-seconds", "1000") as group:
        group.wait_for_epochs(2)
        group.send(2, signal.Signals[name])
        ended = group.codes()
        assert {each for each, _ in ended.values()} == {code}, [*map(group.said, range(4))]
        assert "interrupted" in group.said(0)
        assert not group.said(1)
    place = trainee.moments(group.directory)[-1]
    assert "00000002-00000000" <= place < "00000012-00000000"
    assert not (group.directory / "owner.json").exists()
    with Group(tmp_path, 4, *WORDS, "--resume", "--strict") as group:
        assert {each for each, _ in group.codes().values()} == {0}, group.said(0)
    assert trainee.last_state(group.directory) == trainee.last_state(undisturbed)
    assert len(History.read(group.directory / "history.jsonl")) == 13


def test_another_number_of_processes_is_refused_by_name(undisturbed: Path):
    done = run("--processes", "2", "--resume", "--directory", str(undisturbed))
    assert done.returncode == 2
    assert "devices was 4, is 2; processes was 4, is 2" in done.stderr
    assert done.stderr.count("bilevel: ") == 1
    done = run("--devices", "4", "--resume", "--directory", str(undisturbed))
    assert done.returncode == 2
    assert "processes was 4, is absent" in done.stderr


def test_who_fails_by_itself_is_named_by_the_others(tmp_path: Path):
    words = (*WORDS, "--set", "fails_in=1", "--set", "rows=15", "--silence", "4")
    with Group(tmp_path, 3, *words) as group:
        ended = group.codes()
        assert [ended[number][0] for number in (0, 2)] == [LOST, LOST], group.said(0)
        assert ended[1][0] == 1
        assert "OSError: this one has no data" in group.said(1)
        assert "process 1 has failed: OSError: this one has no data" in group.said(0)


def test_a_long_step_that_holds_the_interpreter_is_no_loss(tmp_path: Path):
    words = (*WORDS, "--epochs", "2", "--set", "frozen_in=2", "--silence", "3")
    with Group(tmp_path, 3, *words, "--set", "rows=15") as group:
        ended = group.codes()
        assert {code for code, _ in ended.values()} == {0}, [*map(group.said, range(3))]
        assert min(seconds for _, seconds in ended.values()) > 8.0


def test_a_command_starts_all_of_them(tmp_path: Path):
    done = run("--processes", "2", "--devices", "2", "--json", "--directory", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)  # and nothing of gloo's
    assert summary["device"].startswith("4 × ")
    assert "2 devices are simulated" in done.stderr
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == summary
    again = run("--processes", "2", "--devices", "2", "--directory", str(tmp_path / "run"))
    assert again.returncode == 2
    assert again.stderr.count("holds a run already") == 1


def test_a_batch_that_the_processes_do_not_divide_is_refused(tmp_path: Path):
    done = run("--processes", "3", "--directory", str(tmp_path / "run"))
    assert done.returncode == 2
    assert "a batch of 16 cannot be split evenly over 3 devices" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "history.jsonl").exists()


def test_more_devices_than_there_are_is_refused(tmp_path: Path):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    done = run("--devices", "4", "--directory", str(tmp_path / "run"), XLA_FLAGS=flags)
    assert done.returncode == 2
    assert "--devices 4: there are 2 here (cpu); ask for as many as there are." in done.stderr


def test_the_script_of_the_page_trains_in_two_processes(tmp_path: Path):
    page = (ROOT / "docs" / "processes.md").read_text(encoding="utf-8")
    script = tmp_path / "train.py"
    script.write_text(page.partition("<!-- file: train.py -->\n```python\n")[2].partition("```")[0])
    address = free_address()
    started = [
        subprocess.Popen(
            [sys.executable, str(script), address, str(number), "2"],
            env=environment(),
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    said = [process.communicate(timeout=120)[0] for process in started]
    for number in range(2):
        assert f"process {number}: 1.500\n" in said[number]


@pytest.mark.parametrize("backend", ["safetensors", "orbax"])
def test_parameters_in_parts_are_kept_and_gone_on_with(tmp_path: Path, backend: str):
    if backend == "orbax":
        pytest.importorskip("orbax.checkpoint", reason="needs bilevel[orbax]")
    words = (*WORDS[:-2], "--set", "cut=true", f"checkpoints.backend={backend}")
    (tmp_path / "whole").mkdir()
    with Group(tmp_path / "whole", 2, *words) as group:
        assert {code for code, _ in group.codes().values()} == {0}, group.said(0)
    whole = np.load(group.directory / "theta.npz")
    assert whole["w"].shape == (8,)
    # Saved in the middle, by all at the same update.
    more = ("--checkpoint-seconds", "0.5", "--set", "pause=0.05", "--keep", "9")
    with Group(tmp_path, 2, *words, *more) as group:
        group.wait_for_epochs(3)
        group.send(1, signal.SIGTERM)
        assert {code for code, _ in group.codes().values()} == {143}, group.said(0)
    moments = trainee.moments(group.directory)
    assert len(moments) > 1
    with Group(tmp_path, 2, *words, *more, "--resume", "--strict") as group:
        assert {code for code, _ in group.codes().values()} == {0}, group.said(0)
    found = np.load(group.directory / "theta.npz")
    for name in ("w", "b"):
        np.testing.assert_array_equal(found[name], whole[name])
