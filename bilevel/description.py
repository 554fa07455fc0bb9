"""Results in a line: numbers where they are known, shapes where they are not."""

import dataclasses
from collections import Counter
from collections.abc import Collection
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jax.core import Tracer

from bilevel.status import Status


def described(module: Any, *, without: Collection[str] = ()) -> str:
    """A representation of a module with the numbers in it, where JAX and Equinox show shapes.

    **Arguments:**

    - `without`: names of fields to leave out.

    >>> import jax.numpy as jnp, bilevel as bl
    >>> bl.solve(bl.LinearSystem(jnp.eye(2), jnp.ones(2)), None, jnp.zeros(2)).diagnosis[:9]
    'CONVERGED'
    >>> problem = bl.FixedPoint(lambda x, theta: 0.5 * x + theta)
    >>> budget = bl.Budget(iterations=3)
    >>> solution = bl.solve(problem, 1.0, 0.0, solver=bl.FixedPointIteration(), budget=budget)
    >>> solution
    Solution(value=1.75, status=BUDGET, residual_norm=0.125, iterations=3, tolerance=1.192e-07,
             scale=1, rate=0.5, applications=5)
    """
    parts = [
        f"{field.name}={_shown(field.name, value)}"
        for field in dataclasses.fields(module)
        if field.name not in without and (value := getattr(module, field.name)) is not None
    ]
    return f"{type(module).__name__}({', '.join(parts)})"


def _shown(name: str, value: Any) -> str:
    if isinstance(value, jax.Array | np.ndarray | np.generic) and not isinstance(value, Tracer):
        if name == "status":
            return _statuses(np.asarray(value))
        if value.ndim == 0:
            return _number(np.asarray(value)[()])
    if isinstance(value, eqx.Module):
        return repr(value)
    return eqx.tree_pformat(value, width=10_000)


def _number(value: Any) -> str:
    if np.issubdtype(value.dtype, np.integer) or value.dtype == bool:
        return str(value)
    return f"{value:.4g}"


def _statuses(codes: np.ndarray) -> str:

    counts = Counter(Status(int(code)).name for code in codes.reshape(-1))
    if codes.ndim == 0:
        return next(iter(counts))
    return "{" + ", ".join(f"{name}: {count}" for name, count in counts.items()) + "}"
