"""Status: how an inner solve ended."""

import enum
from typing import Self


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
            "non-finite values, and the diagonal for zeros if the solver or its preconditioner "
            "divides by it (Jacobi, Gauss-Seidel). From a direct solver: the matrix is singular."
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
            "adjoint_budget at least one iteration; or the budget, where the estimator "
            "differentiates the iteration itself."
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
    NOT_SYMMETRIC = (
        10,
        (
            "The operator is not symmetric, and the solver needs it to be. Use GMRES or BiCGStab. "
            "(It was looked at because nobody declared it: symmetric=True vouches for an operator "
            "that is symmetric up to larger rounding errors.)"
        ),
    )
    NOT_ADJOINT = (
        11,
        (
            "The operator and what was declared of its transpose do not belong together, so the "
            "gradient would be wrong: rmatvec is not the adjoint of matvec, or symmetric=True is "
            "not so. bilevel.testing.check_inner_problem says which. Leave the declaration out, or "
            "correct it."
        ),
    )
    INCONSISTENT = (
        12,
        (
            "The operator is singular and the right-hand side is not in its range, so there is no "
            "solution, and a small residual is rounding. Take the part along the operator's kernel "
            "off the right-hand side (the mean, for a pure Neumann or periodic problem); in an "
            "adjoint, let the outer loss not depend on that part of the solution."
        ),
    )
    STOPPED = (
        13,
        (
            "The library stopped by itself above the tolerance, and a further run came no closer. "
            "Loosen the tolerance, or look at the library's own settings and at whether it solves "
            "the same problem: units, signs, an intercept."
        ),
    )

    @property
    def failed(self) -> bool:
        """Whether the result must not be used; running out of budget is no failure."""
        return self.value >= Status.DIVERGED.value
