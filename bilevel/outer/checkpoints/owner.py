"""Owner: one process at a time keeps a run in a directory."""

import contextlib
import errno
import functools
import json
import os
import socket
import time
import weakref
from pathlib import Path
from typing import Any, Self

try:
    import fcntl
except ImportError:  # Windows has none
    fcntl = None

LOCK_FILE = "owner.json"

_WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


class DirectoryInUseError(RuntimeError):
    """Another process keeps its run in the directory.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder, Owner(Path(folder)):
    ...     try:
    ...         Owner(Path(folder))
    ...     except DirectoryInUseError as error:
    ...         print(str(error).partition(" since ")[0])
    /... is in use by process ... on ...
    """


class Owner:
    """Holds a directory until `release`, or until the process ends in whatever way.

    The system's own lock on a file, so there is none left over from a process that was killed;
    what stands in the file names the owner for the message. Children that are forked do not
    hold it on.

    **Arguments:**

    - `directory`: must exist.

    **Raises:** [`DirectoryInUseError`][] naming process and host.
    """

    def __init__(self, directory: Path):
        self._path = directory / LOCK_FILE
        self._handle: int | None = None
        while self._handle is None:
            handle = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                self._lock(handle)
                # Between opening and locking, an owner may have left and taken the file along.
                if _same(handle, self._path):
                    self._handle = handle
            finally:
                if self._handle is None:
                    os.close(handle)
        content = {"process": os.getpid(), "host": socket.gethostname(), "since": time.time()}
        # Words for others, who are told of "another process" where a full disk takes none.
        with contextlib.suppress(OSError):
            os.ftruncate(self._handle, 0)
            os.pwrite(self._handle, json.dumps(content).encode(), 0)
        _forget_in_children(self)

    def release(self) -> None:
        """Leave the directory to others."""
        if self._handle is None:
            return
        handle, self._handle = self._handle, None
        try:
            with contextlib.suppress(OSError):
                self._path.unlink(missing_ok=True)
        finally:
            os.close(handle)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _lock(self, handle: int) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            msg = (
                f"{self._path.parent} is in use by {_owner(handle)}. Wait until it ends, or name "
                "another directory."
            )
            raise DirectoryInUseError(msg) from None
        except OSError as error:
            # Some file systems have no locks: there, nobody is told of the other.
            if error.errno not in _WITHOUT_LOCKS:
                raise

    def forget(self) -> None:
        """Let go without leaving: in a forked child, the directory is still the parent's."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


_held: weakref.WeakSet[Owner] = weakref.WeakSet()


def _forget_in_children(owner: Owner) -> None:
    _watch_forks()
    _held.add(owner)


@functools.cache
def _watch_forks() -> None:
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=lambda: [held.forget() for held in list(_held)])


def _same(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _owner(handle: int) -> str:
    try:
        found: Any = json.loads(os.pread(handle, 4096, 0))
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(found["since"]))
        return f"process {int(found['process'])} on {found['host']} since {since}"
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return "another process"
