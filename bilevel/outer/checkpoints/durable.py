"""Durable: files and folders that are on disk whole, or not at all."""

import contextlib
import os
import shutil
import stat
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import BinaryIO

HIDDEN = "."
"""What begins the names of folders that are not finished, or no longer wanted."""


_PIECE = 2**20


class DamagedError(ValueError):
    """What is on disk is not what was written."""


@contextlib.contextmanager
def new_folder(folder: Path) -> Generator[Path]:
    """Make a folder that appears at once, after all that was put in it has reached the disk.

    A crash at any moment leaves either nothing of that name or everything; an unfinished
    folder has a hidden name, which [`sweep`][] removes.

    **Arguments:**

    - `folder`: must not exist; its parent is made.

    **Returns:** where to put its files, with [`put_file`][] or else synced by [`settle`][].

    **Raises:** `OSError` with the file that could not be written.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f"{HIDDEN}{folder.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        sync(partial)
        partial.rename(folder)
        sync(folder.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def settle(folder: Path) -> None:
    """Have all that others wrote into a folder reach the disk.

    **Raises:** `OSError` naming what could not.
    """
    for entry in folder.rglob("*"):
        sync(entry)
    sync(folder)


def write_file(path: Path, content: bytes) -> None:
    """Replace a file by another that has reached the disk, or leave it as it was."""
    partial = path.with_name(f"{HIDDEN}{path.name}.{os.getpid()}.partial")
    try:
        put_file(partial, content)
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


def sync(path: Path) -> None:
    """Have a file, or the names in a folder, reach the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        raise naming(error, path) from None
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
    with _opened(path, most) as file:
        return file.read(most + 1)


def pieces(path: Path, most: int) -> Iterator[bytes]:
    """As [`read_file`][], a piece at a time: for what is too large to be trusted at once."""
    with _opened(path, most) as file:
        while piece := file.read(_PIECE):
            yield piece


def _opened(path: Path, most: int) -> BinaryIO:
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
    size = os.fstat(file.fileno()).st_size
    if size > most:
        file.close()
        msg = f"{path} has {size:,} bytes, more than the {most:,} it may have"
        raise DamagedError(msg)
    return file


def put_file(path: Path, content: bytes) -> None:
    """Write a file that has reached the disk; its name has, when its folder is synced.

    **Raises:** `OSError` naming it.
    """
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
