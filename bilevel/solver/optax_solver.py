"""Any optax transformation as an inner solver."""

from typing import Any, ClassVar

import equinox as eqx
import jax
import optax
from jaxtyping import PyTree

from bilevel import vector
from bilevel.bound import BoundProblem
from bilevel.solver.first_order import FirstOrderSolver


class OptaxState(eqx.Module):
    """Iterate, and the transformation's own state."""

    x: PyTree
    inner: Any


class Optax(FirstOrderSolver):
    """Minimise with an optax gradient transformation.

    The transformation sees the gradient of the inner objective; one that looks at the
    objective too, as optax's line searches do, is given `value`, `grad` and `value_fn`.

    Two things come with the transformation. *Scale*: most are made for objectives of order
    one. A fixed learning rate, the `eps` of Adam and its kin, clipping and weight decay
    are absolute numbers, and multiplying the objective changes what they do; set `eps=0`
    or choose them to scale. *Limits*: Adam and sign methods with a constant learning rate
    circle around the minimiser at a distance of that rate; give them a decaying schedule
    where the tolerance is tight. A transformation with a line search of its own cannot be
    unrolled in reverse mode: use `Implicit`, or this library's line searches.

    **Arguments:**

    - `transformation`: any `optax.GradientTransformation`, for example
        `optax.sgd(0.1, momentum=0.9)`. Make it once, not anew for every call: what it was
        made of is part of the compiled program. `optax.inject_hyperparams` keeps numbers
        in the state instead.

    **Raises:** `TypeError` for anything else.

    >>> import optax, bilevel as bl
    >>> problem = bl.Minimization(lambda x, theta: 0.5 * (x - theta) ** 2)
    >>> solver = bl.Optax(optax.sgd(0.5))
    >>> solution = bl.solve(problem, 4.0, 0.0, solver=solver, budget=bl.Budget(iterations=2))
    >>> float(solution.value)
    3.0
    """

    # Adam and its kin divide the gradient by its size; which transformation does cannot be seen.
    adaptive: ClassVar[bool] = True

    transformation: optax.GradientTransformation

    def __check_init__(self) -> None:
        """Refuse what is no transformation."""
        given: Any = self.transformation
        if not isinstance(given, optax.GradientTransformation):
            name = getattr(given, "__name__", repr(given))
            msg = (
                f"Optax: transformation must be an optax.GradientTransformation, got {name}. "
                "Call the optimiser with its settings, for example Optax(optax.adam(1e-2))."
            )
            raise TypeError(msg)

    def init(self, problem: BoundProblem, x: PyTree) -> OptaxState:
        """The transformation's first state."""
        del problem
        return OptaxState(x, self.transformation.init(x))

    def step(self, problem: BoundProblem, state: OptaxState, residual: PyTree) -> OptaxState:
        """Transform the gradient and add the update."""
        gradient = vector.negative(residual)
        extra: dict[str, Any] = {}
        transformation: Any = self.transformation
        if isinstance(transformation, optax.GradientTransformationExtraArgs):
            objective: Any = problem.objective
            # optax follows jax.grad, whose complex gradients are conjugate to the steepest ascent.
            extra = {
                "value": objective(state.x),
                "grad": vector.conjugate(gradient),
                "value_fn": objective,
            }
        updates, inner = transformation.update(gradient, state.inner, state.x, **extra)
        x: Any = optax.apply_updates(state.x, updates)
        return OptaxState(x, _in_dtypes_of(state.inner, inner))


def _in_dtypes_of(before: Any, after: Any) -> Any:
    """The new state in the dtypes of the old: some transformations promote single precision."""
    return jax.tree.map(lambda old, new: new.astype(old.dtype), before, after)
