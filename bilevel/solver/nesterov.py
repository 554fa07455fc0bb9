"""Nesterov's accelerated gradient method."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from bilevel import vector
from bilevel.bound import BoundProblem
from bilevel.solver.first_order import FirstOrderSolver
from bilevel.solver.parameter import positive, within


class NesterovState(eqx.Module):
    """Iterate, the point extrapolated from it, and steps since the last restart."""

    x: PyTree
    extrapolated: PyTree
    count: Int[Array, ""]


class Nesterov(FirstOrderSolver):
    """Accelerated gradient descent: a step from an extrapolated point.

    x_k = y_{k-1} - α ∂ₓ objective(y_{k-1}),  y_k = x_k + β_k (x_k - x_{k-1}),  y_0 = x_0.

    Without further arguments β_k = (k - 1) / (k + 2), and the objective falls by O(1/k²) for
    α ≤ 1/L (Nesterov 1983 in the form of Su, Boyd and Candès 2016, equation 1).  For a
    strongly convex objective a constant β is better (Nesterov 2004, scheme 2.2.11), and
    where the constant of strong convexity is unknown, a restart.

    **Arguments:**

    - `step_size`: α, in units of x over units of the gradient. Traced.
    - `momentum`: a constant β in [0, 1) instead of the sequence. Traced.
    - `strong_convexity`: μ > 0, the smallest eigenvalue of the Hessian; sets
        β = (1 - √(αμ)) / (1 + √(αμ)). Traced. Give this or `momentum`, not both.
    - `restart`: start the sequence anew whenever the last displacement points uphill
        (O'Donoghue and Candès 2015, gradient scheme).

    The budget's tolerance is tested at the extrapolated point, where the gradient is known
    anyway, and what it says is confirmed at the iterate.

    **Raises:** `ValueError` for arguments out of range or that exclude each other.

    >>> import bilevel as bl
    >>> problem = bl.Minimization(lambda x, theta: 0.5 * (x - theta) ** 2)
    >>> solver = bl.Nesterov(step_size=0.5, momentum=0.5)
    >>> solution = bl.solve(problem, 4.0, 0.0, solver=solver, budget=bl.Budget(iterations=2))
    >>> float(solution.value)  # x_1 = 2, y_1 = 3, x_2 = 3.5
    3.5
    """

    step_size: Float[Array, ""] | float
    momentum: Float[Array, ""] | float | None = None
    strong_convexity: Float[Array, ""] | float | None = None
    restart: bool = eqx.field(static=True, default=False)

    def __check_init__(self) -> None:
        """Validate the parameters where they are concrete."""
        positive("Nesterov", "step_size", self.step_size)
        if self.momentum is not None:
            within("Nesterov", "momentum", self.momentum, 0.0, 1.0)
        if self.strong_convexity is not None:
            positive("Nesterov", "strong_convexity", self.strong_convexity)
        given = [
            name for name in ("momentum", "strong_convexity") if getattr(self, name) is not None
        ]
        if len(given) == 2:
            msg = (
                "Nesterov: momentum and strong_convexity both set the extrapolation. Give one of "
                "them, or neither for the sequence (k - 1) / (k + 2)."
            )
            raise ValueError(msg)
        if self.restart and given:
            msg = (
                f"Nesterov: restart=True starts the sequence (k - 1)/(k + 2) anew, and "
                f"{given[0]} replaces that by a constant. Leave one of the two out."
            )
            raise ValueError(msg)

    def init(self, problem: BoundProblem, x: PyTree) -> NesterovState:
        """Start without extrapolation."""
        del problem
        return NesterovState(x, x, jnp.int32(0))

    def point(self, state: NesterovState) -> PyTree:
        """The extrapolated point."""
        return state.extrapolated

    def step(self, problem: BoundProblem, state: NesterovState, residual: PyTree) -> NesterovState:
        """A gradient step from the extrapolated point, and the next extrapolation."""
        del problem
        x = vector.add_scaled(state.extrapolated, self.step_size, residual)
        displacement = vector.subtract(x, state.x)
        momentum = self._momentum(state.count, vector.real_dtype(x))
        count = state.count + 1
        if self.restart:
            uphill = vector.dot(residual, displacement) < 0
            momentum = jnp.where(uphill, 0.0, momentum)
            count = jnp.where(uphill, 0, count)
        return NesterovState(x, vector.add_scaled(x, momentum, displacement), count)

    def _momentum(self, count: Int[Array, ""], dtype: Any) -> Array | float:
        """The factor of the extrapolation after a step, `count` steps being done before it."""
        if self.momentum is not None:
            return self.momentum
        if self.strong_convexity is not None:
            root = jnp.sqrt(self.step_size * jnp.asarray(self.strong_convexity, dtype))
            return (1 - root) / (1 + root)
        before = count.astype(dtype)
        return before / (before + 3)
