"""The package as a whole: what it imports, what it exports, what it says of itself."""

import ast
import graphlib
import importlib
import importlib.metadata
import inspect
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
import pytest

import bilevel

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CORE = sorted((ROOT / "bilevel").rglob("*.py"))
SOURCES = CORE + sorted((ROOT / "adapters").rglob("*.py"))
PUBLIC = [name for name in bilevel.__all__ if not name.startswith("_")]
LONGEST = 450


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in CORE}


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a fresh interpreter, where every warning is an error."""
    command = [sys.executable, "-W", "error", "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)


def nodes_run(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those that only a type checker reads."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for other in node.orelse:
                yield from nodes_run(ast.Module([other], []))
            continue
        yield node
        yield from nodes_run(node)


def imports(tree: ast.AST) -> Iterator[str]:
    """Names of the modules that the code imports; `a.b` for `from a import b`."""
    for node in nodes_run(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute here"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def test_importing_bilevel_loads_nothing_heavy():
    loaded = run_python(
        "import sys, bilevel; print({name.split('.')[0] for name in sys.modules})"
    ).stdout
    heavy = {"jax", "jaxlib", "numpy", "scipy", "jaxopt", "equinox", "optax", "pydantic", "rich"}
    assert "'bilevel'" in loaded
    assert not [name for name in heavy if f"'{name}'" in loaded]


def test_using_every_public_name_never_loads_jaxopt_or_an_adapter():
    loaded = run_python(
        "import sys, bilevel\n"
        "for name in bilevel.__all__: getattr(bilevel, name)\n"
        "print({name.split('.')[0] for name in sys.modules})"
    ).stdout
    assert "'jax'" in loaded
    assert "jaxopt" not in loaded
    assert "bilevel_" not in loaded


def test_an_unknown_name_is_refused_by_name():
    with pytest.raises(AttributeError, match="no_such_name"):
        bilevel.no_such_name  # noqa: B018


def test_names_are_listed_before_they_are_used():
    assert set(PUBLIC) <= set(dir(bilevel))


@pytest.mark.parametrize("path", CORE, ids=module_name)
def test_core_needs_only_its_own_dependencies(path: Path):
    """Neither an adapter nor what an extra brings; what is optional is asked for when in use."""
    required = {
        re.split(r"[<>=!~\[; ]", entry)[0].replace("-", "_") for entry in PROJECT["dependencies"]
    }
    allowed = (
        (required - {"jaxopt"}) | {"bilevel", "jaxlib", "pydantic_core"} | sys.stdlib_module_names
    )
    tree = parse(path)
    at_import = ast.Module([node for node in tree.body if not is_definition(node)], [])
    assert {name.split(".")[0] for name in imports(at_import)} <= allowed
    assert {name.split(".")[0] for name in imports(tree)} <= allowed | {
        "jinja2",
        "matplotlib",
        "mlflow",
        "orbax",
        "tensorboardX",
    }


def is_definition(node: ast.stmt) -> bool:
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)


def test_imports_between_modules_have_no_cycle():
    """Imports inside functions count: they hide a cycle, they do not break it."""
    graph = {name: set(edges(name, path)) for name, path in MODULES.items()}
    # The package's lazy table leads anywhere but to the command line, which sits above it.
    graph["bilevel"] |= {
        name for name in MODULES if not name.startswith(("bilevel.cli", "bilevel.__main__"))
    }
    graph["bilevel"].discard("bilevel")
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail("import cycle: " + " <- ".join(error.args[1]))


def edges(name: str, path: Path) -> Iterator[str]:
    for imported in imports(parse(path)):
        if imported in MODULES:
            target = imported
        elif imported.rpartition(".")[0] in MODULES:
            target = imported.rpartition(".")[0]
        else:
            continue
        if target != name:
            yield target


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_modules_are_one_noun_long(path: Path):
    length = len(path.read_text(encoding="utf-8").splitlines())
    assert length <= LONGEST, f"{length} lines: split it where it says two things"


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_nothing_is_left_unimplemented(path: Path):
    raised = [ast.unparse(node) for node in ast.walk(parse(path)) if isinstance(node, ast.Raise)]
    assert not [statement for statement in raised if "NotImplemented" in statement]


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_every_module_says_what_it_is(path: Path):
    assert ast.get_docstring(parse(path))


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_come_with_documentation_and_an_example(name: str):
    thing = getattr(bilevel, name)
    documentation = inspect.getdoc(thing) if isinstance(thing, ModuleType) else thing.__doc__
    assert documentation
    if not isinstance(thing, ModuleType):
        assert ">>> " in documentation, "public names show a short example that runs"


def test_the_reference_table_names_every_public_name_and_no_other():
    text = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)
    assert len(listed) == len(set(listed))
    assert set(listed) == set(PUBLIC)


def test_version_is_the_distribution_s():
    assert bilevel.__version__ == PROJECT["version"]


def test_installed_version_is_the_source_s():
    try:
        installed = importlib.metadata.version("bilevel")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("bilevel runs from its sources here, not installed")
    assert installed == PROJECT["version"]


def test_console_script_exists():
    module, _, function = PROJECT["scripts"]["bilevel"].partition(":")
    assert callable(getattr(importlib.import_module(module), function))


def readme_block(name: str) -> str:
    command = [sys.executable, str(ROOT / ".ci" / "readme_block.py"), name]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


NUMBER = re.compile(r"[-+]?\d+\.\d+(?:e[-+]?\d+)?")


def test_readme_example_prints_what_the_readme_says(capsys: pytest.CaptureFixture[str]):
    example = readme_block("example")
    assert len([line for line in example.splitlines() if line.strip()]) <= 15
    names: dict[str, Any] = {"__name__": "example"}
    with jax.enable_x64(False):
        exec(compile(example, "README example", "exec"), names)  # noqa: S102
    printed, promised = capsys.readouterr().out.strip(), readme_block("output").strip()
    assert NUMBER.sub("#", printed) == NUMBER.sub("#", promised)
    np.testing.assert_allclose(
        [float(number) for number in NUMBER.findall(printed)],
        [float(number) for number in NUMBER.findall(promised)],
        rtol=0.1,  # two digits, single precision, another machine's rounding
    )


def test_readme_example_estimates_the_true_error(monkeypatch: pytest.MonkeyPatch):
    """Against the closed form of ridge regression, for all four inner solves."""
    results: list[bilevel.Hypergradient] = []
    original = bilevel.hypergradient

    def recording(*args: Any, **settings: Any) -> bilevel.Hypergradient:
        results.append(original(*args, **settings))
        return results[-1]

    monkeypatch.setattr(bilevel, "hypergradient", recording)
    names: dict[str, Any] = {"__name__": "example"}
    with jax.enable_x64(False):
        exec(compile(readme_block("example"), "README example", "exec"), names)  # noqa: S102
    exact = exact_gradient(*(np.asarray(names[name], np.float64) for name in "XyZz"))
    assert len(results) == 4
    for result in results:
        true = np.linalg.norm(np.asarray(result.gradient) - exact)
        assert true / 2 <= float(result.error.primal + result.error.adjoint) <= 2 * true


def exact_gradient(X: np.ndarray, y: np.ndarray, Z: np.ndarray, z: np.ndarray) -> np.ndarray:
    """d/dθ mean (Z w − z)² at θ = 0, where w minimises mean (X w − y)² + Σ exp(θ) w²."""
    hessian = X.T @ X / len(y) + np.eye(X.shape[1])
    w = np.linalg.solve(hessian, X.T @ y / len(y))
    return -w * np.linalg.solve(hessian, 2 * Z.T @ (Z @ w - z) / len(z))


@pytest.mark.parametrize("name", ["main-job", "test"])
def test_readme_commands_do_everything_on_a_fresh_machine(name: str):
    command = readme_block(name)
    assert command.count("\n") == 1, "one line to copy"
    assert command.startswith("python3 -m venv .venv && .venv/bin/pip install ")
