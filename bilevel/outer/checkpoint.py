"""Pytrees on disk: an .npz archive with the path of each leaf as its name, no pickle."""

import io
import os
import zipfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from bilevel.outer.checkpoints.durable import write_file
from bilevel.outer.processes.shared import gathered, lay

ROOT = "value"
"""Name of the only leaf of a pytree that is one array."""

_TAG = "::"


def save_arrays(path: str | os.PathLike[str], tree: PyTree) -> None:
    """Write the arrays of a pytree; what is no array is left out.

    The file appears whole or not at all: an interruption while writing leaves what was
    there before.

    **Arguments:**

    - `path`: of the file, usually ending in `.npz`; its folder must exist.
    - `tree`: any pytree of arrays of any dtype, random keys and bfloat16 included.

    >>> import tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> save_arrays(f"{folder.name}/theta.npz", {"w": np.ones(2), "name": "linear"})
    >>> read_arrays(f"{folder.name}/theta.npz")
    {'w': array([1., 1.])}
    >>> folder.cleanup()
    """
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_STORED) as archive:
        for name, leaf in named_arrays(tree).items():
            array, tag = _to_numpy(leaf)
            with archive.open(f"{name}{tag}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, array, allow_pickle=False)
    write_file(Path(path), content.getvalue())


def read_arrays(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Read an archive that `save_arrays` wrote: arrays by the path of their leaf.

    **Raises:** `FileNotFoundError`; `ValueError` for a file that is no such archive.
    """
    arrays: dict[str, np.ndarray] = {}
    if not zipfile.is_zipfile(path):
        # NumPy would take it for a pickle, and say how to open it as one.
        Path(path).stat()
        msg = f"{path} is no archive of arrays that bilevel wrote."
        raise ValueError(msg)
    try:
        with np.load(path, allow_pickle=False) as archive:
            for stored in archive.files:
                name, _, dtype = stored.partition(_TAG)
                array = archive[stored]
                arrays[name] = array.view(jnp.dtype(dtype)) if dtype else array
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        msg = f"{path} is no archive of arrays that bilevel wrote: {error}"
        raise ValueError(msg) from error
    return arrays


def load_arrays(path: str | os.PathLike[str], like: PyTree) -> PyTree:
    """Read an archive into the structure it was written from.

    **Arguments:**

    - `path`: of the archive.
    - `like`: a pytree with the same structure, shapes and dtypes; what is no array is
        taken from it.

    **Returns:** `like` with the arrays of the archive in place of its own.

    **Raises:** `ValueError` naming the leaves that differ.
    """
    return fitted(path, read_arrays(path), like)


def fitted(path: object, arrays: Mapping[str, Any], like: PyTree) -> PyTree:
    """The arrays of an archive, read already, in the structure they were written from.

    Those of NumPy go where the leaves of `like` are; those of JAX stay where they are.

    **Raises:** `ValueError` naming the leaves that differ, and the `path`.
    """
    expected = named_arrays(like)
    missing = [name for name in expected if name not in arrays]
    surplus = [name for name in arrays if name not in expected]
    if missing or surplus:
        msg = (
            f"{path} does not fit: it has no {missing[:3]} and what is expected has no "
            f"{surplus[:3]}. Load it into what it was saved from, with the same optimizer and "
            "controller."
        )
        raise ValueError(msg)
    restored = {name: _restore(path, name, arrays[name], leaf) for name, leaf in expected.items()}
    leaves, structure = jax.tree.flatten(like)
    values = iter(restored.values())
    return structure.unflatten([next(values) if is_array(leaf) else leaf for leaf in leaves])


def named_arrays(tree: PyTree) -> dict[str, Any]:
    """The arrays of a pytree by the path of their leaf, in the order of the leaves."""
    found = [
        (path, leaf)
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
        if is_array(leaf)
    ]
    names = [jax.tree_util.keystr(path, simple=True, separator="/") or ROOT for path, _ in found]
    if any(count > 1 for count in Counter(names).values()):
        # {"a/b": ...} beside {"a": {"b": ...}}: only the full notation tells them apart.
        names = [jax.tree_util.keystr(path) for path, _ in found]
    return {name: leaf for name, (_, leaf) in zip(names, found, strict=True)}


def is_array(leaf: Any) -> bool:
    """Whether a leaf is an array of JAX or NumPy, scalars of NumPy included."""
    return isinstance(leaf, jax.Array | np.ndarray | np.generic)


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def plain_array(leaf: Any) -> np.ndarray:
    """An array of JAX or NumPy as one of NumPy; of random keys, their bits.

    Where each process has a part of it, all have to call this.
    """
    return np.asarray(gathered(jax.random.key_data(leaf) if _is_key(leaf) else leaf))


def _to_numpy(leaf: Any) -> tuple[np.ndarray, str]:
    array = plain_array(leaf)
    if array.dtype.isbuiltin == 1:
        return array, ""
    # numpy's format knows no bfloat16 or float8: store the bits and name the dtype.
    bits = np.dtype(f"uint{8 * array.dtype.itemsize}")
    return np.ascontiguousarray(array).view(bits).reshape(array.shape), f"{_TAG}{array.dtype.name}"


def _restore(path: object, name: str, array: Any, leaf: Any) -> Any:
    if _is_key(leaf):
        return jax.random.wrap_key_data(jnp.asarray(array), impl=jax.random.key_impl(leaf))
    shape, dtype = np.shape(leaf), np.dtype(leaf.dtype)
    if array.shape != shape or array.dtype != dtype:
        msg = (
            f"{path} does not fit: {name} is {array.dtype}{list(array.shape)} there and "
            f"{dtype}{list(shape)} is expected. Load it into what it was saved from."
        )
        raise ValueError(msg)
    if not isinstance(leaf, jax.Array) or isinstance(array, jax.Array | jax.ShapeDtypeStruct):
        return array  # put where it belongs already
    # Where it was asked to be; what nobody asked for is the default device's.
    return lay(array, leaf.sharding) if leaf.committed else jnp.asarray(array)
