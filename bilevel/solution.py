"""What a solve returns: how far it got, and why it stopped there."""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int, PyTree

from bilevel.description import described
from bilevel.status import Status

_LOOSE = (
    "But the tolerance is as large as the right-hand side (for other problems, as the residual "
    "that tolerances refer to), so that zero passes for a solution: an absolute tolerance in the "
    "units of another problem does that, such as the primal's given to an adjoint. Give rtol."
)


class Solution(eqx.Module):
    """How far an inner solve got.

    Under vmap every field has the batch axis: each sample has its own count and status.

    - `value`: the last iterate, like the start `x0`. Differentiable as the estimator says;
        the other fields carry no derivative.
    - `status`: int32, one of [`Status`][].
    - `residual_norm`: Euclidean norm of the true residual at `value`, real.
    - `iterations`: int32, iterations done.
    - `inner_iterations`: int32, iterations of the innermost solver: of the linear one for
        Newton, `iterations` for a solver that has none inside.
    - `tolerance`: the residual norm that counted as converged (units of the residual).
    - `scale`: the residual norm that relative tolerances referred to: of the right-hand
        side for a linear system; otherwise of the residual at zero of the problem linearised
        at the start, or of the first residual where that is larger. So for an affine residual
        (a quadratic objective) it is the same from every start, and a warm one is not asked
        for more than a cold one. For any other it belongs to the start, and may be smaller
        next to the solution: give `atol` for the same accuracy from every start.
    - `rate`: residual reduction per iteration over the second half of the solve
        (< 1: contracting); NaN where fewer than two iterations were done.
    - `applications`: int32, how often the residual, gradient or operator was applied.
    - `relative_residual`: `residual_norm` over `scale`.
    - `diagnosis`: the status in words, outside of traced code.
    - `history`: residual norm after 0, 1, 2, ... iterations, padded with NaN to the
        length asked for; `None` where none was asked for.

    >>> import jax.numpy as jnp, bilevel as bl
    >>> problem = bl.FixedPoint(lambda x, theta: 0.5 * x + theta)
    >>> solution = bl.solve(
    ...     problem, 1.0, 0.0, solver=bl.FixedPointIteration(), budget=bl.Budget(iterations=8)
    ... )
    >>> int(solution.iterations), float(solution.rate), float(solution.residual_norm)
    (8, 0.5, 0.00390625)
    >>> solution.diagnosis.split(".")[0]
    'BUDGET: The iteration budget ran out before the tolerance was met'
    """

    value: PyTree
    status: Int[Array, ""]
    residual_norm: Float[Array, ""]
    iterations: Int[Array, ""]
    inner_iterations: Int[Array, ""]
    tolerance: Float[Array, ""]
    scale: Float[Array, ""]
    rate: Float[Array, ""]
    applications: Int[Array, ""]
    history: Float[Array, " length"] | None = None

    def __repr__(self) -> str:
        """The numbers in a line."""
        counts = (self.iterations, self.inner_iterations)
        known = not any(isinstance(count, Tracer) for count in counts)
        same = known and np.array_equal(*counts)
        return described(self, without=("inner_iterations",) if same else ())

    @property
    def relative_residual(self) -> Float[Array, ""]:
        """The residual norm over its scale; 0 for a system with nothing to solve."""
        return self.residual_norm / jnp.where(self.scale > 0, self.scale, 1.0)

    @property
    def diagnosis(self) -> str:
        """The status in words (outside traced code only)."""
        if isinstance(self.status, Tracer):
            return "The status is traced: look at it outside jit, grad and vmap."
        codes = sorted({int(code) for code in self.status.reshape(-1)})
        said = [f"{Status(code).name}: {Status(code).diagnosis}" for code in codes]
        met = np.asarray(self.status) == Status.CONVERGED
        if np.any(met & (self.tolerance >= self.scale) & (self.scale > 0)):
            said.append(_LOOSE)
        return " ".join(said)
