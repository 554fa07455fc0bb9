"""What an estimator's conformance is checked on."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from bilevel.budget import Budget
from bilevel.estimator.base import Estimator
from bilevel.inner_solve import solve
from bilevel.probe import Probe
from bilevel.problem import InnerProblem
from bilevel.solver.base import InnerSolver
from bilevel.testing.counting import TraceCounter
from bilevel.testing.sample import with_inexact


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is checked, with the functions that all checks share."""

    estimator: Estimator
    problem: InnerProblem
    counter: TraceCounter
    solver: InnerSolver
    theta: PyTree
    x0: PyTree
    budget: Budget
    adjoint_budget: Budget | None
    loss: Callable[[Any, Any], Array]

    def value(
        self,
        moving: PyTree,
        x0: PyTree,
        budget: Budget,
        adjoint_budget: Budget | None,
        probe: Probe | None = None,
    ) -> Array:
        """The outer loss as a function of the inexact leaves of θ."""
        theta = with_inexact(self.theta, moving)
        solution = solve(
            self.problem,
            theta,
            x0,
            solver=self.solver,
            estimator=self.estimator,
            budget=budget,
            adjoint_budget=adjoint_budget,
            probe=probe,
        )
        return self.loss(solution.value, theta)

    def gradient(
        self, moving: PyTree, x0: PyTree, budget: Budget, adjoint: Budget | None, scale: Any = 1.0
    ) -> tuple[Array, PyTree, Probe]:
        """(loss, gradient, report), in reverse mode."""

        def scaled(moving: Any, probe: Any) -> Array:
            value = self.value(moving, x0, budget, adjoint, probe)
            return value * jnp.asarray(scale, value.dtype)

        value, (gradient, probe) = jax.value_and_grad(scaled, argnums=(0, 1))(moving, Probe.zeros())
        return value, gradient, probe
