"""The Nyström approximation of an inverse."""

import dataclasses
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from bilevel import vector
from bilevel.bound import BoundProblem
from bilevel.budget import Budget
from bilevel.solver.base import InnerSolver
from bilevel.solver.dense import coordinates
from bilevel.solver.parameter import positive, whole


class NystromInverse(InnerSolver):
    """One application of a low-rank approximate inverse, from randomly drawn columns.

    With C the drawn columns of N and M their rows at the same places, N ≈ C M⁻¹ Cᵀ, and by
    Woodbury's identity (Hataya and Yamada 2023)

        (N + ρI)⁻¹ v ≈ v/ρ - ρ⁻² C (M + CᵀC/ρ)⁻¹ Cᵀ v.

    Costs `rank` operator applications once and two thin products an iteration.  More
    than one iteration is iterative refinement, which need not converge.

    **Arguments:**

    - `rank`: number of columns drawn, at most the number of unknowns.
    - `damping`: ρ as a share of the largest diagonal entry drawn, so that scaling the problem
        changes nothing.
    - `seed`: of the draw.

    >>> import jax.numpy as jnp, bilevel as bl
    >>> problem = bl.LinearSystem(jnp.diag(jnp.array([1.0, 2.0])), jnp.ones(2))
    >>> solution = bl.solve(
    ...     problem, None, jnp.zeros(2), solver=NystromInverse(rank=2, damping=1e-3)
    ... )
    >>> [round(float(v), 2) for v in solution.value]
    [1.0, 0.5]
    """

    requires: ClassVar[frozenset[str]] = frozenset({"operator", "symmetric"})
    instead: ClassVar[str] = "GMRES or BiCGStab, or the estimators Implicit or Neumann for Nystrom,"
    stationary: ClassVar[bool] = True
    linear_adjoint: ClassVar[bool] = True

    rank: int = eqx.field(static=True, default=10)
    damping: Float[Array, ""] | float = 1e-2
    seed: int = eqx.field(static=True, default=0)

    def __check_init__(self) -> None:
        """Validate the numbers."""
        whole("Nystrom", "rank", self.rank)
        positive("Nystrom", "damping", self.damping)

    def prepare(self, problem: BoundProblem, x: PyTree) -> BoundProblem:
        """Draw the columns and factorise the small matrix."""
        operator = problem.operator
        assert operator is not None
        flatten, unflatten = coordinates(x, real=True)
        size = flatten(x).size
        rank = min(self.rank, size)
        places = jax.random.choice(jax.random.key(self.seed), size, (rank,), replace=False)
        units = jax.nn.one_hot(places, size, dtype=vector.real_dtype(x))
        columns = jax.vmap(lambda unit: flatten(operator.matvec(unflatten(unit))))(units)
        core = columns[:, places]
        # Zero only for a zero operator, whose inverse is rightly not finite.
        rho = self.damping * jnp.max(jnp.abs(jnp.diagonal(core)))
        small = 0.5 * (core + core.T) + columns @ columns.T / rho

        def inverse(v: Any) -> Any:
            flat = flatten(v)
            inner = jnp.linalg.solve(small, columns @ flat)
            return unflatten(flat / rho - (inner @ columns) / rho**2)

        return dataclasses.replace(problem, precondition=inverse)

    def init(self, problem: BoundProblem, x: PyTree) -> PyTree:
        """The iterate is all there is."""
        del problem
        return x

    def step(self, problem: BoundProblem, state: PyTree, residual: PyTree) -> PyTree:
        """Add the approximate correction."""
        assert problem.precondition is not None
        return vector.add(state, problem.precondition(residual))

    def value(self, state: PyTree) -> Any:
        """The state itself."""
        return state

    def applications(self, state: PyTree, iterations: Array) -> Array:
        """The columns drawn, and a residual an iteration."""
        del state
        return iterations + 1 + self.rank

    def default_budget(self, x0: PyTree) -> Budget:
        """One application."""
        del x0
        return Budget(iterations=1)
