"""Anderson acceleration."""

from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from bilevel import vector
from bilevel.bound import BoundProblem
from bilevel.solver import basis
from bilevel.solver.base import IncompatibleError, InnerSolver, suited
from bilevel.solver.parameter import positive, whole, within

REGULARISATION = 10.0
"""Default regularisation, in units of the dtype's rounding error."""


class AndersonState(eqx.Module):
    """Iterate, residual before it, and the last differences of both.

    `steps` and `changes` are differences of iterates and of residuals, along a leading
    axis of length `memory` in which they go round.
    """

    x: PyTree
    previous: PyTree
    steps: PyTree
    changes: PyTree
    count: Int[Array, ""]


class Anderson(InnerSolver):
    """Anderson acceleration of a fixed-point iteration: the default for fixed points.

    Anderson 1965, in the form of Walker and Ni 2011 (type II, differences): the next iterate
    is x + βr - Σ γⱼ (Δxⱼ + βΔrⱼ), with γ such that ‖r - Σ γⱼ Δrⱼ‖ is smallest over the last
    differences.  For a linear system the residual is b - Ax and β a Richardson step; the
    iteration is then close to GMRES restarted after `memory` steps, and β = 1 suits the
    adjoint systems of fixed points, whose operator is I - T'.

    **Arguments:**

    - `memory`: differences kept, static. Vectors kept: 2 `memory` + 2.
    - `mixing`: β > 0; in units of x over units of the residual. Traced.
    - `regularisation`: added to the diagonal of the least-squares problem, whose columns
        are scaled to length one: dimensionless. By default ten times the rounding error
        of the dtype. Traced.

    **Raises:** `ValueError` for arguments out of range.

    >>> import jax.numpy as jnp, bilevel as bl
    >>> problem = bl.FixedPoint(lambda x, theta: jnp.cos(x) * theta)
    >>> solution = bl.solve(problem, 1.0, 0.5, solver=bl.Anderson(), budget=bl.Budget(rtol=1e-4))
    >>> round(float(solution.value), 4), int(solution.iterations) < 6
    (0.7391, True)
    """

    linear_adjoint: ClassVar[bool] = True
    conditioned: ClassVar[bool] = True
    adaptive: ClassVar[bool] = True

    memory: int = eqx.field(static=True, default=5)
    mixing: Float[Array, ""] | float = 1.0
    regularisation: Float[Array, ""] | float | None = None

    def __check_init__(self) -> None:
        """Validate the parameters where they are concrete."""
        whole("Anderson", "memory", self.memory)
        positive("Anderson", "mixing", self.mixing)
        if self.regularisation is not None:
            within("Anderson", "regularisation", self.regularisation, 0.0, 1.0)

    def check(self, problem: BoundProblem) -> None:
        """Refuse what is neither a fixed point nor a linear system.

        **Raises:** `IncompatibleError`.
        """
        if problem.mapping is None and problem.operator is None:
            msg = (
                f"Anderson cannot solve this {problem.name}: it needs a fixed-point mapping or a "
                f"linear system. Use {suited(problem)} instead."
            )
            raise IncompatibleError(msg)

    def init(self, problem: BoundProblem, x: PyTree) -> AndersonState:
        """Start without differences."""
        del problem
        none = basis.allocate(x, self.memory)
        return AndersonState(x, vector.zeros_like(x), none, none, jnp.int32(0))

    def step(self, problem: BoundProblem, state: AndersonState, residual: PyTree) -> AndersonState:
        """Combine the last differences, and mix."""
        del problem
        some = state.count > 0
        change = vector.subtract(residual, state.previous)
        change = vector.where(some, change, vector.zeros_like(change))
        changes = basis.write(state.changes, (state.count - 1) % self.memory, change)
        weights = _least_squares(changes, residual, self._regularisation(residual))
        mixed = vector.subtract(residual, basis.combine(weights, changes))
        step = vector.scale(self.mixing, mixed)
        step = vector.subtract(step, basis.combine(weights, state.steps))
        steps = basis.write(state.steps, state.count % self.memory, step)
        return AndersonState(vector.add(state.x, step), residual, steps, changes, state.count + 1)

    def _regularisation(self, like: PyTree) -> Array | float:
        if self.regularisation is None:
            return REGULARISATION * vector.epsilon(like)
        return self.regularisation


def _least_squares(
    columns: PyTree, target: PyTree, regularisation: Array | float
) -> Float[Array, " memory"]:
    """The γ that makes ‖target - Σ γⱼ columnⱼ‖ smallest, by normal equations scaled to one.

    Columns that are zero get γ = 0.
    """

    def products(v: PyTree) -> Array:
        return basis.project(columns, v, complex_linear=False)

    gram, projections = jax.vmap(products)(columns), products(target)
    squares = jnp.diagonal(gram)
    some = squares > 0
    lengths = jnp.where(some, jnp.sqrt(jnp.where(some, squares, 1.0)), 1.0)
    scaled = gram / (lengths[:, None] * lengths[None, :])
    extra = jnp.where(some, jnp.asarray(regularisation, gram.dtype), 1.0)
    return jnp.linalg.solve(scaled + jnp.diag(extra), projections / lengths) / lengths
