"""Error estimate by correction: what one more, rough solve of each equation would change."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from bilevel import vector
from bilevel.bound import BoundProblem
from bilevel.budget import Budget
from bilevel.error.base import ErrorEstimator, Situation, TruncationError, pairing
from bilevel.error.change import change, is_small
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

MOST_GROWTH = 2.0
"""Nor does a step that makes the residual of a nonlinear problem so many times larger."""

ROUNDS = 5
"""Most steps towards the solution of a nonlinear problem."""

ENOUGH = 0.03
"""Part of the residual that they may leave: less than the margin."""


class ResidualCorrection(ErrorEstimator):
    """Truncation error from the residuals, corrected roughly, without any constant.

    With the Lagrangian Λ(x, θ, λ) = f + λᵀr, the hypergradient is ∂_θΛ where ∂ₓΛ = 0 and
    r = 0.  Truncation leaves both residuals non-zero.  x is corrected first, to x + δx with
    N δx = r; a nonlinear problem takes up to five such steps of Newton's method, until 3 % of
    r are left.  Then λ is, by Nᵀδλ = ∂ₓΛ there: what of ∂ₓΛ the correction of x has brought is
    the primal part, what was there before it the adjoint part.  Each solve goes to a per cent
    only, which error modes that decay slowly make several.  What it leaves itself is
    extrapolated from its own rate.  For an estimator without an adjoint, λ is solved for
    precisely and the implicit gradient compared with the one given.

    So the estimate is as sharp as the rough solves are, however large the error is and
    whatever the outer loss, where a bound from constants is off by the condition number; five
    per cent are put on top.  Where a rough solve fails or leaves more than it started with,
    as on badly conditioned problems after few iterations, or where Newton's method runs away,
    the estimate is infinite: unknown, and not small.  It comes out too low, down to half of the
    error, where many modes decay equally slowly and the adjoint's solver is GMRES with a
    restart shorter than their number.

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
        """The estimate, from two to eight rough linear solves."""
        x, theta = situation.x, situation.theta
        bound = situation.problem.at(situation.with_theta(theta))
        operator = bound.linearize(x)
        solver = situation.linear_solver or krylov_solver(operator)
        rough = _Rough(solver, self._budget(situation))

        def lagrangian(x: Any, theta: Any, multiplier: Any) -> Array:
            return situation.loss(x, theta) + pairing(multiplier, situation.residual(x, theta))

        step = _correction(bound, operator, x, rough)
        there = vector.add(x, step)
        multiplier = situation.adjoint_value
        if multiplier is None:
            forcing = jax.grad(situation.loss)(x, theta)
            multiplier = rough(operator.transposed(x), forcing, precise=True)
        forcing, direct = change(
            lambda x: jax.grad(lagrangian, argnums=(0, 1))(x, theta, multiplier), x, step
        )
        transposed = bound.linearize(there).transposed(there)
        indirect = situation.pull_theta(rough(transposed, forcing), there)
        of_primal = vector.add(direct, indirect)
        if situation.adjoint_value is None or situation.adjoint_residual is None:
            implicit = jax.grad(lagrangian, argnums=1)(x, theta, multiplier)
            of_adjoint = vector.subtract(implicit, situation.gradient)
        else:
            of_adjoint = situation.pull_theta(rough(transposed, situation.adjoint_residual), there)
        parts = of_primal, of_adjoint, vector.add(of_primal, of_adjoint)
        primal, adjoint, total = (_known(MARGIN * vector.norm(part)) for part in parts)
        return TruncationError(primal, adjoint, total, rough.applications)

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
        value, share, taken = self.part(operator, rhs, precise=precise)
        self.applications = self.applications + taken
        return extrapolated(value, share, LEAST_REDUCTION)

    def part(
        self, operator: LinearOperator, rhs: PyTree, *, precise: bool = False
    ) -> tuple[PyTree, Array, Array]:
        """The solution as it is, what part of the right-hand side it leaves, applications.

        Of a solve that failed the part is infinite.
        """
        budget = self.solver.default_budget(rhs) if precise else self.budget
        solution, left = solve_linear(operator, rhs, self.solver, budget)
        share = _ratio(vector.norm(left), vector.norm(rhs))
        share = jnp.where(solution.status >= Status.DIVERGED, jnp.inf, share)
        return solution.value, share, solution.applications


def extrapolated(value: PyTree, share: Array, most: float) -> PyTree:
    """A solution that left `share` of its right-hand side, as if it had left nothing.

    The rest shrinks at the same rate again and again: a geometric series. Infinite where
    more than `most` is left: who took next to nothing off knows no error, and it is far from
    small.
    """
    factor = jnp.where(share <= most, 1.0 / (1.0 - jnp.clip(share, 0.0, 0.9)), jnp.inf)
    return jax.tree.map(
        lambda leaf: jnp.where(share <= most, leaf, jnp.inf), vector.scale(factor, value)
    )


def _correction(bound: BoundProblem, operator: LinearOperator, x: PyTree, rough: _Rough) -> PyTree:
    """The step from x towards the solution: one rough solve, or several of Newton's method."""
    first = bound.residual(x)
    if bound.operator is not None:
        return rough(operator, first)
    size = vector.norm(first)

    def going_on(state: Any) -> Array:
        step, residual, _, count, _ = state
        left = (vector.norm(residual) > ENOUGH * size) & ~is_small(step, x)
        return (count == 0) | (left & (count < ROUNDS))

    def advance(state: Any) -> Any:
        step, residual, share, count, applications = state
        at = bound.linearize(vector.add(x, step))
        value, left, taken = rough.part(at, residual)
        step = vector.add(step, value)
        share = jnp.where(count == 0, left, share)
        return step, bound.residual(vector.add(x, step)), share, count + 1, applications + taken

    zero = vector.zeros_like(x)
    start = zero, first, jnp.full_like(size, jnp.inf), jnp.int32(0), jnp.int32(0)
    step, residual, share, _, taken = jax.lax.while_loop(going_on, advance, start)
    rough.applications = rough.applications + taken
    # After a small step the residual may be at the level of rounding.
    share = jnp.where(
        is_small(step, x),
        jnp.where(share <= LEAST_REDUCTION, share, jnp.inf),
        _ratio(vector.norm(residual), size),
    )
    return extrapolated(step, share, MOST_GROWTH)


def _known(estimate: Array) -> Array:
    # What was derived at a point that is infinitely far away is not a number.
    return jnp.where(jnp.isnan(estimate), jnp.inf, estimate)


def _ratio(part: Array, whole: Array) -> Array:
    return part / jnp.where(whole > 0, whole, 1.0)


def krylov_solver(operator: LinearOperator) -> InnerSolver:
    """A Krylov solver for an operator of this kind."""
    if operator.symmetric and operator.positive_definite:
        return ConjugateGradient()
    if operator.symmetric:
        return MINRES()
    return GMRES()
