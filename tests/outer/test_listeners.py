"""Listeners: callbacks whose memory outlives a break of the run."""

import json
from pathlib import Path
from typing import Any

import pytest

import bilevel as bl
from tests.faults import trainee


class Average(bl.Callback):
    """Stops when a running average of the metric has come below a number."""

    def __init__(self) -> None:
        self.average, self.seen = 0.0, []

    def start(self, event: bl.Event) -> None:
        self.average, self.seen = float(event.record.metric or 0.0), [event.epoch]

    def epoch(self, event: bl.Event) -> None:
        self.average = 0.5 * self.average + 0.5 * float(event.record.metric or 0.0)
        self.seen.append(event.epoch)

    def state(self) -> Any:
        return {"average": self.average, "seen": self.seen}

    def restore(self, state: Any) -> None:
        self.average, self.seen = state["average"], state["seen"]


def broken_in(epoch: int) -> Any:
    def fail(event: bl.Event) -> None:
        if event.epoch == epoch:
            raise KeyboardInterrupt

    return fail


@pytest.mark.parametrize("first", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_callback_goes_on_as_if_there_had_been_no_break(tmp_path: Path, first: bool):
    undisturbed = [Average(), Average()]
    trainee.train(None, callbacks=undisturbed)
    for epoch in (1, 3):
        directory = tmp_path / str(epoch)
        # Broken off by a callback before and after the others have seen the epoch.
        breaking = [broken_in(epoch)]
        before = [*breaking, Average(), Average()] if first else [Average(), Average(), *breaking]
        assert trainee.train(directory, callbacks=before).status == "interrupted"
        after = [Average(), Average()]
        trainee.train(directory, callbacks=after, resume=True)
        for one, other in zip(undisturbed, after, strict=True):
            assert one.state() == other.state()  # each epoch seen once, the same to the last bit
        kept = directory / "checkpoints" / trainee.moments(directory)[-1] / "callbacks.json"
        assert set(json.loads(kept.read_text())["states"]) == {"Average", "Average 2"}


def test_a_state_that_is_not_plain_names_the_callback():
    class Odd(bl.Callback):
        def state(self) -> Any:
            return {1j}

    with pytest.raises(TypeError, match=r"Odd\.state\(\) should give numbers, text"):
        trainee.train(None, callbacks=[Odd()])


def test_a_state_that_is_large_names_the_callback():
    class Large(bl.Callback):
        def state(self) -> Any:
            return "x" * 2**20

    with pytest.raises(ValueError, match=r"that of .*Large is the largest"):
        trainee.train(None, callbacks=[Average(), Large()])


def test_callbacks_without_state_leave_nothing(tmp_path: Path):
    trainee.train(tmp_path, callbacks=[lambda event: None])
    assert not list(tmp_path.rglob("callbacks.json"))


def test_a_resumed_run_tells_all_its_compilations(tmp_path: Path):
    whole = trainee.train(tmp_path)
    again = trainee.train(tmp_path, resume=True)
    assert again.summary.compilations == whole.summary.compilations == 1
    assert again.summary.other_compilations == whole.summary.other_compilations


@pytest.mark.parametrize("ends", ["completed", "interrupted"])
def test_no_record_waits_longer_than_the_run(tmp_path: Path, ends: str):
    behind: list[int] = []

    def watch(event: bl.Event) -> None:
        behind.append(len(event.history) - len(bl.History.read(tmp_path / "history.jsonl")))
        if ends == "interrupted" and event.epoch == 3:
            raise KeyboardInterrupt

    run = trainee.train(tmp_path, callbacks=[watch], seconds=1e9)
    assert run.status == ends
    # They wait for each other, and for nothing after the end.
    assert max(behind) > 0
    assert (tmp_path / "history.jsonl").read_bytes() == run.history.lines(0, len(run.history))


def test_records_are_on_disk_before_a_checkpoint_is(tmp_path: Path):
    def look(event: bl.Event) -> None:
        last = trainee.moments(tmp_path)[-1]
        assert last.startswith(f"{event.epoch:08d}-")
        assert len(bl.History.read(tmp_path / "history.jsonl")) == event.epoch + 1

    assert trainee.train(tmp_path, callbacks=[look], seconds=0.0).status == "completed"
