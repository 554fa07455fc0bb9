"""Store: the checkpoints of a run, newest last."""

import contextlib
import json
import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jaxtyping import PyTree

from bilevel.outer.checkpoint import fitted, named_arrays
from bilevel.outer.checkpoints import arrays
from bilevel.outer.checkpoints.durable import (
    DamagedError,
    new_folder,
    put_file,
    read_file,
    remove_folder,
    sweep,
)
from bilevel.outer.checkpoints.manifest import (
    MOST_BYTES,
    SCHEMA,
    FileEntry,
    Manifest,
    check_file,
    digest,
    entry_of,
    unique,
)
from bilevel.outer.checkpoints.records import decode_records, encode_records, most_record_bytes
from bilevel.outer.checkpoints.sharded import (
    is_sharded,
    orbax_library,
    read_sharded,
    write_sharded,
)
from bilevel.outer.fingerprint import OtherRunError, differences, some
from bilevel.outer.history import History
from bilevel.outer.processes.shared import decided, lay, shared
from bilevel.outer.run import CHECKPOINTS_FOLDER
from bilevel.outer.versions import versions

_MANIFEST, _DIGEST, _STATE, _HISTORY, _CALLBACKS = (
    "manifest.json",
    "manifest.sha256",
    "state.safetensors",
    "history.safetensors",
    "callbacks.json",
)
_SHARDED = "sharded"
_LINES = "history.jsonl"
"""The history in checkpoints of the first schema."""

_NAME = re.compile(r"^\d{8,}-\d{8,}$")
_MOST_LINE = 2**16
"""Bytes of a line: a hundred times as many as any has."""


class Moment(NamedTuple):
    """How far a run is: epochs finished, and updates made in the one under way."""

    epoch: int
    batch: int

    @property
    def words(self) -> str:
        """For messages."""
        return f"epoch {self.epoch}" + (f", {self.batch} updates on" if self.batch else "")

    @property
    def name(self) -> str:
        """Of its checkpoint's folder."""
        return f"{self.epoch:08d}-{self.batch:08d}"


class Stored(NamedTuple):
    """What a checkpoint gives back, and a line on each newer one that was damaged."""

    place: Moment
    state: PyTree
    history: History
    callbacks: dict[str, Any]
    compilations: tuple[int, int]
    damaged: tuple[str, ...]


class Store:
    """Writes checkpoints, keeps the last ones and the best, and finds one that is whole.

    Each is a folder: the arrays of the state, the history so far, and a manifest with the
    SHA-256 of every file, whose own stands beside it.

    **Arguments:**

    - `directory`: of the run.
    - `begun_with`: its fingerprint.
    - `last`: how many to keep, besides that of the lowest metric.
    - `orbax`: whether arrays that lie over several devices are written by Orbax.
    - `writes`: whether this process does.
    - `together`: whether all processes save at the same time, for each has a part of the arrays.
    """

    def __init__(
        self,
        directory: Path,
        begun_with: dict[str, str],
        last: int,
        *,
        orbax: bool = False,
        writes: bool = True,
        together: bool = False,
    ):
        self._writes, self._together = writes, together
        self.folder = directory / CHECKPOINTS_FOLDER
        self._begun_with = begun_with
        self._last = last
        if orbax:
            orbax_library()  # that it is missing is to be known before a run has begun
        self._orbax = orbax
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

    def save(
        self,
        place: Moment,
        state: PyTree,
        history: History,
        metric: float | None,
        *,
        records: int | None = None,
        callbacks: bytes = b"",
        compilations: tuple[int, int] = (0, 0),
    ) -> Path:
        """Write one.

        **Arguments:**

        - `place`: of the state; one that is there already is not written again.
        - `state`: pytree of arrays.
        - `history`: all records so far.
        - `metric`: of the last finished epoch.
        - `records`: how many of the history belong to it; all by default.
        - `callbacks`: their states, a JSON object; none by default.
        - `compilations`: so far, of the update and of all else.

        **Raises:** `OSError` naming the file that could not be written.
        """
        folder = self.folder / place.name
        if self._shared(folder.exists()):
            return folder
        named = named_arrays(state)
        apart = {name: leaf for name, leaf in named.items() if self._orbax and is_sharded(leaf)}
        content = arrays.encode({name: named[name] for name in named if name not in apart})
        count = len(history) if records is None else records
        files = {_STATE: content, _HISTORY: encode_records(history, count)}
        if callbacks:
            files[_CALLBACKS] = callbacks
        known = metric is not None and math.isfinite(metric)
        with contextlib.ExitStack() as stack:
            partial = Path(self._decided(lambda: str(stack.enter_context(new_folder(folder)))))
            if apart:
                write_sharded(partial / _SHARDED, apart)
            if not self._writes:
                return folder
            for name, part in files.items():
                put_file(partial / name, part)
            entries = {name: FileEntry.of(part) for name, part in files.items()}
            if apart:
                entries |= {name: entry_of(partial / name) for name in _within(partial / _SHARDED)}
            manifest = Manifest(
                version=SCHEMA,
                epoch=place.epoch,
                batch=place.batch,
                metric=metric if known else None,
                begun_with=self._begun_with,
                files=entries,
                leaves={name: arrays.entry_of(leaf) for name, leaf in named.items()},
                sharded=tuple(sorted(apart)),
                compilations=compilations,
                versions=versions(),
            ).encode()
            put_file(partial / _MANIFEST, manifest)
            put_file(partial / _DIGEST, f"{digest(manifest)}\n".encode())
        return folder

    def _shared(self, value: bool) -> bool:  # noqa: FBT001
        return shared(value) if self._together else value

    def _decided(self, function: Callable[[], str]) -> str:
        return decided(function, OSError) if self._together else function()

    def prune(self, best: Moment | None) -> None:
        """Remove all but the last ones and the best.

        **Raises:** `OSError` naming what could not be removed.
        """
        if not self._writes:
            return
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
                found = self._read(folder, like)
            except (DamagedError, OSError) as error:
                reasons.append(f"the checkpoint {folder.name} is damaged: {error}")
                self._damaged.append(folder)
                if strict:
                    break
            else:
                return found._replace(damaged=tuple(reasons))
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

    def _read(self, folder: Path, like: Callable[[Moment], PyTree]) -> Stored:
        manifest = self._manifest(folder)
        place = Moment(manifest.epoch, manifest.batch)
        different = differences(manifest.begun_with, self._begun_with)
        if different:
            raise OtherRunError(some(different))
        expected = like(place)
        most = {
            _STATE: arrays.most_bytes(expected),
            _HISTORY: most_record_bytes(place.epoch + 2),
            _LINES: _MOST_LINE * (place.epoch + 2),
            _CALLBACKS: MOST_BYTES,
        }
        self.check(folder, manifest, most)
        contents = {
            name: self._content(folder / name, manifest.files[name])
            for name in manifest.files
            if name in most
        }
        state = _placed(folder, manifest, contents[_STATE], expected)
        if _HISTORY in contents:
            history = decode_records(contents[_HISTORY], folder / _HISTORY)
        else:
            history = History.decode(contents[_LINES], folder / _LINES)
        callbacks = _states(contents.get(_CALLBACKS, b"{}"), folder / _CALLBACKS)
        return Stored(place, state, history, callbacks, manifest.compilations, ())

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
        own = {name for name in manifest.files if "/" not in name} - {_CALLBACKS}
        if own != {_STATE, _LINES if manifest.version == 1 else _HISTORY}:
            msg = f"{path} names other files than a checkpoint has"
            raise DamagedError(msg)
        if Moment(manifest.epoch, manifest.batch) != _place(folder.name):
            msg = f"{path} is of another checkpoint"
            raise DamagedError(msg)
        return manifest

    @staticmethod
    def check(folder: Path, manifest: Manifest, most: Mapping[str, int]) -> None:
        """Compare all files with their entries, in little memory, before any is read.

        **Arguments:**

        - `most`: bytes that a file may have, by name.

        **Raises:** [`DamagedError`][], `OSError`.
        """
        for name, entry in manifest.files.items():
            check_file(folder / name, entry, most.get(name, entry.size))
        apart = folder / _SHARDED
        there = set(_within(apart)) if apart.is_dir() or apart.is_symlink() else set[str]()
        strange = there - set(manifest.files)
        if strange:
            msg = f"{folder / min(strange)} is not in the manifest"
            raise DamagedError(msg)

    @staticmethod
    def _content(path: Path, entry: FileEntry) -> bytes:
        content = read_file(path, entry.size)
        if digest(content) != entry.sha256:  # changed since it was checked
            msg = f"{path} is not what was written: its SHA-256 is another"
            raise DamagedError(msg)
        return content


def _placed(folder: Path, manifest: Manifest, content: bytes, expected: PyTree) -> PyTree:
    """The state, each array where it was."""
    where = folder / _STATE
    apart = set(manifest.sharded)
    shardings = {
        name: entry.sharding.sharding(name)
        for name, entry in manifest.leaves.items()
        if entry.sharding is not None
    }
    if not apart <= set(shardings):
        msg = f"{where}: its manifest does not tell how {min(apart - set(shardings))} lies"
        raise DamagedError(msg)
    entries = {name: entry for name, entry in manifest.leaves.items() if name not in apart}
    found: dict[str, Any] = dict(arrays.decode(content, entries, where))
    for name in shardings.keys() & found.keys():
        found[name] = lay(found[name], shardings[name])
    if apart:
        like = {
            name: jax.ShapeDtypeStruct(
                manifest.leaves[name].shape, manifest.leaves[name].dtype, sharding=shardings[name]
            )
            for name in apart
        }
        # Of the shapes that are expected, before memory is asked for them.
        fitted(where, found | like, expected)
        found |= read_sharded(folder / _SHARDED, like)
    return fitted(where, found, expected)


def _states(content: bytes, where: Path) -> dict[str, Any]:
    try:
        found: Any = json.loads(content, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        msg = f"{where} is no JSON: {error}"
        raise DamagedError(msg) from None
    whole = isinstance(found, dict) and isinstance(found.get("states", {}), dict)
    if not whole or not isinstance(found.get("epoch", 0), int):
        msg = f"{where} does not hold the states of callbacks"
        raise DamagedError(msg)
    return found


def _within(folder: Path) -> list[str]:
    """All files in a folder, by their path from the folder's own parent on.

    **Raises:** [`DamagedError`][] for a link, which no checkpoint has.
    """
    found: list[str] = []
    for parent, folders, names in os.walk(folder):
        for name in [*folders, *names]:
            if (Path(parent) / name).is_symlink():
                msg = f"{Path(parent) / name} is a link, which no checkpoint has"
                raise DamagedError(msg)
        found += [(Path(parent) / name).relative_to(folder.parent).as_posix() for name in names]
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
