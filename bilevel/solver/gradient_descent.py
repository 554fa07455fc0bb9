"""Gradient descent with a fixed step."""

from typing import Any, ClassVar

from jaxtyping import Array, Float, PyTree

from bilevel import vector
from bilevel.bound import BoundProblem
from bilevel.solver.first_order import FirstOrderSolver
from bilevel.solver.parameter import positive


class GradientDescent(FirstOrderSolver):
    """Gradient descent, x ← x - α ∂ₓ objective.

    Converges for 0 < α < 2/L, with L the largest eigenvalue of the Hessian, at the rate
    max(|1 - αμ|, |1 - αL|) an iteration.

    **Arguments:**

    - `step_size`: α, in units of x over units of the gradient. Traced.

    >>> import bilevel as bl
    >>> problem = bl.Minimization(lambda x, theta: 0.5 * (x - theta) ** 2)
    >>> solver = bl.GradientDescent(step_size=0.5)
    >>> solution = bl.solve(problem, 4.0, 0.0, solver=solver, budget=bl.Budget(iterations=2))
    >>> float(solution.value)
    3.0
    """

    stationary: ClassVar[bool] = True

    step_size: Float[Array, ""] | float

    def __check_init__(self) -> None:
        """Validate the step size where it is concrete."""
        positive("GradientDescent", "step_size", self.step_size)

    def init(self, problem: BoundProblem, x: PyTree) -> PyTree:
        """The iterate is all there is."""
        del problem
        return x

    def step(self, problem: BoundProblem, state: PyTree, residual: PyTree) -> PyTree:
        """One step down the gradient."""
        del problem
        return vector.add_scaled(state, self.step_size, residual)

    def value(self, state: PyTree) -> Any:
        """The state itself."""
        return state
