"""`bilevel report`: pages, findings in words, and one line for whatever is broken."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from bilevel.outer.comparison import Comparison
from bilevel.outer.history import History, Record
from bilevel.outer.run import Run, summarize

Invoke = Callable[..., tuple[int, str, str]]


def run_of(policy: str) -> Run:
    history = History(
        Record(epoch=epoch, metric=1.0, updates=1, primal_iterations=4, elapsed=1.0 * epoch)
        for epoch in range(1, 4)
    )
    summary = summarize(
        history,
        {},
        task="two",
        policy=policy,
        controller="none",
        seed=0,
        status="completed",
        message="",
        metric_name="error [m]",
        seconds=3.0,
        compile_seconds=0.0,
        compilations=1,
        other_compilations=0,
        device="cpu",
    )
    return Run(np.zeros(1), history, summary)


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a run in `r` and a comparison in `c`."""
    monkeypatch.chdir(tmp_path)
    run_of("prdp").save(tmp_path / "r")
    configuration = {"command": "run", "configuration": {"task": {"start": "5.0"}, "seed": None}}
    (tmp_path / "r" / "configuration.json").write_text(json.dumps(configuration))
    runs: dict[str, list[Run]] = {}
    for policy in ("full", "prdp"):
        directory = tmp_path / "c" / policy / "seed-0"
        run_of(policy).save(directory)
        runs[policy] = [dataclasses.replace(run_of(policy), directory=directory)]
    Comparison("two", "error [m]", runs, None, 0.02, [], interrupted=False).save(tmp_path / "c")
    return tmp_path


def test_a_page_is_written_beside_the_first_run(invoke: Invoke, kept: Path):
    assert invoke("report", "r", "c") == (0, "r/report.html\n", "")
    assert invoke("report", "c/comparison.json", "r")[1] == "c/report.html\n"


def test_runs_and_comparisons_have_parts_of_one_page(invoke: Invoke, kept: Path):
    page = kept / "new" / "both.html"
    code, out, _ = invoke("report", "r/history.jsonl", "c", "--output", str(page))
    assert (code, out.strip()) == (0, str(page))
    text = page.read_text(encoding="utf-8")
    assert text.count("<section ") == 2
    assert "two, whole runs" in text  # the comparison's table
    assert "<dt>task.start</dt><dd>5.0</dd>" in text
    assert "<dt>seed</dt>" not in text


NAN = (
    "The metric was NaN or infinite in epoch 4. Validation solves may need a finer budget than "
    "training solves."
)


def test_findings_are_printed_and_no_page_is_written(invoke: Invoke, kept: Path):
    with (kept / "c" / "full" / "seed-0" / "history.jsonl").open("a") as history:
        history.write('{"epoch": 4, "metric": "NaN", "primal_iterations": 4}\n')
    code, out, _ = invoke("report", "r", "c", "--text")
    assert code == 0
    assert out.splitlines() == [
        "two, prdp",
        "  nothing stands out",
        "two, full",
        f"  problem: {NAN}",
        "two, prdp",
        "  nothing stands out",
    ]
    assert not list(kept.rglob("*.html"))


def refused(invoke: Invoke, *words: str) -> str:
    """The one line."""
    code, out, err = invoke("report", *words)
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    return line


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("summary.json", b""),
        ("summary.json", b"[]"),
        ("summary.json", b"{}"),
        ("summary.json", b"[" * 100_000),
        ("summary.json", b"\xff"),
        ("history.jsonl", b"\xff\n"),
        ("history.jsonl", b"{}\n{}\n"),
        ("history.jsonl", b'{"epoch": 1, "metric": "<b>"}\n{"epoch": 2}\n'),
    ],
)
def test_a_broken_run_is_refused_in_one_line(invoke: Invoke, kept: Path, name: str, content: bytes):
    (kept / "r" / name).write_bytes(content)
    assert "bilevel: r" in refused(invoke, "r")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("task", 3),
        ("metric_name", None),
        ("target", "<b>"),
        ("margin", None),
        ("origin", []),
        ("directories", []),
        ("directories", {"full": ["../r/x"]}),
        ("search", [{}]),
    ],
)
def test_a_broken_comparison_is_refused_in_one_line(
    invoke: Invoke, kept: Path, key: str, value: object
):
    path = kept / "c" / "comparison.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    refused(invoke, "c")


def test_a_run_of_a_comparison_that_is_broken_is_refused(invoke: Invoke, kept: Path):
    path = kept / "c" / "full" / "seed-0" / "summary.json"
    path.write_text(path.read_text().replace('"seconds": 3.0', '"seconds": "long"'))
    assert "summary.json: seconds" in refused(invoke, "c")


def test_what_is_missing_is_named(invoke: Invoke, kept: Path):
    (kept / "r" / "history.jsonl").unlink()
    assert "there is no history.jsonl in it" in refused(invoke, "r")
    shutil.rmtree(kept / "c" / "full")
    assert "c/full/seed-0" in refused(invoke, "c")


def test_a_page_that_cannot_be_written_is_named(invoke: Invoke, kept: Path):
    (kept / "file").touch()
    assert "file" in refused(invoke, "r", "--output", "file/x.html")
