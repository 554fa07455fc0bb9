"""What a solve returns: how far it got, and why it stopped there."""

import enum
from typing import Self

import equinox as eqx
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Float, Int, PyTree


class Status(enum.IntEnum):
    """Why an iteration stopped; the text of each member is its diagnosis.

    Inside traced code a status is an int32 array with one of these values, so
    ``solution.status == Status.CONVERGED`` works under jit and, per sample, under vmap.

    >>> Status.BUDGET.failed, Status.BREAKDOWN.failed
    (False, True)
    """

    diagnosis: str

    def __new__(cls, code: int, diagnosis: str) -> Self:
        """Attach the diagnosis to the code."""
        member = int.__new__(cls, code)
        member._value_ = code
        member.diagnosis = diagnosis
        return member

    CONVERGED = 0, "The true residual is within the tolerance."
    BUDGET = (
        1,
        (
            "The iteration budget ran out before the tolerance was met. This is no failure: the "
            "residual norm says how far the solve got."
        ),
    )
    ROUNDING = (
        2,
        (
            "The residual stopped shrinking at the rounding level of the dtype, above the "
            "tolerance. Loosen the tolerance or use a wider dtype."
        ),
    )
    UNROLL_LIMIT = (
        3,
        (
            "The iteration reached the number of steps that Unrolled keeps room for, before the "
            "budget. Give Unrolled(max_iterations=...) at least the largest budget."
        ),
    )
    NOT_RUN = (4, "No adjoint solve took place: the estimator differentiates the iteration itself.")
    DIVERGED = (
        5,
        (
            "The residual grew instead of shrinking: the iteration is no contraction here. Use a "
            "smaller step, damping, or a Krylov solver."
        ),
    )
    NONFINITE = (
        6,
        (
            "A NaN or infinity came up in the iteration. Check the data, theta and the start for "
            "non-finite values."
        ),
    )
    BREAKDOWN = (
        7,
        (
            "The solver broke down: the operator is singular or not of the kind the solver needs "
            "(symmetric positive definite for conjugate gradients). Use MINRES, GMRES or a direct "
            "solver, or regularise."
        ),
    )
    NOT_STARTED = (
        8,
        (
            "The adjoint was given no iterations, so the hypergradient is unknown. Give the "
            "adjoint_budget at least one iteration."
        ),
    )
    LINE_SEARCH = (
        9,
        (
            "The line search found no step that decreases the objective: it is not smooth here, or "
            "its gradient does not belong to it. Use ProximalGradient for a non-smooth term, or a "
            "fixed step."
        ),
    )

    @property
    def failed(self) -> bool:
        """Whether the result must not be used; running out of budget is no failure."""
        return self.value >= Status.DIVERGED.value


class Solution(eqx.Module):
    """How far an inner solve got.

    Under vmap every field has the batch axis: each sample has its own count and status.

    - `value`: the last iterate, like the start `x0`. Differentiable as the estimator says;
        the other fields carry no derivative.
    - `status`: int32, one of [`Status`][].
    - `residual_norm`: Euclidean norm of the true residual at `value`, real.
    - `iterations`: int32, iterations done.
    - `tolerance`: the residual norm that counted as converged (units of the residual).
    - `scale`: the residual norm that relative tolerances referred to: of the right-hand
        side for a linear system, of the first residual otherwise.
    - `rate`: residual reduction per iteration over the second half of the solve
        (< 1: contracting); NaN where fewer than two iterations were done.
    - `applications`: int32, how often the residual, gradient or operator was applied.
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
    tolerance: Float[Array, ""]
    scale: Float[Array, ""]
    rate: Float[Array, ""]
    applications: Int[Array, ""]
    history: Float[Array, " length"] | None = None

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
        return " ".join(f"{Status(code).name}: {Status(code).diagnosis}" for code in codes)
