"""Limited-memory BFGS."""

from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from bilevel import vector
from bilevel.bound import BoundProblem
from bilevel.solver import basis
from bilevel.solver.first_order import FirstOrderSolver
from bilevel.solver.line_search import (
    Found,
    failure_of,
    first_length,
    objective_of,
    rounding_hides,
    wolfe,
)
from bilevel.solver.parameter import positive, whole, within
from bilevel.solver.recall import recall
from bilevel.status import Status


class LBFGSState(eqx.Module):
    """Iterate, residual and objective there, and the last pairs of differences.

    - `steps`, `changes`: differences of iterates and of gradients, along a leading axis of
        length `history` in which they go round.
    - `inverses`: 1/⟨step, change⟩ of each pair, 0 where there is none.
    - `scale`: the multiple of the identity that the inverse Hessian starts from.
    - `pairs`: pairs taken so far; `evaluations`: of objective and gradient.
    - `first_length`, `largest_norm`: natural step at the start, largest gradient norm so far.
    """

    x: PyTree
    residual: PyTree
    value: Float[Array, ""]
    steps: PyTree
    changes: PyTree
    inverses: Float[Array, " history"]
    scale: Float[Array, ""]
    pairs: Int[Array, ""]
    first_length: Float[Array, ""]
    largest_norm: Float[Array, ""]
    evaluations: Int[Array, ""]
    status: Int[Array, ""]


class LBFGS(FirstOrderSolver):
    """Limited-memory BFGS with a Wolfe line search: the default for large smooth objectives.

    Liu and Nocedal 1989.  The first direction is scaled by the curvature along the first
    gradient, and a pair of differences is left out where its curvature is not clearly
    positive, so that the direction always points downhill; an objective need not be
    convex.  One evaluation of objective and gradient in most iterations.

    Multiplying the objective by a number changes nothing.  A search that finds no step
    first drops the history, then ends the solve: as `ROUNDING` where rounding explains it,
    as `LINE_SEARCH` otherwise.  Unrolling differentiates the directions, history
    included, and takes the step lengths as constants.  On an ill-conditioned objective
    that is not quadratic, iterates of a short history depend on θ so sensitively that
    their derivatives need not converge with them: use `Implicit` there.

    **Arguments:**

    - `history`: pairs kept, static. Memory: 2 `history` + 4 vectors like x.
    - `decrease`, `curvature`: constants 0 < c₁ < 1/2 and c₁ < c₂ < 1 of the line search.
        Traced.
    - `trials`: most evaluations in one search, static.

    **Raises:** `ValueError` for arguments out of range.

    >>> import jax.numpy as jnp, bilevel as bl
    >>> problem = bl.Minimization(  # Rosenbrock's valley
    ...     lambda x, theta: (theta - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2
    ... )
    >>> solution = bl.solve(
    ...     problem,
    ...     1.0,
    ...     jnp.array([-1.2, 1.0]),
    ...     solver=bl.LBFGS(),
    ...     budget=bl.Budget(iterations=100, rtol=1e-5),
    ... )
    >>> [round(float(v), 3) for v in solution.value], int(solution.iterations) < 50
    ([1.0, 1.0], True)
    """

    adaptive: ClassVar[bool] = True

    history: int = eqx.field(static=True, default=10)
    decrease: Float[Array, ""] | float = 1e-4
    curvature: Float[Array, ""] | float = 0.9
    trials: int = eqx.field(static=True, default=30)

    def __check_init__(self) -> None:
        """Validate the parameters where they are concrete."""
        whole("LBFGS", "history", self.history)
        whole("LBFGS", "trials", self.trials)
        positive("LBFGS", "decrease", self.decrease)
        within("LBFGS", "decrease", self.decrease, 0.0, 0.5)
        within("LBFGS", "curvature", self.curvature, 0.0, 1.0)
        lower, upper = self.decrease, self.curvature
        if isinstance(lower, float) and isinstance(upper, float) and lower >= upper:
            msg = (
                "LBFGS: decrease must be smaller than curvature, or no step may fulfil both "
                f"conditions; got {lower} and {upper}. The usual values are 1e-4 and 0.9."
            )
            raise ValueError(msg)

    def init(self, problem: BoundProblem, x: PyTree) -> LBFGSState:
        """Evaluate once, and measure the curvature along the gradient."""
        residual = problem.residual(x)
        norm = jax.lax.stop_gradient(vector.norm(residual))
        length = first_length(problem, x, residual).astype(norm.dtype)
        none = basis.allocate(x, self.history)
        return LBFGSState(
            x=x,
            residual=residual,
            value=jax.lax.stop_gradient(objective_of(problem)(x)),
            steps=none,
            changes=none,
            inverses=jnp.zeros(self.history, norm.dtype),
            scale=length,
            pairs=jnp.int32(0),
            first_length=length,
            largest_norm=norm,
            evaluations=jnp.int32(2),
            status=jnp.int32(Status.CONVERGED),
        )

    def step(self, problem: BoundProblem, state: LBFGSState, residual: PyTree) -> LBFGSState:
        """Go along the quasi-Newton direction, and take the pair of differences up."""
        norm = vector.norm(jax.lax.stop_gradient(residual))
        largest_norm = jnp.maximum(state.largest_norm, norm)
        known = (state.value, norm, state.first_length, largest_norm)
        direction = _direction(state, residual)
        steepest = vector.scale(state.scale, residual)
        downhill = vector.dot(residual, direction) > 0
        direction = vector.where(downhill, direction, steepest)
        found = wolfe(
            problem,
            state.x,
            direction,
            state.value,
            residual,
            decrease=self.decrease,
            curvature=self.curvature,
            trials=self.trials,
            hidden=rounding_hides(*known, self.decrease),
        )
        x = vector.add_scaled(state.x, found.length, direction)
        after = recall(problem.residual, x, found.residual)
        state = eqx.tree_at(lambda state: state.largest_norm, state, largest_norm)
        return self._remember(state, residual, x, after, found, failure_of(*known))

    def residual(self, problem: BoundProblem, state: LBFGSState) -> PyTree:
        """The residual that the line search evaluated."""
        del problem
        return state.residual

    def failure(self, state: LBFGSState) -> Int[Array, ""]:
        """`ROUNDING` or `LINE_SEARCH` once a search along the gradient found no step."""
        return state.status

    def applications(self, state: LBFGSState, iterations: Int[Array, ""]) -> Int[Array, ""]:
        """Evaluations of objective and gradient, and one Hessian-vector product."""
        del iterations
        return state.evaluations

    def _remember(
        self,
        state: LBFGSState,
        residual: PyTree,
        x: PyTree,
        after: PyTree,
        found: Found,
        why: Int[Array, ""],
    ) -> LBFGSState:
        difference, change = vector.subtract(x, state.x), vector.subtract(residual, after)
        product, square = vector.dot(difference, change), vector.dot(change, change)
        lengths = vector.norm(jax.lax.stop_gradient(difference)) * jnp.sqrt(
            jax.lax.stop_gradient(square)
        )
        curved = product > vector.epsilon(x) * lengths
        positive_product = jnp.where(curved, product, 1.0)
        slot = state.pairs % self.history
        keep = curved & found.success
        # A search that failed drops the history; without one, there is nothing left to try.
        dropped = ~found.success & (state.pairs > 0)
        inverses = jnp.where(
            keep, state.inverses.at[slot].set(1.0 / positive_product), state.inverses
        )
        fine = found.success | dropped
        return LBFGSState(
            x=x,
            residual=after,
            value=found.value,
            steps=_put(state.steps, slot, difference, keep),
            changes=_put(state.changes, slot, change, keep),
            inverses=jnp.where(dropped, jnp.zeros_like(inverses), inverses),
            scale=jnp.where(keep, positive_product / jnp.where(curved, square, 1.0), state.scale),
            pairs=jnp.where(dropped, 0, state.pairs + keep.astype(jnp.int32)),
            first_length=state.first_length,
            largest_norm=state.largest_norm,
            evaluations=state.evaluations + found.evaluations,
            status=jax.lax.stop_gradient(jnp.where(fine, jnp.int32(Status.CONVERGED), why)),
        )


def _put(buffer: PyTree, slot: Int[Array, ""], entry: PyTree, keep: Array) -> PyTree:
    """Write an entry into its slot, or the slot's own content where it is not kept."""
    return basis.write(buffer, slot, vector.where(keep, entry, basis.read(buffer, slot)))


def _direction(state: LBFGSState, residual: PyTree) -> PyTree:
    """The two-loop recursion (Nocedal 1980) on the downhill residual."""
    history = state.inverses.shape[0]
    newest_first = (state.pairs - 1 - jnp.arange(history)) % history

    def pair(slot: Array) -> tuple[PyTree, PyTree, Array]:
        return basis.read((state.steps, state.changes, state.inverses), slot)

    def backward(q: PyTree, slot: Array) -> tuple[PyTree, Array]:
        step, change, inverse = pair(slot)
        weight = inverse * vector.dot(step, q)
        return vector.add_scaled(q, -weight, change), weight

    def forward(q: PyTree, entry: tuple[Array, Array]) -> tuple[PyTree, None]:
        slot, weight = entry
        step, change, inverse = pair(slot)
        return vector.add_scaled(q, weight - inverse * vector.dot(change, q), step), None

    q, weights = jax.lax.scan(backward, residual, newest_first)
    q = vector.scale(state.scale, q)
    q, _ = jax.lax.scan(forward, q, (newest_first, weights), reverse=True)
    return q
