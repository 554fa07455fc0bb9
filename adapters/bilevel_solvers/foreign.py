"""Foreign solvers: what all wrappers of somebody else's have in common."""

from bilevel.bound import BoundProblem
from bilevel.solver.base import IncompatibleError, InnerSolver


class ForeignSolver(InnerSolver):
    """An inner solver made of somebody else's; base class of such.

    It is refused under the name that the user knows it by.
    """

    @property
    def title(self) -> str:
        """What messages call it, such as "jaxopt.LBFGS"."""
        return type(self).__name__

    def check(self, problem: BoundProblem) -> None:
        """Refuse a problem that lacks what the solver requires.

        **Raises:** `IncompatibleError`.
        """
        try:
            super().check(problem)
        except IncompatibleError as error:
            msg = str(error).replace(type(self).__name__, self.title)
            raise IncompatibleError(msg) from None
