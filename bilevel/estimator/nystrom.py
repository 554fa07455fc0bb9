"""Nyström hypergradients."""

import dataclasses

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from bilevel.budget import Budget
from bilevel.estimator.base import Estimator, Record, Setting
from bilevel.estimator.implicit import solve_implicitly
from bilevel.solution import Solution
from bilevel.solver.nystrom_inverse import NystromInverse


class Nystrom(Estimator):
    """The implicit derivative with N⁻¹ replaced by a low-rank Nyström approximation.

    Hataya and Yamada 2023.  No iteration at all: `rank` columns of the Hessian, drawn at
    random, give an approximate inverse at once, good where few directions carry the
    curvature; what is left out of them is amplified by up to 1/ρ.  What the approximation
    cost is the adjoint part of the error estimate.  It is applied once, whatever the
    adjoint budget.

    With `rank` below the number of unknowns and little curvature in the directions left out,
    such as that of weak penalties, this is a wrong gradient and no approximate one: along
    them 1/ρ stands for the inverse of the curvature. Take [`Implicit`][] there, or look at
    `error.adjoint` of [`hypergradient`][].

    **Arguments:**

    - `rank`: columns drawn.
    - `damping`: ρ of the approximation, as a share of the largest diagonal entry drawn.
    - `seed`: of the draw; the same seed draws the same columns.

    >>> import jax, jax.numpy as jnp, bilevel as bl
    >>> problem = bl.Minimization(lambda x, theta: 0.5 * jnp.sum((x - theta) ** 2))
    >>> def value(theta):
    ...     estimator = bl.Nystrom(rank=2, damping=1e-3)
    ...     return jnp.sum(bl.solve(problem, theta, jnp.zeros(2), estimator=estimator).value)
    >>> [round(float(g), 2) for g in jax.grad(value)(jnp.ones(2))]
    [1.0, 1.0]
    """

    rank: int = eqx.field(static=True, default=10)
    damping: Float[Array, ""] | float = 1e-2
    seed: int = eqx.field(static=True, default=0)

    def __check_init__(self) -> None:
        """Validate the numbers where they are concrete."""
        NystromInverse(self.rank, self.damping, self.seed)

    def solve(self, setting: Setting, record: Record) -> Solution:
        """The inner solve with the approximate derivative of its solution."""
        solver = NystromInverse(self.rank, self.damping, self.seed)
        if setting.adjoint_budget is not None:
            once = jnp.minimum(jnp.asarray(setting.adjoint_budget.iterations), 1)
            setting = dataclasses.replace(setting, adjoint_budget=Budget(iterations=once))
        return solve_implicitly(setting, record, solver)
