"""Manifest: what a checkpoint is of, and the fingerprints of its files."""

import hashlib
import json
import math
from pathlib import Path
from typing import Annotated, Any

import pydantic
from pydantic import Field

from bilevel.outer.checkpoints.durable import DamagedError, pieces
from bilevel.outer.checkpoints.part import Part, Size
from bilevel.outer.checkpoints.sharding import ShardingEntry

SCHEMA = 2
"""Of the manifest as it is written; older ones are read, newer ones refused."""

MOST_BYTES = 16 * 2**20
"""A manifest may have: far more than any has, and little enough to be read by mistake."""

FileName = Annotated[
    str, Field(pattern=r"^([a-z][a-z0-9_]*\.[a-z0-9]+|sharded(/[A-Za-z0-9_][A-Za-z0-9_.-]*){1,8})$")
]
"""Of the checkpoint's own, or in its folder of sharded arrays; none that climbs out of it."""


class FileEntry(Part):
    """Of one file: how long it is, and its SHA-256."""

    size: Size
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]

    @classmethod
    def of(cls, content: bytes) -> "FileEntry":
        """Of a file's content."""
        return cls(size=len(content), sha256=digest(content))


class LeafEntry(Part):
    """Of one array: its dtype by name, its shape, and how it lies over several devices."""

    dtype: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,31}$")]
    shape: tuple[Size, ...]
    sharding: ShardingEntry | None = None


class Manifest(Part):
    """What a checkpoint is of.

    - `version`: of the schema.
    - `epoch`, `batch`: epochs finished, and updates made in the one under way.
    - `metric`: of the last finished epoch, where it is a finite number.
    - `begun_with`: the run's fingerprint.
    - `files`: by name.
    - `leaves`: arrays by the path of their leaf.
    - `sharded`: which of them Orbax has written, in a folder of their own.
    - `compilations`: so far, of the update and of all else.
    - `versions`: of what wrote it.
    """

    version: Annotated[int, Field(ge=1)]
    epoch: Size
    batch: Size
    metric: float | None
    begun_with: dict[str, str]
    files: dict[FileName, FileEntry]
    leaves: dict[str, LeafEntry]
    sharded: tuple[str, ...] = ()
    compilations: tuple[Size, Size] = (0, 0)
    versions: dict[str, str]

    def encode(self) -> bytes:
        """As it is written: one way only, so that every other text is a damaged one."""
        metric = self.metric
        plain = self.model_dump(mode="json")
        plain["metric"] = metric if metric is not None and math.isfinite(metric) else None
        return json.dumps(plain, sort_keys=True, indent=1, allow_nan=False).encode() + b"\n"

    @classmethod
    def decode(cls, content: bytes) -> "Manifest":
        """Read what `encode` wrote.

        **Raises:** [`DamagedError`][] in one line for anything else.
        """
        try:
            plain: Any = json.loads(content, object_pairs_hook=unique)
        except (ValueError, RecursionError) as error:
            msg = f"it is no JSON: {error}"
            raise DamagedError(msg) from None
        version = plain.get("version") if isinstance(plain, dict) else None
        if isinstance(version, int) and version > SCHEMA:
            msg = (
                f"it has version {version} and this bilevel reads up to {SCHEMA}: it was written "
                "by a later one"
            )
            raise DamagedError(msg)
        try:
            # As JSON, where a list is a tuple.
            found = cls.model_validate_json(content)
        except pydantic.ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            msg = f"{where or 'it'}: {first['msg']}"
            raise DamagedError(msg) from None
        return found


def check_file(path: Path, entry: FileEntry, most: int) -> None:
    """Compare a file with its entry, in little memory.

    **Raises:** [`DamagedError`][] where it is another than was written, or has more than `most`
    bytes; `OSError` where it cannot be read.
    """
    if entry.size > most:
        msg = f"{path} should have {entry.size:,} bytes, and {most:,} are the most it may"
        raise DamagedError(msg)
    hasher, size = hashlib.sha256(), 0
    for piece in pieces(path, entry.size):
        hasher.update(piece)
        size += len(piece)
    if size != entry.size:
        msg = f"{path} has {size:,} of its {entry.size:,} bytes"
        raise DamagedError(msg)
    if hasher.hexdigest() != entry.sha256:
        msg = f"{path} is not what was written: its SHA-256 is another"
        raise DamagedError(msg)


def entry_of(path: Path) -> FileEntry:
    """The entry of a file that somebody else has written.

    **Raises:** `OSError`, [`DamagedError`][] where it is no file.
    """
    hasher, size = hashlib.sha256(), 0
    for piece in pieces(path, path.stat().st_size):
        hasher.update(piece)
        size += len(piece)
    return FileEntry(size=size, sha256=hasher.hexdigest())


def digest(content: bytes) -> str:
    """SHA-256, hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of a JSON text, none of whose keys stands there twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        msg = f"{twice[:60]!r} stands there twice"
        raise ValueError(msg)
    return found
