"""Columns: many rows in little memory, for a run may have a million epochs."""

from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
from pydantic_core import to_json

Row: TypeAlias = tuple[Any, ...]


class Block:
    """Rows that are complete, column by column; each value comes back as it was, its type too.

    A column of floats or of whole numbers is an array, one whose value never changes a single
    value, and any other a tuple.

    **Arguments:**

    - `rows`: at least one, all of the same length.

    >>> block = Block([(0, 0.5, None), (1, 0.25, None)])
    >>> list(block), block.row(1), block.column(1)
    ([(0, 0.5, None), (1, 0.25, None)], (1, 0.25, None), [0.5, 0.25])
    """

    __slots__ = ("_columns", "_length")

    def __init__(self, rows: Sequence[Row]):
        self._length = len(rows)
        self._columns = tuple(_packed(values) for values in zip(*rows, strict=True))

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Row]:
        return zip(*map(self._unpacked, self._columns), strict=True)

    def row(self, index: int) -> Row:
        """One row; `index` counts from 0."""
        return tuple(_plain(column[index if len(column) > 1 else 0]) for column in self._columns)

    def column(self, place: int) -> list[Any]:
        """All values of one column."""
        return self._unpacked(self._columns[place])

    def lines(self, names: Sequence[str]) -> bytes | None:
        """All rows as lines of JSON, without what is `None`; a column at a time, for speed.

        **Arguments:**

        - `names`: of the columns.

        **Returns:** the lines; `None` where a column has a value in some rows only, or one
        that is neither number nor word.
        """
        keys: list[str] = []
        varying: list[list[bytes]] = []
        for name, column in zip(names, self._columns, strict=True):
            if not isinstance(column, np.ndarray):
                first: Any = next(iter(column))
                if len(column) > 1 or not isinstance(first, str | None):
                    return None
                if first is not None:
                    word = to_json(first).decode().replace("%", "%%")
                    keys.append(f'"{name}":{word}')
                continue
            written = to_json(column.tolist(), inf_nan_mode="strings")[1:-1].split(b",")
            if len(written) < self._length:
                keys.append(f'"{name}":{written[0].decode()}')
            else:
                keys.append(f'"{name}":%b')
                varying.append(written)
        template = f"{{{','.join(keys)}}}\n".encode()
        if not varying:
            return (template % ()) * self._length
        return b"".join(template % row for row in zip(*varying, strict=True))

    def _unpacked(self, column: "np.ndarray | Row") -> list[Any]:
        values = column.tolist() if isinstance(column, np.ndarray) else list(column)
        return values if len(values) == self._length else values * self._length


def _packed(values: Row) -> "np.ndarray | Row":
    kinds = set(map(type, values))
    if kinds == {type(None)} or (kinds == {str} and len(set(values)) == 1):
        return values[:1]
    try:
        if kinds == {float}:
            array = np.array(values)
        elif kinds == {int}:
            array = np.array(values, np.int64)
        else:
            return values
    except OverflowError:
        return values
    bits = array.view(np.int64)  # zeros have signs, and NaN differs from itself
    return array[:1].copy() if bool((bits == bits[0]).all()) else array


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value
