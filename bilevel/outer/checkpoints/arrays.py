"""Arrays: the leaves of a pytree as one safetensors file, which holds numbers and no code."""

import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from jaxtyping import PyTree

from bilevel.outer.checkpoint import named_arrays, plain_array
from bilevel.outer.checkpoints.durable import DamagedError
from bilevel.outer.checkpoints.manifest import LeafEntry, unique
from bilevel.outer.checkpoints.sharding import ShardingEntry

_HEADER = 2**20
"""Room that a header may take besides what each array needs in it."""

_NATIVE = frozenset(
    ["bool", "float16", "float32", "float64"]
    + [f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)]
)


def encode(named: Mapping[str, Any]) -> bytes:
    """Arrays by name as a file's content."""
    stored: dict[str, np.ndarray] = {}
    for name, leaf in named.items():
        array = plain_array(leaf)
        native = array.dtype.name in _NATIVE
        # safetensors takes an array's memory as it lies.
        whole = np.asarray(array, dtype=array.dtype.newbyteorder("="), order="C")
        stored[name] = whole if native else whole.reshape(-1).view(np.uint8)
    return safetensors.numpy.save(stored)


def entry_of(leaf: Any) -> LeafEntry:
    """What an array is, as a manifest has it."""
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    dtype, shape = np.dtype(leaf.dtype), np.shape(leaf)
    return LeafEntry(dtype=dtype.name, shape=shape, sharding=ShardingEntry.of(leaf))


def decode(
    content: bytes, entries: Mapping[str, LeafEntry], where: object
) -> dict[str, np.ndarray]:
    """The arrays that were encoded, by the path of their leaf.

    **Arguments:**

    - `content`: as `encode` gave it.
    - `entries`: as `entry_of` gave them.
    - `where`: what it was read from, for messages.

    **Raises:** [`DamagedError`][] for a file that is none.
    """
    stored = load_file(content, where)
    if set(stored) != set(entries):
        msg = f"{where} does not hold the arrays that its manifest names"
        raise DamagedError(msg)
    return {name: _restored(stored[name], entries[name], name, where) for name in entries}


def load_file(content: bytes, where: object) -> dict[str, np.ndarray]:
    """All arrays of a safetensors file.

    **Arguments:**

    - `content`: of the file.
    - `where`: what it was read from, for messages.

    **Raises:** [`DamagedError`][] for a file that is none.
    """
    try:
        _check_header(content)
        return safetensors.numpy.load(content)
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        msg = f"{where} is no safetensors file: {error}"
        raise DamagedError(msg) from None


def _check_header(content: bytes) -> None:
    """Refuse what the format's own reader lets pass: a name that stands there twice."""
    length = int.from_bytes(content[:8], "little")
    if length <= len(content):  # its reader refuses others
        json.loads(content[8 : 8 + length], object_pairs_hook=unique)


def most_bytes(like: PyTree) -> int:
    """How long a file of such arrays can be."""
    leaves = named_arrays(like).items()
    return _HEADER + sum(plain_array(leaf).nbytes + 8 * len(name) + 256 for name, leaf in leaves)


def _restored(array: np.ndarray, entry: LeafEntry, name: str, where: object) -> np.ndarray:
    try:
        dtype: Any = jnp.dtype(entry.dtype)
        if entry.dtype not in _NATIVE:
            array = array.view(dtype).reshape(entry.shape)
    except (TypeError, ValueError) as error:
        msg = f"{where}: {name} is no {entry.dtype}{list(entry.shape)}: {error}"
        raise DamagedError(msg) from None
    if array.dtype != dtype or array.shape != entry.shape:
        msg = f"{where}: {name} is not the {entry.dtype}{list(entry.shape)} of its manifest"
        raise DamagedError(msg)
    return array
