"""Page: one HTML file with everything in it."""

import base64
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from bilevel.outer.checkpoints.durable import write_file
from bilevel.outer.look import looks
from bilevel.outer.report.chart import Chart
from bilevel.outer.report.colour import DARK, LIGHT, on_page
from bilevel.outer.report.section import Section, section_of
from bilevel.outer.run import Run
from bilevel.outer.versions import versions


class MissingTemplatesError(ImportError):
    """Jinja2 is not installed."""


def write_report(
    runs: Mapping[str, Sequence[Run]],
    path: str | os.PathLike[str],
    *,
    title: str = "",
    metric_name: str = "metric",
    target: float | None = None,
) -> Path:
    """Write one HTML page of runs: charts, tables, findings in words, versions.

    The page needs no network and no other file. Nothing of the runs is executed, and whatever
    they are called is shown as text. What the charts show also stands below them in words and
    in a table.

    **Arguments:**

    - `runs`: by policy, one for each seed.
    - `path`: of the page.
    - `title`: its heading.
    - `metric_name`: what the metric is, with its unit.
    - `target`: a metric to be marked by a line.

    **Returns:** the path.

    **Raises:** `ImportError` if Jinja2 is not installed; `ValueError` if there is no run.

    >>> import tempfile, bilevel as bl, optax
    >>> task = bl.Task(1.0, lambda theta, batch, fidelity: theta**2, full=bl.Budget(1))
    >>> run = bl.optimize(task, optax.sgd(0.25), epochs=2, progress=False)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     page = write_report({"full": [run]}, f"{folder}/report.html", title="squares")
    ...     "squares" in page.read_text(encoding="utf-8")
    True
    """
    return write_page([section_of(runs, title, metric_name, target)], path)


def write_page(sections: Sequence[Section], path: str | os.PathLike[str]) -> Path:
    """Write a page of several tasks.

    **Arguments:**

    - `sections`: one a task, or one a comparison.
    - `path`: of the page.

    **Returns:** the path.

    **Raises:** `ImportError` if Jinja2 is not installed; `ValueError` if there is no run.
    """
    if not any(section.policies for section in sections):
        msg = "there is nothing to report: no run was given."
        raise ValueError(msg)
    # A name may hold half a surrogate pair, which no file can.
    content = render(sections).encode(errors="replace")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, content)
    return path


def render(sections: Sequence[Section]) -> str:
    """The page as text."""
    try:
        import jinja2  # noqa: PLC0415
    except ImportError as error:
        msg = "reports need Jinja2: pip install jinja2"
        raise MissingTemplatesError(msg) from error
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    charts = [section.charts for section in sections]
    # Parts of the page by themselves: a browser runs these scripts, known by their digests, and
    # no other, whatever a run is called.
    script = f"{_asset('uplot/uPlot.iife.min.js')}\n{_asset('page.js')}"
    style = f"{_asset('uplot/uPlot.min.css')}\n{_asset('page.css')}"
    policy = (
        f"default-src 'none'; script-src {_digest(script)}; style-src {_digest(style)}; "
        "base-uri 'none'; form-action 'none'"
    )
    names = [section.title for section in sections]
    return environment.from_string(_asset("page.html")).render(
        sections=list(zip(sections, charts, strict=True)),
        title=", ".join(dict.fromkeys(names)),
        version=versions().get("bilevel", ""),
        script=script,
        style=style,
        security=policy,
        data=_embedded(_data(sections, charts)),
    )


def _data(sections: Sequence[Section], charts: Sequence[Sequence[Chart]]) -> dict[str, Any]:
    """What the script draws."""
    data: dict[str, Any] = {}
    for place, (section, group) in enumerate(zip(sections, charts, strict=True)):
        colours = [look["color"] for look in looks(section.policies).values()]
        slots = {name: slot for slot, name in enumerate(section.policies)}
        for chart in group:
            data[f"{place}-{chart.key}"] = {
                **chart.data(slots),
                "light": [on_page(colour, LIGHT) for colour in colours],
                "dark": [on_page(colour, DARK) for colour in colours],
            }
    return data


def _embedded(data: Any) -> str:
    """JSON that nothing in it can end early, wherever in a page it stands."""
    written = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return (
        written.replace("<", "\\u003c")
        .replace(">", "\\u003e")
        .replace("&", "\\u0026")
        .replace("\u2028", "\\u2028")
        .replace("\u2029", "\\u2029")
    )


def _digest(content: str) -> str:
    digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
    return f"'sha256-{digest}'"


def _asset(name: str) -> str:
    place = resources.files("bilevel.outer.report").joinpath(*name.split("/"))
    return place.read_text(encoding="utf-8")
