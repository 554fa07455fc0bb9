"""Lookup: the fidelity of a level of a ladder."""

import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from bilevel.refinement.columns import looked_up
from bilevel.refinement.fidelity import Fidelity
from bilevel.refinement.level import placed
from bilevel.refinement.namespace import AnyArray
from bilevel.signature import brief

if TYPE_CHECKING:
    from bilevel.refinement.ladder import Ladder

_KEPT = 4096


def require_state(owner: str, method: str, state: Any) -> None:
    """Refuse what is no state of a controller, a forgotten one above all.

    **Raises:** `TypeError`.
    """
    if hasattr(state, "level"):
        return
    use = f"controller.{method}(state)"
    if method == "update":
        use = "state = controller.update(state, ...)"
    msg = (
        f"{owner}.{method}: state should be what init() or update() returned, got {brief(state)}. "
        f"Write {use}."
    )
    raise TypeError(msg)


def fidelity_at(
    ladder: "Ladder",
    level: Int[AnyArray, "..."] | int,
    adjoint_level: Int[AnyArray, "..."] | int | None = None,
) -> Fidelity:
    """`Ladder.fidelity`, without what it costs to look up a method of a module."""
    # A static part is chosen by the host, which therefore has to know the level.
    concrete, count = not ladder.has_one_shape, len(ladder)
    place = placed("level", level, count, concrete=concrete)
    other = place
    if adjoint_level is not None:
        other = placed("adjoint_level", adjoint_level, count, concrete=concrete)
    static = ladder.static.at(place)
    if isinstance(place, int) and isinstance(other, int):
        return _kept(ladder, place, other, jnp.result_type(float))
    budget, adjoint, position = looked_up(
        ladder.primal, ladder.adjoint, count, jnp.asarray(place), jnp.asarray(other)
    )
    return Fidelity(budget, adjoint, position, static=static)


@functools.lru_cache(maxsize=_KEPT)
def _kept(ladder: "Ladder", level: int, adjoint_level: int, real: Any) -> Fidelity:
    """The fidelity of a level on the host, put together once: a loop asks every epoch."""
    del real  # the default float is part of the key
    adjoint = None if ladder.adjoint is None else ladder.adjoint.at(adjoint_level)
    place: Any = np.asarray(level, np.int32)
    fidelity = Fidelity(ladder.primal.at(level), adjoint, place, static=ladder.static.at(level))
    for leaf in jax.tree.leaves(fidelity):
        leaf.flags.writeable = False
    return fidelity
