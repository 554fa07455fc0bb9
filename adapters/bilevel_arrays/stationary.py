"""Stationary iterations: each step applies the same map."""

from typing import Any

import jax
from jaxtyping import PyTree

from bilevel.bound import BoundProblem
from bilevel_arrays.space import Space
from bilevel_arrays.stepping import Stepping


class _Plain(Stepping):
    """The iterate is all there is."""

    def init(self, problem: BoundProblem, x: PyTree) -> PyTree:
        """The iterate."""
        del problem
        return x

    def value(self, state: PyTree) -> PyTree:
        """The state itself."""
        return state


class GradientDescentSteps(_Plain):
    """x ← x - α ∂ₓ objective."""

    def step(self, problem: BoundProblem, state: PyTree, residual: PyTree) -> PyTree:
        """One step down the gradient."""
        del problem
        return self.space.add_scaled(state, float(self.solver.step_size), residual)


class FixedPointSteps(_Plain):
    """x ← (1 - β) x + β mapping(x)."""

    def step(self, problem: BoundProblem, state: PyTree, residual: PyTree) -> PyTree:
        """Go the undamped part of the way to the mapped point."""
        del problem
        return self.space.add_scaled(state, 1.0 - float(self.solver.damping), residual)


class RichardsonSteps(_Plain):
    """x ← x + α M⁻¹ r."""

    def step(self, problem: BoundProblem, state: PyTree, residual: PyTree) -> PyTree:
        """One step along the preconditioned residual."""
        direction = self.precondition(problem, residual)
        return self.space.add_scaled(state, float(self.solver.step_size), direction)


class JacobiSteps(_Plain):
    """x ← x + ω D⁻¹ (b - A x)."""

    def step(self, problem: BoundProblem, state: PyTree, residual: PyTree) -> PyTree:
        """One simultaneous correction of all unknowns."""
        assert problem.operator is not None
        correction = divide(self.space, residual, problem.operator.diagonal)
        return self.space.add_scaled(state, float(self.solver.weight), correction)


def divide(space: Space, v: PyTree, diagonal: PyTree) -> PyTree:
    """D⁻¹v; a diagonal of fewer axes divides along the leading ones.

    **Raises:** `ValueError` for a diagonal that does not fit v.
    """

    def ratio(leaf: Any, entries: Any) -> Any:
        shape = tuple(entries.shape)
        if shape != tuple(leaf.shape)[: len(shape)]:
            msg = (
                f"the operator's diagonal has a part of shape {shape} for an unknown of shape "
                f"{tuple(leaf.shape)}: it must be like the unknown."
            )
            raise ValueError(msg)
        padded = shape + (1,) * (len(leaf.shape) - len(shape))
        return leaf / space.xp.reshape(entries, padded)

    return jax.tree.map(ratio, v, diagonal)
