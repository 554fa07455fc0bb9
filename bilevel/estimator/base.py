"""The estimator protocol: how the derivative of an inner solve is obtained."""

import abc
import dataclasses
from typing import ClassVar

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from bilevel import vector
from bilevel.bound import BoundProblem
from bilevel.budget import Budget
from bilevel.probe import AdjointProbe, Probe
from bilevel.problem import InnerProblem
from bilevel.solution import Solution
from bilevel.solver.base import InnerSolver
from bilevel.status import Status


@dataclasses.dataclass(frozen=True)
class Setting:
    """One inner solve, as the user asked for it.

    `adjoint_budget` is `None` for the estimator's own default; nothing of the primal's
    `budget` stands in for it. `adjoint_guess` is where the adjoint solve starts.
    """

    problem: InnerProblem
    theta: PyTree
    x0: PyTree
    solver: InnerSolver
    budget: Budget
    adjoint_budget: Budget | None = None
    adjoint_guess: PyTree | None = None
    history: int = 0


class Estimator(eqx.Module):
    """A way to get the hypergradient from a truncated solve; subclass it for your own.

    An estimator defines one thing: `solve`, the inner solve as a differentiable function
    of θ (and of whatever the problem captured).  `bl.solve` and `bl.hypergradient` are
    both made of it, so their numbers agree by construction.

    - `solves_adjoint`: whether an adjoint equation is solved, so that there is a λ; the
        others differentiate the iteration itself.
    - `forward_only`: whether only forward mode works.

    The shortest one differentiates nothing:

    >>> import equinox as eqx, jax, jax.numpy as jnp, bilevel as bl
    >>> class Detached(bl.Estimator):
    ...     def solve(self, setting, record):
    ...         return jax.lax.stop_gradient(bl.Implicit().solve(setting, record))
    >>> problem = bl.LinearSystem(jnp.eye(1), lambda theta: theta * jnp.ones(1))
    >>> def value(theta):
    ...     return jnp.sum(bl.solve(problem, theta, jnp.zeros(1), estimator=Detached()).value)
    >>> float(value(3.0)), float(jax.grad(value)(3.0))
    (3.0, 0.0)
    """

    solves_adjoint: ClassVar[bool] = True

    @property
    def forward_only(self) -> bool:
        """Whether only forward-mode differentiation works."""
        return False

    def correction_solver(self, problem: BoundProblem, x: PyTree) -> InnerSolver | None:
        """The linear solver that error estimates should use, `None` for a Krylov solver."""
        return None

    def check_budget(self, budget: Budget | None) -> None:
        """Refuse a concrete budget that the estimator has no room for.

        **Raises:** `ValueError`.
        """
        return

    @abc.abstractmethod
    def solve(self, setting: Setting, record: "Record") -> Solution:
        """The inner solve, differentiable as this estimator says.

        **Arguments:**

        - `setting`: what to solve, and the budgets.
        - `record`: zeros; its cotangent must come out as what the backward pass did.

        **Returns:** the `Solution`, whose value alone carries a derivative.
        """


class Record(eqx.Module):
    """A zero argument of a solve whose cotangent is what the backward pass did.

    - `counts`: sums over all solves that share it; `None` where nobody asked.
    - `detail`: the adjoint solve of this one; `None` where nobody asked.
    """

    counts: Probe | None = None
    detail: AdjointProbe | None = None

    def filled(self, primal: Solution, adjoint: Solution, residual: PyTree) -> "Record":
        """The cotangent that reports a primal and an adjoint solve.

        `residual` is the residual vector that the adjoint solve left.
        """
        counts, detail = self.counts, self.detail
        if counts is not None:
            counts = _counted(counts, primal, adjoint)
        if detail is not None:
            dtype = detail.status.dtype
            detail = AdjointProbe(
                adjoint.value,
                residual,
                *(
                    jnp.asarray(number).astype(dtype)
                    for number in (
                        adjoint.status,
                        adjoint.residual_norm,
                        adjoint.iterations,
                        adjoint.tolerance,
                        adjoint.scale,
                        adjoint.rate,
                        adjoint.applications,
                    )
                ),
            )
        return Record(counts, detail)


def no_adjoint(value: PyTree, applications: Array, *, idle: Array) -> Solution:
    """The adjoint `Solution` of an estimator that solves none.

    **Arguments:**

    - `idle`: whether there was no step that a derivative could be taken of.
    """
    norm = jnp.zeros((), vector.real_dtype(value))
    return Solution(
        value=vector.zeros_like(value),
        status=jnp.where(idle, jnp.int32(Status.NOT_STARTED), jnp.int32(Status.NOT_RUN)),
        residual_norm=norm,
        iterations=jnp.int32(0),
        inner_iterations=jnp.int32(0),
        tolerance=norm,
        scale=norm,
        rate=jnp.full_like(norm, jnp.nan),
        applications=applications,
    )


def _counted(like: Probe, primal: Solution, adjoint: Solution) -> Probe:
    dtype = like.solves.dtype
    failed = (primal.status >= Status.DIVERGED) | (adjoint.status >= Status.DIVERGED)
    adjoint_ran = adjoint.status != Status.NOT_RUN
    numbers = {
        "solves": 1,
        "primal_iterations": primal.inner_iterations,
        "adjoint_iterations": adjoint.iterations,
        "primal_applications": primal.applications,
        "adjoint_applications": adjoint.applications,
        "primal_residual": primal.relative_residual,
        "adjoint_residual": jnp.where(adjoint_ran, adjoint.relative_residual, 0.0),
        "primal_capped": primal.status == Status.BUDGET,
        "adjoint_capped": adjoint.status == Status.BUDGET,
        "failures": failed,
    }
    return Probe(**{name: jnp.asarray(value).astype(dtype) for name, value in numbers.items()})
