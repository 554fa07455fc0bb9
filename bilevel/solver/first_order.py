"""What the first-order methods for a smooth objective have in common."""

from typing import ClassVar

from jaxtyping import PyTree

from bilevel.budget import Budget
from bilevel.solver.base import InnerSolver, default_tolerance

ITERATIONS = 10_000
"""Default cap: the steps these methods take grow with the condition number, not the size."""


class FirstOrderSolver(InnerSolver):
    """A solver that minimises a smooth objective by its gradient; base class of such."""

    requires: ClassVar[frozenset[str]] = frozenset({"objective"})
    instead: ClassVar[str] = (
        "ProximalGradient for a CompositeMinimization, ConjugateGradient or GMRES for a linear "
        "system, Anderson for a fixed point, Newton for a root"
    )

    def default_budget(self, x0: PyTree) -> Budget:
        """To within rounding, however few the unknowns are."""
        return Budget(iterations=ITERATIONS, rtol=default_tolerance(x0))
