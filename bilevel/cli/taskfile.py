"""Task files: from `FILE.py:NAME` and `--set` to tasks."""

import ast
import cmath
import dataclasses
import importlib.machinery
import importlib.util
import inspect
import sys
import types
import typing
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pydantic

from bilevel.cli.failure import (
    TaskError,
    UsageError,
    in_one_line,
    say_in_one_line,
    show_traceback,
)
from bilevel.outer.archive import NotKeptError, ResumeError
from bilevel.outer.checkpoints.owner import DirectoryInUseError
from bilevel.outer.devices import DevicesError
from bilevel.outer.optimize import NonFiniteError
from bilevel.outer.processes.connection import speaks
from bilevel.outer.suggestion import did_you_mean
from bilevel.outer.task import Task

_NAME = "task"

_OURS = (
    UsageError,
    TaskError,
    NonFiniteError,
    ResumeError,
    DirectoryInUseError,
    NotKeptError,
    DevicesError,
)
"""What is no fault of the user's file."""


@dataclasses.dataclass(frozen=True)
class Given:
    """An argument of a task's function as a configuration has it: a value with its type."""

    value: Any


Setting = tuple[str, str | Given]
"""An argument by name: as written on the command line, or given with its type."""


class TaskFile:
    """A task in a user's file, with what was set for it.

    **Arguments:**

    - `target`: ``FILE.py`` or ``FILE.py:NAME``.
    - `settings`: arguments of the task's function as written, by name.
    - `epochs`: of the command, handed to a function that takes such an argument and was given
        none: a learning rate that falls until the last epoch has to know which that is.
    - `traceback`: whether what the file raises is shown with its whole traceback.
    - `shows`: whether it is shown at all; else it is raised as it is.

    **Raises:** `UsageError` for a missing file, one that is no Python or imports what is
    not there, a file without the task, or an argument that the function does not take;
    `TaskError` if the file raises anything else, after showing it.
    """

    def __init__(
        self,
        target: str,
        settings: Sequence[Setting] = (),
        *,
        epochs: int | None = None,
        traceback: bool = False,
        shows: bool = True,
    ):
        self.file, name = _split(target)
        self._traceback, self._shows = traceback, shows
        with self.guard():
            module = self._load()
        self._name = name or _only_name(module, self.file)
        self._found = _lookup(module, self._name, self.file)
        if epochs is not None and self._takes("epochs") and "epochs" not in dict(settings):
            settings = [*settings, ("epochs", Given(epochs))]
        self._arguments = _arguments(self._found, self._name, settings)

    @property
    def target(self) -> str:
        """File and name, from the root on: the same task for a process anywhere on the machine."""
        return f"{self.file.resolve()}:{self._name}"

    @property
    def seeded(self) -> bool:
        """Whether the task's function takes a seed: otherwise every run of it is the same."""
        return self._takes("seed")

    def typed(self, name: str, written: str | Given) -> Any:
        """A value for an argument of the task's function, in the type that it asks for.

        **Raises:** `UsageError` for an argument that it does not take, or another type.
        """
        return _argument(self._found, self._name, name, written)

    def _takes(self, argument: str) -> bool:
        if isinstance(self._found, Task):
            return False
        return argument in inspect.signature(self._found).parameters

    @property
    def effective(self) -> dict[str, str]:
        """The arguments of the task's function as they are, defaults included, in words."""
        if isinstance(self._found, Task):
            return {}
        known = inspect.signature(self._found).parameters.values()
        defaults = {
            parameter.name: parameter.default
            for parameter in known
            if parameter.default is not parameter.empty
        }
        return {name: repr(value) for name, value in (defaults | self._arguments).items()}

    def check_seeds(self, seeds: Sequence[int]) -> None:
        """See that several seeds would make a difference.

        **Raises:** `UsageError` where they would not.
        """
        if len(seeds) > 1 and not self.seeded:
            msg = (
                f"{len(seeds)} seeds would be as many times the same run: the task takes no "
                "argument named seed. Give its function one, or leave --seeds out."
            )
            raise UsageError(msg)

    def build(self, seed: int) -> Task:
        """The task, made anew with a seed where its function takes one.

        **Raises:** `TaskError` if the function raises, `UsageError` if it returns no task.
        """
        if isinstance(self._found, Task):
            return self._found
        arguments = dict(self._arguments)
        if self.seeded:
            arguments.setdefault("seed", seed)
        with self.guard():
            task = self._found(**arguments)
        if not isinstance(task, Task):
            msg = f"{self._name} in {self.file} returned {_kind(task)}, not a bilevel Task."
            raise UsageError(msg)
        return task

    @contextmanager
    def guard(self) -> Generator[None]:
        """Whatever the user's code raises is shown as its own traceback."""
        try:
            yield
        except _OURS:
            raise
        except (Exception, SystemExit) as error:
            if not self._shows:
                raise
            if speaks(error):
                show_traceback(error, self.file, whole=self._traceback)
            raise TaskError from error

    def _load(self) -> types.ModuleType:
        try:
            return _load(self.file)
        except (SyntaxError, ImportError) as error:
            # Nothing of the file has gone wrong yet: it is the wrong file, or the wrong
            # environment, and the line says all that a traceback would.
            if self._traceback or not self._shows:
                raise
            raise UsageError(in_one_line(error, self.file)) from error
        except (Exception, SystemExit) as error:
            # Mere lines of a file, not yet a task of it: the line says which.
            if self._traceback or not self._shows:
                raise
            if speaks(error):
                say_in_one_line(error, self.file)
            raise TaskError from error


def _split(target: str) -> tuple[Path, str | None]:
    name: str | None = None
    if ":" in target and not Path(target).exists():
        target, _, name = target.rpartition(":")
        if not name.isidentifier():
            msg = f"{name!r} is no name of a task; write FILE.py:NAME."
            raise UsageError(msg)
    if not target:
        msg = "the task is empty; write FILE.py or FILE.py:NAME."
        raise UsageError(msg)
    path = Path(target)
    if path.is_dir():
        msg = f"{path} is a directory; name a Python file in it."
        raise UsageError(msg)
    if not path.is_file():
        siblings = (
            [str(found) for found in path.parent.glob("*.py")] if path.parent.is_dir() else []
        )
        near = did_you_mean(str(path), siblings) if siblings else "."
        msg = f"there is no file {path}{near if 'mean' in near else '.'}"
        raise UsageError(msg)
    return path, name


def _load(file: Path) -> types.ModuleType:
    name = f"bilevel_task_{file.stem}"
    loader = importlib.machinery.SourceFileLoader(name, str(file.resolve()))
    spec = importlib.util.spec_from_file_location(name, file, loader=loader)
    assert spec is not None
    try:
        loader.get_code(name)
    except ValueError as error:
        # What Python before 3.11.4 raises for null bytes.
        raise SyntaxError(str(error)) from error
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and pickles look their module up, and files beside this one are imported
    # as they would be if it were run as a script.
    sys.modules[name] = module
    sys.path.insert(0, str(file.resolve().parent))
    loader.exec_module(module)
    return module


def _names(module: types.ModuleType) -> list[str]:
    """Tasks in a module, and functions of its own that say they return one."""
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (isinstance(value, Task) or _returns_task(value, module) or name == _NAME)
    ]


def _returns_task(value: object, module: types.ModuleType) -> bool:
    if not inspect.isfunction(value) or value.__module__ != module.__name__:
        return False
    annotation = inspect.signature(value).return_annotation
    if isinstance(annotation, str):
        return annotation.rpartition(".")[2] == Task.__name__
    return annotation is Task


def _only_name(module: types.ModuleType, file: Path) -> str:
    names = _names(module)
    if _NAME in names:
        return _NAME
    if not names:
        msg = (
            f"{file} holds no task: it should have `task = bl.Task(...)` or "
            "`def task(...) -> bl.Task`."
        )
        raise UsageError(msg)
    if len(names) > 1:
        msg = f"{file} holds {len(names)} tasks; choose one: " + ", ".join(
            f"{file.name}:{name}" for name in names
        )
        raise UsageError(msg)
    return names[0]


def _lookup(module: types.ModuleType, name: str, file: Path) -> Any:
    if not hasattr(module, name):
        msg = f"{file} has no {name!r}{did_you_mean(name, _names(module))}"
        raise UsageError(msg)
    found = getattr(module, name)
    if isinstance(found, Task) or (callable(found) and not isinstance(found, type)):
        return found
    msg = f"{name} in {file} is {_kind(found)}, not a bilevel Task or a function that returns one."
    raise UsageError(msg)


def _arguments(found: Any, name: str, settings: Sequence[Setting]) -> dict[str, Any]:
    """The arguments of a task's function, in the types that it asks for."""
    if isinstance(found, Task):
        if settings:
            msg = (
                f"{name} is a Task and has nothing to set; make it a function, "
                f"`def {name}({settings[0][0]}=...) -> bl.Task`, to set {settings[0][0]}."
            )
            raise UsageError(msg)
        return {}
    arguments = {setting: _argument(found, name, setting, written) for setting, written in settings}
    missing = [
        parameter.name
        for parameter in _parameters(found).values()
        if parameter.default is parameter.empty and parameter.name not in {*arguments, "seed"}
    ]
    if missing:
        msg = f"{name} needs {', '.join(missing)}: give --set {missing[0]}=VALUE."
        raise UsageError(msg)
    return arguments


def _parameters(found: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    return {
        parameter.name: parameter
        for parameter in inspect.signature(found).parameters.values()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }


def _argument(found: Any, name: str, setting: str, written: str | Given) -> Any:
    """One argument of a task's function, in the type that it asks for."""
    parameters = _parameters(found)
    if setting not in parameters:
        msg = f"{name} has no argument {setting!r}{did_you_mean(setting, parameters)}"
        raise UsageError(msg)
    kind = _type_of(found, parameters[setting])
    if isinstance(written, Given):
        argument = _fitting(written.value, kind, setting)
    else:
        argument = _typed(written, kind, setting)
    # A NaN trains for hours to nothing; a default that is one says that it is meant.
    if _all_finite(parameters[setting].default) and not _all_finite(argument):
        shown = f"task.{setting}" if isinstance(written, Given) else f"--set {setting}={written}"
        msg = f"{shown}: {setting} should be finite."
        raise UsageError(msg)
    return argument


def _all_finite(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_all_finite(part) for part in value.values())
    if isinstance(value, list | tuple | set | frozenset):
        return all(_all_finite(part) for part in value)
    return not isinstance(value, float | complex) or cmath.isfinite(value)


def _type_of(function: Callable[..., Any], parameter: inspect.Parameter) -> Any:
    """The annotation, else the type of the default; `None` where neither says it."""
    try:
        hints: Mapping[str, Any] = typing.get_type_hints(function, include_extras=True)
    except Exception:  # noqa: BLE001
        # An annotation that only a type checker can resolve says nothing here.
        hints = {}
    if parameter.name in hints:
        return hints[parameter.name]
    if parameter.default in (None, parameter.empty):
        return None
    return type(parameter.default)


def _typed(written: str, kind: Any, name: str) -> Any:
    if kind is None:
        try:
            return ast.literal_eval(written)
        except (ValueError, SyntaxError):
            return written
    if kind in (list, tuple, set, dict):
        return _literal(written, kind, name)
    adapter = pydantic.TypeAdapter[Any](kind, config=_config(kind))
    if written.lower() == "none" and types.NoneType in typing.get_args(kind):
        return None
    try:
        return adapter.validate_strings(written)
    except pydantic.ValidationError as error:
        first = error
    try:
        return adapter.validate_json(written)
    except pydantic.ValidationError:
        message = first.errors(include_url=False)[0]["msg"].removeprefix("Input ")
        msg = f"--set {name}={written}: {name} {message}."
        raise UsageError(msg) from None


def _fitting(value: Any, kind: Any, name: str) -> Any:
    """A value that has a type already, as the argument wants it."""
    if kind is None:
        return value
    if kind in (tuple, set) and isinstance(value, list):
        return kind(value)
    try:
        return pydantic.TypeAdapter[Any](kind, config=_config(kind)).validate_python(value)
    except pydantic.ValidationError as error:
        message = error.errors(include_url=False)[0]["msg"].removeprefix("Input ")
        msg = f"task.{name}: {name} {message}, got {value!r}."
        raise UsageError(msg) from None


def _config(kind: Any) -> pydantic.ConfigDict | None:
    # Types with a configuration of their own refuse another.
    own = isinstance(kind, type) and hasattr(kind, "__pydantic_config__")
    return None if own else pydantic.ConfigDict(arbitrary_types_allowed=True)


def _literal(written: str, kind: type, name: str) -> Any:
    try:
        value = ast.literal_eval(written)
    except (ValueError, SyntaxError):
        value = None
    if not isinstance(value, kind):
        msg = f"--set {name}={written}: {name} should be a Python {kind.__name__}."
        raise UsageError(msg)
    return value


def _kind(value: object) -> str:
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if inspect.ismodule(value):
        return "a module"
    return f"a value of type {type(value).__name__}"
