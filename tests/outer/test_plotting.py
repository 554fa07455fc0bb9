"""Plotting: pictures are drawn, of whatever there is to draw."""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from bilevel.outer.compare import compare
from bilevel.outer.plotting import MissingPlotsError, _apart, plot_runs
from bilevel.outer.run import Run
from bilevel.outer.task import Task
from bilevel.refinement.ladder import Ladder

Train = Callable[..., Run]
PNG = b"\x89PNG"


def test_a_comparison_is_drawn(make_task: Callable[..., Task], tmp_path: Path):
    runs = compare(make_task(epochs=3), ["full", "prdp"], seeds=2, progress=False).runs
    picture = plot_runs(runs, tmp_path / "new" / "a.png", title="two", metric_name="error")
    assert picture.read_bytes()[:4] == PNG


def test_runs_without_counts_and_with_nonfinite_metrics_are_drawn(train: Train, tmp_path: Path):
    runs = {
        "uncounted": [train(loss=lambda t, b, f: t**2, epochs=2)],
        "nan": [train(validate=lambda t: t * np.nan, epochs=2)],
        "tolerances": [train(ladder=Ladder.tolerances(iterations=9), epochs=2)],
    }
    for name, group in runs.items():
        assert plot_runs({name: group}, tmp_path / f"{name}.svg").stat().st_size > 1000


def test_nothing_to_draw_is_said(tmp_path: Path):
    with pytest.raises(ValueError, match="nothing to draw"):
        plot_runs({"full": []}, tmp_path / "a.png")


def test_without_matplotlib_the_extra_is_named(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = train(epochs=1)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingPlotsError, match=r"pip install 'bilevel\[plot\]'"):
        plot_runs({"full": [run]}, tmp_path / "a.png")


def test_names_stand_apart_and_inside():
    for heights in ([0.5, 0.5, 0.5], [0.98, 0.99, 1.0, 1.0], [0.0, 0.0, 0.01], [0.1, 0.9]):
        placed = _apart(heights, gap=0.1)
        assert np.all(np.diff(placed) >= 0.1 - 1e-12)
        assert min(placed) >= -1e-12
        assert max(placed) <= 1 + 1e-12
    assert _apart([0.1, 0.9], gap=0.1) == [0.1, 0.9]
