"""Controllers: pure state machines that move along the ladder during outer training."""

from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

from jaxtyping import Int

from bilevel.refinement.fidelity import Fidelity
from bilevel.refinement.namespace import AnyArray


class ControllerState(Protocol):
    """What every controller's state has; the rest is the controller's own."""

    @property
    def level(self) -> Int[AnyArray, ""]:
        """Position on the ladder, int32."""
        ...

    @property
    def rejected(self) -> Int[AnyArray, ""]:
        """How many measurements were unusable (NaN, infinite, of the wrong sign), int32."""
        ...


StateT = TypeVar("StateT")


@runtime_checkable
class Controller(Protocol[StateT]):
    """A pure state machine that decides the fidelity of the next outer step.

    `init` and `update` are pure and can be traced, so they work under jit, vmap and
    scan, in a plain Python loop, and beside any other training framework.  The state is
    a pytree of arrays whose structure, shapes and dtypes never change; the controller
    is configuration, hashable and without arrays.  Nothing recompiles when the level
    changes, for `fidelity` returns arrays.

    `requires` names the arguments of `update` that the rule reads (``"metric"``,
    ``"gradient_norm"``, ``"error"``), so that a loop need not measure the others.

    To write one, give a class these three methods and the class attribute; it need not
    inherit.

    >>> import jax, jax.numpy as jnp
    >>> from typing import NamedTuple
    >>> from bilevel.budget import Budget
    >>> class DoublingState(NamedTuple):
    ...     level: jax.Array
    ...     rejected: jax.Array
    >>> class Doubling:
    ...     requires = frozenset()
    ...
    ...     def init(self):
    ...         return DoublingState(jnp.int32(0), jnp.int32(0))
    ...
    ...     def update(self, state, metric=None, *, gradient_norm=None, error=None):
    ...         return DoublingState(state.level + 1, state.rejected)
    ...
    ...     def fidelity(self, state):
    ...         return Fidelity(Budget(2**state.level), level=state.level)
    >>> isinstance(Doubling(), Controller)
    True
    """

    requires: ClassVar[frozenset[str]]

    def init(self) -> StateT:
        """The state before training."""
        ...

    def update(
        self,
        state: StateT,
        metric: Any = None,
        *,
        gradient_norm: Any = None,
        error: Any = None,
    ) -> StateT:
        """The state after one more measurement.

        **Arguments:**

        - `state`: the state before.
        - `metric`: validation metric, a real scalar, smaller is better.
        - `gradient_norm`: Euclidean norm of the hypergradient, in the units of the outer
            loss over those of theta.
        - `error`: estimated truncation error of the hypergradient, in the same units: an
            object with `primal`, `adjoint` and `total`, or one scalar.

        **Returns:** the new state.

        **Raises:** `TypeError` where something named in `requires` is missing.
        """
        ...

    def fidelity(self, state: StateT) -> Fidelity:
        """What the next outer step is computed with."""
        ...
