"""FixedFidelity: the same fidelity throughout."""

from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Int

from bilevel.budget import Budget
from bilevel.refinement.fidelity import Fidelity, as_fidelity
from bilevel.refinement.namespace import AnyArray


class FixedState(NamedTuple):
    """Nothing changes: both are 0 for good."""

    level: Int[AnyArray, ""]
    rejected: Int[AnyArray, ""]


class FixedFidelity(eqx.Module):
    """The same fidelity throughout: what every other controller is compared with.

    **Arguments:**

    - `fidelity`: a `Fidelity`, such as ``ladder.finest``, or a `Budget`.
    - `adjoint_budget`: of the adjoint solve, where `fidelity` is a bare `Budget`; `None`
        gives it the primal's numbers.

    **Raises:** `TypeError` for another type, `ValueError` for two adjoint budgets.

    >>> controller = FixedFidelity(Budget(iterations=20))
    >>> state = controller.update(controller.init(), 0.7)
    >>> int(controller.fidelity(state).budget.iterations)
    20
    """

    # Concrete numbers are kept as Python's: so the controller can be hashed, which jax.jit
    # asks of the methods it is given.
    fixed: Fidelity

    requires: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, fidelity: Fidelity | Budget, adjoint_budget: Budget | None = None):
        fixed = as_fidelity("FixedFidelity", "fidelity", fidelity)
        if adjoint_budget is not None:
            if isinstance(fidelity, Fidelity):
                msg = (
                    "FixedFidelity: adjoint_budget goes with a bare Budget; a Fidelity has its "
                    "own. Use Fidelity(budget, adjoint_budget)."
                )
                raise ValueError(msg)
            fixed = Fidelity(fidelity, adjoint_budget)
        self.fixed = jax.tree.map(_number, fixed)

    def init(self) -> FixedState:
        """The state before training."""
        return FixedState(np.zeros((), np.int32), np.zeros((), np.int32))

    def update(
        self,
        state: FixedState,
        metric: Any = None,
        *,
        gradient_norm: Any = None,
        error: Any = None,
    ) -> FixedState:
        """The same state: nothing is read.

        **Arguments:** as [`Controller.update`][], all of them unused.

        **Returns:** `state`.
        """
        del metric, gradient_norm, error
        return state

    def fidelity(self, state: FixedState) -> Fidelity:
        """The fidelity, its numbers arrays, so that another one compiles nothing anew."""
        del state
        return jax.tree.map(_array, self.fixed)


def _number(leaf: Any) -> Any:
    scalar = isinstance(leaf, jax.Array | np.ndarray | np.generic) and leaf.ndim == 0
    if scalar and not isinstance(leaf, Tracer):
        return leaf.item()
    return leaf


def _array(leaf: Any) -> Any:
    # Without a dtype a Python number becomes an array that is weakly typed, and so not the
    # same to a compiled function as an array of the same dtype.
    if isinstance(leaf, int):
        return np.asarray(leaf, np.int32)
    return np.asarray(leaf, jnp.result_type(float)) if isinstance(leaf, float) else leaf
