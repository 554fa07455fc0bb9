"""Checkpoints: how often they are written, and how many are kept."""

from typing import Annotated, Literal

from pydantic import Field

from bilevel.outer.settings import Count, Settings


class Checkpoints(Settings):
    """How often a run writes checkpoints into its directory, and how many it keeps.

    Whatever these say, one is written when the run ends, however it ends.

    **Arguments:**

    - `seconds`: between two of them, >= 0; 0 writes one before every update. A run that is
        killed loses no more than this.
    - `last`: how many of the latest to keep, >= 1. Where the newest is damaged, `resume` goes
        on from the one before.
    - `best`: whether to keep that of the lowest metric besides.
    - `strict`: whether `resume` refuses where the newest is damaged.
    - `backend`: ``"safetensors"`` gathers every array on the host; ``"orbax"`` has Orbax write
        those that lie over several devices, each device's part by itself (``pip install
        orbax-checkpoint``). Checkpoints of either are read whatever this says.

    **Raises:** `ValueError` naming the argument.

    >>> Checkpoints(seconds=600.0, last=3).last
    3
    """

    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 60.0
    last: Count = 2
    best: bool = True
    strict: bool = False
    backend: Literal["safetensors", "orbax"] = "safetensors"
