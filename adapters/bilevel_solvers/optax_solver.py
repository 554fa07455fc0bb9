"""Optax: its transformations, which the core takes as they are."""

from typing import Any

from bilevel.solver.optax_solver import Optax


def optax(transformation: Any) -> Optax:
    """A gradient transformation of optax as an inner solver: `bl.Optax`.

    An iteration is one update; it unrolls, and its budget is traced.

    **Arguments:**

    - `transformation`: any `optax.GradientTransformation`, such as `optax.adam(1e-2)`.

    **Raises:** `TypeError` for anything else.

    >>> import optax, bilevel as bl, bilevel_solvers
    >>> problem = bl.Minimization(lambda x, theta: 0.5 * (x - theta) ** 2)
    >>> solver = bilevel_solvers.optax(optax.sgd(0.5))
    >>> solution = bl.solve(problem, 4.0, 0.0, solver=solver, budget=bl.Budget(iterations=2))
    >>> float(solution.value)
    3.0
    """
    return Optax(transformation)
