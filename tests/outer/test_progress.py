"""Progress: lines where there is no terminal, a bar where there is one, or nothing."""

import io
import re
from collections.abc import Callable

import numpy as np
import pytest
from rich.console import Console

from bilevel.outer.history import Record
from bilevel.outer.progress import Lines, Live, Silence, _TimeLeft, batches_in, reporter
from bilevel.outer.run import Run

Train = Callable[..., Run]


def console(*, terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=300)


def text_of(out: Console) -> str:
    assert isinstance(out.file, io.StringIO)
    return out.file.getvalue()


def test_lines_tell_the_epochs(train: Train):
    out = console(terminal=False)
    train(epochs=3, progress=Lines(out, interval=0.0), label="prdp")
    lines = text_of(out).splitlines()
    assert lines[0] == "two, prdp: 3 epochs"
    assert lines[1].startswith("  epoch 0/3  metric 3")
    assert "level 11, budget 12  Σ 42 iterations" in lines[4]
    assert len(lines) == 5


def test_a_line_has_what_one_decides_by(train: Train):
    records = [
        Record(epoch=0, metric=3.0),
        Record(
            epoch=1, metric=2.0, loss=4.0, gradient_norm=0.5, error=0.125, level=2,
            budget_iterations=7, primal_iterations=1400, adjoint_iterations=700, elapsed=9.0,
        ),
    ]  # fmt: skip
    out = console(terminal=False)
    lines = Lines(out, interval=0.0)
    lines.start("made", 3, "distance")
    lines.epoch(records[0], None)
    lines.epoch(records[1], 2100)
    assert text_of(out).splitlines()[2] == (
        "  epoch 1/3  distance 2  loss 4  gradient 0.5 ± 0.125  level 2, budget 7  "
        "Σ 2,100 iterations  primal 1,400, adjoint 700 in this epoch  9.000 s"
    )


def test_the_time_that_is_left_is_that_of_the_epochs_that_are_left():
    left = _TimeLeft()
    assert left.after(0, 10, 100.0) is None
    assert left.after(1, 10, 160.0) is None  # with compilation
    assert left.after(2, 10, 162.0) == 16.0
    assert left.after(5, 10, 168.0) == 10.0
    assert left.after(10, 10, 178.0) is None
    resumed = _TimeLeft()
    assert resumed.after(7, 10, 50.0) is None
    assert resumed.after(8, 10, 53.0) == 6.0


def test_lines_come_at_intervals_and_at_the_end(train: Train):
    out = console(terminal=False)
    train(epochs=30, progress=Lines(out, interval=1e6))
    epochs = [line.split()[1] for line in text_of(out).splitlines()[1:]]
    assert epochs == ["0/30", "30/30"]


def test_skipped_updates_are_said_ever_more_rarely(train: Train):
    out = console(terminal=False)
    train(
        loss=lambda theta, batch, fidelity: (theta - batch) ** 2,
        batches=[1.0, np.nan],
        epochs=11,
        progress=Lines(out, interval=1e6),
    )
    said = re.findall(r"epoch (\d+): 1 of 2 updates skipped", text_of(out))
    assert said == ["1", "2", "4", "8"]
    assert "(8 epochs so far)" in text_of(out)


def test_a_terminal_gets_a_bar(train: Train):
    out = console(terminal=True)
    train(epochs=3, progress=Live(out))
    text = text_of(out)
    assert "3/3" in text
    assert "metric" in text


def test_a_failed_run_leaves_the_terminal_usable(train: Train):
    out = console(terminal=True)
    with pytest.raises(ZeroDivisionError):
        train(progress=Live(out), callbacks=[lambda event: 1 / 0])
    # The cursor that the bar had hidden is shown again.
    assert text_of(out).rstrip().endswith("\x1b[?25h")


def test_the_setting_chooses():
    assert isinstance(reporter(progress=False), Silence)
    assert isinstance(reporter(True, console(terminal=False)), Lines)
    assert isinstance(reporter(True, console(terminal=True)), Live)
    own = Silence()
    assert reporter(own) is own


def test_silence_is_silent(train: Train, capsys: pytest.CaptureFixture[str]):
    train(epochs=1, progress=False)
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_batches_are_counted_where_they_can_be():
    assert batches_in(None) == 1
    assert batches_in([1, 2]) == 2
    assert batches_in(lambda epoch, key: []) is None
