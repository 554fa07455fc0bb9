"""Stepping: how one step of a solver is made on any arrays."""

import abc
from typing import Any

from jaxtyping import PyTree

from bilevel.bound import BoundProblem
from bilevel.solver.base import InnerSolver
from bilevel.status import Status
from bilevel_arrays.space import Space


class Stepping(abc.ABC):
    """The steps of a solver of `bilevel` on arrays that are not JAX's.

    What the solver declares (`requires`, `recursive`, `stationary`) holds here, too, and the
    meaning of the methods is that of `bilevel.InnerSolver`.

    **Arguments:**

    - `solver`: with its settings. `space`: of the unknown.
    """

    def __init__(self, solver: InnerSolver, space: Space):
        self.solver: Any = solver
        self.space = space
        self.recursive = type(solver).recursive
        self.stationary = type(solver).stationary
        self.requires = type(solver).requires

    @abc.abstractmethod
    def init(self, problem: BoundProblem, x: PyTree) -> Any:
        """The state at the start x."""

    @abc.abstractmethod
    def step(self, problem: BoundProblem, state: Any, residual: PyTree) -> Any:
        """The next state, given the downhill residual."""

    def value(self, state: Any) -> PyTree:
        """The iterate."""
        return state.x

    def residual(self, problem: BoundProblem, state: Any) -> PyTree:
        """The residual that the solver goes by."""
        return problem.residual(self.value(state))

    def failure(self, state: Any) -> int:
        """`Status.CONVERGED` while all is well."""
        del state
        return Status.CONVERGED

    def applications(self, state: Any, iterations: int) -> int:
        """How often the residual or operator was applied in so many iterations."""
        del state
        return iterations + 1

    def precondition(self, problem: BoundProblem, v: PyTree) -> PyTree:
        """M⁻¹v; v itself without a preconditioner."""
        return v if problem.precondition is None else problem.precondition(v)
