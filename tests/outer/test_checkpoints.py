"""Checkpoints on disk: whole or refused, whatever is in them."""

import hashlib
import json
import os
import pickle
import random
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from bilevel.outer.checkpoints import arrays
from bilevel.outer.checkpoints.durable import DamagedError
from bilevel.outer.checkpoints.manifest import SCHEMA, FileEntry, Manifest
from bilevel.outer.checkpoints.settings import Checkpoints
from bilevel.outer.checkpoints.store import Moment, Store
from bilevel.outer.fingerprint import OtherRunError
from bilevel.outer.history import History, Record

FULL = os.environ.get("BILEVEL_FAULTS") == "full"
BEGUN = {"seed": "0", "task.name": "made"}
STATE = {
    "theta": {"w": jnp.arange(6.0).reshape(2, 3), "b": jnp.float32(2.0)},
    "half": jnp.ones(3, jnp.bfloat16),
    "complex": jnp.array([1 + 2j, 3.0]),
    "key": jax.random.key(3),
    "flags": np.array([True, False]),
    "count": np.int64(7),
    "empty": np.zeros((0, 4), np.float32),
    "name": "not an array",
}


def history(epochs: int) -> History:
    """Records whose fields are measured always, now and then, never, or the same each time."""
    return History(
        Record(
            epoch=epoch,
            metric=1.0 / (epoch + 1),
            loss=float("nan") if epoch == 2 else -0.0,
            error=0.25 if epoch % 2 else None,
            level=epoch or None,
            primal_iterations=2**60 + epoch,
            static=[None, "grid 32, 5 %", "grid 64"][epoch % 3],
        )
        for epoch in range(epochs + 1)
    )


def kept(folder: Path, *epochs: int) -> Store:
    store = Store(folder, BEGUN, 2)
    for epoch in epochs:
        state = {**STATE, "count": np.int64(epoch)}
        store.save(Moment(epoch, 0), state, history(epoch), 1.0 / epoch)
    return store


def newest(store: Store, *, strict: bool = False) -> Any:
    return store.newest(lambda moment: STATE, strict=strict)


def test_what_is_written_comes_back(tmp_path: Path):
    found = newest(kept(tmp_path, 1, 2))
    assert found.place == Moment(2, 0)
    assert list(map(repr, found.history)) == list(map(repr, history(2)))
    assert found.damaged == ()
    for one, other in zip(
        jax.tree.leaves({**STATE, "count": np.int64(2)}), jax.tree.leaves(found.state), strict=True
    ):
        assert type(one) is type(other) or isinstance(other, np.ndarray | np.generic)
        if not isinstance(one, str):
            assert one.dtype == other.dtype
            same = one == other
            assert bool(np.all(np.asarray(same)))


@given(
    st.dictionaries(
        st.text(min_size=1, max_size=8),
        st.sampled_from(["float16", "float32", "float64", "int8", "uint64", "bool", "complex64"]),
        max_size=4,
    ),
    st.lists(st.integers(0, 3), max_size=3),
)
def test_any_arrays_come_back(dtypes: dict[str, str], shape: list[int]):
    tree = {
        name: np.arange(int(np.prod(shape)), dtype="float64").reshape(shape).astype(dtype)
        for name, dtype in dtypes.items()
    }
    content = arrays.encode(tree)
    assert len(content) <= arrays.most_bytes(tree)
    entries = {name: arrays.entry_of(array) for name, array in tree.items()}
    found = arrays.decode(content, entries, "here")
    for name, array in tree.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype


def test_the_last_ones_and_the_best_are_kept(tmp_path: Path):
    store = Store(tmp_path, BEGUN, 2)
    for epoch, metric in enumerate([3.0, 1.0, float("nan"), 2.0, 4.0], start=1):
        store.save(Moment(epoch, 0), STATE, history(epoch), metric)
    assert store.best() == (1.0, Moment(2, 0))
    store.prune(Moment(2, 0))
    assert [folder.name for folder in store.folders()] == [
        "00000002-00000000",
        "00000004-00000000",
        "00000005-00000000",
    ]
    store.prune(None)
    assert len(store.folders()) == 2


def test_another_run_s_is_no_damage(tmp_path: Path):
    kept(tmp_path, 1)
    other = Store(tmp_path, {**BEGUN, "seed": "1"}, 2)
    with pytest.raises(OtherRunError, match="seed was 0, is 1"):
        newest(other)


def test_a_state_of_another_shape_names_the_leaf(tmp_path: Path):
    store = kept(tmp_path, 1)
    with pytest.raises(ValueError, match=r"theta/w is float64\[2, 3\] there and float64\[3\]"):
        store.newest(lambda moment: STATE | {"theta": {"w": jnp.ones(3), "b": STATE["theta"]["b"]}},
                     strict=False)  # fmt: skip


def test_unfinished_folders_are_no_checkpoints(tmp_path: Path):
    store = kept(tmp_path, 1)
    partial = tmp_path / "checkpoints" / ".00000002-00000000.77.partial"
    partial.mkdir()
    (partial / "manifest.json").write_text("{")
    assert newest(store).place == Moment(1, 0)
    store.set_aside()
    assert not partial.exists()


FILES = ("manifest.json", "manifest.sha256", "state.safetensors", "history.safetensors")


def damaged(store: Store) -> bool:
    """Whether the newest is seen to be damaged, and the one before is taken."""
    found = newest(store)
    assert found.place in (Moment(1, 0), Moment(2, 0))
    if found.place == Moment(2, 0):
        return False
    assert int(found.state["count"]) == 1
    assert len(found.damaged) == 1
    assert "00000002-00000000" in found.damaged[0]
    with pytest.raises(DamagedError):
        newest(store, strict=True)
    return True


@pytest.mark.parametrize("name", FILES)
def test_every_flipped_bit_is_seen(tmp_path: Path, name: str):
    store = kept(tmp_path, 1, 2)
    path = tmp_path / "checkpoints" / "00000002-00000000" / name
    whole = path.read_bytes()
    generator = random.Random(name)  # noqa: S311
    places = generator.sample(range(8 * len(whole)), min(250 if FULL else 25, 8 * len(whole)))
    for place in places:
        content = bytearray(whole)
        content[place // 8] ^= 1 << place % 8
        path.write_bytes(content)
        assert damaged(store), place


@pytest.mark.parametrize("name", FILES)
def test_every_truncated_file_is_seen(tmp_path: Path, name: str):
    store = kept(tmp_path, 1, 2)
    path = tmp_path / "checkpoints" / "00000002-00000000" / name
    whole = path.read_bytes()
    generator = random.Random(name)  # noqa: S311
    for length in generator.choices(range(len(whole)), k=125 if FULL else 10):
        path.write_bytes(whole[:length])
        assert damaged(store), length
    path.write_bytes(whole + b"\0")
    assert damaged(store)


@pytest.mark.parametrize("first", FILES)
def test_missing_and_swapped_files_are_seen(tmp_path: Path, first: str):
    store = kept(tmp_path, 1, 2)
    folder = tmp_path / "checkpoints" / "00000002-00000000"
    contents = {name: (folder / name).read_bytes() for name in FILES}
    (folder / first).unlink()
    assert damaged(store)
    before = tmp_path / "checkpoints" / "00000001-00000000"
    for other in FILES:
        for name in FILES:
            (folder / name).write_bytes(contents[name])
        (folder / first).write_bytes(
            (before / first).read_bytes() if other == first else contents[other]
        )
        assert damaged(store), other


def test_a_whole_checkpoint_under_another_s_name_is_seen(tmp_path: Path):
    store = kept(tmp_path, 1)
    folder = tmp_path / "checkpoints"
    (folder / "00000001-00000000").rename(folder / "00000009-00000000")
    with pytest.raises(DamagedError, match="is of another checkpoint"):
        newest(store)


def signed(
    folder: Path, change: Callable[[dict[str, Any]], Any], state: bytes | None = None
) -> None:
    """Change a manifest, and sign it anew, as somebody would who means harm."""
    path = folder / "manifest.json"
    plain = json.loads(path.read_bytes())
    if state is not None:
        (folder / "state.safetensors").write_bytes(state)
        plain["files"]["state.safetensors"] = json.loads(FileEntry.of(state).model_dump_json())
    changed = change(plain)
    content = changed if isinstance(changed, bytes) else json.dumps(plain).encode()
    path.write_bytes(content)
    (folder / "manifest.sha256").write_text(hashlib.sha256(content).hexdigest() + "\n")


class Bomb:
    """Writes a file where it is unpickled."""

    def __reduce__(self) -> Any:
        return os.system, ("touch exploded",)


def header(text: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text


def overlapping(plain: dict[str, Any]) -> None:
    plain["leaves"] = {name: {"dtype": "uint8", "shape": [8]} for name in ("a", "b")}


OVERLAP = json.dumps(
    {name: {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]} for name in ("a", "b")}
).encode()
BEYOND = json.dumps({"a": {"dtype": "U8", "shape": [8], "data_offsets": [0, 2**40]}}).encode()
ONE = b'"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}'
TWICE = b"{" + ONE + b", " + ONE + b"}"


def put(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(plain: dict[str, Any]) -> None:
        part, *names = plain, *key.split("/")
        for name in names[:-1]:
            part = part[name]
        part[names[-1]] = value

    return change


def raw(content: bytes) -> Callable[[dict[str, Any]], bytes]:
    return lambda plain: content


SIZE = {"size": 1, "sha256": 64 * "0"}
HOSTILE: dict[str, tuple[Callable[[dict[str, Any]], Any], bytes | None]] = {
    "a pickle for a state": (put("version", 1), pickle.dumps(Bomb())),
    "a huge header": (put("version", 1), header(b"{}", 2**62)),
    "a header of 100 MB that is not there": (put("version", 1), header(b"{}", 10**8)),
    "tensors that overlap": (overlapping, header(OVERLAP) + bytes(8)),
    "a tensor beyond the end": (
        put("leaves", {"a": {"dtype": "uint8", "shape": [8]}}),
        header(BEYOND),
    ),
    "a tensor twice": (
        put("leaves", {"a": {"dtype": "uint8", "shape": [1]}}),
        header(TWICE) + b"0",
    ),
    "a name that climbs": (put("files", {"../../theta.npz": SIZE}), None),
    "an absolute name": (put("files", {"/etc/passwd": SIZE}), None),
    "another file": (put("files/state.pickle", SIZE), None),
    "a key twice": (raw(b'{"version": 1, "version": 1}'), None),
    "deep nesting": (raw(b"[" * 100_000), None),
    "a manifest that is a pickle": (raw(pickle.dumps(Bomb())), None),
    "a shape of a trillion": (
        put("leaves/theta~1w", {"dtype": "float64", "shape": [10**12]}),
        None,
    ),
    "a negative shape": (put("leaves/count", {"dtype": "int64", "shape": [-1]}), None),
    "a dtype of objects": (put("leaves/count", {"dtype": "object", "shape": []}), None),
    "a dtype with code": (put("leaves/count", {"dtype": "__import__('os')", "shape": []}), None),
    "a file of a petabyte": (put("files/state.safetensors/size", 2**50), None),
    "an unknown key": (put("loader", "os.system"), None),
    "a later version": (put("version", SCHEMA + 1), None),
    "a version in words": (put("version", "1"), None),
    "a metric that is no number": (put("metric", "NaN"), None),
    "no object": (raw(b"[]"), None),
    "not even text": (raw(bytes(range(256))), None),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_checkpoints_are_refused(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    store = kept(tmp_path, 1, 2)
    change, state = HOSTILE[name]
    signed(tmp_path / "checkpoints" / "00000002-00000000", change, state)
    began = time.perf_counter()
    assert damaged(store)
    assert time.perf_counter() - began < 2.0  # read twice, the second time strictly
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
@pytest.mark.parametrize("name", FILES)
def test_what_is_no_file_is_refused(tmp_path: Path, kind: str, name: str):
    store = kept(tmp_path, 1, 2)
    path = tmp_path / "checkpoints" / "00000002-00000000" / name
    if kind == "link":
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")
    else:
        path.unlink()
        os.mkfifo(path) if kind == "pipe" else path.mkdir()
    assert damaged(store)


def test_a_state_larger_than_the_task_s_is_not_read(tmp_path: Path):
    store = kept(tmp_path, 1, 2)
    large = safetensors.numpy.save({"a": np.zeros(2**21)})
    folder = tmp_path / "checkpoints" / "00000002-00000000"
    signed(folder, put("leaves", {"a": {"dtype": "float64", "shape": [2**21]}}), large)
    found = newest(store)
    assert "are the most it may" in found.damaged[0]


def test_where_none_is_whole_the_newest_says_why(tmp_path: Path):
    store = kept(tmp_path, 1, 2)
    for folder in store.folders():
        (folder / "state.safetensors").write_bytes(b"xx")
    with pytest.raises(DamagedError, match=r"00000002-00000000 is damaged.*nor is any of the 1"):
        newest(store)
    with pytest.raises(DamagedError, match="there is no checkpoint in"):
        newest(Store(tmp_path / "empty", BEGUN, 2))


GOLDEN = Path(__file__).parent / "golden"


def golden_state() -> dict[str, Any]:
    return {
        "trained": {"w": np.linspace(0.0, 1.0, 4), "half": jnp.ones(2, jnp.bfloat16)},
        "count": np.int64(12),
    }


CALLBACKS = {"epoch": 3, "states": {"Watch": {"seen": [1, 2.5, None]}}}


def write_golden() -> None:
    """Leave one of the present schema; run once for each, before it is released."""
    Store(GOLDEN / f"v{SCHEMA}", BEGUN, 2).save(
        Moment(3, 2),
        golden_state(),
        history(3),
        0.25,
        callbacks=json.dumps(CALLBACKS).encode() + b"\n",
        compilations=(1, 2),
    )


@pytest.mark.parametrize("version", range(1, SCHEMA + 1))
def test_checkpoints_of_every_version_are_read(version: int):
    store = Store(GOLDEN / f"v{version}", BEGUN, 2)
    found = store.newest(lambda moment: golden_state(), strict=True)
    assert found.place == Moment(3, 2)
    written = History([Record(epoch=0)]) if version == 1 else history(3)
    assert list(map(repr, found.history)) == list(map(repr, written))
    assert found.callbacks == ({} if version == 1 else CALLBACKS)
    assert found.compilations == ((0, 0) if version == 1 else (1, 2))
    for one, other in zip(
        jax.tree.leaves(golden_state()), jax.tree.leaves(found.state), strict=True
    ):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def test_a_manifest_is_written_one_way():
    entry = FileEntry.of(b"x")
    manifest = Manifest(
        version=1, epoch=1, batch=0, metric=None, begun_with={}, files={"a.b": entry},
        leaves={}, versions={},
    )  # fmt: skip
    assert Manifest.decode(manifest.encode()) == manifest
    assert manifest.encode() == Manifest.decode(manifest.encode()).encode()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"seconds": -1.0}, "seconds"),
        ({"seconds": float("nan")}, "seconds"),
        ({"last": 0}, "last"),
        ({"keep": 3}, "keep"),
    ],
)
def test_settings_name_what_is_wrong(given: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        Checkpoints(**given)


def test_without_orbax_a_run_says_so_before_it_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    with pytest.raises(ImportError, match="pip install orbax-checkpoint"):
        Store(tmp_path, BEGUN, 2, orbax=True)
