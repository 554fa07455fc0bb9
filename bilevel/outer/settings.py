"""Settings of the outer loop, checked where they are passed."""

import os
import re
from pathlib import Path
from typing import Annotated, Any, TypeVar

import pydantic
from pydantic import Field

Count = Annotated[int, Field(ge=1)]
Name = Annotated[str, Field(min_length=1)]


class Settings(pydantic.BaseModel):
    """Strict: no strings for numbers, no floats for counts, no unknown names."""

    model_config = pydantic.ConfigDict(strict=True, extra="forbid", frozen=True)


class TaskSettings(Settings):
    """What a task recommends that is plain data."""

    name: Name
    metric_name: Name
    epochs: Count | None
    policies: tuple[Name, ...]
    jit_validate: bool


class LoopSettings(Settings):
    """How long the outer loop runs and what it keeps."""

    epochs: Count
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    max_nonfinite: Count
    directory: Path | None
    overwrite: bool
    resume: bool


class ComparisonSettings(Settings):
    """What a comparison runs and measures against."""

    policies: Annotated[tuple[Name, ...], Field(min_length=1)]
    seeds: Annotated[tuple[Annotated[int, Field(ge=0, lt=2**32)], ...], Field(min_length=1)]
    target: Annotated[float, Field(allow_inf_nan=False)] | None
    margin: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    directory: Path | None


S = TypeVar("S", bound=Settings)


def validated(model: type[S], owner: str, **values: Any) -> S:
    """Check values against a model.

    **Arguments:**

    - `model`: what is expected.
    - `owner`: who asks, for the message.
    - `values`: NumPy scalars count as the Python numbers they hold, paths as strings too.

    **Raises:** `ValueError` in one line: the name, what was expected, what came.

    >>> try:
    ...     validated(
    ...         TaskSettings,
    ...         "Task",
    ...         name="a",
    ...         metric_name="loss",
    ...         epochs=0,
    ...         policies=(),
    ...         jit_validate=True,
    ...     )
    ... except ValueError as error:
    ...     print(error)
    Task: epochs should be greater than or equal to 1, got 0.
    """
    plain = {name: _plain(value) for name, value in values.items()}
    if isinstance(plain.get("directory"), str | os.PathLike):
        plain["directory"] = Path(plain["directory"])
    try:
        return model(**plain)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False)[0]
    name = ".".join(str(part) for part in first["loc"][:1])
    message = re.sub(r"^(Input|String|Tuple) ", "", first["msg"])
    msg = f"{owner}: {name} {message}, got {first['input']!r}."
    raise ValueError(msg)


def _plain(value: Any) -> Any:
    item = getattr(value, "item", None)
    if item is not None and getattr(value, "shape", None) == ():
        return item()
    return tuple(_plain(entry) for entry in value) if isinstance(value, list | tuple) else value
