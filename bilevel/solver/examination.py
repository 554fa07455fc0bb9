"""Examination: what can be seen of an operator whose numbers are there, before it is traced."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer


def is_concrete(tree: Any) -> bool:
    """Whether none of a pytree's arrays is traced."""
    return not any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(tree))


def examine(solver: object, operator: object) -> None:
    """Let a solver and its preconditioner look at the operator that a user gave as it is.

    Whichever has a method `examine(operator)` is asked, and refuses an operator with numbers
    that it cannot work with.  Nothing is asked where a number is traced: there the status says
    what came of it.

    **Raises:** what they raise, `ValueError` for one.
    """
    if not is_concrete(operator):
        return
    for part in (solver, getattr(solver, "preconditioner", None)):
        look: Any = getattr(part, "examine", None)
        if callable(look) and not isinstance(part, type) and is_concrete(part):
            look(operator)


def require_diagonal(name: str, operator: object) -> None:
    """Refuse an operator with a zero on its diagonal, which an iteration divides by.

    **Arguments:**

    - `name`: of who divides, for the message.
    - `operator`: a matrix, or an object with a diagonal; of anything else, and of traced
        numbers, nothing is said.

    **Raises:** `ValueError` naming the first row.
    """
    if not is_concrete(operator):
        return
    with jax.ensure_compile_time_eval():
        if isinstance(operator, jax.Array | np.ndarray):
            diagonal: Any = jnp.diagonal(operator) if operator.ndim == 2 else None
        else:
            diagonal = getattr(operator, "diagonal", None)
            diagonal = diagonal() if callable(diagonal) else diagonal
        leaves = [leaf for leaf in jax.tree.leaves(diagonal) if eqx.is_array(leaf)]
        if not leaves or not is_concrete(leaves):
            return
        flat = np.concatenate([np.ravel(np.asarray(leaf)) for leaf in leaves])
    zeros = np.flatnonzero(flat == 0)
    if not len(zeros):
        return
    msg = (
        f"{name}: {len(zeros)} of {flat.size} rows have a zero on the diagonal, which it divides "
        f"by, the first is row {zeros[0]}. Use GMRES or MINRES without it, or a direct solver."
    )
    raise ValueError(msg)
