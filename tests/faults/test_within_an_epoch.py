"""Ctrl-C between two batches: what is trained after it is what would have been trained."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

import bilevel as bl
from tests.faults import trainee

POLICIES = {
    "error": bl.ErrorControlled,
    "auto": bl.AutomaticRefinement,
    "schedule": lambda ladder: bl.ScheduledFidelity(ladder, lambda updates: updates // 3),
}


def train(directory: Path | None, policy: str, stop: tuple[int, int] | None, **options: Any) -> Any:
    made = trainee.task()
    drawn: list[int] = []
    source: Any = made.batches

    def batches(epoch: int, key: Any) -> Any:
        for number, batch in enumerate(source(epoch, key)):
            if (epoch, number) == stop:
                raise KeyboardInterrupt
            drawn.append(epoch)
            yield batch

    assert made.ladder is not None
    made = dataclasses.replace(made, batches=batches)
    run = bl.optimize(
        made,
        controller=POLICIES[policy](made.ladder),
        epochs=trainee.EPOCHS,
        directory=directory,
        checkpoints=bl.Checkpoints(seconds=1e9),
        progress=False,
        **options,
    )
    return run, drawn


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
def test_a_run_that_was_stopped_between_batches_ends_as_if_it_had_not_been(
    tmp_path: Path, policy: str
):
    whole, _ = train(None, policy, None)
    for place, stop in enumerate([(1, 1), (3, 2), (4, 4)]):
        directory = tmp_path / str(place)
        broken, _ = train(directory, policy, stop)
        assert broken.status == "interrupted"
        assert trainee.moments(directory)[-1] == f"{stop[0] - 1:08d}-{max(stop[1] - 1, 0):08d}"
        rest, drawn = train(directory, policy, None, resume=True)
        trainee.same(rest, whole)
        # Of the epochs before, no batch is drawn again.
        assert min(drawn) == stop[0]


def test_stopped_before_the_first_metric_there_is_nothing_to_go_on_from(tmp_path: Path):
    broken, _ = train(tmp_path, "auto", (1, 0))
    assert broken.status == "interrupted"
    assert trainee.moments(tmp_path) == []
    with pytest.raises(FileNotFoundError, match="Leave resume out to begin"):
        train(tmp_path, "auto", None, resume=True)
    assert not (tmp_path / "owner.json").exists()
