"""Harness: interleaved timing, first calls, memory, and the report they end up in."""

import gc
import json
import multiprocessing
import os
import pickle
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table as RichTable

import bilevel as bl

Cell = str | int | float | None
"""What stands in a table: `None` where there is nothing to say."""


@dataclass(frozen=True)
class Timing:
    """Wall-clock seconds of one candidate, one entry a round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median over the rounds, seconds."""
        return statistics.median(self.seconds)

    def ratio(self, reference: "Timing") -> float:
        """Median over the rounds of this time over the reference's in the same round.

        Pairing within a round cancels what slows the whole machine for a while.
        """
        pairs = zip(self.seconds, reference.seconds, strict=True)
        return statistics.median(mine / theirs for mine, theirs in pairs)


def round_robin(
    candidates: Mapping[str, Callable[[], Any]], *, rounds: int, warmup: int = 2
) -> dict[str, Timing]:
    """Time candidates in turn, so that all see the same machine.

    **Arguments:**

    - `candidates`: by name, functions without arguments; what they return is waited for.
    - `rounds`: how often each is timed, in another order every time: what ran just before
        leaves its mark on the caches.
    - `warmup`: calls of each before the first round, which also compile.

    **Returns:** a [`Timing`][] for each name.
    """
    names = list(candidates)
    for name in names:
        for _ in range(warmup):
            jax.block_until_ready(candidates[name]())
    seconds: dict[str, list[float]] = {name: [] for name in names}
    order = random.Random(0)  # noqa: S311
    for _ in range(rounds):
        for name in order.sample(names, len(names)):
            seconds[name].append(_seconds(candidates[name]))
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def first_calls(
    makers: Mapping[str, Callable[[], Callable[[], Any]]], *, rounds: int
) -> dict[str, Timing]:
    """Time the first call of freshly made functions: tracing, compiling and one run.

    **Arguments:**

    - `makers`: by name, functions that make a new function without arguments. Every
        cache of JAX is emptied before each, so nothing traced before is used again.
    - `rounds`: how often each is made and called.
    """
    names = list(makers)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            jax.clear_caches()
            gc.collect()
            seconds[name].append(_seconds(makers[name]()))
    jax.clear_caches()
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def _seconds(function: Callable[[], Any]) -> float:
    if isinstance(function, Remote):
        return function.seconds()
    start = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - start


def temporary_bytes(function: Callable[..., Any], *arguments: Any) -> int:
    """Bytes XLA reserves beyond arguments and results to run the jitted function."""
    analysis = jax.jit(function).lower(*arguments).compile().memory_analysis()
    if analysis is None:
        msg = "temporary_bytes: this back end reports no memory analysis; use peak_growth."
        raise RuntimeError(msg)
    return int(analysis.temp_size_in_bytes)


def peak_growth(build: Callable[..., Callable[[], Any]], *arguments: Any) -> int:
    """Bytes of resident memory that one run adds at its peak, seen by the operating system.

    **Arguments:**

    - `build`: a function of a module, called in a fresh process with `arguments`; it
        compiles and returns what is then run once and watched.

    **Returns:** the growth of the high-water mark in bytes, by the page.
    """
    return apart(_watch, build, arguments)


def _watch(build: Callable[..., Callable[[], Any]], arguments: Sequence[Any]) -> int:
    run = build(*arguments)
    gc.collect()
    # Writing 5 resets the high-water mark to the present size (proc(5)).
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = _high_water_bytes()
    jax.block_until_ready(run())
    return _high_water_bytes() - before


def apart(function: Callable[..., Any], *arguments: Any, flags: str | None = None) -> Any:
    """What a function of a module returns in a fresh process.

    **Arguments:**

    - `arguments`: to be pickled, as the result is.
    - `flags`: `XLA_FLAGS` of that process.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(
        target=_answer,
        args=(sender, function, arguments, jax.config.read("jax_enable_x64")),
    )
    before = os.environ.get("XLA_FLAGS")
    if flags is not None:
        os.environ["XLA_FLAGS"] = flags
    try:
        process.start()
    finally:
        if before is not None:
            os.environ["XLA_FLAGS"] = before
        elif flags is not None:
            del os.environ["XLA_FLAGS"]
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        msg = f"apart: the process running {function.__name__} ended without an answer."
        raise RuntimeError(msg) from None
    finally:
        process.join()


def _answer(
    sender: Connection, function: Callable[..., Any], arguments: Sequence[Any], wide: bool
) -> None:
    jax.config.update("jax_enable_x64", wide)
    sender.send(function(*arguments))
    sender.close()


@dataclass(frozen=True)
class Remote:
    """A candidate that lives in another process and is timed there."""

    connection: Connection
    name: str

    def __call__(self) -> Any:
        """What it returns."""
        return self._ask()[1]

    def seconds(self) -> float:
        """Wall-clock seconds of one call, without the way between the processes."""
        return self._ask()[0]

    def _ask(self) -> tuple[float, Any]:
        self.connection.send(self.name)
        return self.connection.recv()


@contextmanager
def beside(
    make: Callable[..., Mapping[str, Callable[[], Any]]], *arguments: Any
) -> Generator[dict[str, Remote]]:
    """Candidates of another framework, in a process of their own that waits between calls.

    **Arguments:**

    - `make`: a function of a module that returns functions without arguments by name, whose
        results can be pickled; called there with `arguments`.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    wide = jax.config.read("jax_enable_x64")
    # Unpickled there after the switch to 64 bits: before, arrays would arrive as float32.
    content = pickle.dumps(arguments)
    process = context.Process(target=_serve, args=(there, make, content, wide), daemon=True)
    process.start()
    there.close()
    try:
        yield {name: Remote(here, name) for name in here.recv()}
    except EOFError:
        msg = f"beside: the process running {make.__name__} ended without an answer."
        raise RuntimeError(msg) from None
    finally:
        here.close()
        process.join()


def _serve(
    connection: Connection,
    make: Callable[..., Mapping[str, Callable[[], Any]]],
    content: bytes,
    wide: bool,
) -> None:
    jax.config.update("jax_enable_x64", wide)
    candidates = make(*pickle.loads(content))  # noqa: S301
    connection.send(list(candidates))
    while True:
        try:
            name = connection.recv()
        except EOFError:
            return
        start = time.perf_counter()
        result = candidates[name]()
        connection.send((time.perf_counter() - start, result))


def _high_water_bytes() -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


@dataclass(frozen=True)
class Check:
    """A claim with the figure that decides it."""

    claim: str
    value: float
    limit: float
    at_least: bool = False

    @property
    def holds(self) -> bool:
        """Whether the figure keeps the limit; a NaN never does."""
        return self.value >= self.limit if self.at_least else self.value <= self.limit


@dataclass(frozen=True)
class Table:
    """Figures under column heads."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[Cell, ...]] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Refuse two columns of one name: a row is written as a mapping."""
        if len(set(self.columns)) < len(self.columns):
            msg = f"Table {self.title!r} has two columns of one name: {self.columns}."
            raise ValueError(msg)

    def add(self, *cells: Cell) -> None:
        """Append a row, one cell a column."""
        if len(cells) != len(self.columns):
            msg = f"Table {self.title!r} has {len(self.columns)} columns, got {len(cells)} cells."
            raise ValueError(msg)
        self.rows.append(cells)


@dataclass
class Report:
    """What a benchmark found."""

    name: str
    tables: list[Table] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def say(self, text: str) -> None:
        """Tell on standard error what is being measured: some of it takes minutes."""
        sys.stderr.write(f"{self.name}: {text}\n")
        sys.stderr.flush()

    def table(self, title: str, *columns: str) -> Table:
        """Begin a table."""
        table = Table(title, columns)
        self.tables.append(table)
        return table

    def check(self, claim: str, value: float, limit: float, *, at_least: bool = False) -> None:
        """Hold a figure against its limit."""
        self.checks.append(Check(claim, float(value), limit, at_least))

    @property
    def holds(self) -> bool:
        """Whether every claim holds."""
        return all(check.holds for check in self.checks)

    def show(self, console: Console) -> None:
        """Print tables, remarks and claims."""
        for table in self.tables:
            rich = RichTable(title=table.title, title_justify="left")
            for index, column in enumerate(table.columns):
                rich.add_column(column, justify="left" if index == 0 else "right")
            for row in table.rows:
                rich.add_row(*(_text(cell) for cell in row))
            console.print(rich)
        for remark in self.remarks:
            console.print(remark)
        if self.checks:
            rich = RichTable(title=f"{self.name}: claims", title_justify="left")
            rich.add_column("claim")
            for column in ("measured", "limit", ""):
                rich.add_column(column, justify="right")
            for check in self.checks:
                sign = "≥" if check.at_least else "≤"
                verdict = "[green]holds[/]" if check.holds else "[bold red]missed[/]"
                rich.add_row(check.claim, _text(check.value), f"{sign} {check.limit:g}", verdict)
            console.print(rich)

    def save(self, file: Path) -> None:
        """Write everything, with versions and machine, as JSON."""
        content = {
            "benchmark": self.name,
            "environment": environment(),
            "tables": [
                {
                    "title": table.title,
                    "rows": [dict(zip(table.columns, row, strict=True)) for row in table.rows],
                }
                for table in self.tables
            ],
            "checks": [
                {
                    "claim": check.claim,
                    "value": check.value,
                    "limit": check.limit,
                    "at_least": check.at_least,
                    "holds": check.holds,
                }
                for check in self.checks
            ],
            "remarks": self.remarks,
        }
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _text(cell: Cell) -> str:
    if cell is None:
        return "–"
    if isinstance(cell, float):
        return f"{cell:.4g}"
    return f"{cell:,}" if isinstance(cell, int) else cell


def environment() -> dict[str, Any]:
    """Versions and machine: what a figure must be read with."""
    versions = {"python": platform.python_version(), "bilevel": bl.__version__}
    for name in ("jax", "jaxlib", "numpy", "scipy", "equinox", "optax", "jaxopt"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "versions": versions,
        "processor": _processor(),
        "cores_used": len(os.sched_getaffinity(0)),
        "devices": [device.device_kind for device in jax.devices()],
        "dtype": "float64" if jax.config.read("jax_enable_x64") else "float32",
    }


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
