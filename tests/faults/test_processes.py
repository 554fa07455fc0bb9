"""One of four processes is killed or frozen: the others leave, and the run goes on."""

import os
import random
import signal
import sys
from pathlib import Path

import pytest

from bilevel.outer.processes.watch import LOST
from tests.faults import trainee
from tests.processes.running import Group

FULL = os.environ.get("BILEVEL_FAULTS") == "full"
COUNT = 4
KILLS, FREEZES = (20, 4) if FULL else (2, 1)
SECONDS = 30.0
WORDS = ("--quiet", "--set", "pause=0.05", "--epochs", "16", "--checkpoint-seconds", "0.3")
# Sooner than by default, for the tests' sake; all kills are told with the default.
SILENCE = () if FULL else ("--silence", "6")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("undisturbed")
    with Group(folder, COUNT, *WORDS) as group:
        assert {code for code, _ in group.codes().values()} == {0}, group.said(0)
    return trainee.last_state(folder / "run")


def disturbed(folder: Path, what: signal.Signals, generator: random.Random) -> list[float]:
    """Seconds that the others took to leave; none if the run had come to its end before."""
    victim = generator.randrange(COUNT)
    with Group(folder, COUNT, *WORDS, *SILENCE) as group:
        group.wait_until_connected()
        wait = generator.uniform(0.0, 10.0)
        ended = group.codes(seconds=wait)
        if any(code is not None for code, _ in ended.values()):
            return []
        group.send(victim, what)
        ended = group.codes(victim, seconds=SECONDS + 30.0)
        said = {number: group.said(number) for number in ended}
        if 0 in {code for code, _ in ended.values()}:
            return []  # it was at its end
    for number, (code, seconds) in ended.items():
        assert code == LOST, (victim, ended, said)
        assert seconds < SECONDS, (victim, ended, said)
        assert f"bilevel: process {victim} does not answer any more" in said[number], said
        assert f"process {number} of {COUNT}, leaves, too" in said[number]
        assert "Traceback" not in said[number]
    told = ", ".join(f"{seconds:.1f} s" for _, seconds in ended.values())
    sys.stdout.write(f"{what.name} of process {victim} after {wait:.1f} s: {told}\n")
    return [seconds for _, seconds in ended.values()]


@pytest.mark.parametrize(
    ("what", "times"), [(signal.SIGKILL, KILLS), (signal.SIGSTOP, FREEZES)], ids=["kill", "freeze"]
)
def test_a_lost_process_ends_all_and_the_run_goes_on(
    tmp_path: Path, undisturbed: str, what: signal.Signals, times: int
):
    generator = random.Random(f"{what} {COUNT}")  # noqa: S311
    seconds: list[float] = []
    lives = done = 0
    while done < times:
        folder = tmp_path / str(lives)
        folder.mkdir()
        lives += 1
        took = disturbed(folder, what, generator)
        if not took:
            continue
        seconds += took
        done += 1
        kept = trainee.moments(folder / "run")
        more = ("--resume", "--strict") if kept else ("--overwrite",)
        with Group(folder, COUNT, *WORDS, *more) as group:
            # As long as a busy machine needs: four processes on a core or two.
            ended = group.codes(seconds=400.0)
            assert {code for code, _ in ended.values()} == {0}, (ended, group.said(0))
        assert trainee.last_state(folder / "run") == undisturbed
    seconds.sort()
    median = seconds[len(seconds) // 2]
    sys.stdout.write(f"{done} × {what.name}: at most {seconds[-1]:.1f} s, median {median:.1f} s\n")
