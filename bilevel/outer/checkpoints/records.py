"""Records: a run's history as columns in one safetensors file."""

import json
from typing import Any

import numpy as np
import safetensors.numpy

from bilevel.outer.checkpoints.arrays import load_file
from bilevel.outer.checkpoints.durable import DamagedError
from bilevel.outer.history import FIELDS, INTEGERS, WORDS, History, record_of

_KNOWN = ".known"
"""Ends the name of what tells in which records a field has a value."""

_WORDS = ".words"
"""Ends the name of the different words of a field, which has their numbers."""

_WHOLE = INTEGERS | WORDS

_RECORD = 9 * len(FIELDS)
_HEADER = 512 * len(FIELDS) + 2**20


def encode_records(history: History, count: int) -> bytes:
    """The first records of a history as a file's content.

    A field that no record has is left out, and one that is the same in all has one value.
    """
    stored: dict[str, np.ndarray] = {}
    for name in FIELDS:
        values = history.values(name)[:count]
        known = np.array([value is not None for value in values], bool)
        if not known.any():
            continue
        if name in WORDS:
            words = sorted({value for value in values if value is not None})
            stored[name + _WORDS] = np.frombuffer(json.dumps(words).encode(), np.uint8)
            numbers = {word: number for number, word in enumerate(words)}
            values = [None if value is None else numbers[value] for value in values]
        dtype = np.float64 if name not in _WHOLE else np.int64
        if not known.all():
            stored[name + _KNOWN] = known
            values = [0 if value is None else value for value in values]
        array = np.array(values, dtype)
        bits = array.view(np.int64)
        same = name != "epoch" and bool((bits == bits[0]).all())
        stored[name] = array[:1] if same else array
    return safetensors.numpy.save(stored)


def decode_records(content: bytes, where: object) -> History:
    """The history that was encoded.

    **Arguments:**

    - `content`: as `encode_records` gave it.
    - `where`: what it was read from, for messages.

    **Raises:** [`DamagedError`][] for anything else.
    """
    stored = load_file(content, where)
    count = stored["epoch"].size if "epoch" in stored else 0
    # Others were written by a later version.
    names = [name for name in FIELDS if name in stored]
    columns = [_column(stored, name, count, where) for name in names]
    rows = zip(*columns, strict=True)
    return History(record_of(dict(zip(names, row, strict=True))) for row in rows)


def most_record_bytes(count: int) -> int:
    """How long a file of so many records can be."""
    return _HEADER + _RECORD * count


def _column(stored: dict[str, np.ndarray], name: str, count: int, where: object) -> list[Any]:
    array = stored[name]
    known = stored.get(name + _KNOWN, np.ones(count, bool))
    dtype = np.float64 if name not in _WHOLE else np.int64
    sizes = ((count,), (1,))
    if array.dtype != dtype or array.shape not in sizes or known.dtype != bool:
        msg = f"{where}: {name} is no column of {count} records"
        raise DamagedError(msg)
    if known.shape != (count,):
        msg = f"{where}: {name} is not told of {count} records"
        raise DamagedError(msg)
    values = array.tolist() if len(array) == count else array.tolist() * count
    if name in WORDS:
        words = _words(stored.get(name + _WORDS), f"{where}: {name}")
        if not all(0 <= value < max(len(words), 1) for value in values):
            msg = f"{where}: {name} has numbers of words that are not there"
            raise DamagedError(msg)
        values = [words[value] if words else None for value in values]
    return [value if told else None for value, told in zip(values, known.tolist(), strict=True)]


def _words(content: np.ndarray | None, where: str) -> list[str]:
    try:
        found: Any = [] if content is None else json.loads(content.tobytes())
    except (ValueError, RecursionError) as error:
        msg = f"{where} has no words: {error}"
        raise DamagedError(msg) from None
    if not isinstance(found, list) or not all(isinstance(word, str) for word in found):
        msg = f"{where} has no words"
        raise DamagedError(msg)
    return found
