"""Budgets: when an iteration stops."""

import operator

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from bilevel.description import described

UNLIMITED = 2**31 - 1
"""Iteration cap of a budget that names none: the tolerance alone decides."""


class Budget(eqx.Module):
    """When an iteration stops: an iteration cap and a tolerance, all traced.

    An iteration stops as soon as its residual norm is at most
    ``max(rtol * scale, atol)``, where ``scale`` is the problem's own reference (the
    norm of the right-hand side for a linear system; otherwise of the residual at zero of
    the problem linearised at the start, or of the first residual where that is larger),
    or when ``iterations`` steps are done, whichever comes first.  Every field is an
    array leaf, so a new value never compiles anything anew.

    **Arguments:**

    - `iterations`: most iterations allowed, a scalar integer >= 0. `None` sets no cap,
        and then `rtol` or `atol` must be positive.
    - `rtol`: relative tolerance, dimensionless, >= 0.
    - `atol`: absolute tolerance in the units of the residual, >= 0.

    With `iterations` alone the whole budget is spent, unless the residual reaches
    rounding level before.

    **Raises:** `ValueError` for a negative or non-finite value or a budget without any
    limit, `TypeError` for a value that is no number.

    >>> Budget(iterations=10)
    Budget(iterations=10, rtol=0.0, atol=0.0)
    """

    iterations: Int[Array, ""] | int
    rtol: Float[Array, ""] | float
    atol: Float[Array, ""] | float

    def __init__(
        self,
        iterations: Int[Array, ""] | int | None = None,
        rtol: Float[Array, ""] | float = 0.0,
        atol: Float[Array, ""] | float = 0.0,
    ):
        self.rtol = _tolerance("rtol", rtol)
        self.atol = _tolerance("atol", atol)
        if iterations is None:
            if _is_zero(self.rtol) and _is_zero(self.atol):
                msg = (
                    "Budget: nothing would stop the iteration. Give iterations=, rtol= or atol=, "
                    "for example Budget(iterations=100) or Budget(rtol=1e-8)."
                )
                raise ValueError(msg)
            iterations = UNLIMITED
        self.iterations = _count("iterations", iterations)

    def __repr__(self) -> str:
        """The numbers in a line."""
        return described(self)

    @property
    def has_tolerance(self) -> bool:
        """Whether a tolerance may stop the iteration; true where that is traced."""
        return not (_is_zero(self.rtol) and _is_zero(self.atol))

    @property
    def concrete_iterations(self) -> int:
        """The cap where it is known now; 0 where it is traced or differs per sample."""
        return int(self.iterations) if _concrete(self.iterations) else 0


def _concrete(value: object) -> bool:
    return not isinstance(value, Tracer) and jnp.ndim(value) == 0  # pyright: ignore[reportArgumentType]


def _is_zero(value: Array | float) -> bool:
    return _concrete(value) and float(value) == 0.0


def _count(name: str, value: Array | int) -> Array | int:
    if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jnp.integer):
        if _concrete(value) and int(value) < 0:
            raise ValueError(_negative(name, value))
        return value
    if isinstance(value, bool):
        raise TypeError(_not_whole(name, value))
    try:
        count = operator.index(value)
    except TypeError:
        raise TypeError(_not_whole(name, value)) from None
    if count < 0:
        raise ValueError(_negative(name, count))
    return min(count, UNLIMITED)


def _tolerance(name: str, value: Array | float) -> Array | float:
    if isinstance(value, Tracer):
        return value
    if isinstance(value, bool | str | bytes) or not jnp.isscalar(value):
        if not (isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jnp.floating)):
            msg = (
                f"Budget: {name} must be a real number, got {value!r} of type "
                f"{type(value).__name__}. Use for example {name}=1e-8."
            )
            raise TypeError(msg)
        if not _concrete(value):
            return value
    if not float(value) >= 0.0 or float(value) == float("inf"):
        raise ValueError(_negative(name, value))
    return value if isinstance(value, jax.Array) else float(value)


def _not_whole(name: str, value: object) -> str:
    small = isinstance(value, float) and 0 < value < 1
    advice = f"For a tolerance write Budget(rtol={value!r})" if small else "Use int(...)"
    return (
        f"Budget: {name} must be a whole number or an integer array, got {value!r} "
        f"of type {type(value).__name__}. {advice}."
    )


def _negative(name: str, value: object) -> str:
    return f"Budget: {name} must be finite and at least 0, got {value}."
