"""Store: the checkpoints of a run, newest last."""

import contextlib
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from jaxtyping import PyTree

from bilevel.outer.checkpoints import arrays
from bilevel.outer.checkpoints.durable import (
    DamagedError,
    read_file,
    remove_folder,
    sweep,
    write_folder,
)
from bilevel.outer.checkpoints.manifest import MOST_BYTES, SCHEMA, FileEntry, Manifest, digest
from bilevel.outer.fingerprint import differences, some
from bilevel.outer.run import CHECKPOINTS_FOLDER
from bilevel.outer.versions import versions

_MANIFEST, _DIGEST, _STATE, _HISTORY = (
    "manifest.json",
    "manifest.sha256",
    "state.safetensors",
    "history.jsonl",
)
_NAME = re.compile(r"^\d{8,}-\d{8,}$")
_MOST_RECORD = 2**16
"""Bytes of a record: a hundred times as many as any has."""


class Moment(NamedTuple):
    """How far a run is: epochs finished, and updates made in the one under way."""

    epoch: int
    batch: int

    @property
    def words(self) -> str:
        """For messages."""
        return f"epoch {self.epoch}" + (f", {self.batch} updates on" if self.batch else "")


class Stored(NamedTuple):
    """What a checkpoint gives back, and a line on each newer one that was damaged."""

    place: Moment
    state: PyTree
    history: bytes
    damaged: tuple[str, ...]


class OtherRunError(ValueError):
    """A checkpoint is whole, and of a run that was begun with something else."""


class Store:
    """Writes checkpoints, keeps the last ones and the best, and finds one that is whole.

    Each is a folder: the arrays of the state, the history so far, and a manifest with the
    SHA-256 of both, whose own stands beside it.

    **Arguments:**

    - `directory`: of the run.
    - `begun_with`: its fingerprint.
    - `last`: how many to keep, besides that of the lowest metric.
    """

    def __init__(self, directory: Path, begun_with: dict[str, str], last: int):
        self.folder = directory / CHECKPOINTS_FOLDER
        self._begun_with = begun_with
        self._last = last
        self._damaged: list[Path] = []

    def clear(self) -> None:
        """Remove all there are."""
        sweep(self.folder)
        if self.folder.is_dir():
            aside = [path for path in self.folder.iterdir() if path.suffix == ".damaged"]
            for folder in [*self.folders(), *aside]:
                remove_folder(folder)

    def folders(self) -> list[Path]:
        """Of all checkpoints, oldest first."""
        if not self.folder.is_dir():
            return []
        found = (entry for entry in self.folder.iterdir() if _NAME.match(entry.name))
        return sorted(found, key=lambda entry: _place(entry.name))

    def save(self, place: Moment, state: PyTree, history: bytes, metric: float | None) -> Path:
        """Write one.

        **Arguments:**

        - `place`: of the state; one that is there already is not written again.
        - `state`: pytree of arrays.
        - `history`: all records so far, as they are written.
        - `metric`: of the last finished epoch.

        **Raises:** `OSError` naming the file that could not be written.
        """
        folder = self.folder / f"{place.epoch:08d}-{place.batch:08d}"
        if folder.exists():
            return folder
        content, leaves = arrays.encode(state)
        known = metric is not None and math.isfinite(metric)
        manifest = Manifest(
            version=SCHEMA,
            epoch=place.epoch,
            batch=place.batch,
            metric=metric if known else None,
            begun_with=self._begun_with,
            files={_STATE: FileEntry.of(content), _HISTORY: FileEntry.of(history)},
            leaves=leaves,
            versions=versions(),
        ).encode()
        proof = f"{digest(manifest)}\n".encode()
        files = {_STATE: content, _HISTORY: history, _MANIFEST: manifest, _DIGEST: proof}
        write_folder(folder, files)
        return folder

    def prune(self, best: Moment | None) -> None:
        """Remove all but the last ones and the best.

        **Raises:** `OSError` naming what could not be removed.
        """
        for folder in self.folders()[: -self._last]:
            if best is None or _place(folder.name) != best:
                remove_folder(folder)

    def newest(self, like: Callable[[Moment], PyTree], *, strict: bool) -> Stored:
        """The newest checkpoint that is whole.

        **Arguments:**

        - `like`: from a moment to a state of the same structure.
        - `strict`: whether no newer one may be damaged.

        **Raises:** [`DamagedError`][] where there is none; [`OtherRunError`][] where it is of a
        run begun with something else; `OSError` where the disk cannot be read.
        """
        reasons: list[str] = []
        for folder in reversed(self.folders()):
            try:
                moment, state, history = self._read(folder, like)
            except (DamagedError, OSError) as error:
                reasons.append(f"the checkpoint {folder.name} is damaged: {error}")
                self._damaged.append(folder)
                if strict:
                    break
            else:
                return Stored(moment, state, history, tuple(reasons))
        msg = reasons[0] if reasons else f"there is no checkpoint in {self.folder}"
        if len(reasons) > 1:
            msg = f"{msg}; nor is any of the {len(reasons) - 1} before whole"
        elif reasons and strict:
            msg = f"{msg}. Without strict, the one before is taken"
        raise DamagedError(msg)

    def set_aside(self) -> None:
        """Rename what `newest` found damaged: its name will be needed again.

        **Raises:** `OSError` naming what could not be renamed.
        """
        sweep(self.folder)
        for folder in self._damaged:
            aside = folder.with_name(f"{folder.name}.damaged")
            if aside.exists():
                remove_folder(aside)
            folder.rename(aside)
        self._damaged.clear()

    def best(self) -> tuple[float, Moment] | None:
        """The lowest metric of a whole manifest at an epoch's end, and its place."""
        found: list[tuple[float, Moment]] = []
        for folder in self.folders():
            with contextlib.suppress(DamagedError, OSError):
                manifest = self._manifest(folder)
                if manifest.metric is not None and not manifest.batch:
                    found.append((manifest.metric, _place(folder.name)))
        return min(found, default=None)

    def _read(self, folder: Path, like: Callable[[Moment], PyTree]) -> tuple[Moment, PyTree, bytes]:
        manifest = self._manifest(folder)
        place = Moment(manifest.epoch, manifest.batch)
        different = differences(manifest.begun_with, self._begun_with)
        if different:
            raise OtherRunError(some(different))
        expected = like(place)
        most = {_STATE: arrays.most_bytes(expected), _HISTORY: _MOST_RECORD * (place.epoch + 2)}
        contents = self._contents(folder, manifest, most)
        where = folder / _STATE
        state = arrays.decode(contents[_STATE], manifest.leaves, expected, where)
        return place, state, contents[_HISTORY]

    def _manifest(self, folder: Path) -> Manifest:
        path = folder / _MANIFEST
        content = read_file(path, MOST_BYTES)
        proof = read_file(folder / _DIGEST, 65)
        if proof != f"{digest(content)}\n".encode():
            msg = f"{path} is not what was written: its SHA-256 is another"
            raise DamagedError(msg)
        try:
            manifest = Manifest.decode(content)
        except DamagedError as error:
            msg = f"{path}: {error}"
            raise DamagedError(msg) from None
        if set(manifest.files) != {_STATE, _HISTORY}:
            msg = f"{path} names other files than {_STATE} and {_HISTORY}"
            raise DamagedError(msg)
        if Moment(manifest.epoch, manifest.batch) != _place(folder.name):
            msg = f"{path} is of another checkpoint"
            raise DamagedError(msg)
        return manifest

    def _contents(self, folder: Path, manifest: Manifest, most: dict[str, int]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, entry in manifest.files.items():
            path, limit = folder / name, most.get(name, entry.size)
            if entry.size > limit:
                msg = f"{path} should have {entry.size:,} bytes, and {limit:,} are the most it may"
                raise DamagedError(msg)
            content = read_file(path, entry.size)
            if len(content) != entry.size:
                msg = f"{path} has {len(content):,} of its {entry.size:,} bytes"
                raise DamagedError(msg)
            if digest(content) != entry.sha256:
                msg = f"{path} is not what was written: its SHA-256 is another"
                raise DamagedError(msg)
            found[name] = content
        return found


def has_checkpoints(directory: Path) -> bool:
    """Whether a run left any there, whole or not."""
    return bool(Store(directory, {}, 1).folders())


def remove_checkpoints(directory: Path) -> None:
    """Remove all that a run left there."""
    Store(directory, {}, 1).clear()


def _place(name: str) -> Moment:
    epoch, _, batch = name.partition("-")
    return Moment(int(epoch), int(batch))
