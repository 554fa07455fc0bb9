"""Error estimate by correction: what one more, rough solve of each equation would change."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from bilevel import vector
from bilevel.budget import Budget
from bilevel.error.base import ErrorEstimator, Situation, TruncationError, pairing
from bilevel.operator import LinearOperator
from bilevel.solver.base import InnerSolver
from bilevel.solver.conjugate_gradient import ConjugateGradient
from bilevel.solver.gmres import GMRES
from bilevel.solver.linear import solve_linear
from bilevel.solver.minres import MINRES
from bilevel.status import Status

MARGIN = 1.05
"""What the estimate is multiplied by, so that rough solves do not leave it below the error."""

LEAST_REDUCTION = 1.0
"""A rough solve that leaves more of its right-hand side than this tells nothing."""


class ResidualCorrection(ErrorEstimator):
    """Truncation error from the residuals, corrected roughly, without any constant.

    With the Lagrangian Λ(x, θ, λ) = f + λᵀr, the hypergradient is ∂_θΛ where ∂ₓΛ = 0 and
    r = 0.  Truncation leaves both residuals non-zero.  Their first-order effect is found
    by solving N δx = r, then Nᵀδλ = ∂ₓₓΛ δx (primal part) and Nᵀδλ = ∂ₓΛ (adjoint part), each
    to a per cent only, which error modes that decay slowly make several.  What such a rough
    solve leaves itself is extrapolated from its own rate.  For an estimator without an adjoint,
    λ is solved for precisely and the implicit gradient compared with the one given.  Derivatives
    are taken half-way and at the end of the correction: with a quadratic outer loss and a
    linear inner problem this is exact however large the error is, and else up to second order.
    So the estimate is as sharp as the rough solves are, where a bound from constants is off by
    the condition number; five per cent are put on top.  Where a rough solve
    fails or leaves more than it started with, as on badly conditioned problems after few
    iterations, the estimate is infinite: unknown, and not small.

    **Arguments:**

    - `iterations`: most iterations of each rough solve. By default half of what the
        adjoint took, between 10 and 200.
    - `rtol`: its relative tolerance.

    >>> import jax.numpy as jnp, bilevel as bl
    >>> problem = bl.Minimization(lambda x, theta: jnp.sum(jnp.cosh(x - theta)))
    >>> result = bl.hypergradient(
    ...     lambda x, theta: jnp.sum(x**2),
    ...     problem,
    ...     jnp.ones(1),
    ...     jnp.zeros(1),
    ...     solver=bl.GradientDescent(step_size=0.5),
    ...     budget=bl.Budget(iterations=6),
    ...     error=ResidualCorrection(),
    ... )
    >>> round(float(abs(result.gradient[0] - 2)), 3), round(float(result.error.total), 3)
    (0.025, 0.026)
    """

    iterations: Any = None
    rtol: float = 0.01

    def estimate(self, situation: Situation) -> TruncationError:
        """The estimate, from two to four rough linear solves."""
        x, theta = situation.x, situation.theta
        bound = situation.problem.at(situation.with_theta(theta))
        operator = bound.linearize(x)
        transposed = operator.transposed(x)
        solver = situation.linear_solver or krylov_solver(operator)
        rough = _Rough(solver, self._budget(situation))

        def lagrangian(x: Any, theta: Any, multiplier: Any) -> Array:
            return situation.loss(x, theta) + pairing(multiplier, situation.residual(x, theta))

        residual = bound.residual(x)
        step = rough(operator, residual)
        multiplier = situation.adjoint_value
        if multiplier is None:
            multiplier = rough(transposed, jax.grad(situation.loss)(x, theta), precise=True)

        def derivatives(x: Any) -> Any:
            return jax.grad(lagrangian, argnums=(0, 1))(x, theta, multiplier)

        # Half-way there, for a step that is not small: exact for what is quadratic in x.
        halfway, there = (vector.add_scaled(x, share, step) for share in (0.5, 1.0))
        _, (forcing, direct) = jax.jvp(derivatives, (halfway,), (step,))
        indirect = situation.pull_theta(rough(transposed, forcing), there)
        of_primal = vector.add(direct, indirect)
        if situation.adjoint_value is None or situation.adjoint_residual is None:
            implicit = jax.grad(lagrangian, argnums=1)(x, theta, multiplier)
            of_adjoint = vector.subtract(implicit, situation.gradient)
        else:
            of_adjoint = situation.pull_theta(rough(transposed, situation.adjoint_residual), there)
        return TruncationError(
            primal=MARGIN * vector.norm(of_primal),
            adjoint=MARGIN * vector.norm(of_adjoint),
            total=MARGIN * vector.norm(vector.add(of_primal, of_adjoint)),
            applications=rough.applications,
        )

    def _budget(self, situation: Situation) -> Budget:
        cap = self.iterations
        if cap is None:
            done = jnp.maximum(situation.adjoint.iterations, situation.primal.iterations)
            cap = jnp.clip(done // 2, 10, 200)
        return Budget(iterations=jnp.asarray(cap, jnp.int32), rtol=self.rtol)


class _Rough:
    """Rough linear solves, and what they took."""

    def __init__(self, solver: InnerSolver, budget: Budget):
        self.solver = solver
        self.budget = budget
        self.applications = jnp.int32(0)

    def __call__(self, operator: LinearOperator, rhs: PyTree, *, precise: bool = False) -> PyTree:
        budget = self.solver.default_budget(rhs) if precise else self.budget
        solution, left = solve_linear(operator, rhs, self.solver, budget)
        self.applications = self.applications + solution.applications
        # The rest shrinks at the same rate again and again: a geometric series.
        norm = vector.norm(rhs)
        share = vector.norm(left) / jnp.where(norm > 0, norm, 1.0)
        # A solve that failed, or took next to nothing off, knows no error: far from small.
        unknown = (solution.status >= Status.DIVERGED) | ~(share <= LEAST_REDUCTION)
        factor = jnp.where(unknown, jnp.inf, 1.0 / (1.0 - jnp.clip(share, 0.0, 0.9)))
        return jax.tree.map(
            lambda leaf: jnp.where(unknown, jnp.inf, leaf), vector.scale(factor, solution.value)
        )


def krylov_solver(operator: LinearOperator) -> InnerSolver:
    """A Krylov solver for an operator of this kind."""
    if operator.symmetric and operator.positive_definite:
        return ConjugateGradient()
    if operator.symmetric:
        return MINRES()
    return GMRES()
