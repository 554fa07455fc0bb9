"""Shared: what all processes of a run have to agree on."""

import contextlib
import json
from collections.abc import Callable, Generator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

T = TypeVar("T")

_MOST_WORDS = 128
"""Bytes of what processes compare."""


def several() -> bool:
    """Whether this process is one of several that JAX has connected."""
    return jax.process_count() > 1


def first() -> bool:
    """Whether this process is the one that writes and speaks for all."""
    return jax.process_index() == 0


def shared(value: T) -> T:
    """What process 0 has, in every process: all of them have to call it.

    **Arguments:**

    - `value`: plain data that JSON can hold; elsewhere than in process 0 it is not looked at.

    >>> shared(["one", 2.5, None])
    ['one', 2.5, None]
    """
    if not several():
        return value
    content = json.dumps(value).encode() if first() else b""
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(content))))
    room = np.zeros(length, np.uint8)
    room[: len(content)] = np.frombuffer(content, np.uint8)
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(room)).tobytes())


def decided(function: Callable[[], T], *errors: type[Exception]) -> T:
    """What a function gives in process 0, which alone calls it, in every process.

    **Arguments:**

    - `function`: gives plain data that JSON can hold.
    - `errors`: that it may raise; they are raised in every process.

    >>> decided(lambda: 3)
    3
    """
    if not several():
        return function()
    raised: Exception | None = None
    told: Any = None
    if first():
        try:
            told = [function(), -1, ""]
        except errors as error:
            raised = error
            place = next(place for place, kind in enumerate(errors) if isinstance(error, kind))
            told = [None, place, str(error)]
    found, place, message = shared(told)
    if raised is not None:
        raise raised
    if place >= 0:
        raise errors[place](message)
    return found


@contextlib.contextmanager
def same_everywhere() -> Generator[list[str]]:
    """See that every process finds the same; one that raises has the others raise, too.

    **Returns:** a list, to be given what was found, in words.

    **Raises:** `ValueError` naming process and what it found.
    """
    found: list[str] = []
    raised: Exception | None = None
    try:
        yield found
    except Exception as error:
        if not several():
            raise
        raised = error
    if not several():
        return
    text = "" if raised is not None else found[0]
    room = np.zeros(_MOST_WORDS, np.uint8)
    content = text.encode()[:_MOST_WORDS]
    room[: len(content)] = np.frombuffer(content, np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(room))
    words = [row.tobytes().rstrip(b"\0").decode() for row in rows]
    if raised is not None:
        raise raised
    for process, word in enumerate(words):
        if word != text:
            there = f"finds {word}" if word else "cannot read it"
            msg = (
                f"process {process} {there}, and process {jax.process_index()} finds {text}: the "
                "directory has to be the same for all processes"
            )
            raise ValueError(msg)


def lay(leaf: Any, sharding: jax.sharding.Sharding) -> jax.Array:
    """An array that every process has, laid over the devices of all.

    **Arguments:**

    - `leaf`: of JAX or NumPy, the same in every process.
    - `sharding`: where it shall lie.
    """
    if sharding.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        bits = lay(jax.random.key_data(leaf), sharding)
        return jax.random.wrap_key_data(bits, impl=jax.random.key_impl(leaf))
    content = np.asarray(leaf)
    if not isinstance(leaf, jax.Array):
        # NumPy's double precision where JAX computes in single.
        content = content.astype(jax.dtypes.canonicalize_dtype(content.dtype))
    return jax.make_array_from_callback(content.shape, sharding, lambda index: content[index])


def is_scattered(leaf: Any) -> bool:
    """Whether no process has all of an array."""
    return (
        isinstance(leaf, jax.Array)
        and not leaf.is_fully_addressable
        and not leaf.is_fully_replicated
    )


def gathered(leaf: Any) -> Any:
    """An array of which each process has a part, whole in every process; all have to call it."""
    if not is_scattered(leaf):
        return leaf
    return multihost_utils.process_allgather(leaf, tiled=True)
