"""Library: somebody else's, imported when it is asked for."""

import importlib
from typing import Any

DISTRIBUTIONS = {
    "array_api_compat": "array-api-compat",
    "cupy": "cupy-cuda12x (or the build for your CUDA)",
}
"""Where what one installs is called otherwise than what one imports."""


def load(name: str) -> Any:
    """The library, imported.

    **Raises:** `ModuleNotFoundError` that says what to install.

    >>> load("math").floor(2.5)
    2
    >>> try:
    ...     load("no_such_library")
    ... except ModuleNotFoundError as error:
    ...     print(error)
    bilevel_arrays needs no_such_library, which is not installed: pip install no_such_library
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        root = name.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != root:
            raise
        distribution = DISTRIBUTIONS.get(root, root)
        msg = (
            f"bilevel_arrays needs {root}, which is not installed: pip install {distribution}"
            f"{_BUILDS if root == 'torch' else ''}"
        )
        raise ModuleNotFoundError(msg, name=error.name) from None


_BUILDS = ", in the build for your accelerator, or for the CPU alone"
