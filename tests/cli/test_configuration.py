"""Configurations: what overrides what, and what is refused in a line with file and key."""

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from bilevel.cli.configuration import MODELS, schema

pytest.importorskip("yaml")

Invoke = Callable[..., tuple[int, str, str]]

TASK = """
import optax
import bilevel as bl

def task(scale: float = 1.0, width: int = 3, names: list[str] = [], seed: int = 0):
    def loss(theta, batch, fidelity):
        return scale * (theta - 4.0) ** 2
    return bl.Task(1.0, loss, optimizer=optax.sgd(0.05), epochs=4, full=bl.Budget(1),
                   ladder=bl.Ladder.iterations(1, 1, width))
"""


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.py").write_text(TASK)


def effective(folder: str) -> dict:
    return json.loads(Path(folder, "configuration.json").read_text())["configuration"]


SETTINGS = {
    "c.toml": """
epochs = 3
policy = "fixed=2"
seed = 5
[task]
scale = 0.5
width = 4
names = ["a", "b"]
[checkpoints]
seconds = 5
last = 3
""",
    "c.yaml": """
epochs: 3
policy: fixed=2
seed: 5
task: {scale: 0.5, width: 4, names: [a, b]}
checkpoints:
  seconds: 5
  last: 3
""",
}


@pytest.mark.parametrize("name", SETTINGS)
def test_words_override_options_and_options_the_file(invoke: Invoke, name: str):
    Path(name).write_text(SETTINGS[name])
    words = ("task.width=7", "checkpoints.last=9", "--epochs", "2", "--set", "scale=0.25")
    code, _, err = invoke("run", "t.py", "--config", name, "--quiet", "--directory", "r", *words)
    assert code == 0, err
    found = effective("r")
    assert found["epochs"] == 2
    assert (found["policy"], found["seed"]) == ("fixed=2", 5)
    assert found["task"] == {"scale": "0.25", "width": "7", "names": "['a', 'b']", "seed": "0"}
    assert found["checkpoints"] == {
        "seconds": 5.0,
        "last": 9,
        "best": True,
        "strict": False,
        "backend": "safetensors",
    }
    assert json.loads(Path("r/summary.json").read_text())["epochs"] == 2


def test_what_was_kept_makes_the_same_run(invoke: Invoke):
    common = ("run", "t.py", "--quiet")
    assert invoke(*common, "--directory", "a", "task.scale=0.3", "policy=full", "epochs=3")[0] == 0
    kept = effective("a")
    lines = [f"epochs = {kept['epochs']}", f"policy = {kept['policy']!r}", "[task]"]
    lines += [f"{name} = {value}" for name, value in kept["task"].items()]
    Path("again.toml").write_text("\n".join(lines))
    assert invoke(*common, "--directory", "b", "--config", "again.toml")[0] == 0
    assert effective("b") == kept
    assert Path("a/theta.npz").read_bytes() == Path("b/theta.npz").read_bytes()


def test_comparisons_have_theirs(invoke: Invoke):
    Path("c.toml").write_text('policies = ["full", "fixed=2"]\nseeds = [3, 4]\nmargin = 0.1\n')
    code, _, err = invoke(
        "compare", "t.py", "--config", "c.toml", "--quiet", "--directory", "r", "epochs=2"
    )
    assert code == 0, err
    found = effective("r")
    assert (found["policies"], found["seeds"], found["margin"]) == (
        ["full", "fixed=2"],
        [3, 4],
        0.1,
    )


def test_trackers_are_told_of_the_run_and_its_configuration(invoke: Invoke):
    pytest.importorskip("tensorboardX")
    Path("c.toml").write_text('tensorboard = "from-file"\n')
    words = ("--config", "c.toml", "--quiet", "--discard", "task.scale=0.5", "--policy", "fixed=2")
    code, _, err = invoke("run", "t.py", *words)
    assert code == 0, err
    (events,) = Path("from-file").glob("events.out.*")
    for part in (b"| task.scale | 0.5 |", b"| policy | fixed=2 |", b"loss"):
        assert part in events.read_bytes()
    code, _, err = invoke("run", "t.py", *words, "--tensorboard", "from-option")
    assert list(Path("from-option").glob("events.out.*"))


def test_a_tracker_that_is_not_installed_is_misuse(invoke: Invoke, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    code, _, err = invoke("run", "t.py", "--discard", "--mlflow", "http://localhost:1")
    assert code == 2
    assert err.endswith("MLflow: needs mlflow-skinny: pip install mlflow-skinny.\n")
    assert err.count("\n") == 1
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    code, _, err = invoke("run", "t.py", "--discard", "checkpoints.backend=orbax")
    assert code == 2
    assert "pip install orbax-checkpoint" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("command", MODELS)
def test_the_schema_is_published(invoke: Invoke, command: str):
    code, out, _ = invoke("schema", command)
    assert code == 0
    found = json.loads(out)
    assert found == json.loads(schema(command))
    assert found["additionalProperties"] is False
    assert set(found["properties"]) == set(MODELS[command].model_fields)


DEEP = "x = " + "[" * 5000 + "]" * 5000
BAD_TOML = {
    "epoks = 3": "there is no key epoks; did you mean epochs?",
    "[checkpoint]\nlast = 3": "there is no key checkpoint; did you mean checkpoints?",
    "[checkpoints]\nlst = 3": "there is no key checkpoints.lst; did you mean last?",
    "[checkpoints]\nlast = 0": "checkpoints.last should be greater than or equal to 1, got 0",
    "[checkpoints]\nlast = 2.5": "checkpoints.last should be a valid integer",
    "[checkpoints]\nseconds = -1": "checkpoints.seconds should be greater than or equal to 0",
    "[checkpoints]\nseconds = nan": "checkpoints.seconds should be a finite number",
    "[checkpoints]\nbest = 1": "checkpoints.best should be a valid boolean",
    "checkpoints = 3": "checkpoints should be",
    "epochs = 0": "epochs should be greater than or equal to 1, got 0",
    'epochs = "3"': "epochs should be a valid integer",
    "epochs = 3.5": "epochs should be a valid integer",
    "epochs = true": "epochs should be a valid integer",
    "seed = -1": "seed should be greater than or equal to 0",
    "seed = 4294967296": "seed should be less than 4294967296",
    "policy = 3": "policy should be a valid string",
    'policy = ""': "policy",
    'policy = "prpd"': "prpd",
    "precision = 'half'": "precision should be 'float32' or 'float64'",
    "task = 3": "task should be a valid dictionary",
    "[task]\nscal = 2": "task has no argument 'scal'; did you mean scale?",
    "[task]\nscale = 'wide'": "scale should be a valid number",
    "[task]\nscale = nan": "scale should be finite",
    "[task]\nwidth = 2.5": "width should be a valid integer",
    "[task]\nx = 2020-01-01": "task.x",
    "seed = 1\n[task]\nscale = [1, 2020-01-01]": "task.scale.item should be a number, text",
    ".".join(["a"] * 3000) + " = 1": "",
    "max_nonfinite = 0": "max_nonfinite should be",
    "policies = ['full']": "there is no key policies; did you mean policy?",
    "optimizer = 'os.system'": "there is no key optimizer",
    "import = 'os'": "there is no key import",
    "file = '/etc/passwd'": "there is no key file",
    "directory = '../../x'": "there is no key directory",
    "epochs = 3\nepochs = 4": "Cannot overwrite a value",
    "epochs = ": "Invalid value",
    "epochs": "Expected '='",
    "[task": "Expected ']'",
    DEEP: "",
    "x = '" + "y" * 2**21 + "'": "has more than 1,048,576 bytes",
    "\0": "",
}
BAD_YAML = {
    "epoks: 3": "there is no key epoks",
    "epochs: !!python/object/apply:os.system ['touch exploded']": "constructor",
    "policy: !!python/name:os.system": "constructor",
    "!!python/object/new:os.system ['touch exploded']": "constructor",
    "a: &a [x, x]\nb: *a": "anchors and aliases",
    "\n".join(
        ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
        + [f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 9)}]" for k in range(1, 12)]
    ): "anchors and aliases",
    "epochs: 3\nepochs: 4": "epochs stands there twice",
    "task: {scale: 1, scale: 2}": "scale stands there twice",
    "1: 2": "the key 1 should be text",
    "on: 2": "the key True should be text",
    "task: {x: !!binary aGVsbG8=}": "task.x should be a number, text",
    "- epochs": "should hold keys with values, got list",
    "3": "should hold keys with values, got int",
    "epochs: [": "line",
    "? [a, b]\n: 3": "",
    "epochs: .nan": "epochs should be",
    "<<: {epochs: 0}": "epochs should be",
    "[" * 3000: "",
    "\x07": "",
}
CASES = [("c.toml", text, said) for text, said in BAD_TOML.items()] + [
    ("c.yaml", text, said) for text, said in BAD_YAML.items()
]


@pytest.mark.parametrize(("name", "text", "said"), CASES, ids=range(len(CASES)))
def test_bad_and_hostile_configurations_are_refused(
    invoke: Invoke, name: str, text: str, said: str
):
    Path(name).write_text(text)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    code, out, err = invoke("run", "t.py", "--config", name, "--quiet", "--directory", "r")
    assert time.perf_counter() - began < 1.0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 100_000
    assert (code, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1
    assert len(err) < 400
    assert name in err
    assert not Path("exploded").exists()
    assert not Path("r").exists()


def test_at_least_forty_are_tried():
    assert len(CASES) >= 40


@pytest.mark.parametrize("kind", ["missing", "folder", "pipe", "device", "json", "latin"])
def test_what_is_no_configuration_file(invoke: Invoke, kind: str):
    name = "c.json" if kind == "json" else "c.toml"
    path = Path(name)
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "latin":
        path.write_bytes(b"policy = '\xff'")
    elif kind == "json":
        path.write_text("{}")
    code, _, err = invoke("run", "t.py", "--config", name, "--discard")
    assert code == 2
    assert name in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("epoks=3", "epoks=3: there is no key epoks; did you mean epochs?"),
        ("checkpoints.sekonds=1", "did you mean seconds?"),
        ("epochs=", "epochs should be a valid integer"),
        ("task.scale=wide", "scale should be a valid number"),
        ("task.scale=[1]", "scale should be a valid number"),
        ("seed.x=3", "seed should be a valid integer"),
        ("task=[1", "task should be a valid dictionary"),
    ],
)
def test_words_are_checked_like_files(invoke: Invoke, word: str, said: str):
    code, _, err = invoke("run", "t.py", word, "--discard", "--quiet")
    assert code == 2
    assert said in err
    assert err.count("\n") == 1


def test_words_override_set_whatever_their_order(invoke: Invoke):
    words = ("--set", "scale=1", "task.scale=2", "--set", "width=4", "task.width=5")
    assert invoke("run", "t.py", "--quiet", "--directory", "r", *words)[0] == 0
    assert effective("r")["task"]["scale"] == "2.0"
    assert effective("r")["task"]["width"] == "5"


TYPES = """
import optax
import bilevel as bl

def task(flags: list = [], anything=None, pair: tuple = ()):
    assert flags == [True, False], flags
    assert anything == "5", anything
    assert pair == (1, 2), pair
    return bl.Task(1.0, lambda theta, batch, fidelity: theta**2, optimizer=optax.sgd(0.1), epochs=1,
                   full=bl.Budget(1))
"""


def test_values_keep_their_types(invoke: Invoke):
    Path("typed.py").write_text(TYPES)
    Path("c.toml").write_text("[task]\nflags = [true, false]\nanything = '5'\npair = [1, 2]\n")
    code, _, err = invoke("run", "typed.py", "--config", "c.toml", "--quiet", "--discard")
    assert code == 0, err
    words = ("task.flags=[true, false]", "task.anything='5'", "task.pair=[1, 2]")
    code, _, err = invoke("run", "typed.py", *words, "--quiet", "--discard")
    assert code == 0, err


def test_seeds_differ(invoke: Invoke):
    code, _, err = invoke("compare", "t.py", "seeds=[0, 0]", "--quiet", "--discard")
    assert code == 2
    assert "seeds should differ from each other" in err


def test_a_refused_command_leaves_what_was_kept(invoke: Invoke):
    common = ("run", "t.py", "--quiet", "--directory", "r")
    assert invoke(*common, "seed=3")[0] == 0
    before = Path("r/configuration.json").read_bytes()
    assert invoke(*common, "--resume", "seed=4")[0] == 2
    assert invoke(*common, "seed=5")[0] == 2
    assert Path("r/configuration.json").read_bytes() == before
