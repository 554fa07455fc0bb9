"""Neumann series for the adjoint."""

import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from bilevel.bound import BoundProblem
from bilevel.estimator.base import Estimator, Record, Setting
from bilevel.estimator.implicit import solve_implicitly
from bilevel.solution import Solution
from bilevel.solver.parameter import positive
from bilevel.solver.richardson import Richardson
from bilevel.solver.spectrum import largest_eigenvalue


class Neumann(Estimator):
    """The implicit derivative with N⁻¹ replaced by a truncated Neumann series.

    λ = α Σ_{j<M} (I - αNᵀ)ʲ ∂ₓf, with M the iterations of the adjoint budget (Lorraine,
    Vicol and Duvenaud 2020).  For a fixed-point problem and α = 1 it is the series of the
    mapping's own Jacobian.  A series that does not contract is reported as `DIVERGED`, and
    the gradient is NaN.

    **Arguments:**

    - `step_size`: α. `None`: 1 for a fixed-point problem, the primal solver's own step
        where it has one, otherwise 1/λ_max(N) from power iteration.

    >>> import jax, bilevel as bl
    >>> problem = bl.FixedPoint(lambda x, theta: 0.5 * x + theta)
    >>> def value(theta):
    ...     return bl.solve(
    ...         problem, theta, 0.0, estimator=bl.Neumann(), adjoint_budget=bl.Budget(iterations=3)
    ...     ).value
    >>> float(jax.grad(value)(1.0))  # 1 + 1/2 + 1/4
    1.75
    """

    step_size: Float[Array, ""] | float | None = None

    def __check_init__(self) -> None:
        """Validate the step size where it is concrete."""
        if self.step_size is not None:
            positive("Neumann", "step_size", self.step_size)

    def solve(self, setting: Setting, record: Record) -> Solution:
        """The inner solve with the truncated derivative of its solution."""
        step_size = self.step_size
        if step_size is None:
            step_size = _step_size(setting)
        return solve_implicitly(setting, record, Richardson(step_size=step_size))


def _step_size(setting: Setting) -> Array | float:
    equation = setting.problem.equation(setting.x0)
    bound: BoundProblem = equation.at(setting.theta)
    if bound.mapping is not None:
        return 1.0
    own: PyTree = getattr(setting.solver, "step_size", None)
    if own is not None:
        return own
    x0 = setting.x0
    return 1.0 / jnp.maximum(largest_eigenvalue(bound.linearize(x0), x0), jnp.finfo(float).tiny)
