"""`bilevel info`: versions, devices, adapters, and what is missing for each extra."""

import argparse
import importlib.metadata
import importlib.util
import json
import re
import tomllib
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.markup import escape
from rich.text import Text

from bilevel.cli.failure import DONE
from bilevel.cli.output import put
from bilevel.cli.training import console
from bilevel.outer import text
from bilevel.outer.versions import installed, versions

ADAPTERS = {
    "bilevel_pde": ("pde", "operators of PDEs on grids"),
    "bilevel_arrays": ("arrays", "PyTorch, CuPy and NumPy"),
    "bilevel_solvers": ("solvers", "solvers of other libraries, and BilevelSearch"),
}
"""Import package of each adapter, its extra, and what it brings."""

_ABSENT = "not part of this version"

_DISTRIBUTION = "bilevel"
_REQUIREMENT = re.compile(r"^\s*([A-Za-z0-9._-]+)\s*(?:\[([^\]]*)\])?")
_EXTRA = re.compile(r"""extra\s*==\s*["']([^"']+)["']""")


def info(options: argparse.Namespace) -> int:
    """Print what there is and what is missing.

    **Returns:** the exit code.
    """
    found = collect()
    if options.json:
        put(json.dumps(found, indent=2))
    else:
        console().print(_tables(found))
    return DONE


def collect() -> dict[str, Any]:
    """What there is and what is missing, as plain data."""
    return {
        "versions": versions(),
        "devices": _devices(),
        "adapters": {name: importlib.util.find_spec(name) is not None for name in ADAPTERS},
        "extras": {
            extra: {"missing": [name for name in names if installed(name) is None]}
            for extra, names in _extras().items()
        },
    }


def _devices() -> list[str]:
    import jax

    try:
        return [f"{device.platform}: {device.device_kind}" for device in jax.devices()]
    except RuntimeError as error:
        # A machine with a broken driver is when this command is needed most.
        return [f"none usable: {' '.join(str(error).split())}"]


def _extras() -> dict[str, list[str]]:
    """The distributions each extra asks for, extras of extras included."""
    direct: dict[str, list[tuple[str, str]]] = {}
    for extra, requirement in _requirements():
        match = _REQUIREMENT.match(requirement)
        direct.setdefault(extra, [])
        if match is not None:
            direct[extra].append((match.group(1), match.group(2) or ""))
    return {extra: sorted(_expanded(extra, direct, set())) for extra in sorted(direct)}


def _expanded(extra: str, direct: dict[str, list[tuple[str, str]]], seen: set[str]) -> set[str]:
    names: set[str] = set()
    if extra in seen:
        return names
    seen.add(extra)
    for name, nested in direct.get(extra, []):
        if name == _DISTRIBUTION:
            for part in nested.split(","):
                names |= _expanded(part.strip(), direct, seen)
        else:
            names.add(name)
    return names


def _requirements() -> list[tuple[str, str]]:
    """Pairs of extra and requirement: from the installed distribution, else from the sources."""
    try:
        metadata = importlib.metadata.metadata(_DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return _from_sources()
    pairs = [(extra, "") for extra in metadata.get_all("Provides-Extra") or []]
    for requirement in importlib.metadata.requires(_DISTRIBUTION) or []:
        marker = _EXTRA.search(requirement)
        if marker is not None:
            pairs.append((marker.group(1), requirement))
    return pairs


def _from_sources() -> list[tuple[str, str]]:
    path = Path(__file__).resolve().parents[2] / "pyproject.toml"
    if not path.is_file():
        return []
    project = tomllib.loads(path.read_text(encoding="utf-8")).get("project", {})
    return [
        (extra, requirement)
        for extra, requirements in project.get("optional-dependencies", {}).items()
        for requirement in ("", *requirements)
    ]


def _tables(found: dict[str, Any]) -> Group:
    version_table = text.table(title="versions")
    version_table.add_column("package")
    version_table.add_column("version")
    for name, version in found["versions"].items():
        version_table.add_row(name, version)
    devices = Text("devices\n\n" + "\n".join(f" {device}" for device in found["devices"]) + "\n")
    adapters = text.table(title="adapters")
    for column in ("adapter", "found", "what it brings"):
        adapters.add_column(column)
    for name, present in found["adapters"].items():
        adapters.add_row(name, "yes" if present else _ABSENT, ADAPTERS[name][1])
    of_adapter = {extra: name for name, (extra, _) in ADAPTERS.items()}

    def absent(extra: str) -> bool:
        return not found["adapters"].get(of_adapter.get(extra, ""), True)

    useless = {
        name
        for extra, state in found["extras"].items()
        if absent(extra)
        for name in state["missing"]
    }
    extras = text.table(title="extras")
    for column in ("extra", "missing", "to install"):
        extras.add_column(column)
    for extra, state in found["extras"].items():
        missing = [name for name in state["missing"] if absent(extra) or name not in useless]
        # bilevel is on no package index, so an extra of it cannot be asked for by name.
        command = escape(f"pip install {' '.join(missing)}") if missing else ""
        extras.add_row(
            extra, ", ".join(missing) or "nothing", _ABSENT if absent(extra) else command
        )
    return Group(version_table, devices, adapters, extras)
