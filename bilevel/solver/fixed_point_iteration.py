"""Fixed-point iteration."""

from typing import Any, ClassVar

from jaxtyping import Array, Float, PyTree

from bilevel import vector
from bilevel.bound import BoundProblem
from bilevel.solver.base import InnerSolver
from bilevel.solver.parameter import within


class FixedPointIteration(InnerSolver):
    """Damped fixed-point (Picard) iteration, x ← (1 - β) x + β mapping(x).

    Converges where the damped mapping is a contraction; a rate of 1 or more is reported
    as `DIVERGED`.

    **Arguments:**

    - `damping`: 1 - β, in [0, 1). 0 applies the mapping as it is.

    >>> import bilevel as bl
    >>> problem = bl.FixedPoint(lambda x, theta: 0.5 * x + theta)
    >>> solution = bl.solve(
    ...     problem, 1.0, 0.0, solver=bl.FixedPointIteration(), budget=bl.Budget(iterations=2)
    ... )
    >>> float(solution.value)
    1.5
    """

    requires: ClassVar[frozenset[str]] = frozenset({"mapping"})
    stationary: ClassVar[bool] = True

    damping: Float[Array, ""] | float = 0.0

    def __check_init__(self) -> None:
        """Validate the damping where it is concrete."""
        within("FixedPointIteration", "damping", self.damping, 0.0, 1.0)

    def init(self, problem: BoundProblem, x: PyTree) -> PyTree:
        """The iterate is all there is."""
        del problem
        return x

    def step(self, problem: BoundProblem, state: PyTree, residual: PyTree) -> PyTree:
        """Go the undamped part of the way to the mapped point."""
        del problem
        return vector.add_scaled(state, 1.0 - self.damping, residual)

    def value(self, state: PyTree) -> Any:
        """The state itself."""
        return state
