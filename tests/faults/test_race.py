"""Two runs for one directory: one has it, the other is told who."""

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import bilevel as bl
from bilevel.outer.checkpoints.owner import LOCK_FILE, DirectoryInUseError, Owner
from tests.faults import trainee

FULL = os.environ.get("BILEVEL_FAULTS") == "full"
RACES = 100 if FULL else 20


def compete(directory: str, start: Any, tell: Any, leave: Any) -> None:
    """Want the directory as soon as all do; have it until told to leave."""
    start.wait()
    try:
        owner = Owner(Path(directory))
    except DirectoryInUseError as error:
        tell.send(str(error))
        return
    tell.send(os.getpid())
    leave.wait()
    owner.release()


def test_one_of_two_has_the_directory_each_time(tmp_path: Path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.faults.test_race"])
    for _ in range(RACES):
        start, leave = context.Barrier(2), context.Event()
        pipes = [context.Pipe(duplex=False) for _ in range(2)]
        racers = [
            context.Process(target=compete, args=(str(tmp_path), start, tell, leave))
            for _, tell in pipes
        ]
        for racer in racers:
            racer.start()
        heard = [hear.recv() for hear, _ in pipes]
        leave.set()
        for racer in racers:
            racer.join()
        owners = [word for word in heard if isinstance(word, int)]
        assert len(owners) == 1, heard
        told = next(word for word in heard if isinstance(word, str))
        # Who comes between the lock and the name's being written hears of "another process".
        assert f"process {owners[0]} on " in told or "another process" in told


def test_a_dead_owner_leaves_nothing_to_clear(tmp_path: Path):
    (tmp_path / LOCK_FILE).write_text('{"process": 1, "host": "elsewhere", "since": 0}')
    with Owner(tmp_path):
        assert str(os.getpid()) in (tmp_path / LOCK_FILE).read_text()
        with pytest.raises(DirectoryInUseError, match=f"in use by process {os.getpid()} on "):
            Owner(tmp_path)
    assert not (tmp_path / LOCK_FILE).exists()
    Owner(tmp_path).release()


FORKING = """
import os, sys
from pathlib import Path
from bilevel.outer.checkpoints.owner import Owner

directory = Path(sys.argv[1])
owner = Owner(directory)
ready, go = os.pipe(), os.pipe()
child = os.fork()
if child == 0:
    os.close(go[1])
    os.write(ready[1], b"r")
    os.read(go[0], 1)
    os._exit(0)
os.read(ready[0], 1)
owner.forget()  # as if this process had been killed, and its child had not
Owner(directory).release()
os.write(go[1], b"g")
os.waitpid(child, 0)
print("released")
"""


def test_a_forked_child_does_not_hold_on(tmp_path: Path):
    # In a process without threads: JAX warns of forks.
    words = [sys.executable, "-c", FORKING, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        words, capture_output=True, text=True, env=environment, check=False, timeout=60
    )
    assert done.stdout == "released\n", done.stderr


@pytest.mark.slow
def test_a_run_has_its_directory_for_itself(tmp_path: Path):
    def intrude(event: Any) -> None:
        del event
        with pytest.raises(bl.DirectoryInUseError, match="in use by process"):
            trainee.train(tmp_path / "run", overwrite=True)

    run = trainee.train(tmp_path / "run", callbacks=[intrude])
    assert run.status == "completed"
    assert not (tmp_path / "run" / LOCK_FILE).exists()
