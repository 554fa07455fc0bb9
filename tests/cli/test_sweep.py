"""`bilevel sweep`: what is typed, what is kept, and that no end of a process loses a run."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bilevel.cli.configuration import split
from bilevel.outer.sweeps.result import Sweep

ROOT = Path(__file__).parents[2]
TASK = '''
import os, time
import jax, jax.numpy as jnp, optax
import bilevel as bl

def task(rate: float, shape: tuple[int, int] = (1, 1), seed: int = 0, pause: float = 0.0,
         bad: str = "no") -> bl.Task:
    """A metric of 3 (1 - rate)**4."""
    if bad == "raise":
        raise ValueError("no such thing")

    def batches(epoch, key):
        time.sleep(pause)
        if bad == "die" and epoch == 2:
            os._exit(9)
        yield jnp.zeros(())

    return bl.Task(
        jnp.full(shape, 3.0 + seed), lambda theta, batch, fidelity: 0.5 * jnp.sum(theta**2),
        batches=batches, validate=lambda theta: jnp.max(jnp.abs(theta)), full=bl.Budget(1),
        optimizer=optax.sgd(rate), epochs=4, ladder=bl.Ladder.iterations(1, 1, 2), name="made",
    )
'''


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "made.py"
    path.write_text(TASK)
    return path


def test_values_with_commas_are_a_grid_and_words_of_lists_too(invoke, file, tmp_path):
    words = ["--policies", "full", "--seeds", "2,", "--workers", "1", "--quiet"]
    where = str(tmp_path / "s")
    code, out, err = invoke(
        "sweep", str(file), *words, "--set", "rate=0.5,2.5e-1", "--set", "shape=[1,2],[2,1]",
        "--directory", where,
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert "rate=0.25, shape=[2, 1], full" in out
    assert "made, whole runs" in out
    assert f"kept in {where}" in out
    rows = list(csv.DictReader((tmp_path / "s" / "sweep.csv").read_text().splitlines()))
    assert [(row["rate"], row["shape"]) for row in rows] == [
        ("0.5", "[1, 2]"),
        ("0.5", "[2, 1]"),
        ("0.25", "[1, 2]"),
        ("0.25", "[2, 1]"),
    ]
    assert float(rows[0]["final_metric"]) == pytest.approx(5 * 0.5**4)
    folder = next(path for path in (tmp_path / "s").iterdir() if path.name.startswith("rate=0.25"))
    kept = json.loads((folder / "configuration.json").read_text())
    assert kept["configuration"]["task"]["rate"] == "0.25"
    assert kept["command"] == "sweep"

    code, out, err = invoke(
        "sweep", str(file), *words, "grid.shape=[[1, 2], [2, 1]]", "grid.rate=[0.5, 0.25]",
        "--directory", where, "--json",
    )  # fmt: skip
    assert (code, err) == (0, "")  # the same sweep: nothing is left to do
    assert json.loads(out)["rows"][2]["settings"] == {"rate": 0.25, "shape": [1, 2]}

    code, out, err = invoke("plot", where)
    assert code == 0
    assert len(out.split()) == 4
    code, out, err = invoke("plot", where, "--output", "a.png")
    assert code == 2
    assert "a sweep has a picture a comparison; name one of them, such as" in err
    code, out, err = invoke("report", where, "--text")
    assert code == 0
    assert "made, rate=0.5, shape=[1, 2], full" in out


def test_a_configuration_has_the_values_under_grid(invoke, file, tmp_path):
    made = tmp_path / "made.toml"
    made.write_text(
        'policies = ["full"]\nseeds = [3]\nworkers = 1\nepochs = 2\n'
        "[grid]\nrate = [0.5, 0.25]\n[task]\npause = 0\n[checkpoints]\nseconds = 5\n"
    )
    words = ["--config", str(made), "--quiet", "--directory", str(tmp_path / "s")]
    # A value of the command line takes the place of the file's list.
    code, _, err = invoke("sweep", str(file), *words, "--set", "rate=0.5")
    assert (code, err) == (0, "")
    sweep = Sweep.read(tmp_path / "s")
    assert list(sweep.comparisons) == [""]
    assert (sweep.plan.seeds, sweep.plan.training["epochs"]) == ((3,), 2)
    code, _, err = invoke("sweep", str(file), *words)
    assert code == 2
    assert "holds another sweep: fixed.rate was" in err or "settings.rate was absent" in err
    made.write_text("[grid]\nrate = []\n")
    code, _, err = invoke("sweep", str(file), "--config", str(made))
    assert code == 2
    assert f"{made}: grid.rate" in err
    assert invoke("schema", "sweep")[0] == 0


def test_failures_are_in_the_table_and_in_the_exit_code(invoke, file, tmp_path):
    words = ["--workers", "1", "--policies", "full", "--set", "rate=0.5", "--set", "bad=raise,no"]
    code, out, err = invoke("sweep", str(file), *words, "--directory", str(tmp_path / "s"))
    assert code == 1
    assert "bad=raise, full (failed)" in out
    assert "Failed: bad=raise, full, seed 0: ValueError: no such thing" in out
    assert "1 of 2: bad=raise, full, seed 0: failed: ValueError: no such thing" in err
    assert "2 of 2: bad=no, full, seed 0: completed, metric 0.1875" in err
    told = (tmp_path / "s" / "bad=raise" / "full" / "seed-0" / "traceback.txt").read_text()
    assert "made.py" in told
    assert "Traceback" not in err
    code, out, err = invoke("sweep", str(file), *words, "--directory", str(tmp_path / "s"))
    assert code == 1
    assert "1 of 2 runs are there already" in err


USES = {
    "unknown": (["--set", "rat=1,2"], "did you mean rate?"),
    "no number": (["--set", "rate=0.1,x"], "--set rate=x: rate should be a valid number"),
    "not finite": (["--set", "rate=0.1,nan"], "rate should be finite"),
    "seed": (["--set", "rate=1", "--set", "seed=1,2"], "several are given by --seeds"),
    "missing": ([], "task needs rate: give --set rate=VALUE"),
    "both": (["task.rate=0.5", "grid.rate=[1.0]"], "rate is both in grid, to be varied, and in"),
    "policy": (["--set", "rate=1", "--policies", "full,best-fixed"], "is a search of runs one aft"),
    "workers": (["--set", "rate=1", "--workers", "0"], "'0' is no whole number of 1 or more"),
    "backend": (["--set", "rate=1", "--backend", "loki"], "joblib has no backend 'loki'"),
    "slurm": (["--set", "rate=1", "--slurm", "timeout_min=3"], "--slurm is for --backend slurm"),
    "parameter": (
        ["--set", "rate=1", "--backend", "slurm", "--slurm", "cluster=local", "--slurm", "a=3"],
        "submitit refuses",
    ),
    "grid": (["grid.rate=0.5"], "grid.rate should be a valid list, got 0.5"),
}


@pytest.mark.parametrize("name", USES)
def test_what_cannot_be_run_is_one_line(invoke, file, tmp_path, name):
    words, message = USES[name]
    code, _, err = invoke("sweep", str(file), "--directory", str(tmp_path / "s"), *words)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("written", "parts"),
    [
        ("1e-3,1e-2", ["1e-3", "1e-2"]),
        ("adam", ["adam"]),
        ("(1,2),(3,4)", ["(1,2)", "(3,4)"]),
        ("[1, 2]", ["[1, 2]"]),
        ("'a,b', c", ["'a,b'", "c"]),
        ("", [""]),
        ("1,", ["1", ""]),
        ("(", ["("]),
    ],
)
def test_commas_within_brackets_and_quotes_belong_to_a_value(written, parts):
    assert split(written) == parts


def command(file, directory, *words):
    return [
        *(sys.executable, "-m", "bilevel", "sweep", str(file), "--directory", str(directory)),
        *("--policies", "full", "--quiet", *words),
    ]


def start(*arguments):
    paths = [str(ROOT), str(ROOT / "adapters"), os.environ.get("PYTHONPATH", "")]
    return subprocess.Popen(
        command(*arguments),
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def ended(process, code):
    out, said = process.communicate(timeout=120)
    assert process.returncode == code, (out, said)
    return out, said


def wait_until(process, condition):
    deadline = time.monotonic() + 90
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def epochs_of(directory):
    return sorted(path.read_text().count("\n") for path in directory.rglob("history.jsonl"))


SLOWLY = ["--set", "rate=0.5,0.25", "--set", "pause=0.7", "--seeds", "2", "--workers", "2"]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGKILL", -9)])
def test_a_sweep_that_is_ended_in_whatever_way_goes_on(file, tmp_path, name, code):
    """Two of four runs are under way; the others were not begun."""
    where = tmp_path / "s"
    process = start(file, where, *SLOWLY, "--checkpoint-seconds", "0")
    wait_until(process, lambda: sum(epochs_of(where)) >= 4)
    if name == "SIGINT":  # as a terminal does, to all of its processes
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.send_signal(getattr(signal, name))
    _, said = ended(process, code)
    if code > 0:
        assert "interrupted; what was done so far is in" in said
        assert not list(where.rglob("attempt.json"))
    summaries = {
        path: path.stat().st_mtime_ns
        for path in where.rglob("summary.json")
        if json.loads(path.read_text())["status"] == "completed"
    }
    out, _ = ended(start(file, where, *SLOWLY), 0)
    assert "Unfinished" not in out
    assert all(path.stat().st_mtime_ns == then for path, then in summaries.items())
    sweep = Sweep.read(where)
    assert [round(row.final_metric.mean, 6) for _, row in sweep.rows] == [0.21875, 1.107422]
    # Every epoch once, in the runs that went on as in those that began anew.
    assert epochs_of(where) == [5, 5, 5, 5]
    resumed = [
        path for path in where.rglob("progress.log") if "resumed after epoch" in path.read_text()
    ]
    assert len(resumed) == 2


@pytest.mark.slow
def test_a_process_that_dies_takes_no_other_run_along(file, tmp_path):
    where = tmp_path / "s"
    words = ["--set", "rate=0.5", "--set", "bad=die,no", "--seeds", "2", "--workers", "2"]
    out, _ = ended(start(file, where, *words), 1)
    assert "Failed: bad=die, full, seed 0: DiedError: its process died" in out
    sweep = Sweep.read(where)
    assert list(sweep.failures) == ["bad=die, full, seed 0", "bad=die, full, seed 1"]
    assert not sweep.unfinished
    (row,) = (row for name, row in sweep.rows if name == "bad=no")
    assert (row.status, row.runs) == ("completed", 2)


@pytest.mark.slow
def test_jobs_of_submitit_have_the_precision_of_the_sweep(file, tmp_path):
    """Its executor of local processes, in the place of Slurm's."""
    pytest.importorskip("submitit")
    where = tmp_path / "s"
    words = ["--set", "rate=0.5", "--set", "bad=no,die", "--x64", "--workers", "2"]
    words += ["--backend", "slurm", "--slurm", "cluster=local", "--slurm", "timeout_min=5"]
    ended(start(file, where, *words), 1)
    sweep = Sweep.read(where)
    rows = dict(sweep.rows)
    assert rows["bad=no"].status == "completed"
    assert rows["bad=die"].status == "failed"
    (failure,) = sweep.failures.values()
    assert "Error" in failure.cause
    assert (where / "slurm").is_dir()
    import numpy as np

    theta = np.load(where / "bad=no" / "full" / "seed-0" / "theta.npz")
    assert {array.dtype.name for array in theta.values()} == {"float64"}


@pytest.mark.slow
def test_a_cluster_of_dask_is_a_backend(file, tmp_path):
    distributed = pytest.importorskip("distributed")
    where = tmp_path / "s"
    with distributed.LocalCluster(
        n_workers=1, threads_per_worker=1, dashboard_address=None
    ) as cluster:
        words = ["--set", "rate=0.5,0.25", "--backend", "dask"]
        ended(start(file, where, *words, "--address", cluster.scheduler_address), 0)
    assert [row.status for _, row in Sweep.read(where).rows] == ["completed"] * 2
