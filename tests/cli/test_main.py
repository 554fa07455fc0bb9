"""The command line in one process: exit codes, one-line errors, what it prints and keeps."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bilevel.cli import info
from bilevel.outer.comparison import Comparison
from bilevel.outer.run import Run

TASK = """
from typing import Literal
import jax.numpy as jnp
import optax
from bilevel.outer.task import Task
from bilevel.refinement.ladder import Ladder

def task(start: float = 5.0, shape: tuple[int, ...] = (), kind: Literal["a", "b"] = "a",
         plain=3, flag: bool = False, seed: int = 0) -> Task:
    def loss(theta, batch, fidelity):
        n = fidelity.budget.iterations.astype(float)
        value = jnp.mean((theta - 2.0) ** 2)
        probe = fidelity.probe
        if probe is None:
            return value
        return value + n * (probe.primal_iterations + probe.adjoint_iterations)
    return Task(
        jnp.full(shape, start + seed), loss, validate=lambda theta: jnp.mean(jnp.abs(theta - 2.0)),
        ladder=Ladder.iterations(1, 1, 5), optimizer=optax.sgd(0.3), epochs=3,
        name=f"{kind}{plain}{flag}", metric_name="error [m]",
    )
"""

Write = Callable[..., str]
Invoke = Callable[..., tuple[int, str, str]]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def put(text: str = TASK, name: str = "problem.py") -> str:
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return put


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    modules = set(sys.modules)
    yield
    for name in set(sys.modules) - modules:
        if name.startswith("bilevel_task_"):
            del sys.modules[name]


def test_run_trains_prints_and_keeps(write: Write, invoke: Invoke, tmp_path: Path):
    code, out, err = invoke("run", write())
    assert code == 0
    assert "error [m]" in out
    assert "compilations of the update" in out
    assert "epoch 3/3" in err
    run = Run.read(tmp_path / "runs" / "a3False-prdp")
    assert run.summary.policy == "prdp"
    assert run.summary.epochs == 3
    # The next one finds a folder of its own.
    assert invoke("run", write(), "--quiet")[2] == ""
    assert (tmp_path / "runs" / "a3False-prdp-2").is_dir()


def test_run_takes_policy_epochs_seed_and_directory(write: Write, invoke: Invoke, tmp_path: Path):
    code, out, _ = invoke(
        "run",
        write(),
        "--policy",
        "fixed=4:2",
        "--epochs",
        "5",
        "--seed",
        "3",
        "--directory",
        str(tmp_path / "mine"),
        "--quiet",
        "--json",
    )
    assert code == 0
    summary = json.loads(out)
    assert summary["policy"] == "fixed=4:2"
    assert summary["epochs"] == 5
    assert summary["primal_iterations"] == 20
    assert summary["first_metric"] == 6.0  # the seed reached the task's function
    assert Run.read(tmp_path / "mine").history[1].adjoint_budget_iterations == 2


def test_settings_take_the_types_of_the_arguments(write: Write, invoke: Invoke):
    settings = ["start=4", "shape=[2, 3]", "kind=b", "plain=7", "flag=yes", "seed=1"]
    words = [word for setting in settings for word in ("--set", setting)]
    code, out, err = invoke("run", write(), *words, "--discard", "--json", "--quiet")
    assert code == 0, err
    summary = json.loads(out)
    assert summary["task"] == "b7True"
    assert summary["first_metric"] == 3.0


def test_a_size_is_a_setting(write: Write, invoke: Invoke):
    sized = TASK.replace('kind: Literal["a", "b"]', 'size: Literal["a", "b"]').replace(
        "{kind}", "{size}"
    )
    path = write(sized)
    for words in (("--size", "b"), ("--set", "size=b"), ("--set", "plain=3", "--size", "b")):
        code, out, err = invoke("run", path, *words, "--discard", "--json", "--quiet")
        assert code == 0, err
        assert json.loads(out)["task"] == "b3False"
    code, _, err = invoke("run", path, "--size", "c", "--discard")
    assert code == 2
    assert "--set size=c: size should be 'a' or 'b'" in err


def test_a_run_is_resumed_or_replaced(write: Write, invoke: Invoke, tmp_path: Path):
    words = ("run", write(), "--quiet", "--directory", str(tmp_path / "r"))
    assert invoke(*words)[0] == 0
    code, _, err = invoke(*words)
    assert code == 2
    assert "--overwrite or --resume" in err
    assert invoke(*words, "--epochs", "6", "--resume")[0] == 0
    assert len(Run.read(tmp_path / "r").history) == 7
    assert invoke(*words, "--overwrite")[0] == 0
    assert len(Run.read(tmp_path / "r").history) == 4


def test_compare_prints_tables_and_keeps_everything(write: Write, invoke: Invoke, tmp_path: Path):
    code, out, _ = invoke(
        "compare",
        write(),
        "--policies",
        "full,fixed=1",
        "--seeds",
        "2",
        "--quiet",
        "--directory",
        str(tmp_path / "c"),
    )
    assert code == 0
    assert "whole runs" in out
    assert "until error [m] ≤" in out
    assert (tmp_path / "c" / "comparison.png").read_bytes()[:4] == b"\x89PNG"
    assert "| full |" in (tmp_path / "c" / "comparison.md").read_text()
    comparison = Comparison.read(tmp_path / "c")
    # The command as it would be typed here: the test is in tmp_path.
    assert comparison.origin["command"] == (
        "bilevel compare problem.py --policies full,fixed=1 --seeds 2 --quiet --directory c"
    )
    assert [row.runs for row in comparison.rows] == [2, 2]
    code, out, _ = invoke(
        "compare",
        write(),
        "--policies",
        "fixed=1,fixed=2",
        "--seeds",
        "4,9",
        "--target",
        "2",
        "--discard",
        "--quiet",
        "--json",
        "--epochs",
        "2",
    )
    assert code == 0
    stored = json.loads(out)
    assert stored["target"] == 2.0
    assert [run["seed"] for run in stored["runs"]["fixed=1"]] == [4, 9]


def test_the_margin_of_a_comparison(write: Write, invoke: Invoke):
    path = write()
    words = ("compare", path, "--policies", "full,fixed=1", "--discard", "--json", "--quiet")
    for option, margin in (((), 0.02), (("--margin", "0.25"), 0.25)):
        code, out, _ = invoke(*words, *option)
        assert code == 0
        stored = json.loads(out)
        assert stored["margin"] == margin
        final = stored["runs"]["full"][0]["final_metric"]
        assert stored["targets"] == [pytest.approx((1 + margin) * final, rel=1e-6)]


def test_a_comparison_in_a_size(write: Write, invoke: Invoke):
    sized = TASK.replace('kind: Literal["a", "b"]', 'size: Literal["a", "b"]').replace(
        "{kind}", "{size}"
    )
    words = ("compare", write(sized), "--policies", "full", "--discard", "--json", "--quiet")
    assert json.loads(invoke(*words, "--size", "b")[1])["task"] == "b3False"
    assert json.loads(invoke(*words)[1])["task"] == "a3False"
    code, _, err = invoke("compare", write(), "--size", "small", "--discard")
    assert code == 2
    assert "task has no argument 'size'" in err


def test_a_narrow_screen_cuts_no_number(
    write: Write, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
):
    words = ("compare", write(), "--policies", "full,fixed=1", "--seeds", "3", "--discard")
    # Standard output is no terminal here, so that the width is at least 120.
    monkeypatch.setattr("bilevel.cli.training._WIDE", 30)
    monkeypatch.setenv("COLUMNS", "50")
    code, out, _ = invoke(*words, "--quiet")
    assert code == 0
    assert "…" not in out
    assert max(map(len, out.splitlines())) <= 50
    assert out.count("policy ") > 2


def test_plot_draws_runs_and_comparisons(write: Write, invoke: Invoke, tmp_path: Path):
    invoke("run", write(), "--quiet", "--directory", str(tmp_path / "r"))
    code, out, _ = invoke("plot", str(tmp_path / "r"))
    assert code == 0
    assert Path(out.strip()).read_bytes()[:4] == b"\x89PNG"
    invoke("compare", write(), "--quiet", "--directory", str(tmp_path / "c"))
    assert invoke("plot", str(tmp_path / "c"), "--output", str(tmp_path / "x.svg"))[0] == 0
    assert "<svg" in (tmp_path / "x.svg").read_text()


def test_a_run_ends_with_its_findings(write: Write, invoke: Invoke):
    text = TASK.replace("epochs=3", "epochs=30").replace("optax.sgd(0.3)", "optax.sgd(0.05)")
    code, out, _ = invoke("run", write(text), "--quiet", "--discard")
    assert code == 0
    assert "advice: The metric never reached a plateau: it still fell by" in out
    code, out, _ = invoke("run", write(text), "--quiet", "--discard", "--json")
    assert json.loads(out)["status"] == "completed"


def test_info_tells_versions_devices_adapters_and_extras(invoke: Invoke):
    code, out, _ = invoke("info", "--json")
    assert code == 0
    found = json.loads(out)
    assert set(found["adapters"]) == {"bilevel_pde", "bilevel_arrays", "bilevel_solvers"}
    assert found["devices"]
    assert "jax" in found["versions"]
    assert {"plot", "solvers", "all"} <= set(found["extras"])
    assert found["extras"]["plot"]["missing"] == []
    code, out, _ = invoke("info")
    assert code == 0
    assert "bilevel_pde" in out


def test_info_offers_nothing_that_cannot_be_had(invoke: Invoke, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        info,
        "collect",
        lambda: {
            "versions": {},
            "devices": ["cpu: cpu"],
            "adapters": {"bilevel_pde": True, "bilevel_arrays": False},
            "extras": {
                "plot": {"missing": ["matplotlib"]},
                "arrays": {"missing": ["array-api-compat"]},
                "pde": {"missing": []},
                "all": {"missing": ["array-api-compat", "matplotlib"]},
            },
        },
    )
    lines = invoke("info")[1].splitlines()
    rows = {line.split()[0]: " ".join(line.split()[1:]) for line in lines if line.split()}
    assert rows["bilevel_pde"].startswith("yes")
    assert rows["bilevel_arrays"].startswith("not part of this version")
    assert rows["plot"] == "matplotlib pip install matplotlib"
    assert rows["arrays"] == "array-api-compat not part of this version"
    assert rows["pde"] == "nothing"
    assert rows["all"] == rows["plot"]


def test_a_task_s_own_report_is_shown(write: Write, invoke: Invoke):
    text = TASK.replace(
        'metric_name="error [m]",',
        'metric_name="e", report=lambda runs, where: print("report of", len(runs), where),',
    )
    assert "report of 1 None" in invoke("run", write(text), "--discard", "--quiet")[1]
    out = invoke("compare", write(text), "--policies", "full,fixed=1", "--discard", "--quiet")[1]
    assert "report of 2 None" in out


SEVERAL = "import bilevel.outer.task as t\nloss = lambda a, b, c: a\n"
TASKS = SEVERAL + "first = t.Task(1.0, loss)\nsecond = t.Task(1.0, loss)\nnumber = 3\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "which command? There is run, compare, sweep, plot, report, schema, info"),
        (["rnu"], "there is no command 'rnu'; did you mean run?"),
        (["--verbose"], "there is no option --verbose; did you mean --version?"),
        (["run"], "required: FILE.py[:NAME]"),
        (["run", "nothing.py"], "there is no file nothing.py."),
        (["run", "problm.py"], "did you mean problem.py?"),
        (["run", "."], "is a directory"),
        (["run", ""], "the task is empty; write FILE.py or FILE.py:NAME"),
        (["run", ":task"], "the task is empty; write FILE.py or FILE.py:NAME"),
        (["run", "problem.py:tsak"], "has no 'tsak'; did you mean task?"),
        (["run", "problem.py:1x"], "'1x' is no name of a task"),
        (["run", "problem.py:jnp"], "jnp in problem.py is a module, not a bilevel Task"),
        (["run", "problem.py:Task"], "is the class Task, not a bilevel Task"),
        (["run", "problem.py", "--polcy", "full"], "no option --polcy; did you mean --policy?"),
        (["run", "problem.py", "--pol", "full"], "no option --pol"),
        (["run", "problem.py", "--policy", "prpd"], "'prpd' is unknown; did you mean prdp?"),
        (["run", "problem.py", "--policy", "task"], "no controller of its own"),
        (["run", "problem.py", "--policy", "best-fixed"], "only a comparison makes"),
        (["run", "problem.py", "--epochs", "0"], "--epochs: '0' is no whole number"),
        (["run", "problem.py", "--epochs"], "--epochs: expected one argument"),
        (["run", "problem.py", "--seed", "-1"], "'-1' is no seed"),
        (["run", "problem.py", "--seed", "x"], "'x' is no seed"),
        (["run", "problem.py", "--set", "n"], "'n' is not of the form NAME=VALUE"),
        (["run", "problem.py", "--set", "strat=1"], "no argument 'strat'; did you mean start?"),
        (["run", "problem.py", "--size", "small"], "task has no argument 'size'"),
        (["run", "problem.py", "--set", "start=x"], "start should be a valid number"),
        (["run", "problem.py", "--set", "kind=c"], "kind should be 'a' or 'b'"),
        (["run", "problem.py", "--set", "shape=3"], "--set shape=3: shape"),
        (["run", "problem.py", "--x64", "--float32"], "not allowed with argument --x64"),
        (["run", "problem.py", "--resume"], "--resume needs --directory"),
        (["run", "problem.py", "--resume", "--directory", "new"], "holds no run to go on with"),
        (["run", "problem.py", "--directory", "problem.py"], "is a file; name a directory"),
        (["run", "problem.py", "--directory", ""], "'' is no path"),
        (["run", "problem.py", "--directory", "problem.py/a"], "problem.py/a: Not a directory"),
        (["run", "problem.py", "--directory", "/proc/a"], "cannot write to the directory /proc/a"),
        (["run", "problem.py", "--directory", "a" * 300], "File name too long. Name another"),
        (["compare", "problem.py", "--directory", "problem.py/a"], "problem.py/a: Not a directory"),
        (["run", "problem.py", "--resume", "--overwrite"], "give one of them"),
        (["run", "problem.py", "--policy", ""], "policy '' is unknown"),
        (["run", "problem.py", "--policy", "fixed=0"], "'0' is no whole number of 1 or more"),
        (["run", "problem.py", "--policy", "fixed=abc"], "'abc' is no whole number of 1 or more"),
        (["run", "problem.py", "--set", "start=nan"], "--set start=nan: start should be finite"),
        (["run", "problem.py", "--set", "start=-inf"], "start should be finite"),
        (["run", "problem.py", "--set", "start=1e400"], "start should be finite"),
        (["run", "syntax.py"], "syntax.py, line 2: SyntaxError: "),
        (["run", "imports.py"], "imports.py, line 3: ModuleNotFoundError: No module named 'no_su"),
        (["run", "beside.py"], "syntax.py, line 2: SyntaxError: "),
        (["run", "bytes.py"], "bytes.py: SyntaxError: source code string cannot contain null"),
        (["run", "problem.py", "more"], "one argument too many: 'more'"),
        (["run", "tasks.py"], "holds 2 tasks; choose one: tasks.py:first, tasks.py:second"),
        (["run", "tasks.py:number"], "a value of type int, not a bilevel Task"),
        (["run", "tasks.py:first"], "names no optimizer"),
        (["run", "tasks.py:first", "--set", "a=1"], "first is a Task and has nothing to set"),
        (["run", "empty.py"], "holds no task: it should have `task = bl.Task(...)`"),
        (["run", "number.py"], "returned a value of type int, not a bilevel Task"),
        (["run", "needs.py"], "task needs n: give --set n=VALUE"),
        (["compare", "problem.py", "--policies", "full,full"], "given twice"),
        (["compare", "problem.py", "--policies", ","], "no policy given"),
        (["compare", "problem.py", "--policies", "best-fixed"], "needs full among the policies"),
        (["compare", "problem.py", "--seeds", "0"], "'0' is no whole number of 1 or more"),
        (["compare", "problem.py", "--seeds", "-1"], "'-1' is no whole number of 1 or more"),
        (["compare", "problem.py", "--seeds", "99999999999"], "more than 10000 seeds"),
        (["compare", "problem.py", "--seeds", "1,1"], "should list seeds that differ"),
        (["compare", "tasks.py:first", "--seeds", "2"], "2 seeds would be as many times the same"),
        (["compare", "problem.py", "--target", "nan"], "'nan' is no finite number"),
        (["compare", "problem.py", "--margin", "-1"], "'-1' is negative"),
        (["plot", "nowhere"], "there is no directory nowhere"),
        (["plot", "problem.py"], "there is no directory problem.py"),
        (["plot", "."], "holds neither a run nor a comparison"),
        (["plot", ".", "--output", "a.gif"], "the ending should be one of .png, .pdf, .svg"),
        (["report"], "required: RUN"),
        (["report", "nowhere"], "there is no nowhere"),
        (["report", "."], "holds neither a run nor a comparison"),
        (["report", "problem.py"], "problem.py is neither the directory of a run or comparison"),
        (["report", ".", "--output", "a.pdf"], "the ending should be .html"),
        (["report", ".", "--text", "--output", "a.html"], "give one of them"),
        (["report", ".", "--txet"], "no option --txet; did you mean --text?"),
    ],
)
def test_misuse_is_one_clear_line_and_exit_2(
    write: Write, invoke: Invoke, words: list[str], message: str
):
    write()
    write(TASKS, "tasks.py")
    write("", "empty.py")
    write("x = 1\nx = = 1\n", "syntax.py")
    write("\n\nimport no_such_module\n", "imports.py")
    write("import syntax\n", "beside.py")
    write("\0", "bytes.py")
    write("def task():\n    return 3\n", "number.py")
    write("def task(n):\n    return n\n", "needs.py")
    code, out, err = invoke(*words)
    assert message in err
    assert code == 2
    assert out == ""
    assert err.startswith("bilevel: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("def task():\n    raise KeyError('mine')\n", "KeyError: 'mine'"),
        (TASK.replace("value = jnp.mean", "value = undefined_name"), "in loss"),
    ],
)
def test_errors_of_the_file_show_its_traceback_and_exit_1(
    write: Write, invoke: Invoke, text: str, shown: str
):
    code, out, err = invoke("run", write(text), "--discard", "--quiet")
    assert code == 1
    assert shown in err
    assert "problem.py" in err
    assert "taskfile.py" not in err
    assert out == ""


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("def f():\n    return 1 / 0\nf()\n", "problem.py, line 2: ZeroDivisionError: division by"),
        ("raise SystemExit(0)\n", "problem.py, line 1: SystemExit: 0 ("),
        ("x = 1\nraise ValueError('two\\nlines')\n", "problem.py, line 2: ValueError: two ("),
    ],
)
def test_a_file_that_raises_as_it_is_read_is_one_line_and_exit_1(
    write: Write, invoke: Invoke, text: str, shown: str
):
    code, out, err = invoke("run", write(text), "--discard", "--quiet")
    assert code == 1
    assert shown in err
    assert "--traceback shows where" in err
    assert err.count("\n") == 1
    assert out == ""


@pytest.mark.parametrize(
    "text", ["x = = 1\n", "import no_such_module\n", "raise ValueError('mine')\n"]
)
def test_the_whole_traceback_is_shown_on_request(write: Write, invoke: Invoke, text: str):
    code, _, err = invoke("run", write(text), "--discard", "--traceback")
    assert code == 1
    assert "Traceback" in err
    assert "taskfile.py" in err


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("value = jnp.mean(", "value = jnp.ones(3) + (", "loss should be one real floating"),
        ("lambda theta: jnp.mean(", "lambda theta: jnp.ones(3) * (", "validate should return one"),
    ],
)
def test_an_error_without_a_frame_of_the_file_is_one_line(
    write: Write, invoke: Invoke, before: str, after: str, message: str
):
    code, _, err = invoke("run", write(TASK.replace(before, after)), "--discard", "--quiet")
    assert code == 1
    assert message in err
    assert err.count("\n") == 1
    code, _, err = invoke("run", write(TASK.replace(before, after)), "--discard", "--traceback")
    assert "training.py" in err


def test_a_setting_may_be_infinite_where_its_default_is(write: Write, invoke: Invoke):
    text = TASK.replace("start: float = 5.0", "start: float = 5.0, limit: float = float('inf')")
    words = ("run", write(text), "--discard", "--quiet")
    assert invoke(*words, "--set", "limit=inf")[0] == 0
    assert invoke(*words, "--set", "start=inf")[0] == 2


@pytest.mark.parametrize(
    ("name", "stored", "message"),
    [
        ("history.jsonl", b'{"epoch": "one"}\n{"epoch": 2}\n', "history.jsonl, line 1: not a rec"),
        ("history.jsonl", b"\xff\xfe\n", "history.jsonl: not a bilevel history"),
        ("history.jsonl", None, "history.jsonl: No such file"),
        ("theta.npz", b"xx", "theta.npz is no archive of arrays"),
        ("summary.json", b"", "summary.json: Expecting value"),
        ("summary.json", b"{}", "and 25 more missing"),
    ],
)
def test_a_damaged_run_is_named_in_one_line(
    write: Write, invoke: Invoke, tmp_path: Path, name: str, stored: bytes | None, message: str
):
    invoke("run", write(), "--quiet", "--directory", str(tmp_path / "r"))
    damaged = tmp_path / "r" / name
    damaged.unlink() if stored is None else damaged.write_bytes(stored)
    code, _, err = invoke("plot", str(tmp_path / "r"))
    assert code == 2
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("where", ["problem.py/a.png", "/proc/a.png", "folder.png"])
def test_a_picture_that_cannot_be_written_is_misuse(
    write: Write, invoke: Invoke, tmp_path: Path, where: str
):
    invoke("run", write(), "--quiet", "--directory", str(tmp_path / "r"))
    (tmp_path / "folder.png").mkdir()
    code, _, err = invoke("plot", str(tmp_path / "r"), "--output", where)
    assert code == 2
    assert err.startswith("bilevel: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "name", "stored", "message"),
    [
        (["--policy", "full"], None, b"", "controller was ProgressiveRefinement, is FixedFidelity"),
        (["--seed", "4"], None, b"", "seed was 0, is 4"),
        (["--set", "plain=4"], None, b"", "task.name was a3False, is a4False"),
        ([], "checkpoints", b"xx", "00000003-00000000 is damaged: "),
    ],
)
def test_a_run_of_something_else_is_not_gone_on_with(
    write: Write,
    invoke: Invoke,
    tmp_path: Path,
    words: list[str],
    name: str | None,
    stored: bytes,
    message: str,
):
    common = ("run", write(), "--directory", str(tmp_path / "r"))
    assert invoke(*common, "--quiet")[0] == 0
    if name is not None:
        for state in (tmp_path / "r" / name).glob("*/state.safetensors"):
            state.write_bytes(stored)
    code, _, err = invoke(*common, "--resume", *words)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1


def test_a_run_that_is_given_up_exits_1(write: Write, invoke: Invoke):
    text = TASK.replace("value = jnp.mean((theta - 2.0) ** 2)", "value = jnp.mean(theta * jnp.nan)")
    code, _, err = invoke(
        "run", write(text), "--discard", "--quiet", "--max-nonfinite", "2", "--epochs", "9"
    )
    assert code == 1
    assert "2 updates in a row" in err
    assert err.count("\n") == 1


def test_a_corrupt_run_is_misuse(write: Write, invoke: Invoke, tmp_path: Path):
    invoke("run", write(), "--quiet", "--directory", str(tmp_path / "r"))
    (tmp_path / "r" / "summary.json").write_text("{}")
    code, _, err = invoke("plot", str(tmp_path / "r"))
    assert code == 2
    assert "not a summary of a bilevel run" in err


def test_files_beside_the_task_can_be_imported(write: Write, invoke: Invoke):
    write("START = 3.0\n", "beside_the_task.py")
    text = "from beside_the_task import START\n" + TASK.replace("5.0", "START")
    code, out, err = invoke("run", write(text), "--discard", "--quiet", "--json")
    assert code == 0, err
    assert json.loads(out)["first_metric"] == 1.0
    del sys.modules["beside_the_task"]


def test_a_run_that_is_given_up_says_so_once(write: Write, invoke: Invoke):
    text = TASK.replace("value = jnp.mean((theta - 2.0) ** 2)", "value = jnp.mean(theta * jnp.nan)")
    words = ("run", write(text), "--discard", "--max-nonfinite", "2", "--epochs", "9")
    assert invoke(*words)[2].count("2 updates in a row") == 1


def test_the_default_policy_is_in_the_help(invoke: Invoke):
    assert "task's own controller, else prdp" in " ".join(invoke("run", "--help")[1].split())
