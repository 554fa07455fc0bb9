"""Mixed precision: a function computed in fewer bits than what it is given."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from bilevel.signature import brief


def mixed_precision(function: Callable[..., Any], dtype: DTypeLike) -> Callable[..., Any]:
    """A function that computes in `dtype`, with results in the precision of its arguments.

    For the cheap levels of a ladder: an operator or a residual that is evaluated in bfloat16 or
    float32 moves half the memory, while unknowns, inner products and tolerances stay in the
    precision that a solver needs. What rounding leaves is about the unit roundoff of `dtype`
    (4e-3 for bfloat16, 6e-8 for float32) times the size of what is computed: a residual does not
    fall below that, so give such a level a budget of iterations, or a tolerance above it.

    Derivatives go through the conversions. Arrays that the function captured keep their own
    precision, and widen what they meet: pass data as an argument, or convert it, too.

    **Arguments:**

    - `function`: of pytrees of arrays. Their real floating-point leaves are converted, all others
        are left alone, and so it is with its results.
    - `dtype`: a real floating-point dtype or its name, such as ``fidelity["dtype"]`` of a ladder
        with ``ladder.with_static(dtype=["bfloat16", "float32"])``.

    **Returns:** the function.

    **Raises:** `TypeError` for no function and for another dtype.

    >>> import jax.numpy as jnp, bilevel as bl
    >>> third = bl.mixed_precision(lambda x: x / 3, "bfloat16")(jnp.ones(()))
    >>> third.dtype, float(third)
    (dtype('float32'), 0.333984375)
    """
    if not callable(function):
        msg = f"mixed_precision: function should be a function of arrays, got {brief(function)}."
        raise TypeError(msg)
    inner = _real("mixed_precision", dtype)

    def mixed(*args: Any, **kwargs: Any) -> Any:
        leaves = [leaf for leaf in jax.tree.leaves((args, kwargs)) if _is_real(leaf)]
        if not leaves:
            return function(*args, **kwargs)
        outer = jnp.result_type(*leaves)
        narrow_args, narrow_kwargs = _converted((args, kwargs), inner)
        return _converted(function(*narrow_args, **narrow_kwargs), outer)

    return mixed


def _real(owner: str, dtype: DTypeLike) -> Any:
    try:
        found = None if dtype is None else jnp.dtype(dtype)
    except TypeError:
        found = None
    if found is None or not jnp.issubdtype(found, jnp.floating):
        msg = (
            f"{owner}: dtype should be a real floating-point dtype such as 'bfloat16' or "
            f"jnp.float32, got {dtype!r}."
        )
        raise TypeError(msg)
    return found


def _is_real(leaf: Any) -> bool:
    dtype = getattr(leaf, "dtype", None)
    if dtype is None:
        return isinstance(leaf, float)
    return bool(jnp.issubdtype(dtype, jnp.floating))


def _converted(tree: Any, dtype: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype) if _is_real(leaf) else leaf, tree)
