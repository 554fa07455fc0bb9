"""Versions: what a result was computed with."""

import importlib.metadata
import platform

PACKAGES = ("bilevel", "jax", "jaxlib", "numpy", "scipy", "equinox", "optax", "pydantic", "rich")
"""What every result depends on."""


def installed(package: str) -> str | None:
    """The version of a distribution; `None` if there is none.

    >>> installed("no-such-distribution") is None
    True
    """
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions(packages: tuple[str, ...] = PACKAGES) -> dict[str, str]:
    """Python's version and those of installed packages.

    >>> versions()["python"].split(".")[0]
    '3'
    """
    found = {"python": platform.python_version()}
    for package in packages:
        version = installed(package)
        if version is not None:
            found[package] = version
    return found
