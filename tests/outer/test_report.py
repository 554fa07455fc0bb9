"""The report: whatever is in a history, the page is whole, says it in words, runs none of it."""

import dataclasses
import hashlib
import json
import math
import re
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bilevel.outer.comparison import Comparison
from bilevel.outer.history import Record
from bilevel.outer.report.chart import MOST_ROWS
from bilevel.outer.report.charts import charts_of
from bilevel.outer.report.colour import DARK, LIGHT, contrast, on_page
from bilevel.outer.report.page import MissingTemplatesError, write_page, write_report
from bilevel.outer.report.section import section_of
from bilevel.outer.report.source import UNFINISHED, read_sections
from bilevel.outer.report.thinning import MOST_POINTS, thinned
from bilevel.outer.run import Run
from bilevel.outer.series import work_of_step

MadeRun = Callable[..., Run]

ATTACK = "</script><script>alert(1)</script><img src=x onerror=alert(1)>\"'&{{ 7 * 7 }}"

UPLOT = "19c8d4c6ad88929a79f4ae49d6f7161566dfd0ba3d15cc495e974f787eb78f1f"


class Page(HTMLParser):
    """The tags of a page, its text, and the content of its scripts."""

    def __init__(self, content: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.scripts: list[str] = []
        self._open: list[str] = []
        self.feed(content)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] == "script":
            self.scripts[-1] += data
        elif "style" not in self._open:
            self.text += data

    @property
    def data(self) -> dict[str, Any]:
        return json.loads(self.scripts[0])


def page_of(runs: dict[str, list[Run]], tmp_path: Path, **settings: Any) -> Page:
    return Page(write_report(runs, tmp_path / "page.html", **settings).read_text(encoding="utf-8"))


def record(epoch: int, **fields: Any) -> Record:
    known: dict[str, Any] = {
        "metric": 1.0 / (epoch + 1),
        "updates": 1,
        "solves": 1,
        "primal_iterations": 5 * epoch,
        "adjoint_iterations": epoch,
        "budget_iterations": 5 * epoch,
        "adjoint_budget_iterations": epoch,
        "primal_residual": 10.0**-epoch,
        "adjoint_residual": 0.5,
        "gradient_norm": 2.0,
        "gradient_noise": 1.0,
        "error": 0.5,
        "elapsed": float(epoch),
    }
    return Record(epoch=epoch, **known | fields)


@pytest.fixture
def run(made_run: MadeRun) -> Run:
    return made_run(*(record(epoch) for epoch in range(1, 6)), task="two", policy="prdp")


def test_the_page_needs_no_other_file_and_runs_only_its_own_script(run: Run, tmp_path: Path):
    page = page_of({"prdp": [run]}, tmp_path, title="two")
    assert not [tag for tag, _ in page.tags if tag in ("link", "img", "iframe", "object", "base")]
    named = [value for _, tag in page.tags for name in ("src", "href") if (value := tag.get(name))]
    assert named
    assert all(value.startswith("#") for value in named)
    (policy,) = [
        tag["content"] for _, tag in page.tags if "Security" in (tag.get("http-equiv") or "")
    ]
    assert policy is not None
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    assert len(page.scripts) == 2
    # A style or handler in a tag would be refused by the policy, and be missed by its reader.
    assert not [
        tag for _, tag in page.tags if "style" in tag or any(n.startswith("on") for n in tag)
    ]


def test_the_chart_library_is_the_one_that_was_looked_at():
    script = resources.files("bilevel.outer.report").joinpath("uplot", "uPlot.iife.min.js")
    assert hashlib.sha256(script.read_bytes()).hexdigest() == UPLOT


@pytest.mark.parametrize("attack", [ATTACK, "<!--", "]]>", "\u2028", "\ud800", "{% include 'x' %}"])
def test_whatever_a_run_is_called_is_text(made_run: MadeRun, tmp_path: Path, attack: str):
    names = {"task": attack, "policy": attack, "controller": attack, "device": attack}
    run = made_run(record(1), record(2), status="failed", message=attack, **names)
    plain = page_of({"prdp": [run.with_summary(task="x")]}, tmp_path, title="two")
    page = page_of({attack: [run]}, tmp_path, title=attack, metric_name=attack)
    assert len(page.scripts) == len(plain.scripts)
    assert page.scripts[1] == plain.scripts[1]
    # No reader of HTML, however old, sees a tag or a comment begin here.
    assert not set("<>&") & set(page.scripts[0])
    allowed = {tag for tag, _ in plain.tags}
    assert {tag for tag, _ in page.tags} <= allowed
    shown = attack.encode(errors="replace").decode()
    assert shown in page.text
    lines = page.data["0-metric"]["lines"]
    assert [line["name"] for line in lines] == [attack]


def test_configurations_and_directories_are_text(run: Run, tmp_path: Path):
    directory = tmp_path / "a<b>&"
    saved = run.with_summary(policy=ATTACK)
    dataclasses.replace(saved, theta=np.zeros(1)).save(directory)
    (directory / "configuration.json").write_text(json.dumps({"configuration": {ATTACK: ATTACK}}))
    page = Page(write_page(read_sections([directory]), tmp_path / "p.html").read_text("utf-8"))
    assert page.text.count(ATTACK) >= 3
    assert "alert" not in page.scripts[1]
    assert not [tag for tag, _ in page.tags if tag == "img"]


def test_charts_have_what_was_asked_for_in_numbers_words_and_a_table(run: Run, tmp_path: Path):
    page = page_of({"prdp": [run]}, tmp_path, title="two")
    keys = ["metric", "work", "time", "budget", "residual", "gradient", "savings"]
    assert list(page.data) == [f"0-{key}" for key in keys]
    figures = [tag["data-chart"] for name, tag in page.tags if name == "figure"]
    assert figures == list(page.data)
    for tag, count in (
        ("figcaption", len(keys)),
        ("details", len(keys) + 1),
        ("h4", len(keys) + 1),
    ):
        assert len([name for name, _ in page.tags if name == tag]) == count
    (line,) = page.data["0-work"]["lines"]
    assert line["x"] == [6, 18, 36, 60, 90]
    assert line["y"] == pytest.approx([1 / 2, 1 / 3, 1 / 4, 1 / 5, 1 / 6], abs=1e-6)
    assert "prdp came to 0.1667 with 90 iterations\n" in page.text
    assert "prdp: from 0.5 to 0.1667\n" in page.text
    assert "primal: from 5 to 25\nadjoint: from 1 to 5\n" in page.text.replace("\n\n", "\n")
    assert "primal: from 0.1 to 1.000e-05\nadjoint: from 0.5 to 0.5\n" in page.text.replace(
        "\n\n", "\n"
    )
    assert "truncation error 0.25 of the norm in the median, above it in 0 of 5 epochs" in page.text
    # Σ 90 of 5 · 30.
    assert "prdp: 40 % saved" in page.text
    norm, error, noise = page.data["0-gradient"]["lines"]
    assert (norm["y"][0], error["y"][0], noise["y"][0]) == (2.0, 0.5, 1.0)
    assert len({str(line["dashes"]) for line in (norm, error, noise)}) == 3


def test_a_comparison_has_bands_areas_and_its_target(made_run: MadeRun, tmp_path: Path):
    def spent(work: int, shift: float) -> Run:
        return made_run(
            *(
                record(k, primal_iterations=work, adjoint_iterations=0, metric=shift / k)
                for k in (1, 2)
            )
        )

    runs = {"full": [spent(40, 1.0), spent(40, 3.0)], "prdp": [spent(10, 1.0), spent(10, 1.0)]}
    charts = {chart.key: chart for chart in charts_of(runs, "error", 0.125)}
    full, prdp = charts["metric"].data({"full": 0, "prdp": 1})["lines"]
    assert (full["low"], full["y"], full["high"]) == ([1, 0.5], [2, 1], [3, 1.5])
    assert "low" not in prdp
    assert (full["slot"], prdp["slot"]) == (0, 1)
    assert charts["metric"].mark == 0.125
    assert "medians of 2 seeds" in charts["metric"].caption
    full, prdp = charts["savings"].data({})["lines"]
    assert prdp["area"]
    assert (prdp["low"], prdp["high"]) == ([10, 10], [40, 40])
    assert "low" not in full
    assert charts["savings"].points == ["prdp: 75 % saved"]
    assert charts["gradient"].y_name == "part of the norm"
    error = charts["gradient"].lines[0]
    assert (error.name, list(error.curve.y)) == ("full error", [0.25, 0.25])
    page = page_of(runs, tmp_path, title="two", target=0.125)
    assert "until metric ≤ 0.125" in page.text
    assert "75 %" in page.text


def test_a_policy_that_takes_more_than_full_has_no_area_below_it(made_run: MadeRun):
    def spent(work: int) -> Run:
        return made_run(*(record(k, primal_iterations=work, adjoint_iterations=0) for k in (1, 2)))

    charts = charts_of({"full": [spent(40)], "auto": [spent(50)]}, "error", None)
    (savings,) = [chart for chart in charts if chart.key == "savings"]
    assert [line.area for line in savings.lines] == [False, False]
    assert list(savings.lines[1].curve.y) == [50, 50]
    assert "No policy took fewer" in savings.caption


def test_the_area_ends_where_a_policy_takes_more_than_full(made_run: MadeRun):
    def spent(*works: int) -> Run:
        return made_run(
            *(
                record(k, primal_iterations=work, adjoint_iterations=0)
                for k, work in enumerate(works, start=1)
            )
        )

    charts = charts_of({"full": [spent(40, 40)], "auto": [spent(10, 50)]}, "error", None)
    (savings,) = [chart for chart in charts if chart.key == "savings"]
    auto = savings.lines[1].curve
    assert (list(auto.low), list(auto.high)) == ([10, 50], [40, 50])
    assert savings.points == ["auto: 25 % saved"]
    # To give up early is no saving.
    charts = charts_of({"full": [spent(40, 40)], "auto": [spent(10)]}, "error", None)
    assert "No policy took fewer" in charts[-1].caption


def test_skipped_updates_count_as_steps(made_run: MadeRun):
    skipping = record(1, primal_iterations=60, adjoint_iterations=0, updates=2, nonfinite=1)
    assert list(work_of_step(made_run(skipping).history)) == [20]


def test_numbers_that_json_lacks_are_shown_as_gaps_and_told(made_run: MadeRun, tmp_path: Path):
    odd = [math.nan, math.inf, -math.inf, 0.5, 0.25]
    run = made_run(
        *(record(k + 1, metric=odd[k], error=odd[k], primal_residual=odd[k]) for k in range(5))
    )
    page = page_of({"full": [run]}, tmp_path)
    (line,) = page.data["0-metric"]["lines"]
    assert (line["x"], line["y"]) == ([4, 5], [0.5, 0.25])
    assert "The metric was NaN or infinite in epochs 1–3." in page.text
    assert not re.search(r"\b(NaN|Infinity)\b", page.scripts[0])


@pytest.mark.parametrize("records", [(), (Record(epoch=0, metric=1.0),)])
def test_a_run_that_finished_no_epoch_has_a_page(
    made_run: MadeRun, tmp_path: Path, records: tuple[Record, ...]
):
    page = page_of({"full": [made_run(*records)]}, tmp_path, title="two")
    assert "No epoch was finished" in page.text
    assert list(page.data) == ([] if not records else ["0-metric", "0-time"])


def test_one_epoch_has_a_page(made_run: MadeRun, tmp_path: Path):
    page = page_of({"full": [made_run(record(1))]}, tmp_path, title="two")
    assert [line["x"] for line in page.data["0-metric"]["lines"]] == [[1]]


def test_a_long_history_keeps_its_peaks_and_its_page_small(made_run: MadeRun, tmp_path: Path):
    metric = 1.0 / np.arange(1, 10_001)
    metric[7_777] = 5.0
    run = made_run(
        *(
            record(k + 1, metric=float(metric[k]), primal_residual=0.1, budget_iterations=9)
            for k in range(10_000)
        )
    )
    path = write_report({"full": [run]}, tmp_path / "page.html")
    assert path.stat().st_size < 600_000
    page = Page(path.read_text("utf-8"))
    (line,) = page.data["0-metric"]["lines"]
    assert len(line["x"]) <= MOST_POINTS + 2
    assert (line["x"][0], line["x"][-1]) == (1, 10_000)
    assert dict(zip(line["x"], line["y"], strict=True))[7_778] == 5.0
    rows = len([tag for tag, _ in page.tags if tag == "tr"])
    assert rows < 9 * (MOST_ROWS + 2)


def test_thinned_lines_keep_ends_and_extremes():
    y = np.sin(np.linspace(0, 40, 5_000))
    y[1234], y[4321] = 9.0, -9.0
    kept = thinned(np.arange(5_000.0), y, 300)
    assert len(kept) <= 302
    assert {0, 1234, 4321, 4999} <= set(kept.tolist())
    assert (np.diff(kept) > 0).all()


def test_a_logarithmic_axis_keeps_points_in_every_decade():
    x = np.arange(1.0, 100_001.0)
    kept = thinned(np.log(x), np.log(x), 300)
    counts = [int(((x[kept] >= low) & (x[kept] < 10 * low)).sum()) for low in (10.0, 1e2, 1e3, 1e4)]
    assert min(counts) > 25


@pytest.mark.parametrize("page", [LIGHT, DARK])
def test_every_colour_stands_off_both_pages(page: str):
    for colour in ("#0072B2", "#E69F00", "#56B4E9", "#000000", "#ffffff", "#15181c"):
        assert contrast(on_page(colour, page), page) >= 3


def test_without_jinja_the_extra_is_named(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(MissingTemplatesError, match="pip install jinja2"):
        write_report({"full": [run]}, tmp_path / "page.html")


def test_nothing_to_report_is_said(tmp_path: Path):
    with pytest.raises(ValueError, match="nothing to report"):
        write_report({}, tmp_path / "page.html")


# What is read.


def saved(run: Run, directory: Path) -> Path:
    dataclasses.replace(run, theta=np.zeros(1)).save(directory)
    return directory


def test_runs_of_one_task_are_put_together_and_told_apart(run: Run, tmp_path: Path):
    places = [
        saved(run.with_summary(policy="full"), tmp_path / "a"),
        saved(run.with_summary(policy="prdp"), tmp_path / "b"),
        saved(run.with_summary(policy="prdp", seed=1), tmp_path / "c"),
        saved(run.with_summary(policy="prdp", seed=1), tmp_path / "d"),
        saved(run.with_summary(task="other"), tmp_path / "e"),
    ]
    two, other = read_sections(places)
    assert two.policies == ["full", "prdp, seed 0", "prdp, seed 1, c", "prdp, seed 1, d"]
    assert other.policies == ["prdp"]
    assert [section.title for section in (two, other)] == ["two", "other"]


def test_a_comparison_keeps_its_tables_notes_and_configuration(run: Run, tmp_path: Path):
    runs = {
        name: [
            dataclasses.replace(run, theta=np.zeros(1), directory=tmp_path / "c" / name / "seed-0")
        ]
        for name in ("full", "prdp")
    }
    for (kept,) in runs.values():
        assert kept.directory is not None
        run_files = dataclasses.replace(kept, directory=None)
        run_files.save(kept.directory)
    machine = {"processor": "abacus", "cores": 2, "devices": ["cpu"], "dtype": "float32"}
    origin = {
        "command": "bilevel compare x",
        "date": "2026-01-01",
        "machine": machine,
        "versions": {},
    }
    Comparison("two", "error", runs, 0.2, 0.02, [], False, origin).save(tmp_path / "c")
    (tmp_path / "c" / "configuration.json").write_text('{"configuration": {"epochs": 5}}')
    (section,) = read_sections([tmp_path / "c"])
    (again,) = read_sections([tmp_path / "c" / "comparison.json"])
    assert section.title == again.title
    assert [sheet.title for sheet in section.sheets][1] == "until error ≤ 0.2"
    assert section.configurations == {str(tmp_path / "c"): {"epochs": "5"}}
    facts = dict(section.facts)
    assert (facts["processor"], facts["cores"], facts["command"]) == (
        "abacus",
        "2",
        "bilevel compare x",
    )
    assert section.charts[0].mark == pytest.approx(0.2)


def test_a_run_that_goes_on_is_shown_as_far_as_it_came(run: Run, tmp_path: Path):
    directory = saved(run, tmp_path / "going")
    (directory / "summary.json").unlink()
    written = (directory / "history.jsonl").read_bytes()
    (directory / "history.jsonl").write_bytes(written[:-20])  # cut off in the middle of a line
    (directory / "configuration.json").write_text(
        '{"file": "x.py", "configuration": {"policy": "prdp", "seed": 3}}'
    )
    (section,) = read_sections([directory])
    (kept,) = section.comparison.runs["prdp"]
    assert (kept.status, kept.summary.seed, section.title) == (UNFINISHED, 3, "x.py")
    assert len(kept.history) == 4
    (lone,) = read_sections([directory / "history.jsonl"])
    assert lone.policies == ["prdp"]
    assert f"({UNFINISHED})" in lone.charts[0].points[0]


def test_the_best_of_a_wrong_summary_is_a_sentence(run: Run, tmp_path: Path):
    directory = saved(run, tmp_path / "a")
    stored = json.loads((directory / "summary.json").read_text())
    for field, value in (("seconds", "fast"), ("versions", [1]), ("epochs", None), ("task", 3)):
        (directory / "summary.json").write_text(json.dumps(stored | {field: value}))
        with pytest.raises(ValueError, match=rf"summary\.json: {field}"):
            read_sections([directory])


def test_a_section_without_full_needs_none(run: Run):
    section = section_of({"prdp": [run], "auto": [run]}, "two", "error", None)
    charts = {chart.key: chart for chart in section.charts}
    assert "Without a run of full" in charts["savings"].caption
    assert charts["metric"].mark is None


def test_what_all_policies_have_in_common_is_said_once(made_run: MadeRun):
    alike = made_run(*(record(epoch) for epoch in range(1, 6)), task="two", policy="prdp")
    other = made_run(*(record(epoch, nonfinite=1) for epoch in range(1, 6)), task="two")
    by_itself = dict(section_of({"prdp": [alike]}, "two", "error", None).findings)["prdp"]
    assert by_itself

    heads = section_of({"prdp": [alike], "auto": [alike]}, "two", "error", None).findings
    assert heads == [("Every policy", by_itself), ("prdp", []), ("auto", [])]

    (every, shared), (_, first), (_, second) = section_of(
        {"prdp": [alike], "auto": [other]}, "two", "error", None
    ).findings
    assert every == "Every policy"
    assert not any(one in shared for one in [*first, *second])
    assert {one.kind for one in second} > {one.kind for one in first}
    assert [one for one in by_itself if one in shared or one in first] == by_itself
