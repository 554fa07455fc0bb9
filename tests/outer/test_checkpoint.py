"""Pytrees on disk: what goes in comes out, without pickle."""

import zipfile
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilevel.outer.checkpoint import load_arrays, named_arrays, read_arrays, save_arrays

TREES: dict[str, Any] = {
    "one array": jnp.arange(3.0),
    "a scalar": jnp.float32(2.5),
    "nested": {"a": [jnp.ones(2), (np.zeros((2, 0)),)], "file": jnp.arange(2)},
    "names that look alike": {"a/b": jnp.ones(1), "a": {"b": jnp.zeros(1)}},
    "dtypes": [jnp.asarray(x) for x in (True, 3, 1.5, 1 + 2j)],
    "half": {"b": jnp.arange(3, dtype=jnp.bfloat16), "h": jnp.arange(3, dtype=jnp.float16)},
    "keys": {"typed": jax.random.key(5), "raw": jax.random.PRNGKey(5)},
    "module": eqx.nn.MLP(2, 1, 4, 1, key=jax.random.key(0)),
    "no arrays": {"name": "x", "none": None},
}


def bits(leaf: Any) -> Any:
    typed = isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if typed else leaf)


@pytest.mark.parametrize("name", TREES)
def test_what_is_saved_is_loaded(tmp_path: Path, name: str):
    tree = TREES[name]
    save_arrays(tmp_path / "tree.npz", tree)
    loaded = load_arrays(tmp_path / "tree.npz", tree)
    assert jax.tree.structure(loaded) == jax.tree.structure(tree)
    for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(tree), strict=True):
        if hasattr(b, "dtype"):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(bits(a), bits(b))
        else:
            assert a is b


def test_half_precision_comes_back_by_name_alone(tmp_path: Path):
    save_arrays(tmp_path / "tree.npz", TREES["half"])
    assert read_arrays(tmp_path / "tree.npz")["b"].dtype == jnp.bfloat16


def test_names_are_paths():
    assert list(named_arrays({"layers": [{"weight": jnp.ones(1)}]})) == ["layers/0/weight"]
    assert list(named_arrays(jnp.ones(1))) == ["value"]


def test_the_archive_holds_no_pickle(tmp_path: Path):
    with pytest.raises(ValueError, match=r"pickle|Object arrays"):
        save_arrays(tmp_path / "tree.npz", {"x": np.array([object()])})
    assert not (tmp_path / "tree.npz").exists()


def test_another_structure_or_shape_is_refused(tmp_path: Path):
    path = tmp_path / "tree.npz"
    save_arrays(path, {"w": jnp.ones(3)})
    with pytest.raises(ValueError, match="does not fit"):
        load_arrays(path, {"v": jnp.ones(3)})
    with pytest.raises(ValueError, match=r"w is float64\[3\] there and float64\[4\]"):
        load_arrays(path, {"w": jnp.ones(4)})
    with pytest.raises(ValueError, match="float32"):
        load_arrays(path, {"w": jnp.ones(3, jnp.float32)})


def test_what_is_no_archive_is_refused(tmp_path: Path):
    (tmp_path / "a.npz").write_text("not an archive")
    with pytest.raises(ValueError, match="no archive of arrays"):
        read_arrays(tmp_path / "a.npz")
    with pytest.raises(FileNotFoundError):
        read_arrays(tmp_path / "b.npz")


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "tree.npz"
    save_arrays(path, {"w": jnp.ones(3)})

    def fail(*_: Any, **__: Any) -> None:
        msg = "disk full"
        raise OSError(msg)

    monkeypatch.setattr(zipfile.ZipFile, "open", fail)
    with pytest.raises(OSError, match="disk full"):
        save_arrays(path, {"w": jnp.zeros(3)})
    monkeypatch.undo()
    assert read_arrays(path)["w"].sum() == 3
