"""Durable: files and folders that are on disk whole, or not at all."""

import contextlib
import os
import shutil
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

HIDDEN = "."
"""What begins the names of folders that are not finished, or no longer wanted."""


class DamagedError(ValueError):
    """What is on disk is not what was written."""


def write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Make a folder of files that appears at once, after all of it has reached the disk.

    A crash at any moment leaves either nothing of that name or everything; an unfinished
    folder has a hidden name, which [`sweep`][] removes.

    **Arguments:**

    - `folder`: must not exist; its parent is made.
    - `files`: contents by name.

    **Raises:** `OSError` with the file that could not be written.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f"{HIDDEN}{folder.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        for name, content in files.items():
            _write(partial / name, content)
        sync(partial)
        partial.rename(folder)
        sync(folder.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write_file(path: Path, content: bytes) -> None:
    """Replace a file by another that has reached the disk, or leave it as it was."""
    partial = path.with_name(f"{HIDDEN}{path.name}.{os.getpid()}.partial")
    try:
        _write(partial, content)
        partial.replace(path)
        sync(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def remove_folder(folder: Path) -> None:
    """Remove a folder so that no part of it is ever seen under its name."""
    hidden = folder.with_name(f"{HIDDEN}{folder.name}.{os.getpid()}.removed")
    shutil.rmtree(hidden, ignore_errors=True)
    folder.rename(hidden)
    if hidden.is_dir():
        shutil.rmtree(hidden, ignore_errors=True)
    else:
        hidden.unlink(missing_ok=True)


def sweep(parent: Path) -> None:
    """Remove what crashes left unfinished in a folder."""
    if not parent.is_dir():
        return
    for entry in parent.iterdir():
        if entry.name.startswith(HIDDEN) and entry.suffix in (".partial", ".removed"):
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):
                    entry.unlink()


def sync(folder: Path) -> None:
    """Have the names in a folder reach the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        raise naming(error, folder) from None
    finally:
        os.close(handle)


def open_regular(path: Path, *, links: bool) -> BinaryIO | None:
    """Open a file for reading; `None` for a pipe, a device or a folder.

    **Arguments:**

    - `links`: whether a link is followed.

    **Raises:** `OSError` where it cannot be opened.
    """
    # Without blocking: a pipe of that name would wait for a writer.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)
    handle = os.open(path, flags if links else flags | getattr(os, "O_NOFOLLOW", 0))
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        return None
    return os.fdopen(handle, "rb")


def read_file(path: Path, most: int) -> bytes:
    """Read a regular file that is no link and no larger than it may be.

    **Raises:** [`DamagedError`][] where it is missing, something else or larger; `OSError`
    where it cannot be read.
    """
    try:
        file = open_regular(path, links=False)
    except FileNotFoundError:
        msg = f"{path} is missing"
        raise DamagedError(msg) from None
    except OSError as error:
        if path.is_symlink():
            msg = f"{path} is a link, which no checkpoint has"
            raise DamagedError(msg) from None
        raise naming(error, path) from None
    if file is None:
        msg = f"{path} is no regular file"
        raise DamagedError(msg)
    with file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            msg = f"{path} has {size:,} bytes, more than the {most:,} it may have"
            raise DamagedError(msg)
        return file.read(most + 1)


def _write(path: Path, content: bytes) -> None:
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        try:
            rest = memoryview(content)
            while rest:
                rest = rest[os.write(handle, rest) :]
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        raise naming(error, path) from None


def naming(error: OSError, path: Path) -> OSError:
    """The same error, naming the file: the system's says what, but not always where."""
    return type(error)(error.errno, error.strerror or str(error), str(path))
