"""Plotting: pictures are drawn, of whatever there is to draw."""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from bilevel.outer.compare import compare
from bilevel.outer.plotting import MissingPlotsError, _looks, _scale, plot_runs
from bilevel.outer.policy import SYNTAX
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
    with pytest.raises(MissingPlotsError, match="pip install matplotlib"):
        plot_runs({"full": [run]}, tmp_path / "a.png")


def test_a_policy_keeps_its_colour_in_every_company():
    alone, together = _looks(["prdp"]), _looks(["full", "fixed=4", "prdp"])
    assert alone["prdp"]["color"] == together["prdp"]["color"]
    assert _looks(["full, seed 3"])["full, seed 3"]["color"] == together["full"]["color"]
    colours = [look["color"] for look in _looks(list(SYNTAX)).values()]
    assert len(set(colours)) == len(SYNTAX)
    unknown = [look["color"] for look in _looks(["mine", "yours", "theirs", "ours"]).values()]
    assert len(set(unknown)) == 4


def test_lines_that_coincide_differ_in_style_and_the_later_is_the_thinner():
    looks = list(_looks(["full", "fixed=40", "fixed=60"]).values())
    assert len({str(look["linestyle"]) for look in looks}) == 3
    assert looks[0]["lw"] > looks[1]["lw"] > looks[2]["lw"]
    assert looks[0]["zorder"] < looks[1]["zorder"] < looks[2]["zorder"]


def figure_of(
    runs: dict[str, list[Run]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Figure:
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    plot_runs(runs, tmp_path / "a.png", title="two")
    return figures[0]


def test_policies_that_go_by_tolerances_have_a_panel_of_their_own(
    make_task: Callable[..., Task], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    runs = compare(make_task(epochs=3), ["full", "hoag=cubic"], seeds=2, progress=False).runs
    figure = figure_of(runs, tmp_path, monkeypatch)
    titles = [axis.get_title("left") for axis in figure.axes]
    assert titles[2:] == [
        "budget: iterations allowed in a solve",
        "budget: relative tolerance of a solve",
    ]
    pink = _looks(list(runs))["hoag=cubic"]["color"]
    assert [any(line.get_color() == pink for line in axis.lines) for axis in figure.axes] == [
        True,
        True,
        False,
        True,
    ]
    note = figure.get_supxlabel()
    assert "hoag=cubic goes by its tolerance" in note
    assert "Thin lines: one seed each, of 2" in note


def test_one_seed_needs_no_note(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    figure = figure_of({"full": [train(epochs=2)]}, tmp_path, monkeypatch)
    assert figure.get_supxlabel() == ""
    legend = figure.legends[0]
    assert [text.get_text() for text in legend.get_texts()] == ["full"]
    assert legend.get_title().get_text() == "two"


@pytest.mark.slow
def test_names_and_panels_do_not_overlap(
    make_task: Callable[..., Task], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    policies = ["full", "fixed=1:100000", "prdp", "hoag=exponential", "schedule=linear:2"]
    runs = compare(make_task(epochs=2), policies, progress=False).runs
    figure = figure_of(runs, tmp_path, monkeypatch)
    figure.draw_without_rendering()
    boxes = [figure.legends[0].get_window_extent()]
    boxes += [axis.get_tightbbox() for axis in figure.axes]
    for place, box in enumerate(boxes):
        assert box is not None
        assert figure.bbox.x0 - 1 <= box.x0
        assert box.x1 <= figure.bbox.x1 + 1
        assert not [other for other in boxes[:place] if other is not None and box.overlaps(other)]


@pytest.mark.parametrize("high", [1.5, 30.0, 5e3, 1e12])
def test_ticks_are_few_and_all_of_them_have_a_label(high: float):
    figure = Figure()
    axis = figure.subplots()
    axis.plot([0, 1], [1.0, high])
    _scale(axis.set_yscale, axis.yaxis, [np.array([1.0, high])])
    figure.draw_without_rendering()
    low, top = axis.get_ylim()
    shown = [tick for tick in axis.get_yticks() if low <= tick <= top]
    assert 2 <= len(shown) <= 8
    assert all(label.get_text() for label in axis.get_yticklabels())
    assert not [tick for tick in axis.get_yticks(minor=True) if low <= tick <= top]
