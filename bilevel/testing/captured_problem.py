"""A problem that captures θ instead of being passed it."""

from collections.abc import Callable
from typing import Any

from jaxtyping import PyTree

from bilevel import vector
from bilevel.bound import BoundProblem
from bilevel.problem import InnerProblem


class CapturedProblem(InnerProblem):
    """A problem whose functions hold θ, and ignore the one they are passed."""

    bind: Callable[[], BoundProblem]

    def residual(self, x: PyTree, theta: PyTree) -> Any:
        """The residual at the captured θ."""
        return vector.negative(self.at(theta).residual(x))

    def at(self, theta: PyTree) -> BoundProblem:
        """The problem at the captured θ."""
        del theta
        return self.bind()
