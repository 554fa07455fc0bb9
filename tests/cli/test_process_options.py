"""Options of several devices and processes: what does not fit together is refused in one line."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

Invoke = Callable[..., tuple[int, str, str]]

TASK = str(Path(__file__).parents[1] / "processes" / "task.py")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--process", "4/4"], "'4/4' is no process: write I/N with I from 0 to N - 1"),
        (["--process", "first"], "'first' is no process"),
        (["--process", "0/4"], "--process I/N needs --coordinator HOST:PORT"),
        (["--coordinator", "a:1"], "--coordinator needs --process I/N"),
        (["--process", "auto", "--coordinator", "a:1"], "--coordinator needs --process I/N"),
        (
            ["--process", "0/4", "--coordinator", "a:1", "--processes", "3"],
            "--process 0/4 is one of 4, and --processes says 3",
        ),
        (["--processes", "0"], "'0' is no whole number of 1 or more"),
        (["--silence", "60"], "'60' should be from 3 to 20 seconds"),
        (["silence=60"], "silence should be less than or equal to 20, got 60"),
        (["devices=two"], "devices should be a valid integer, got 'two'"),
    ],
)
def test_misuse_is_told_in_a_line(invoke: Invoke, words: list[str], said: str):
    code, out, err = invoke("run", TASK, "--discard", *words)
    assert code == 2
    assert not out
    assert said in err
    assert err.count("\n") == 1


def test_the_schema_has_their_keys(invoke: Invoke):
    _, out, _ = invoke("schema", "run")
    found = json.loads(out)["properties"]
    assert {"devices", "processes", "silence"} <= set(found)
    _, out, _ = invoke("schema", "compare")
    assert "devices" not in json.loads(out)["properties"]
