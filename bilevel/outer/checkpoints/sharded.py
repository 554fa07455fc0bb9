"""Orbax: arrays that lie over several devices, each device's part written where it is."""

import math
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from bilevel.outer.checkpoints.durable import DamagedError, naming, settle
from bilevel.outer.checkpoints.sharding import ShardingEntry


def is_sharded(leaf: Any) -> bool:
    """Whether Orbax keeps it: an array that was put over several devices, and is not empty."""
    return (
        ShardingEntry.of(leaf) is not None
        and leaf.size > 0
        and not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    )


def write_sharded(folder: Path, arrays: Mapping[str, jax.Array]) -> None:
    """Write arrays into a folder that does not exist yet, by the order of their names.

    **Raises:** `OSError` naming the folder; `ImportError` saying how to install Orbax.
    """
    orbax = orbax_library()
    try:
        with orbax.PyTreeCheckpointer() as checkpointer:
            checkpointer.save(folder, _numbered(arrays))
    except OSError as error:
        raise naming(error, folder) from None
    except ValueError as error:
        # The library underneath says so where a disk fails.
        raise OSError(0, str(error).splitlines()[0], str(folder)) from error
    settle(folder)


def read_sharded(folder: Path, like: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Read them again, onto the devices that `like` names.

    The files' digests have been compared before: Orbax does not see that a bit has changed.

    **Raises:** [`DamagedError`][] where there is something else in it.
    """
    orbax = orbax_library()
    item = _numbered(like)
    arguments = orbax.checkpoint_utils.construct_restore_args(item)
    try:
        with orbax.PyTreeCheckpointer() as checkpointer:
            _agree(checkpointer.metadata(folder).item_metadata.tree, item)
            found = checkpointer.restore(
                folder, args=orbax.args.PyTreeRestore(item=item, restore_args=arguments)
            )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        msg = f"{folder} cannot be read: {(str(error).splitlines() or [''])[0]}"
        raise DamagedError(msg) from error
    return {name: found[str(place)] for place, name in enumerate(sorted(like))}


def _agree(found: Mapping[str, Any], item: Mapping[str, jax.ShapeDtypeStruct]) -> None:
    """That no array, and no piece of one, is larger than what it is read into.

    **Raises:** `ValueError` naming what does not fit. Nothing of the arrays has been read.
    """
    if set(found) != set(item):
        msg = f"it holds {len(found)} arrays in place of {len(item)}"
        raise ValueError(msg)
    for name, wanted in item.items():
        there, fits = (f"{one.dtype}{list(one.shape)}" for one in (found[name], wanted))
        if there != fits:
            msg = f"array {name} is {there} in place of {fits}"
            raise ValueError(msg)
        piece = found[name].storage.chunk_shape
        if piece is None or math.prod(piece) > math.prod(wanted.shape):
            msg = f"array {name} is in pieces of {piece}, and it is {list(wanted.shape)}"
            raise ValueError(msg)


def _numbered(arrays: Mapping[str, Any]) -> dict[str, Any]:
    # By number: a leaf's name may be one that no file can have.
    return {str(place): arrays[name] for place, name in enumerate(sorted(arrays))}


def orbax_library() -> ModuleType:
    """Orbax, which is imported where it is needed.

    **Raises:** `ImportError` saying how to install it.
    """
    try:
        import orbax.checkpoint  # noqa: PLC0415
    except ImportError as error:
        msg = (
            "Checkpoints: backend='orbax' needs orbax-checkpoint: pip install orbax-checkpoint, or "
            "leave backend out."
        )
        raise ImportError(msg) from error
    return orbax.checkpoint
