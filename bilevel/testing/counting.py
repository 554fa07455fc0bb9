"""Counting how often a problem is traced."""

from typing import Any

import equinox as eqx
from jaxtyping import PyTree

from bilevel.bound import BoundProblem
from bilevel.problem import InnerProblem


class TraceCounter:
    """How often a problem was looked at; compiled code looks at it no more."""

    def __init__(self) -> None:
        self.count = 0


class CountedProblem(InnerProblem):
    """An inner problem that counts how often it is bound to a θ, which tracing does.

    >>> import bilevel as bl
    >>> counter = TraceCounter()
    >>> problem = CountedProblem(bl.RootFinding(lambda x, theta: x - theta), counter)
    >>> _ = problem.at(1.0)
    >>> counter.count
    1
    """

    problem: InnerProblem
    counter: TraceCounter = eqx.field(static=True)

    def residual(self, x: PyTree, theta: PyTree) -> Any:
        """The problem's own."""
        return self.problem.residual(x, theta)

    def at(self, theta: PyTree) -> BoundProblem:
        """The problem's own, counted."""
        self.counter.count += 1
        return self.problem.at(theta)
