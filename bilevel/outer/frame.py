"""Data frames, of whichever library is there."""

import importlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any


def data_frame(
    owner: str,
    columns: Mapping[str, Sequence[float | str | None]],
    whole: Collection[str],
    words: Collection[str] = (),
) -> Any:
    """A data frame of pandas, or of polars where that alone is installed.

    **Arguments:**

    - `owner`: who asks, for the message.
    - `columns`: of numbers or words, `None` where there is none.
    - `whole`: names of those with whole numbers.
    - `words`: names of those with words.

    **Raises:** `ImportError` where neither is installed.
    """
    pandas = _installed("pandas")
    if pandas is not None:
        types = {
            name: "Int64" if name in whole else "string" if name in words else "float64"
            for name in columns
        }
        return pandas.DataFrame(dict(columns)).astype(types)
    polars = _installed("polars")
    if polars is None:
        msg = f"{owner} needs pandas or polars: pip install pandas"
        raise ImportError(msg)
    schema = {
        name: polars.Int64 if name in whole else polars.String if name in words else polars.Float64
        for name in columns
    }
    return polars.DataFrame(dict(columns), schema=schema)


def _installed(name: str) -> Any | None:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None
