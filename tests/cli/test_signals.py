"""Signals: a run that is told to leave saves itself, and says who told it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TASK = """
import time
import jax.numpy as jnp, numpy as np, optax
import bilevel as bl

def task():
    def loss(theta, batch, fidelity):
        solution = bl.solve(bl.FixedPoint(lambda x, t: 0.5 * x + t), theta, 0.0, fidelity=fidelity)
        return (solution.value - batch) ** 2

    def batches(epoch, key):
        for number in range(4):
            time.sleep(PAUSE)
            yield jnp.float32(epoch + number)

    return bl.Task(1.0, loss, batches=batches, optimizer=optax.sgd(0.1), epochs=40,
                   full=bl.Budget(iterations=3), metric_name="loss")
"""


def start(folder: Path, *words: str, pause: float) -> "subprocess.Popen[str]":
    file = folder / "waiting.py"
    file.write_text(TASK.replace("PAUSE", str(pause)))
    paths = [str(ROOT), str(ROOT / "adapters"), os.environ.get("PYTHONPATH", "")]
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "bilevel",
            "run",
            str(file),
            "--directory",
            str(folder / "r"),
            *words,
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process: "subprocess.Popen[str]", code: int) -> str:
    _, said = process.communicate(timeout=60)
    assert process.returncode == code, said
    return said


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("SIGTERM", 143),
        pytest.param("SIGUSR1", 138, marks=pytest.mark.slow),
        pytest.param("SIGINT", 130, marks=pytest.mark.slow),
    ],
)
def test_a_told_run_saves_and_leaves(tmp_path: Path, name: str, code: int):
    process = start(tmp_path, "--quiet", "--checkpoint-seconds", "1000", pause=0.05)
    history = tmp_path / "r" / "history.jsonl"
    deadline = time.monotonic() + 60
    while not (history.exists() and history.read_text().count("\n") >= 3):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(getattr(signal, name))
    said = ended(process, code)
    by = "" if name == "SIGINT" else f"by {name} "
    assert f"interrupted {by}in epoch " in said or f"interrupted {by}after epoch " in said
    assert not (tmp_path / "r" / "owner.json").exists()
    if name == "SIGTERM":
        ended(start(tmp_path, "--quiet", "--resume", "--strict", pause=0.0), 0)
        assert history.read_text().count("\n") == 41
