"""What the first-order methods for a smooth objective have in common."""

from typing import ClassVar

from bilevel.solver.base import InnerSolver


class FirstOrderSolver(InnerSolver):
    """A solver that minimises a smooth objective by its gradient; base class of such."""

    requires: ClassVar[frozenset[str]] = frozenset({"objective"})
    conditioned: ClassVar[bool] = True
