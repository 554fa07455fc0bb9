"""The command line as a process of its own: how fast it answers, how it is interrupted."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bilevel.outer.history import History
from bilevel.outer.run import Run

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "bilevel"]

SLOW = """
import time
import jax.numpy as jnp, optax
from bilevel.budget import Budget
from bilevel.outer.task import Task

def validate(theta):
    time.sleep(0.02)
    return float(theta)

task = Task(jnp.float32(1.0), lambda theta, batch, fidelity: theta**2, validate=validate,
            jit_validate=False, optimizer=optax.sgd(1e-4), epochs=100_000, full=Budget(3))
"""


@pytest.mark.parametrize(
    "words", [["--help"], ["run", "--help"], ["compare", "--help"], ["rnu"], ["run", "--polcy"]]
)
def test_help_and_misuse_load_nothing_heavy(words: list[str]):
    code = (
        "import sys\n"
        "from bilevel.cli import main\n"
        f"main({words!r})\n"
        "print('LOADED', *sorted({name.split('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    loaded = done.stdout.split("LOADED")[1].split()
    assert "argparse" in loaded
    assert not {"jax", "numpy", "equinox", "optax", "pydantic", "rich", "scipy"} & set(loaded)


def test_help_answers_at_once():
    def answer() -> float:
        start = time.perf_counter()
        done = subprocess.run([*COMMAND, "--help"], capture_output=True, check=True, cwd=ROOT)
        assert b"compare" in done.stdout
        return time.perf_counter() - start

    # The best of three: the machine may be busy, the command is not.
    assert min(answer() for _ in range(3)) < 0.3


@pytest.mark.slow
def test_ctrl_c_keeps_what_was_done_says_so_and_exits_130(tmp_path: Path):
    (tmp_path / "slow.py").write_text(SLOW)
    directory = tmp_path / "kept"
    process = subprocess.Popen(
        [*COMMAND, "run", str(tmp_path / "slow.py"), "--directory", str(directory)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    history = directory / "history.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and (not history.exists() or history.stat().st_size < 2000):
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in err
    assert "kept" in err
    assert "Traceback" not in err
    assert "interrupted" in out
    run = Run.read(directory)
    assert run.status == "interrupted"
    assert len(run.history) == len(History.read(history)) > 1
    assert json.loads((directory / "summary.json").read_text())["epochs"] == len(run.history) - 1


@pytest.mark.slow
@pytest.mark.parametrize(("option", "dtype"), [("--x64", "float64"), ("--float32", "float32")])
def test_precision_is_set_before_the_file_runs(tmp_path: Path, option: str, dtype: str):
    text = SLOW.replace("jnp.float32(1.0)", "1.0").replace("100_000", "2")
    (tmp_path / "task.py").write_text(text)
    words = [
        "run",
        str(tmp_path / "task.py"),
        option,
        "--quiet",
        "--directory",
        str(tmp_path / "r"),
    ]
    subprocess.run([*COMMAND, *words], capture_output=True, check=True, cwd=ROOT)
    assert Run.read(tmp_path / "r").theta["value"].dtype == dtype
