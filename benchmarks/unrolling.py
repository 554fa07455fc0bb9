"""Unrolling with a traced budget against a static scan: time, memory, and the bits."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

import bilevel as bl
from benchmarks import harness, problems
from benchmarks.handwritten import scan_unroll
from benchmarks.harness import Report

CAP = 1000
"""Room for this many steps is kept whatever the budget."""


@dataclass(frozen=True)
class Case:
    """An iteration, as the library sees it and as a scan does."""

    name: str
    problem: bl.InnerProblem
    solver: bl.InnerSolver
    step: Callable[[Any, Any], Any]
    outer_loss: Callable[[Any, Any], Array]
    start: Array
    theta: Any

    def by_library(self, estimator: bl.Estimator) -> Callable[[Any, Any], tuple[Array, Any]]:
        """(theta, steps) -> (outer loss, gradient), compiled once for all steps."""

        def loss(theta: Any, steps: Any) -> Array:
            solution = bl.solve(
                self.problem,
                theta,
                self.start,
                solver=self.solver,
                estimator=estimator,
                budget=bl.Budget(iterations=steps),
            )
            return self.outer_loss(solution.value, theta)

        return jax.jit(jax.value_and_grad(loss))

    def by_scan(self, steps: int) -> Callable[[Any], tuple[Array, Any]]:
        """theta -> (outer loss, gradient), compiled for these steps."""
        return scan_unroll(self.step, self.outer_loss, self.start, steps)


def descent_case(name: str, problem: problems.Ridge | problems.Logistic, lipschitz: float) -> Case:
    """Gradient descent of step 1/L."""
    step_size = 1.0 / lipschitz
    slope = jax.grad(problem.objective)
    return Case(
        name,
        bl.Minimization(problem.objective),
        bl.GradientDescent(step_size=step_size),
        lambda w, theta: w - step_size * slope(w, theta),
        problem.outer_loss,
        problem.start,
        problem.theta,
    )


def diffusion_case(points: int) -> Case:
    """Reaction and diffusion on a ring, relaxed explicitly towards a stationary state.

    u ← u + τ (∂ₓ(exp(θ) (1 + u²) ∂ₓu) + u − u³ + source): nonlinear in the diffusivity and
    in the reaction; θ is a field, one parameter a point.
    """
    random = np.random.default_rng(0)
    x = np.arange(points) / points
    source = jnp.asarray(np.sin(2 * np.pi * x) + 0.1 * random.standard_normal(points))
    target = jnp.asarray(0.5 * np.cos(2 * np.pi * x))
    theta = jnp.asarray(0.1 * random.standard_normal(points))

    def relax(u: Float[Array, " n"], theta: Float[Array, " n"]) -> Float[Array, " n"]:
        ahead = jnp.roll(u, -1)
        flux = jnp.exp(theta) * (1.0 + (0.5 * (u + ahead)) ** 2) * (ahead - u)
        return u + 0.1 * (flux - jnp.roll(flux, 1) + 0.1 * (u - u**3 + source))

    return Case(
        "diffusion",
        bl.FixedPoint(relax),
        bl.FixedPointIteration(),
        relax,
        lambda u, theta: 0.5 * jnp.mean((u - target) ** 2),  # noqa: ARG005
        jnp.zeros(points),
        theta,
    )
