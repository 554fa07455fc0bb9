"""Library: somebody else's, imported when it is asked for."""

import importlib
import warnings
from typing import Any

DISTRIBUTIONS = {"sklearn": "scikit-learn"}
"""Where what one installs is called otherwise than what one imports."""


def load(name: str) -> Any:
    """The library, imported.

    What it warns of at its import is its own affair (jaxopt, that it is no longer maintained),
    and filtered there and nowhere else.

    **Raises:** `ModuleNotFoundError` that says what to install.

    >>> load("math").floor(2.5)
    2
    >>> try:
    ...     load("no_such_library")
    ... except ModuleNotFoundError as error:
    ...     print(error)
    bilevel_solvers needs no_such_library: pip install 'bilevel[solvers]', or no_such_library alone.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != name.partition(".")[0]:
            raise
        root = name.partition(".")[0]
        distribution = DISTRIBUTIONS.get(root, root)
        msg = (
            f"bilevel_solvers needs {distribution}: pip install 'bilevel[solvers]', or "
            f"{distribution} alone."
        )
        raise ModuleNotFoundError(msg, name=error.name) from None


def origin(given: object) -> str:
    """Where an object or a class comes from, as "library.module".

    >>> origin(1.0)
    'builtins'
    """
    kind = given if isinstance(given, type) else type(given)
    return kind.__module__
