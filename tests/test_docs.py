"""The pages in docs/: their code runs as it stands and prints what they say."""

import importlib.util
import inspect
import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import bilevel
import bilevel.testing
import bilevel_arrays
import bilevel_pde
import bilevel_solvers
from bilevel.cli import main

needs_torch = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="PyTorch is not installed"
)

DOCS = Path(__file__).resolve().parents[1] / "docs"
EXAMPLES = DOCS.parent / "examples"
INTERFACE = DOCS / "_extensions" / "interface.py"
BLOCK = re.compile(r"(?:<!-- file: (\S+) -->\n+)?```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d*)?(?:e[-+]?\d+)?")


def blocks(page: str) -> list[tuple[str, str, str]]:
    """File name (or nothing), language and text of each code block, in order."""
    return BLOCK.findall((DOCS / page).read_text(encoding="utf-8"))


@pytest.fixture(autouse=True)
def _no_module_stays() -> Iterator[None]:
    yield
    sys.modules.pop("penalties", None)


def same(printed: str, promised: str) -> None:
    """Equal words and spaces, numbers to a tenth: another machine rounds otherwise."""
    words = [" ".join(NUMBER.sub("#", text).split()) for text in (printed, promised)]
    assert words[0] == words[1]
    found, expected = (
        [float(number.replace(",", "")) for number in NUMBER.findall(text)]
        for text in (printed, promised)
    )
    np.testing.assert_allclose(found, expected, rtol=0.1)


@pytest.mark.parametrize(
    "page",
    [
        "custom.md",
        "tasks.md",
        pytest.param("sweeps.md", marks=pytest.mark.slow),
        pytest.param("report.md", marks=pytest.mark.slow),
        "hyperparameters.md",
        pytest.param("pde.md", marks=pytest.mark.slow),
        pytest.param("solvers.md", marks=pytest.mark.slow),
        pytest.param("arrays.md", marks=[pytest.mark.slow, needs_torch]),
        pytest.param("devices.md", marks=pytest.mark.slow),
    ],
)
def test_code_of_a_page_runs_and_prints_what_it_says(
    page: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)  # a page's files are imported
    names: dict[str, Any] = {"__name__": "page"}
    ran = 0
    printed = ""
    with jax.enable_x64(False):
        for file, language, text in blocks(page):
            if file:
                Path(file).write_text(text, encoding="utf-8")
            elif language == "python":
                exec(compile(text, page, "exec"), names)  # noqa: S102
                printed, ran = capsys.readouterr().out, ran + 1
            elif language == "text":
                same(printed, text)
    assert ran >= 2


@pytest.mark.slow
def test_the_task_file_of_the_page_is_run_by_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    files = {file: text for file, _, text in blocks("tasks.md") if file}
    for file, text in files.items():
        Path(file).write_text(text, encoding="utf-8")
    commands = "\n".join(text for _, language, text in blocks("tasks.md") if language == "sh")
    lines = [line.split("#")[0].split() for line in commands.splitlines() if line.strip()]
    assert len(lines) >= 3
    with jax.enable_x64(False):
        for words in lines:
            assert words[0] == "bilevel"
            quiet = ["--quiet"] if words[1] in ("run", "compare") else []
            assert main([*words[1:], *quiet]) == 0
    assert "whole runs" in capsys.readouterr().out
    assert list(files) == ["penalties.py", "penalties.toml"]
    assert "task" in runpy.run_path("penalties.py")


def test_the_reference_names_what_the_kit_has():
    text = (DOCS / "reference.md").read_text(encoding="utf-8")
    section = text.partition("## Testing your own")[2].partition("\n## ")[0]
    listed = re.findall(r"^\| `testing\.(\w+)` \|", section, re.MULTILINE)
    assert sorted(listed) == sorted(bilevel.testing.__all__)


@pytest.mark.parametrize(
    ("page", "package"),
    [("pde", bilevel_pde), ("solvers", bilevel_solvers), ("arrays", bilevel_arrays)],
)
def test_the_page_of_an_adapter_names_what_it_has(page: str, package: Any):
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8").partition("## The public names")[2]
    listed = re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)
    assert sorted(listed) == sorted(name for name in package.__all__ if name[0] != "_")


def test_the_first_page_runs_and_prints_what_it_says(capsys: pytest.CaptureFixture[str]):
    found = blocks("index.md")
    (code,) = (text for _, language, text in found if language == "python")
    (promised,) = (text for _, language, text in found if language == "text")
    with jax.enable_x64(False):
        exec(compile(code, "index.md", "exec"), {})  # noqa: S102
    same(capsys.readouterr().out, promised)


def test_every_example_has_a_page_in_the_gallery():
    """What a file draws is seen when the site is built; here only that none is forgotten."""
    runs = {file.stem for file in EXAMPLES.glob("*.py") if "task = " in file.read_text("utf-8")}
    runs |= {file.stem for file in EXAMPLES.glob("*.py") if "def task(" in file.read_text("utf-8")}
    assert {file.stem for file in (DOCS / "gallery").glob("*.py")} == runs


def test_tutorials_stand_in_the_order_of_the_site():
    names = re.search(r"_TUTORIALS = \((.*?)\)", INTERFACE.read_text("utf-8"), re.DOTALL)
    assert names is not None
    listed = re.findall(r'"(\w+)"', names[1])
    assert sorted(listed) == sorted(file.stem for file in (DOCS / "tutorials").glob("*.py"))


def test_pages_are_reachable_from_the_first():
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    toctree = "\n".join(re.findall(r"^```\{toctree\}\n(.*?)^```$", index, re.DOTALL | re.MULTILINE))
    for page in DOCS.glob("*.md"):
        if page.stem != "index":
            assert page.stem in toctree.split()
            assert f"({page.name})" in index


@pytest.mark.parametrize("name", [name for name in bilevel.__all__ if name[0] != "_"])
def test_documentation_of_public_names_links_only_public_names(name: str):
    """What ``[`name`][]`` links, a reader has to find."""
    known = {*bilevel.__all__, *bilevel.testing.__all__}
    public = getattr(bilevel, name)
    members = [getattr(public, member, None) for member in dir(public) if member[0] != "_"]
    texts = [inspect.getdoc(thing) or "" for thing in (public, *members)]
    linked = re.findall(r"\[`([^`]+)`\]\[\]", "\n".join(texts))
    assert not [link for link in linked if link.partition(".")[0] not in known]
