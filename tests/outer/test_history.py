"""Histories: sums, columns, files, tables."""

import dataclasses
import json
import math
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from bilevel.outer.history import FIELDS, WORDS, History, HistoryWriter, Record, line_of

RECORDS = st.builds(
    Record,
    epoch=st.integers(0, 10**9),
    metric=st.none() | st.floats(),
    loss=st.none() | st.floats(),
    budget_rtol=st.none() | st.floats(0, 1),
    primal_iterations=st.none() | st.integers(0, 10**15),
    elapsed=st.floats(0, 1e9),
)


def same(a: Record, b: Record) -> bool:
    return all(
        x == y
        or (isinstance(x, float) and isinstance(y, float) and math.isnan(x) and math.isnan(y))
        for x, y in zip(dataclasses.astuple(a), dataclasses.astuple(b), strict=True)
    )


@given(st.lists(RECORDS, max_size=4))
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, records: list[Record]):
    path = tmp_path_factory.mktemp("history") / "history.jsonl"
    History(records).write(path)
    read = History.read(path)
    assert len(read) == len(records)
    assert all(same(a, b) for a, b in zip(read, records, strict=True))
    for line in path.read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


@pytest.mark.parametrize("count", [511, 512, 1300])
def test_records_in_columns_are_what_they_were(count: int):
    values = [0.0, -0.0, math.nan, math.inf, -math.inf, 5e-324, 0.1]
    records = [
        Record(
            epoch=k,
            metric=values[k % 7],
            loss=-0.0,  # the same in all
            gradient_norm=0.0 if k else -0.0,  # but for the sign of one
            error=0.5 if k % 256 == 255 or k > 1024 else None,  # now and then
            updates=2**53 + k,
            level=2**70 if k < 256 else k,  # too large for an array
            budget_rtol=1 if k % 2 else 1.0,  # of two types
            elapsed=k / 3,
        )
        for k in range(count)
    ]
    found = History(records)
    assert found.packed in (count // 256 * 256, count // 256 * 256 - 256)
    # repr tells types, signs and NaN apart.
    assert list(map(repr, found)) == list(map(repr, records))
    for k in (0, 255, 256, 300, count - 1, -1, -count):
        assert repr(found[k]) == repr(records[k])
    assert repr(list(found[250:270])) == repr(records[250:270])
    assert repr(found.values("level")) == repr([record.level for record in records])
    for first, last in ((0, count), (3, 500), (256, 511)):
        assert found.lines(first, last) == b"".join(map(line_of, records[first:last]))
    for wrong in (count, -count - 1):
        with pytest.raises(IndexError, match="no record"):
            found[wrong]


def test_a_column_at_a_time_is_written_as_a_record_at_a_time():
    records = [
        Record(epoch=k, metric=[0.1, math.nan, -math.inf][k % 3], static='5 % of "32"')
        for k in range(600)
    ]
    found = History(records)
    assert found._blocks[0].lines(FIELDS) == b"".join(map(line_of, records[:256]))


def test_records_take_a_fraction_of_their_memory():
    def record(k: int) -> Record:
        return Record(
            epoch=k, metric=k / 7, loss=k / 3, gradient_norm=k / 9, updates=1, level=4,
            budget_iterations=600, primal_iterations=600, adjoint_iterations=600, solves=1,
            primal_residual=k / 11, adjoint_residual=k / 13, seconds=k / 17, elapsed=k / 19,
        )  # fmt: skip

    tracemalloc.start()
    try:
        kept = History(map(record, range(5120)))
        used = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    # Nine numbers of 8 bytes each; as objects they are 800 bytes a record.
    assert used - 512 * 1000 < 100 * len(kept)


def test_records_are_on_disk_at_once(tmp_path: Path):
    writer = HistoryWriter(tmp_path / "history.jsonl")
    writer.write(Record(epoch=0, metric=1.0))
    assert len(History.read(tmp_path / "history.jsonl")) == 1
    writer.close()


def test_a_line_cut_off_by_a_crash_is_left_out(tmp_path: Path):
    path = tmp_path / "history.jsonl"
    History([Record(epoch=0), Record(epoch=1)]).write(path)
    path.write_text(path.read_text()[:-10])
    assert [record.epoch for record in History.read(path)] == [0]


@pytest.mark.parametrize("line", ["{", '{"epoch": "one"}', "[]", '{"epoch": 1, "level": 1.5}'])
def test_a_bad_line_is_named_by_its_number(tmp_path: Path, line: str):
    path = tmp_path / "history.jsonl"
    path.write_text(f'{{"epoch": 0}}\n{line}\n{{"epoch": 2}}\n')
    with pytest.raises(ValueError, match="line 2"):
        History.read(path)


def test_fields_of_a_later_version_are_ignored(tmp_path: Path):
    path = tmp_path / "history.jsonl"
    path.write_text('{"epoch": 3, "colour": "blue"}\n')
    assert History.read(path)[0] == Record(epoch=3)


def history() -> History:
    return History(
        [
            Record(epoch=0, metric=8.0),
            Record(epoch=1, metric=4.0, primal_iterations=10, adjoint_iterations=5, updates=2),
            Record(epoch=2, metric=5.0, primal_iterations=20, adjoint_iterations=5, updates=2),
            Record(epoch=3, metric=1.0, primal_iterations=30, adjoint_iterations=5, updates=2),
        ]
    )


def test_sums_and_columns():
    h = history()
    assert h.total("primal_iterations") == 60
    assert h.total("loss") is None
    assert h.work == 75
    assert h.cumulative("work").tolist() == [0, 15, 40, 75]
    np.testing.assert_array_equal(h.column("primal_iterations"), [np.nan, 10, 20, 30])
    assert set(h.columns()) == set(FIELDS) - WORDS
    first = h.first_at(4.5)
    assert first is not None
    assert first.epoch == 1
    assert h.first_at(0.5) is None
    assert h.until(first).work == 15
    with pytest.raises(KeyError, match="did you mean metric"):
        h.column("metrik")
    with pytest.raises(KeyError, match="'static' is no number"):
        h.column("static")


def printed(table: Any) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_a_table_shows_first_and_last_and_no_empty_column():
    rows = [Record(epoch=k, metric=1.0 / (k + 1), updates=1) for k in range(100)]
    text = printed(History(rows).table(rows=5, metric_name="error [m]"))
    shown = [line.split()[0] for line in text.splitlines() if line.strip()[:1].isdigit()]
    assert shown == ["0", "25", "50", "74", "99"]
    assert "error [m]" in text
    assert "gradient" not in text


@pytest.mark.parametrize("library", ["pandas", "polars"])
def test_a_data_frame_of_whichever_library_is_there(library: str, monkeypatch: pytest.MonkeyPatch):
    frames = pytest.importorskip(library)
    if library == "polars":
        monkeypatch.setitem(sys.modules, "pandas", None)
    history = History(
        [Record(epoch=0, metric=1.0), Record(epoch=1, metric=0.5, level=3, static="cells 8")]
    )
    frame = history.to_dataframe()
    assert isinstance(frame, frames.DataFrame)
    assert list(frame.columns) == list(FIELDS)
    assert frame["metric"].to_list() == [1.0, 0.5]
    # Whole numbers stay whole beside what is missing.
    assert frame["level"].to_list()[1] == 3
    assert frame["static"].to_list()[1] == "cells 8"
    assert "int64" in str(frame["level"].dtype).lower()
    assert frame["level"].to_list()[0] is None or frame["level"].isna()[0]


def test_without_a_library_of_data_frames_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
):
    for name in ("pandas", "polars"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match="needs pandas or polars: pip install pandas"):
        History([Record(epoch=0)]).to_dataframe()
