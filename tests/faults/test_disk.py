"""Disks that fail or fill up: the run goes on where it can, and what is kept is whole."""

import errno
import itertools
import os
import random
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import pytest

import bilevel as bl
from bilevel.outer.checkpoints.owner import LOCK_FILE
from bilevel.outer.checkpoints.store import Store
from tests.faults import trainee

# Of a folder's iterator, where a failing disk stopped its removal.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

FULL = os.environ.get("BILEVEL_FAULTS") == "full"
CALLS = ("open", "write", "pwrite", "fsync", "rename", "replace", "mkdir")
ERRORS = (errno.ENOSPC, errno.EIO, errno.EACCES)
CASES = list(itertools.product(CALLS, ERRORS, ("once", "for good"), (1, 2, 3, 5, 9, 17, 33, 65)))
CHOSEN = CASES if FULL else random.Random(0).sample(CASES, 12)  # noqa: S311


class Disk:
    """Fails from the n-th call of one function that touches the directory, or at it only."""

    def __init__(self, directory: Path, call: str, error: int, length: str, first: int):
        self._directory, self._call = directory, call
        self._error, self._length, self._first = error, length, first
        self._real: Callable[..., Any] = getattr(os, call)
        self.calls = 0
        self.failed: list[str] = []

    def __call__(self, target: Any, *arguments: Any, **options: Any) -> Any:
        where = _path(target) if isinstance(target, int) else str(target)
        if where.startswith(str(self._directory)):
            self.calls += 1
            if self.calls == self._first or (
                self._length == "for good" and self.calls > self._first
            ):
                self.failed.append(Path(where).name)
                raise OSError(self._error, os.strerror(self._error), where)
        return self._real(target, *arguments, **options)

    def __enter__(self) -> Self:
        setattr(os, self._call, self)
        return self

    def __exit__(self, *_: object) -> None:
        setattr(os, self._call, self._real)


def _path(handle: int) -> str:
    return str(Path(f"/proc/self/fd/{handle}").readlink())


@pytest.fixture(scope="module")
def whole() -> bl.Run:
    return trainee.train(None)


def endured(train: Callable[[], object]) -> list[str]:
    """What was said while training, warnings and a last error."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        failure = ""
        try:
            train()
        except OSError as error:
            failure = str(error)
    return [str(warning.message) for warning in said] + [failure]


def goes_on(directory: Path, whole: bl.Run) -> None:
    """What is kept is whole, and the run that goes on from it ends as it would have."""
    if trainee.moments(directory):
        store = Store(directory, {}, 2)
        for folder in store.folders():
            store.check(folder, store._manifest(folder), {})
        trainee.same(trainee.train(directory, resume=True), whole)


@pytest.mark.slow
@pytest.mark.parametrize(("call", "error", "length", "first"), CHOSEN)
def test_a_failing_disk(
    tmp_path: Path, whole: bl.Run, call: str, error: int, length: str, first: int
):
    directory = tmp_path / "run"
    with Disk(directory, call, error, length, first) as disk:
        said = endured(lambda: trainee.train(directory))
    # The lock holds without the words in its file, which tell others whose it is.
    words_alone = call == "pwrite" and disk.failed == [LOCK_FILE]
    if disk.failed and not words_alone:
        # All that is said names the file and the cause.
        told = [line for line in said if os.strerror(error) in line and str(directory) in line]
        assert told, said
    goes_on(directory, whole)


@pytest.fixture
def small_disk() -> Iterator[Path]:
    # Not in pytest's own folder, which it could not remove if this process were killed.
    folder = Path(tempfile.mkdtemp(prefix="bilevel-disk-"))
    mount = ["mount", "-t", "tmpfs", "-o", "size=1024k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small disk can be mounted by root only")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)  # noqa: S607
    folder.rmdir()


@pytest.mark.slow
@pytest.mark.parametrize("free", [0, 4096, 40960, 81920])
def test_a_full_disk(small_disk: Path, whole: bl.Run, free: int):
    directory = small_disk / "run"
    stop = lambda event: event.stop("half") if event.epoch == 2 else None  # noqa: E731
    trainee.train(directory, callbacks=[stop], seconds=1e9)
    before = trainee.moments(directory)
    filler = small_disk / "filler"
    room = os.statvfs(small_disk)
    filler.write_bytes(bytes(max(room.f_bavail * room.f_bsize - free, 0)))
    said = endured(lambda: trainee.train(directory, resume=True))
    kept = trainee.moments(directory)
    assert kept[-1] >= before[-1]
    if free == 0:
        assert any("No space left on device" in line and str(directory) in line for line in said)
    filler.unlink()
    goes_on(directory, whole)
