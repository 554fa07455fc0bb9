"""Callbacks: what they see and stop."""

from collections.abc import Callable
from typing import Any

import optax
import pytest

from bilevel.outer.callbacks import Callback, Event, Patience, Target, TimeLimit
from bilevel.outer.run import Run

Train = Callable[..., Run]


def test_a_callback_sees_every_epoch_and_the_end(train: Train):
    seen: list[Any] = []

    class Watch(Callback):
        def start(self, event: Event) -> None:
            seen.append(("start", event.epoch, event.record.metric))

        def epoch(self, event: Event) -> None:
            seen.append((event.epoch, event.epochs, float(event.theta)))

        def end(self, run: Run) -> None:
            seen.append(("end", run.status))

    run = train(epochs=2, callbacks=[Watch()])
    assert seen[0] == ("start", 0, 3.0)
    assert [entry[0] for entry in seen] == ["start", 1, 2, "end"]
    assert seen[2] == (2, 2, float(run.theta))
    assert seen[3] == ("end", "completed")


def test_a_function_may_stop(train: Train):
    run = train(callbacks=[lambda event: event.stop("seen enough") if event.epoch == 3 else None])
    assert run.status == "stopped"
    assert run.summary.message == "seen enough"
    assert run.summary.epochs == 3


def test_a_target_stops_at_the_first_metric_that_meets_it(train: Train):
    run = train(callbacks=[Target(1.0)], epochs=50, optimizer=optax.sgd(0.9))
    metrics = run.history.column("metric")
    assert metrics[-1] <= 1.0 < metrics[-2]
    assert train(callbacks=[Target(4.0)]).summary.epochs == 0


def test_patience_waits_for_improvements(train: Train):
    def metric_of(values: list[float]) -> Callable[[Any], float]:
        remaining = iter(values)
        return lambda theta: next(remaining)

    values = [5.0, 4.0, 4.5, 3.99, 3.995, 3.98, 3.97, 1.0]
    run = train(validate=metric_of(values), jit_validate=False, callbacks=[Patience(3)], epochs=7)
    assert run.status == "completed"
    run = train(
        validate=metric_of(values), jit_validate=False, callbacks=[Patience(3, 0.1)], epochs=7
    )
    assert run.summary.epochs == 4  # 1 % better than 4.0 does not count as better


def test_a_time_limit_is_over_after_an_epoch(train: Train):
    assert train(callbacks=[TimeLimit(1e-9)]).summary.epochs == 1
    assert train(callbacks=[TimeLimit(1e9)], epochs=2).summary.epochs == 2


@pytest.mark.parametrize(
    "make",
    [
        lambda: Target(float("nan")),
        lambda: Patience(0),
        lambda: Patience(3, 1.5),
        lambda: TimeLimit(0.0),
    ],
)
def test_bad_settings_are_refused(make: Callable[[], Any]):
    with pytest.raises(ValueError, match="should be"):
        make()


@pytest.mark.parametrize("wrong", [3, Callback])
def test_what_is_no_callback_is_refused(train: Train, wrong: Any):
    for given in (wrong, [wrong]):
        with pytest.raises(TypeError, match="callbacks should be Callback objects or functions"):
            train(callbacks=given)


def test_a_class_for_a_callback_is_told_to_be_called(train: Train):
    with pytest.raises(TypeError, match=r"Write Callback\(\.\.\.\)\."):
        train(callbacks=Callback)


def test_a_single_callback_needs_no_list(train: Train):
    epochs: list[int] = []
    train(epochs=2, callbacks=lambda event: epochs.append(event.epoch))
    assert epochs == [1, 2]
    assert train(callbacks=Target(4.0)).summary.epochs == 0
