"""kill -9 at any moment: the run goes on where it was, and ends the same to the last bit."""

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from bilevel.outer.checkpoints.records import decode_records
from bilevel.outer.checkpoints.store import Store
from tests.faults import trainee

FULL = os.environ.get("BILEVEL_FAULTS") == "full"
KILLS = 200 if FULL else 12
"""Half of them inside a save."""


@pytest.fixture(scope="module")
def processes() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.faults.trainee"])
    return context


def disturbed(processes: Any, directory: Path, policy: str, wait: Any) -> tuple[bool, str, str]:
    """One life: whether it ended by itself, where it began, and its newest save."""
    hear, tell = processes.Pipe(duplex=False)
    child = processes.Process(target=trainee.live, args=(str(directory), policy, tell))
    child.start()
    tell.close()
    assert hear.poll(60)
    _, began = hear.recv()
    done = wait(hear)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    newest = (trainee.moments(directory) or [""])[-1]
    return done, began, newest


def at_random(hear: Any, generator: random.Random) -> bool:
    return _until(hear, time.monotonic() + generator.uniform(0.0, 3.0), None)


def in_a_save(hear: Any, generator: random.Random) -> bool:
    """A while after one of the writes of one of the saves was begun."""
    done = _until(hear, time.monotonic() + 60.0, generator.randrange(1, 100))
    time.sleep(generator.uniform(0.0, 0.002))
    return done


def _until(hear: Any, deadline: float, writes: int | None) -> bool:
    seen = 0
    while (left := deadline - time.monotonic()) > 0 and (writes is None or seen < writes):
        try:
            if not hear.poll(left):
                return False
            message = hear.recv()
        except EOFError:
            return True
        if message == "done":
            return True
        seen += 1
    return False


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["prdp", "auto"])
def test_killed_runs_end_as_if_nobody_had_killed_them(processes: Any, tmp_path: Path, policy: str):
    trainee.train(tmp_path / "whole", policy)
    expected = trainee.last_state(tmp_path / "whole")
    generator = random.Random(policy)  # noqa: S311
    kills = inside = lives = 0
    while kills < KILLS // 2:
        directory, finished, before = tmp_path / str(lives), False, ""
        lives += 1
        while not finished:
            kind = in_a_save if generator.random() < 0.6 else at_random
            if kills >= KILLS // 2:
                kind = lambda hear, _: _until(hear, time.monotonic() + 120.0, None)  # noqa: E731
            finished, began, newest = disturbed(
                processes,
                directory,
                policy,
                lambda hear: kind(hear, generator),  # noqa: B023
            )
            # Nothing that was on disk is lost: the next life begins where this one was.
            assert began == before
            assert newest >= began
            before = newest
            kills += not finished
            inside += kind is in_a_save and not finished
            if newest:
                store = Store(directory, {}, 2)
                whole = store.folders()[-1]
                store.check(whole, store._manifest(whole), {})
                content = (whole / "history.safetensors").read_bytes()
                assert len(decode_records(content, whole)) == int(newest[:8]) + 1
        assert trainee.last_state(directory) == expected
    assert inside >= KILLS // 8
