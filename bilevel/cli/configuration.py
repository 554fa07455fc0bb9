"""Configurations: a command's options in a TOML or YAML file, and on the command line."""

import argparse
import contextlib
import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import AfterValidator, Field

from bilevel.cli.failure import UsageError, reason
from bilevel.cli.taskfile import Given
from bilevel.cli.yaml import MOST_DEEP, read_yaml
from bilevel.outer.checkpoints.durable import open_regular
from bilevel.outer.checkpoints.settings import Checkpoints
from bilevel.outer.settings import Count, Name, Settings
from bilevel.outer.suggestion import did_you_mean

MOST_BYTES = 2**20
"""A configuration may have."""

Seed = Annotated[int, Field(ge=0, lt=2**32)]
Real = Annotated[float, Field(allow_inf_nan=False)]
Scalar = bool | int | float | str
Value = Scalar | list[Any] | dict[str, Any] | None


def _different(seeds: list[int]) -> list[int]:
    if len(set(seeds)) < len(seeds):
        msg = "should differ from each other"
        raise ValueError(msg)
    return seeds


class Configuration(Settings):
    """What these commands have.

    - `task`: arguments of the task's function. The task itself is what the command names:
        nothing here can name code.
    - `epochs`, `max_nonfinite`: as `bl.optimize` has them.
    - `precision`: by default, if the task's file does not say.
    - `checkpoints`: how often, and how many are kept.
    """

    task: dict[Name, Value] = Field(default_factory=dict)
    epochs: Count | None = None
    max_nonfinite: Count = 10
    precision: Literal["float32", "float64"] | None = None


class RunConfiguration(Configuration):
    """Of `bilevel run`.

    - `tensorboard`: directory of event files for TensorBoard.
    - `mlflow`: tracking server or store of MLflow.
    - `devices`: that share each batch, in each process.
    - `processes`: to start on this machine.
    - `silence`: seconds after which a process that does not answer is lost.
    """

    policy: str | None = None
    seed: Seed = 0
    checkpoints: Checkpoints = Checkpoints()
    tensorboard: Name | None = None
    mlflow: Name | None = None
    devices: Count | None = None
    processes: Count | None = None
    silence: Annotated[Real, Field(ge=3, le=20)] = 15.0


class CompareConfiguration(Configuration):
    """Of `bilevel compare`; `seeds` is a list of them."""

    policies: Annotated[list[str], Field(min_length=1)] | None = None
    seeds: Annotated[list[Seed], Field(min_length=1), AfterValidator(_different)] = Field(
        default_factory=lambda: [0]
    )
    target: Real | None = None
    margin: Annotated[Real, Field(ge=0)] = 0.02


class SweepConfiguration(CompareConfiguration):
    """Of `bilevel sweep`.

    - `grid`: by argument of the task's function, the values that are tried; `task` has those that
        are the same in every run.
    - `workers`, `backend`, `address`, `slurm`: who makes the runs, as `bl.sweep` has them.
    """

    grid: dict[Name, Annotated[list[Value], Field(min_length=1)]] = Field(default_factory=dict)
    checkpoints: Checkpoints = Checkpoints()
    workers: Count | None = None
    backend: Name | None = None
    address: Name | None = None
    slurm: dict[Name, Scalar] = Field(default_factory=dict)


AnyConfiguration = RunConfiguration | CompareConfiguration | SweepConfiguration

MODELS: dict[
    str, type[RunConfiguration] | type[CompareConfiguration] | type[SweepConfiguration]
] = {
    "run": RunConfiguration,
    "compare": CompareConfiguration,
    "sweep": SweepConfiguration,
}


def configure(options: argparse.Namespace) -> AnyConfiguration:
    """The effective configuration of a command, which is put into its options, too.

    What stands later overrides: the file, options of the command line, `KEY=VALUE` words.

    **Raises:** `UsageError` in one line with file and key.
    """
    model = MODELS[options.command]
    file: Path | None = options.config
    written = {} if file is None else _checked(model, read(file), str(file))
    options.in_file = [*written, *(f"task.{name}" for name in written.get("task", {}))]
    for key, value in _flags(options).items():
        _put(written, key.split("."), value)
    for name, value in options.settings:
        _set(written, name, value, several=options.command == "sweep")
    for name, value in getattr(options, "slurm_parameters", ()):
        given = _value(value)
        _put(written, ["slurm", name], str(given) if isinstance(given, _Written) else given)
    for word in options.words:
        key, _, value = word.partition("=")
        path = key.split(".")
        given = dict[str, Any]()
        if len(path) > MOST_DEEP:
            msg = f"{word[:60]}: it is nested too deeply."
            raise UsageError(msg)
        _put(given, path, _value(value))
        _checked(model, given, word)
        _put(written, path, _value(value))
    task = written.get("task", {})
    grid: dict[str, list[Any]] = written.get("grid", {})
    worded: dict[str, Any] = {"task": {name: str(task[name]) for name in task}}
    if grid:
        worded["grid"] = {name: list(map(str, values)) for name, values in grid.items()}
    found = model(**_tupled({**written, **worded}))
    _apply(options, found, task)
    options.grid = {name: [_setting(value) for value in values] for name, values in grid.items()}
    twice = next((name for name in grid if name in task), None)
    if twice is not None:
        msg = f"{twice} is both in grid, to be varied, and in task, to be one value; take one away."
        raise UsageError(msg)
    return found


def _set(written: dict[str, Any], name: str, value: str, *, several: bool) -> None:
    """Note what `--set` says; of a sweep, it may be several values with commas between them."""
    values = split(value) if several else [value]
    if len(values) > 1:
        _put(written, ["grid", name], [_Written(part) for part in values])
        written.get("task", {}).pop(name, None)
    else:
        _put(written, ["task", name], _Written(value))
        written.get("grid", {}).pop(name, None)


def split(written: str) -> list[str]:
    """Values with commas between them; not those within brackets or quotes.

    >>> split("(3,4),(5,6)"), split("adam"), split('"a,b"')
    (['(3,4)', '(5,6)'], ['adam'], ['"a,b"'])
    """
    parts, depth, quote = [""], 0, ""
    for letter in written:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'":
            quote = letter
        elif letter in "([{":
            depth += 1
        elif letter in ")]}":
            depth -= 1
        elif letter == "," and depth == 0:
            parts.append("")
            continue
        parts[-1] += letter
    return [part.strip() for part in parts]


def read(file: Path) -> dict[str, Any]:
    """A configuration as plain data.

    **Raises:** `UsageError` for a file that cannot be read, is no configuration, or is larger
    than one can be.
    """
    if file.suffix not in (".toml", ".yaml", ".yml"):
        msg = f"{file} should end in .toml, .yaml or .yml."
        raise UsageError(msg)
    try:
        stream = open_regular(file, links=True)
        if stream is None:
            msg = f"{file} is no file."
            raise UsageError(msg)
        with stream:
            content = stream.read(MOST_BYTES + 1)
    except OSError as error:
        msg = f"cannot read {file}: {reason(error)}."
        raise UsageError(msg) from error
    if len(content) > MOST_BYTES:
        msg = f"{file} has more than {MOST_BYTES:,} bytes, which no configuration needs."
        raise UsageError(msg)
    try:
        text = content.decode("utf-8")
        found: Any = tomllib.loads(text) if file.suffix == ".toml" else read_yaml(text)
    except (ValueError, RecursionError) as error:
        first = next(iter(str(error).splitlines()), "not to be read")
        msg = f"{file}: {first}"
        raise UsageError(msg) from None
    if found is None:
        return {}
    if not isinstance(found, dict):
        msg = f"{file} should hold keys with values, got {type(found).__name__}."
        raise UsageError(msg)
    _check_plain(found, str(file), [])
    return found


def _check_plain(value: Any, where: str, path: list[str]) -> None:
    """Refuse what has no place in a configuration, whatever its format can hold."""
    key = ".".join(path)
    if len(path) > MOST_DEEP:
        msg = f"{where}: {key[:60]} is nested too deeply."
        raise UsageError(msg)
    if isinstance(value, dict):
        for name, part in value.items():
            if not isinstance(name, str):
                msg = f"{where}: the key {name!r} should be text; put it in quotes."
                raise UsageError(msg)
            _check_plain(part, where, [*path, name])
    elif isinstance(value, list):
        for part in value:
            _check_plain(part, where, [*path, "item"])
    elif not (value is None or isinstance(value, bool | int | float | str)):
        msg = f"{where}: {key} should be a number, text, a list or a table, got {_short(value)}."
        raise UsageError(msg)


def schema(command: str) -> str:
    """The JSON schema of a command's configuration."""
    return json.dumps(MODELS[command].model_json_schema(), indent=2)


def _checked(model: type[Configuration], given: dict[str, Any], where: str) -> dict[str, Any]:
    """What was given, if it is of the model.

    **Raises:** `UsageError` naming the key, and the nearest known one for one that is not.
    """
    try:
        model(**_tupled(given))
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False)[0]
    except RecursionError:
        msg = f"{where}: it is nested too deeply."
        raise UsageError(msg) from None
    else:
        return given
    path = [str(part) for part in first["loc"]]
    if first["type"] == "extra_forbidden":
        known = list(model.model_fields) if len(path) == 1 else list(Checkpoints.model_fields)
        msg = f"{where}: there is no key {'.'.join(path)}{did_you_mean(path[-1], known)}"
        raise UsageError(msg)
    named = _key(path, given)
    words = first["msg"].removeprefix("Input ").removeprefix("Value error, ")
    msg = f"{where}: {named} {words}, got {_short(first['input'])}."
    raise UsageError(msg)


def _key(path: Sequence[str], given: Mapping[str, Any]) -> str:
    """The part of a path that names keys: pydantic adds the branches of unions."""
    kept: list[str] = []
    part: Any = given
    for name in path:
        if isinstance(part, dict) and name in part:
            part = part[name]
        elif not (isinstance(part, list) and name.isdecimal()):
            break
        kept.append(name)
    return ".".join(kept) or path[0]


def _short(value: Any) -> str:
    if isinstance(value, dict | list):
        return f"a {'table' if isinstance(value, dict) else 'list'}"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _put(tree: dict[str, Any], path: Sequence[str], value: Any) -> None:
    for name in path[:-1]:
        inner = tree.setdefault(name, {})
        if not isinstance(inner, dict):
            inner = tree[name] = {}
        tree = inner
    tree[path[-1]] = value


class _Written(str):
    """Text as it was typed, whose type the task's function decides."""

    __slots__ = ()


def _value(written: str) -> Any:
    """A value as TOML has it, or the word itself."""
    try:
        found: Any = tomllib.loads(f"x = {written}")["x"]
    except (ValueError, RecursionError, KeyError):
        return _Written(written)
    plain = isinstance(found, bool | int | float | str | list | dict)
    return found if plain else _Written(written)


def _tupled(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Strict models take a table of checkpoints as one of their own."""
    found = dict(tree)
    given = found.get("checkpoints")
    if isinstance(given, dict):
        # What is wrong with it, the model says.
        with contextlib.suppress(pydantic.ValidationError, TypeError):
            found["checkpoints"] = Checkpoints(**given)
    return found


def _flags(options: argparse.Namespace) -> dict[str, Any]:
    """What the command line's options say, by key."""
    found: dict[str, Any] = {}
    for name, key in _OPTIONS.items():
        value = getattr(options, name, None)
        if value is not None:
            found[key] = list(value) if isinstance(value, tuple) else value
    if getattr(options, "policies", None) is not None:
        found["policies"] = options.policies.split(",")
    for name, chosen in (("x64", "float64"), ("float32", "float32")):
        if getattr(options, name):
            found["precision"] = chosen
    return found


_OPTIONS = {
    "epochs": "epochs",
    "max_nonfinite": "max_nonfinite",
    "policy": "policy",
    "seed": "seed",
    "checkpoint_seconds": "checkpoints.seconds",
    "keep": "checkpoints.last",
    "strict": "checkpoints.strict",
    "tensorboard": "tensorboard",
    "mlflow": "mlflow",
    "devices": "devices",
    "processes": "processes",
    "silence": "silence",
    "seeds": "seeds",
    "target": "target",
    "margin": "margin",
    "workers": "workers",
    "backend": "backend",
    "address": "address",
}


def _apply(
    options: argparse.Namespace,
    found: AnyConfiguration,
    task: Mapping[str, Any],
) -> None:
    options.epochs, options.max_nonfinite = found.epochs, found.max_nonfinite
    options.x64 = found.precision == "float64"
    options.float32 = found.precision == "float32"
    options.settings = [(name, _setting(value)) for name, value in task.items()]
    if isinstance(found, RunConfiguration):
        options.policy, options.seed = found.policy, found.seed
        options.checkpoints = found.checkpoints
        options.tensorboard, options.mlflow = found.tensorboard, found.mlflow
        options.devices, options.processes = found.devices, found.processes
        options.silence = found.silence
    else:
        options.policies = None if found.policies is None else ",".join(found.policies)
        options.seeds = tuple(found.seeds)
        options.target, options.margin = found.target, found.margin
    if isinstance(found, SweepConfiguration):
        options.checkpoints = found.checkpoints
        options.workers, options.backend = found.workers, found.backend
        options.address, options.slurm = found.address, dict(found.slurm)


def _setting(value: Any) -> str | Given:
    """As it was typed, or with the type that it has in a configuration."""
    return str(value) if isinstance(value, _Written) else Given(value)


def located(message: str, options: argparse.Namespace) -> str:
    """A message about a value that stands in the configuration's file, with the file and key.

    What is wrong with a value is often known only when it is used.
    """
    for key in getattr(options, "in_file", ()):
        name = key.removeprefix("task.")
        if f"task.{name}:" in message or f"--set {name}=" in message:
            return f"{options.config}: {message}"
        if f"{name!r}" in message or (key.startswith("polic") and "polic" in message):
            return f"{options.config}: {message}"
    return message
