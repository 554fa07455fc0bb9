"""What happened, epoch by epoch: in memory, on disk, as a table."""

import dataclasses
import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Self, overload

import numpy as np
from pydantic_core import to_json
from rich.markup import escape
from rich.table import Table

from bilevel.outer import text
from bilevel.outer.columns import Block
from bilevel.outer.frame import data_frame
from bilevel.outer.suggestion import did_you_mean


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """One epoch. `None` stands for what was not measured or not reported.

    - `epoch`: 0 is the state before training, with a metric and nothing else.
    - `metric`: validation metric after the epoch.
    - `loss`: mean training loss over the updates that were made.
    - `gradient_norm`: mean Euclidean norm of the gradient over these updates.
    - `gradient_noise`: standard deviation of one batch's gradient about the mean of all, a
        Euclidean norm like the gradient's, from the distances of the gradients of consecutive
        batches; θ moves between them, so that large steps make it larger. `None` where an
        epoch has one batch.
    - `error`: mean estimated truncation error of the gradient (absolute, like its norm);
        `primal_error`, `adjoint_error`: its parts.
    - `updates`: optimizer updates made.
    - `nonfinite`: updates skipped because the loss, the gradient or the next parameters
        were not finite.
    - `level`: of the ladder.
    - `static`: what it changes besides budgets (a grid, a precision), in words.
    - `rejected`: measurements so far that the controller could not use.
    - `budget_iterations`, `budget_rtol`, `budget_atol`: primal budget of a solve.
    - `adjoint_budget_iterations`, `adjoint_budget_rtol`, `adjoint_budget_atol`: adjoint
        budget; `None` where the estimator's own default applies.
    - `solves`: solves that reported.
    - `primal_iterations`, `adjoint_iterations`: sums over all solves of the epoch,
        skipped updates included, for they cost the same.
    - `primal_applications`, `adjoint_applications`: applications of the operator and of
        its transpose, likewise.
    - `error_applications`: of either, for the error estimates; in no other sum.
    - `primal_residual`, `adjoint_residual`: mean relative residual norm of a solve.
    - `primal_capped`, `adjoint_capped`: solves that stopped on their budget.
    - `failures`: solves whose status is a failure.
    - `seconds`: wall time of the updates, without compilation.
    - `validation_seconds`: wall time of the validation, without compilation.
    - `compile_seconds`: wall time of the compilations in this epoch.
    - `elapsed`: wall time since the start, with everything.

    >>> record = Record(epoch=1, metric=0.5, primal_iterations=25)
    >>> record.metric, record.adjoint_iterations is None
    (0.5, True)
    """

    epoch: int
    metric: float | None = None
    loss: float | None = None
    gradient_norm: float | None = None
    gradient_noise: float | None = None
    error: float | None = None
    primal_error: float | None = None
    adjoint_error: float | None = None
    updates: int = 0
    nonfinite: int = 0
    level: int | None = None
    static: str | None = None
    rejected: int | None = None
    budget_iterations: int | None = None
    budget_rtol: float | None = None
    budget_atol: float | None = None
    adjoint_budget_iterations: int | None = None
    adjoint_budget_rtol: float | None = None
    adjoint_budget_atol: float | None = None
    solves: int | None = None
    primal_iterations: int | None = None
    adjoint_iterations: int | None = None
    primal_applications: int | None = None
    adjoint_applications: int | None = None
    error_applications: int | None = None
    primal_residual: float | None = None
    adjoint_residual: float | None = None
    primal_capped: int | None = None
    adjoint_capped: int | None = None
    failures: int | None = None
    seconds: float = 0.0
    validation_seconds: float = 0.0
    compile_seconds: float = 0.0
    elapsed: float = 0.0

    @property
    def work(self) -> int | None:
        """Primal and adjoint iterations together."""
        if self.primal_iterations is None:
            return None
        return self.primal_iterations + (self.adjoint_iterations or 0)


FIELDS = tuple(field.name for field in dataclasses.fields(Record))
WORDS = frozenset({"static"})
"""Fields that are no numbers."""

INTEGERS = frozenset(field.name for field in dataclasses.fields(Record) if "int" in str(field.type))
"""The fields that hold whole numbers."""

_DEFAULTS = {
    field.name: None if field.default is dataclasses.MISSING else field.default
    for field in dataclasses.fields(Record)
}
_BLOCK = 256


def record_of(fields: Mapping[str, Any]) -> Record:
    """A record of these fields, unchecked: a fifth of the time that its constructor takes.

    An epoch may be one update of a fraction of a millisecond.
    """
    record = object.__new__(Record)
    vars(record).update(_DEFAULTS | dict(fields))
    return record


class History(Sequence[Record]):
    """The records of a run, in order.

    >>> history = History([Record(epoch=0, metric=1.0), Record(epoch=1, metric=0.5, updates=8)])
    >>> history.column("metric")
    array([1. , 0.5])
    >>> history.total("updates")
    8

    - `packed`: how many of the records lie in columns: these are fast to write.

    `to_dataframe` gives a table of pandas or polars.
    """

    def __init__(self, records: Iterable[Record] = ()):
        # The latest as they are, those before in columns: a tenth of the memory.
        self._blocks: list[Block] = []
        self._recent: list[Record] = []
        self.packed = 0
        for record in records:
            self.append(record)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> "History": ...
    def __getitem__(self, index: int | slice) -> "Record | History":
        """The record at a position (which is its epoch), or a part of the history."""
        if isinstance(index, slice):
            return History(self[place] for place in range(*index.indices(len(self))))
        length, packed = len(self), self.packed
        place = index + length if index < 0 else index
        if not 0 <= place < length:
            msg = f"History: no record {index}, there are {length}."
            raise IndexError(msg)
        if place >= packed:
            return self._recent[place - packed]
        row = self._blocks[place // _BLOCK].row(place % _BLOCK)
        return record_of(dict(zip(FIELDS, row, strict=True)))

    def __len__(self) -> int:
        return self.packed + len(self._recent)

    def __iter__(self) -> Iterator[Record]:
        rows = itertools.chain.from_iterable(self._blocks)
        packed = (record_of(dict(zip(FIELDS, row, strict=True))) for row in rows)
        return itertools.chain(packed, self._recent)

    def append(self, record: Record) -> None:
        """Add the next record."""
        self._recent.append(record)
        # Never the latest: what looks at a run looks there.
        if len(self._recent) == 2 * _BLOCK:
            first = self._recent[:_BLOCK]
            self._blocks.append(Block([tuple(vars(record).values()) for record in first]))
            del self._recent[:_BLOCK]
            self.packed += _BLOCK

    def lines(self, first: int, last: int) -> bytes:
        """The records of a range of positions, as lines of JSON."""
        parts: list[bytes] = []
        while first < last:
            block, within = divmod(first, _BLOCK)
            whole = block < len(self._blocks) and not within and last - first >= _BLOCK
            lines = self._blocks[block].lines(FIELDS) if whole else None
            count = _BLOCK if lines is not None else 1
            parts.append(lines if lines is not None else line_of(self[first]))
            first += count
        return b"".join(parts)

    def values(self, name: str) -> list[Any]:
        """One field over all records, as they have it.

        **Raises:** `KeyError` naming the nearest field for an unknown one.
        """
        if name == "work":
            pairs = zip(
                self.values("primal_iterations"), self.values("adjoint_iterations"), strict=True
            )
            return [None if primal is None else primal + (other or 0) for primal, other in pairs]
        if name not in FIELDS:
            msg = f"History: no column {name!r}{did_you_mean(name, (*FIELDS, 'work'))}"
            raise KeyError(msg)
        place = FIELDS.index(name)
        found = [value for block in self._blocks for value in block.column(place)]
        found.extend(getattr(record, name) for record in self._recent)
        return found

    def column(self, name: str) -> np.ndarray:
        """One field over all records, float64; NaN where it is `None`.

        **Raises:** `KeyError` naming the nearest field for an unknown one, or for one of words.
        """
        if name in WORDS:
            msg = f"History: {name!r} is no number; read it from the records."
            raise KeyError(msg)
        values = self.values(name)
        return np.array([math.nan if value is None else value for value in values], dtype=float)

    def columns(self) -> dict[str, np.ndarray]:
        """Every field of numbers over all records, as a table of columns."""
        return {name: self.column(name) for name in FIELDS if name not in WORDS}

    def to_dataframe(self) -> Any:
        """A data frame of pandas, or of polars where that alone is installed: a row an epoch.

        Whole numbers are whole, and what was not measured is missing.

        **Raises:** `ImportError` where neither is installed.
        """
        columns = {name: self.values(name) for name in FIELDS}
        return data_frame("History.to_dataframe", columns, whole=INTEGERS, words=WORDS)

    def total(self, name: str) -> int | float | None:
        """Sum of a field over all records that have it; `None` if none has."""
        known = [value for value in self.values(name) if value is not None]
        return sum(known) if known else None

    @property
    def work(self) -> int | None:
        """Primal and adjoint iterations of all records; `None` if no solve reported."""
        return _whole(self.total("work"))

    def cumulative(self, name: str) -> np.ndarray:
        """Running sum of a field, float64; what was not reported counts as zero."""
        return np.cumsum(np.nan_to_num(self.column(name), nan=0.0))

    def first_at(self, target: float) -> Record | None:
        """The first record whose metric is at most the target; `None` if there is none."""
        for place, metric in enumerate(self.values("metric")):
            if metric is not None and metric <= target:
                return self[place]
        return None

    def until(self, record: Record) -> "History":
        """The records up to and including one of them."""
        return self[: self.index(record) + 1]

    def table(self, rows: int = 12, metric_name: str = "metric") -> Table:
        """A printable table of at most so many epochs, evenly spread, the last included."""
        return _table(self, rows, metric_name)

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write a JSONL file."""
        HistoryWriter(path, self).close()

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Self:
        """Read a JSONL file that a `HistoryWriter` wrote.

        A last line that was cut off by a crash is left out.

        **Raises:** `FileNotFoundError`; `ValueError` with the number of a bad line.
        """
        return cls.decode(Path(path).read_bytes(), path)

    @classmethod
    def decode(cls, content: bytes, path: str | os.PathLike[str]) -> Self:
        """Read the content of such a file; `path` is for messages.

        **Raises:** `ValueError` with the number of a bad line.
        """
        try:
            lines = content.decode("utf-8").split("\n")
        except UnicodeDecodeError as error:
            msg = f"{path}: not a bilevel history: {error}"
            raise ValueError(msg) from error
        records: list[Record] = []
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                records.append(_decode(json.loads(line)))
            except (ValueError, TypeError, RecursionError) as error:
                if number == len(lines):
                    break
                msg = f"{path}, line {number}: not a record of a bilevel history: {error}"
                raise ValueError(msg) from error
        return cls(records)


class HistoryWriter:
    """Appends records to a JSONL file, each at once, so that a crash loses none.

    Numbers that JSON does not have are written as the strings "NaN", "Infinity" and
    "-Infinity".

    **Arguments:**

    - `path`: of the file.
    - `keep`: records to begin with; the file is written anew with them.
    """

    def __init__(self, path: str | os.PathLike[str], keep: Iterable[Record] = ()):
        self._file: IO[str] = Path(path).open("w", encoding="utf-8")  # noqa: SIM115
        for record in keep:
            self.write(record)

    def write(self, record: Record) -> None:
        """Append one record and flush."""
        self._file.write(line_of(record).decode())
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def line_of(record: Record) -> bytes:
    """A record as its line of a JSONL file; what was not measured is left out."""
    # Once an epoch, and an epoch may be one update of a fraction of a millisecond: no copies.
    known = {name: value for name, value in vars(record).items() if value is not None}
    return to_json(known, inf_nan_mode="strings") + b"\n"


def _whole(value: float | None) -> int | None:
    return None if value is None else round(value)


_NONFINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def encode(value: Any) -> Any:
    """A value of plain containers with non-finite numbers as strings, ready for JSON."""
    if isinstance(value, Mapping):
        return {str(key): encode(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [encode(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    return value


def decode_number(value: Any) -> Any:
    """Undo `encode` for one value."""
    return _NONFINITE.get(value, value) if isinstance(value, str) else value


def _decode(line: Any) -> Record:
    if not isinstance(line, dict) or "epoch" not in line:
        msg = "expected an object with an epoch"
        raise ValueError(msg)
    values: dict[str, Any] = {}
    for name, stored in line.items():
        if name not in FIELDS:
            continue  # written by a later version
        value = stored if name in WORDS else decode_number(stored)
        allowed = (str,) if name in WORDS else (int,) if name in INTEGERS else (int, float)
        if value is not None and (isinstance(value, bool) or not isinstance(value, allowed)):
            msg = f"{name} is {value!r}"
            raise ValueError(msg)
        values[name] = value
    return Record(**values)


_COLUMNS: tuple[tuple[str, Callable[[Record], str]], ...] = (
    ("epoch", lambda r: str(r.epoch)),
    ("level", lambda r: text.count(r.level)),
    ("static", lambda r: text.NOTHING if r.static is None else escape(r.static)),
    ("budget", lambda r: text.budget(r.budget_iterations, r.budget_rtol, r.budget_atol)),
    ("loss", lambda r: text.number(r.loss)),
    ("gradient", lambda r: text.number(r.gradient_norm)),
    ("noise", lambda r: text.number(r.gradient_noise)),
    ("primal", lambda r: text.count(r.primal_iterations)),
    ("adjoint", lambda r: text.count(r.adjoint_iterations)),
    ("residual", lambda r: text.number(r.primal_residual)),
    ("skipped", lambda r: text.count(r.nonfinite or None)),
    ("failed", lambda r: text.count(r.failures or None)),
    ("seconds", lambda r: text.seconds(r.seconds)),
)


def _table(records: Sequence[Record], rows: int, metric_name: str) -> Table:
    table = text.table()
    last = len(records) - 1
    chosen = {round(k * last / max(rows - 1, 1)) for k in range(rows)} if last >= rows else None
    shown = [r for k, r in enumerate(records) if chosen is None or k in chosen]
    table.add_column("epoch", justify="right")
    table.add_column(escape(metric_name), justify="right")
    columns = [
        (name, cell)
        for name, cell in _COLUMNS[1:]
        if any(cell(record) != text.NOTHING for record in records)
    ]
    for name, _ in columns:
        table.add_column(name, justify="right")
    for record in shown:
        cells = [cell(record) for _, cell in columns]
        table.add_row(str(record.epoch), text.number(record.metric), *cells)
    return table
