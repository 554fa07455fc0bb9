"""Signatures: whether what a user gave can be called as it will be."""

import inspect
from typing import Any


def check_callable(owner: str, name: str, value: Any, arguments: tuple[str, ...]) -> None:
    """Refuse what cannot be called with the arguments that it will get.

    **Arguments:**

    - `owner`, `name`: whose argument it is, for the message.
    - `value`: what was given.
    - `arguments`: names of what it will be called with, by position.

    **Raises:** `TypeError` for what is no function, or takes other arguments.

    >>> check_callable("Task", "validate", lambda theta: theta, ("theta",))
    >>> try:
    ...     check_callable("Minimization", "objective", lambda x: x, ("x", "theta"))
    ... except TypeError as error:
    ...     print(error)
    Minimization: objective should take (x, theta), but it takes (x). Wrap it: lambda x, theta: ...
    """
    expected = f"({', '.join(arguments)})"
    if not callable(value):
        msg = f"{owner}: {name} should be a function of {expected}, got {brief(value)}."
        raise TypeError(msg)
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):  # built in, or C
        return
    try:
        signature.bind(*arguments)
    except TypeError:
        msg = (
            f"{owner}: {name} should take {expected}, but it takes {signature}. Wrap it: "
            f"lambda {', '.join(arguments)}: ..."
        )
        raise TypeError(msg) from None


def brief(value: object) -> str:
    """A value and its type, cut where it gets long.

    >>> brief(3)
    '3 of type int'
    """
    text = repr(value)
    short = text if len(text) <= 60 else f"{text[:60]}..."
    return f"{short} of type {type(value).__name__}"
