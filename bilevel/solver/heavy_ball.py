"""Heavy-ball gradient descent."""

import equinox as eqx
from jaxtyping import Array, Float, PyTree

from bilevel import vector
from bilevel.bound import BoundProblem
from bilevel.solver.first_order import FirstOrderSolver
from bilevel.solver.parameter import positive, within


class HeavyBallState(eqx.Module):
    """Iterate, and the displacement that led to it."""

    x: PyTree
    displacement: PyTree


class HeavyBall(FirstOrderSolver):
    """Gradient descent with momentum, x ← x - α ∂ₓ objective + β (x - x_previous).

    Polyak 1964, equation (9).  On a quadratic with eigenvalues in [μ, L] it converges for
    0 ≤ β < 1 and 0 < α < 2 (1 + β) / L; the best choice is α = 4 / (√L + √μ)² and
    β = ((√L - √μ) / (√L + √μ))², at the rate √β an iteration.

    **Arguments:**

    - `step_size`: α, in units of x over units of the gradient. Traced.
    - `momentum`: β in [0, 1), dimensionless. Traced.

    >>> import bilevel as bl
    >>> problem = bl.Minimization(lambda x, theta: 0.5 * (x - theta) ** 2)
    >>> solver = bl.HeavyBall(step_size=0.5, momentum=0.5)
    >>> solution = bl.solve(problem, 4.0, 0.0, solver=solver, budget=bl.Budget(iterations=2))
    >>> float(solution.value)  # 0, 2, 2 + 1 + 0.5 · 2
    4.0
    """

    step_size: Float[Array, ""] | float
    momentum: Float[Array, ""] | float

    def __check_init__(self) -> None:
        """Validate the parameters where they are concrete."""
        positive("HeavyBall", "step_size", self.step_size)
        within("HeavyBall", "momentum", self.momentum, 0.0, 1.0)

    def init(self, problem: BoundProblem, x: PyTree) -> HeavyBallState:
        """Start at rest."""
        del problem
        return HeavyBallState(x, vector.zeros_like(x))

    def step(
        self, problem: BoundProblem, state: HeavyBallState, residual: PyTree
    ) -> HeavyBallState:
        """Keep part of the last displacement and add a step down the gradient."""
        del problem
        kept = vector.scale(self.momentum, state.displacement)
        displacement = vector.add_scaled(kept, self.step_size, residual)
        return HeavyBallState(vector.add(state.x, displacement), displacement)
