"""Source: runs and comparisons as they were kept, whole or broken off."""

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from bilevel.outer.comparison import COMPARISON_FILE, Comparison
from bilevel.outer.history import History
from bilevel.outer.report.section import Section, section_of
from bilevel.outer.run import HISTORY_FILE, SUMMARY_FILE, Run, Summary, summarize
from bilevel.outer.sweeps.plan import PLAN_FILE
from bilevel.outer.sweeps.result import Sweep

CONFIGURATION_FILE = "configuration.json"
UNFINISHED = "unfinished"
"""Status of a run that has no summary: it goes on, or was killed."""


def read_sections(paths: Sequence[Path]) -> list[Section]:
    """What the paths hold: each comparison by itself, and the runs of one task together.

    **Arguments:**

    - `paths`: directories of runs or comparisons, or their files.

    **Raises:** `FileNotFoundError` or `ValueError` naming what is wrong where, in one line.
    """
    found: dict[object, Section] = {}
    singles: dict[tuple[str, str], list[tuple[Path, Run]]] = {}
    for path in paths:
        try:
            directory, history = _located(path)
            if history is None and (directory / COMPARISON_FILE).is_file():
                found[len(found)] = _comparison(directory)
                continue
            if history is None and (directory / PLAN_FILE).is_file():
                found |= {len(found) + place: each for place, each in enumerate(_sweep(directory))}
                continue
            run = _run(directory, history)
        except RecursionError as error:
            msg = f"{path}: its JSON is nested too deeply."
            raise ValueError(msg) from error
        key = run.summary.task, run.summary.metric_name
        singles.setdefault(key, []).append((directory, run))
        found[key] = _together(key, singles[key])
    return list(found.values())


def _comparison(directory: Path) -> Section:
    comparison = _checked(Comparison.read(directory), directory / COMPARISON_FILE)
    kept = _configuration(directory)
    return Section(comparison, {str(directory): kept} if kept else {})


def _sweep(directory: Path) -> list[Section]:
    """A section for each choice of settings, as far as the sweep has come."""
    sweep = Sweep.read(directory)
    sections: list[Section] = []
    for point in sweep.plan.points:
        comparison = sweep.comparisons[point.name]
        known = {
            name: [run for run in runs if run.history] for name, runs in comparison.runs.items()
        }
        if not any(known.values()):
            continue
        folder = directory / point.folder
        kept = _configuration(folder)
        sections.append(Section(comparison, {str(folder): kept} if kept else {}))
    if not sections:
        msg = f"{directory} holds a sweep of which no run has a record yet."
        raise ValueError(msg)
    return sections


def _together(key: tuple[str, str], group: Sequence[tuple[Path, Run]]) -> Section:
    """Runs of one task."""
    section = section_of(dict(_named(group)), *key, None)
    kept = {str(place): found for place, _ in group if (found := _configuration(place))}
    return dataclasses.replace(section, configurations=kept)


def _located(path: Path) -> tuple[Path, Path | None]:
    """The directory that a path means; and a history, where that was named by itself."""
    if path.is_dir():
        return path, None
    if not path.exists():
        msg = f"there is no {path}."
        raise FileNotFoundError(msg)
    if path.name in (COMPARISON_FILE, SUMMARY_FILE):
        return path.parent, None
    if path.suffix == ".jsonl":
        return path.parent, path
    msg = (
        f"{path} is neither the directory of a run or comparison nor a {COMPARISON_FILE}, "
        f"{SUMMARY_FILE} or {HISTORY_FILE}."
    )
    raise ValueError(msg)


def _run(directory: Path, history: Path | None) -> Run:
    """A run without its parameters, which no page shows."""
    records, summary = history or directory / HISTORY_FILE, directory / SUMMARY_FILE
    beside = history is None or history.name == HISTORY_FILE
    if not records.is_file():
        if summary.is_file():
            msg = f"{directory} holds no whole run: there is no {HISTORY_FILE} in it."
        else:
            msg = (
                f"{directory} holds neither a run nor a comparison: there is no {HISTORY_FILE} and "
                f"no {COMPARISON_FILE} in it."
            )
        raise FileNotFoundError(msg)
    known = History.read(records)
    if beside and summary.is_file():
        return Run(None, known, _summary(summary), directory)
    return Run(None, known, _made_up(known, records), directory)


def _summary(path: Path) -> Summary:
    try:
        found = Summary.from_json(path.read_text(encoding="utf-8"))
        return TypeAdapter(Summary).validate_python(vars(found))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        msg = f"{path}: {where}: {first['msg'].lower()}."
        raise ValueError(msg) from error
    except ValueError as error:
        msg = f"{path}: {error}"
        raise ValueError(msg) from error


def _made_up(history: History, path: Path) -> Summary:
    """What a history alone says of its run."""
    kept = _configuration(path.parent)
    summary = summarize(
        history,
        {},
        task=kept.get("file", path.parent.absolute().name),
        policy=kept.get("policy", "") or UNFINISHED,
        controller="",
        seed=_seed(kept.get("seed", "")),
        status=UNFINISHED,
        message="",
        metric_name="metric",
        seconds=history[-1].elapsed if history else 0.0,
        compile_seconds=history.total("compile_seconds") or 0.0,
        compilations=0,
        other_compilations=0,
        device="",
    )
    return dataclasses.replace(summary, versions={})


def _seed(written: str) -> int:
    return int(written) if written.isdecimal() else 0


def _named(group: Sequence[tuple[Path, Run]]) -> Iterator[tuple[str, list[Run]]]:
    """Runs by their policy; by seed and directory too, where that is needed to tell them apart."""
    policies = [run.summary.policy for _, run in group]
    seeds = [f"{run.summary.policy}, seed {run.summary.seed}" for _, run in group]
    taken: set[str] = set()
    for place, (directory, run) in enumerate(group):
        name = policies[place] or "no name"
        if policies.count(policies[place]) > 1:
            name = seeds[place]
            if seeds.count(seeds[place]) > 1:
                name = f"{name}, {directory.name or directory}"
        while name in taken:
            name += "′"
        taken.add(name)
        yield name, [run]


def _configuration(directory: Path) -> dict[str, str]:
    """The keys and values that a run was made with; none where they cannot be read."""
    path = directory / CONFIGURATION_FILE
    try:
        stored: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return {key.removeprefix("configuration."): value for key, value in _flat("", stored)}


def _flat(prefix: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _flat(f"{prefix}.{key}" if prefix else str(key), item)
    elif value is not None and prefix:
        yield prefix, value if isinstance(value, str) else json.dumps(value)


def _checked(comparison: Comparison, path: Path) -> Comparison:
    """**Raises:** `ValueError` where a field is of a wrong type."""
    numbers = (comparison.margin, 0.0 if comparison.target is None else comparison.target)
    words = (comparison.task, comparison.metric_name, *comparison.runs)
    origin: Any = comparison.origin
    whole = (
        all(isinstance(word, str) for word in words)
        and all(isinstance(number, int | float) and math.isfinite(number) for number in numbers)
        and isinstance(origin, Mapping)
    )
    if not whole:
        msg = f"{path} is no comparison that bilevel wrote: a field is of a wrong type."
        raise ValueError(msg)
    for runs in comparison.runs.values():
        for run in runs:
            _summary((run.directory or path.parent) / SUMMARY_FILE)
    return comparison
