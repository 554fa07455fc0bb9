"""Arguments: what a user configures is checked once, where it is passed."""

import functools
import inspect
import types
from collections.abc import Callable
from typing import Annotated, Any, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

import jax
import numpy as np
import pydantic
from jax.core import Tracer
from pydantic import AfterValidator, Field
from pydantic.fields import FieldInfo

from bilevel.budget import UNLIMITED
from bilevel.naming import no_argument

P = ParamSpec("P")
R = TypeVar("R")

_CONFIG = pydantic.ConfigDict(strict=True, arbitrary_types_allowed=True)
_LONGEST_QUOTE = 60

Count = Annotated[
    int, Field(ge=1, le=UNLIMITED, description="Give a whole number of iterations, 1 or more.")
]
Cap = Annotated[
    int | None,
    Field(ge=1, le=UNLIMITED, description="Give a whole number of iterations, or None for no cap."),
]
Tolerance = Annotated[
    float,
    Field(gt=0.0, allow_inf_nan=False, description="Give a positive tolerance, such as 1e-3."),
]
Reduction = Annotated[
    float,
    Field(gt=0.0, lt=1.0, description="Each level's tolerance is this much smaller, such as 0.1."),
]
Growth = Annotated[
    float,
    Field(
        gt=1.0,
        allow_inf_nan=False,
        description="Each level has this many times the iterations, such as 1.5.",
    ),
]


def _hashable(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    try:
        hash(function)
    except TypeError:
        msg = "should be hashable"
        raise ValueError(msg) from None
    return function


Schedule = Annotated[
    Callable[[Any], Any],
    AfterValidator(_hashable),
    Field(description="Give a function of one integer, as optax schedules are."),
]


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """Check the arguments of a constructor against its annotations.

    Annotations are pydantic's (``Annotated[int, Field(ge=1)]``); the `description` of a
    field ends the message, so it should say what to pass instead.  Checking is strict:
    no strings for numbers, no floats for counts.  NumPy and JAX scalars count as the
    Python numbers they hold, so that a configuration is hashable and never an array.

    **Arguments:**

    - `function`: a constructor with annotated arguments.

    **Returns:** the same constructor; it raises a one-line `ValueError` for a bad value and
    a one-line `TypeError` for a missing or unknown argument.

    >>> from typing import Annotated
    >>> @checked
    ... def stairs(steps: Annotated[int, Field(ge=1, description="One is enough.")]):
    ...     return steps
    >>> stairs(0)
    Traceback (most recent call last):
    ...
    ValueError: stairs: steps should be greater than or equal to 1, got 0. One is enough.
    """
    owner = function.__qualname__.removesuffix(".__init__")

    # Built at the first call: annotations may name classes not defined yet, and an import
    # should not pay for schemas nobody uses.
    @functools.cache
    def validator() -> Callable[P, R]:
        return pydantic.validate_call(config=_CONFIG)(function)

    signature = inspect.signature(function)

    @functools.wraps(function)
    def construct(*args: P.args, **kwargs: P.kwargs) -> R:
        plain = tuple(_plain(value) for value in args)
        named = {name: _plain(value) for name, value in kwargs.items()}
        try:
            return validator()(*plain, **named)
        except pydantic.ValidationError as error:
            failure = _explain(owner, function, error)
        raise failure

    # What help() and editors show: types and defaults, without what checks them.
    plain: Any = construct
    plain.__signature__ = signature.replace(
        parameters=[
            parameter.replace(annotation=_bare(parameter.annotation))
            for parameter in signature.parameters.values()
        ]
    )
    return construct


def _bare(annotation: Any) -> Any:
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _bare(parts[0])
    if origin in {Union, types.UnionType}:
        return functools.reduce(lambda one, other: one | other, map(_bare, parts))
    return annotation


def _plain(value: Any) -> Any:
    scalar = isinstance(value, np.generic | np.ndarray | jax.Array) and value.ndim == 0
    return value.item() if scalar and not isinstance(value, Tracer) else value


def _explain(
    owner: str, function: Callable[..., Any], error: pydantic.ValidationError
) -> ValueError | TypeError:
    """The first wrong argument in one line: its name, what was expected, what came."""
    parameters = inspect.signature(function).parameters
    names = list(parameters)
    problems = error.errors(include_url=False)
    where = problems[0]["loc"][0]
    name = names[where] if isinstance(where, int) and where < len(names) else str(where)
    if problems[0]["type"] == "missing_argument":
        return TypeError(f"{owner}: the argument {name} is missing.")
    if problems[0]["type"] == "unexpected_positional_argument":
        msg = f"{owner}: too many arguments, got {_quoted(problems[0]['input'])} besides."
        if name in parameters:
            given = _quoted(problems[0]["input"])
            msg = f"{owner}: {name} is keyword-only: write {name}={given}."
        return TypeError(msg)
    if problems[0]["type"] == "multiple_argument_values":
        return TypeError(f"{owner}: {name} is given twice, by position and by name.")
    if problems[0]["type"].startswith("unexpected"):
        known = [known for known in names if known not in {"self", "cls"}]
        return TypeError(f"{owner}: {no_argument(name, known)}")
    # A union reports one problem a member: they are alternatives.
    same = [problem for problem in problems if problem["loc"][0] == where]
    expected = " or ".join(
        dict.fromkeys(
            problem["msg"].removeprefix("Input ").removeprefix("Value error, ") for problem in same
        )
    )
    expected = expected.replace(" or should be ", " or ")
    hint = _hint(function, name)
    return ValueError(f"{owner}: {name} {expected}, got {_quoted(problems[0]['input'])}.{hint}")


def _quoted(value: Any) -> str:
    quoted = repr(value)
    return quoted if len(quoted) <= _LONGEST_QUOTE else f"{quoted[:_LONGEST_QUOTE]}..."


def _hint(function: Callable[..., Any], name: str) -> str:
    hints = get_type_hints(function, include_extras=True)
    for part in get_args(hints.get(name)):
        for field in (part, *get_args(part)):
            if isinstance(field, FieldInfo) and field.description:
                return f" {field.description}"
    return ""
