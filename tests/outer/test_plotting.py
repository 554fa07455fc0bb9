"""Plotting: pictures are drawn, of whatever there is to draw."""

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from bilevel.outer.compare import compare
from bilevel.outer.history import Record
from bilevel.outer.look import looks as _looks
from bilevel.outer.plotting import MissingPlotsError, plot_runs
from bilevel.outer.policy import SYNTAX
from bilevel.outer.run import Run
from bilevel.outer.task import Task
from bilevel.outer.ticks import scale
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
    assert titles == [
        *["metric"] * 3,
        "budget: iterations allowed in a solve",
        "budget: relative tolerance of a solve",
        "Σ iterations: primal, adjoint (pale)",
        "wall time, s: solver, rest (pale), compile (grey)",
        "iterations of an outer step, shaded what is saved",
    ]
    pink = _looks(list(runs))["hoag=cubic"]["color"]
    drawn = [any(line.get_color() == pink for line in axis.lines) for axis in figure.axes[:5]]
    assert drawn == [True, True, True, False, True]
    note = figure.get_supxlabel()
    assert "hoag=cubic goes by its tolerance" in note
    assert "Lines: medians of 2 seeds, in bands from the lowest to the highest." in note
    assert "95 % confidence interval" in note


def test_one_seed_needs_no_note(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    figure = figure_of({"full": [train(epochs=2)]}, tmp_path, monkeypatch)
    assert figure.get_supxlabel() == ""
    legend = figure.legends[0]
    assert [text.get_text() for text in legend.get_texts()] == ["full"]
    assert legend.get_title().get_text() == "two"


def test_bars_are_as_long_as_the_table_says(
    made_run: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def spent(primal: int, adjoint: int, **summary: Any) -> Run:
        record = Record(
            epoch=1, metric=0.5, primal_iterations=primal, adjoint_iterations=adjoint, updates=1
        )
        last = dataclasses.replace(record, elapsed=9.0, compile_seconds=4.0)
        return made_run(last).with_summary(**summary)

    runs = {
        "full": [spent(100, 20, solver_seconds=2.0), spent(140, 20, solver_seconds=3.0)],
        "prdp": [spent(10, 2), spent(10, 2)],
    }
    figure = figure_of(runs, tmp_path, monkeypatch)
    work_axis, time_axis = (
        next(axis for axis in figure.axes if axis.get_title("left").startswith(start))
        for start in ("Σ iterations", "wall time, s")
    )
    work, time = ([bar.get_width() for bar in axis.patches] for axis in (work_axis, time_axis))
    assert work == pytest.approx([120, 20, 10, 2])
    assert time == pytest.approx([2.5, 2.5, 4, 0, 5, 4])
    # Half of the interval by Student's t for 120 and 160: 12.7062 * 20.
    (whisker,) = [whiskers for whiskers in work_axis.collections if len(whiskers.get_paths())]
    assert whisker.get_paths()[0].vertices[:, 0] == pytest.approx(
        [140 - 254.124, 140 + 254.124], abs=1e-3
    )


@pytest.mark.parametrize(
    ("side", "values"), [("budget_iterations", (4, 40)), ("budget_rtol", (1e-3, 1e-6))]
)
def test_an_adjoint_budget_of_its_own_is_dashed_and_explained(
    made_run: Callable[..., Run],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    side: str,
    values: tuple[Any, Any],
):
    def run(own: Any, other: Any) -> Run:
        fields = {side: own, f"adjoint_{side}": other}
        # The first epoch's are the same: it is the path that counts.
        return made_run(
            *(
                Record(epoch=place, metric=1.0, updates=1, **fields | first)
                for place, first in ((1, {f"adjoint_{side}": own}), (2, {}))
            )
        )

    apart, alike = run(*values), run(values[1], values[1])
    explained = "dashed the adjoint's"
    panel = 2
    figure = figure_of({"full": [apart]}, tmp_path, monkeypatch)
    assert explained in figure.get_supxlabel()
    assert [line.get_linestyle() for line in figure.axes[panel].lines[::2]] == ["-", "--"]
    figure = figure_of({"full": [alike]}, tmp_path, monkeypatch)
    assert explained not in figure.get_supxlabel()
    assert [line.get_linestyle() for line in figure.axes[panel].lines[::2]] == ["-"]


def test_a_target_is_marked_and_a_failure_named(
    made_run: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    record = Record(epoch=1, metric=0.5, updates=1, elapsed=1.0)
    runs = {"full": [made_run(record)], "prdp": [made_run(record, status="nonfinite")]}
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    plot_runs(runs, tmp_path / "a.png", target=0.125)
    marks = [line.get_ydata() for line in figures[0].axes[0].lines]
    assert any(list(mark) == [0.125, 0.125] for mark in marks)
    low, high = figures[0].axes[0].get_ylim()
    assert low < 0.125
    assert high > 0.5
    labels = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert labels == ["full", "prdp (nonfinite)"]
    assert "timed to, 0.125" in figures[0].get_supxlabel()


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


@pytest.mark.parametrize(
    ("low", "high"), [(1.0, 1.5), (1.0, 30.0), (1.0, 5e3), (1.0, 1e12), (3e-4, 7e-3)]
)
def test_ticks_are_few_and_all_of_them_have_a_label(low: float, high: float):
    figure = Figure()
    axis = figure.subplots()
    axis.plot([0, 1], [low, high])
    scale(axis.set_yscale, axis.yaxis, [np.array([low, high])])
    figure.draw_without_rendering()
    bottom, top = axis.get_ylim()
    shown = [tick for tick in axis.get_yticks() if bottom <= tick <= top]
    assert 2 <= len(shown) <= 8
    assert all(label.get_text() for label in axis.get_yticklabels())
    assert not [tick for tick in axis.get_yticks(minor=True) if bottom <= tick <= top]


def quality_record(epoch: int, work: int, **fields: Any) -> Record:
    own = {"primal_iterations": work - 1, "adjoint_iterations": 1, "budget_iterations": work}
    return Record(epoch=epoch, metric=1.0 / epoch, updates=1, **own | fields)


def axis_of(figure: Figure, start: str) -> Any:
    return next(axis for axis in figure.axes if axis.get_title("left").startswith(start))


def test_residuals_are_drawn_for_both_solves_on_a_logarithmic_axis(
    made_run: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    numbers = [(1, 0.5, 0.25), (2, 1e-3, 1e-4)]
    run = made_run(
        *(quality_record(n, 4, primal_residual=p, adjoint_residual=a) for n, p, a in numbers)
    )
    axis = axis_of(figure_of({"full": [run]}, tmp_path, monkeypatch), "relative residual")
    primal, adjoint = axis.lines[0], axis.lines[2]  # each is followed by the mark of its end
    assert list(primal.get_ydata()) == [0.5, 1e-3]
    assert list(adjoint.get_ydata()) == [0.25, 1e-4]
    assert (primal.get_linestyle(), adjoint.get_linestyle()) == ("-", "--")
    assert axis.get_yscale() == "log"


def test_the_error_stands_beside_the_norm_of_one_policy_and_over_it_for_several(
    made_run: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = made_run(quality_record(1, 4, gradient_norm=4.0, error=2.0, gradient_noise=1.0))
    axis = axis_of(figure_of({"prdp": [run]}, tmp_path, monkeypatch), "gradient:")
    assert axis.get_title("left") == "gradient: norm, error (dashed), noise (dotted)"
    assert [float(line.get_ydata()[0]) for line in axis.lines[::2]] == [4.0, 2.0, 1.0]
    figure = figure_of({"full": [run], "prdp": [run]}, tmp_path, monkeypatch)
    axis = axis_of(figure, "of the gradient's norm")
    heights = [float(line.get_ydata()[0]) for line in axis.lines]
    assert heights == [0.5, 0.5, 0.25, 0.25, 0.5, 0.5, 0.25, 0.25, 1.0]


def test_what_is_not_known_is_not_named(
    made_run: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = made_run(quality_record(1, 4, gradient_norm=4.0, gradient_noise=1.0))
    figure = figure_of({"prdp": [run]}, tmp_path, monkeypatch)
    titles = [axis.get_title("left") for axis in figure.axes]
    assert "gradient: norm, noise (dotted)" in titles
    assert not [title for title in titles if "residual" in title or "shaded" in title]


def test_the_saved_area_lies_between_the_full_solve_and_the_policy(
    made_run: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    full = made_run(*(quality_record(n, 40) for n in (1, 2, 3)))
    prdp = made_run(*(quality_record(n, w) for n, w in ((1, 10), (2, 20), (3, 30))))
    figure = figure_of({"full": [full], "prdp": [prdp]}, tmp_path, monkeypatch)
    axis = axis_of(figure, "iterations of an outer step")
    (area,) = axis.collections
    heights = area.get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == (10, 40)
    assert axis.get_ylim()[0] == 0
    # 60 of 120 iterations.
    assert "saved against full: prdp 50 %." in figure.get_supxlabel()


def test_one_policy_saves_against_its_own_finest_budget(
    made_run: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # In the last epoch a controller measured: twice the work under the same budget.
    records = [quality_record(n, w) for n, w in ((1, 10), (2, 20), (3, 40), (4, 40))]
    measured = quality_record(5, 80, budget_iterations=40)
    run = made_run(*records, measured)
    figure = figure_of({"auto": [run]}, tmp_path, monkeypatch)
    axis = axis_of(figure, "iterations of an outer step")
    assert list(axis.lines[-1].get_ydata()) == [40] * 5
    # 190 iterations were taken where 5 · 40 would have been.
    assert "its finest budget throughout (dotted): auto 5 %." in figure.get_supxlabel()


def test_epochs_are_counted_in_whole_numbers(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    figure = figure_of({"full": [train(epochs=2)]}, tmp_path, monkeypatch)
    figure.draw_without_rendering()
    assert all(float(tick).is_integer() for tick in figure.axes[0].get_xticks())
