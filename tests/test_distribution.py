"""What an install brings: the core, its types, and every adapter there is."""

import shutil
import subprocess
import sys
import zipfile
from email import message_from_bytes
from email.message import Message
from pathlib import Path

import lazy_loader
import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what a build reads, with no adapter in it."""
    copy = tmp_path / "tree"
    shutil.copytree(
        ROOT / "bilevel", copy / "bilevel", ignore=shutil.ignore_patterns("__pycache__")
    )
    (copy / "adapters").mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "adapters/README.md"):
        shutil.copy(ROOT / name, copy / name)
    return copy


def add_adapter(tree: Path) -> None:
    package = tree / "adapters" / "bilevel_fake"
    (package / "inner").mkdir(parents=True)
    (package / "__init__.py").write_text('"""A stand-in."""\n\nfrom bilevel_fake import inner\n')
    (package / "inner" / "__init__.py").write_text("VALUE = 7\n")
    (package / "py.typed").touch()


def build(tree: Path, target: str = "wheel") -> Path:
    command = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", "dist"]
    subprocess.run(command, cwd=tree, check=True, capture_output=True, text=True)
    (built,) = (tree / "dist").iterdir()
    return built


def contents(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return message_from_bytes(archive.read(name))


def test_wheel_holds_the_core_and_nothing_else_without_adapters(tree: Path):
    names = contents(build(tree))
    assert {"bilevel/__init__.py", "bilevel/py.typed", "bilevel/solver/loop.py"} <= names
    page = {"page.html", "page.css", "page.js", "uplot/uPlot.iife.min.js", "uplot/LICENSE"}
    assert {f"bilevel/outer/report/{name}" for name in page} <= names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"bilevel"}


def test_wheel_ships_adapters_under_their_own_names(tree: Path):
    add_adapter(tree)
    names = contents(build(tree))
    assert {"bilevel_fake/__init__.py", "bilevel_fake/inner/__init__.py"} <= names
    assert "bilevel_fake/py.typed" in names
    assert not [name for name in names if name.startswith(("adapters", "README"))]


def test_wheel_says_what_it_is_and_needs(tree: Path):
    described = metadata(build(tree))
    assert described["Name"] == "bilevel"
    assert set(described["Requires-Python"].split(",")) == {">=3.11", "<3.14"}
    extras = {"pde", "arrays", "solvers", "plot", "report", "examples", "test", "docs", "all"}
    assert extras <= set(described.get_all("Provides-Extra", []))
    core = [entry for entry in described.get_all("Requires-Dist", []) if "extra ==" not in entry]
    assert any(entry.startswith("jax>") for entry in core)
    assert not [entry for entry in core if entry.startswith(("torch", "cupy", "matplotlib"))]


@pytest.mark.slow
@pytest.mark.parametrize("editable", [False, True], ids=["wheel", "editable"])
def test_core_and_adapter_import_where_they_are_installed(
    tree: Path, tmp_path: Path, *, editable: bool
):
    """In an environment without dependencies; the one that is needed at once comes last."""
    add_adapter(tree)
    if editable:
        code = "from hatchling.build import build_editable; print(build_editable('dist'))"
        subprocess.run([sys.executable, "-c", code], cwd=tree, check=True, capture_output=True)
        (wheel,) = (tree / "dist").iterdir()
    else:
        wheel = build(tree)
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    python = environment / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index"]
    subprocess.run([*pip, wheel], check=True, capture_output=True)

    needed = str(Path(lazy_loader.__file__).parents[1])
    code = (
        f"import sys; sys.path.append({needed!r}); "
        "import bilevel, bilevel_fake; print(bilevel.__file__, bilevel_fake.inner.VALUE)"
    )
    ran = subprocess.run(
        [python, "-I", "-c", code], check=True, capture_output=True, text=True, cwd=tmp_path
    )
    where, value = ran.stdout.split()
    assert value == "7"
    assert Path(where).is_relative_to(tree if editable else environment)

    if editable:  # an adapter written after the install needs no reinstall
        (tree / "adapters" / "bilevel_later.py").touch()
        subprocess.run([python, "-I", "-c", "import bilevel_later"], check=True, cwd=tmp_path)
