"""Stepper: an implicit step in time, one inner solve each."""

import abc
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, PyTree

from bilevel.budget import Budget
from bilevel.estimator.base import Estimator
from bilevel.inner_solve import solve
from bilevel.probe import Probe
from bilevel.problem import InnerProblem
from bilevel.refinement.fidelity import Fidelity
from bilevel.solution import Solution
from bilevel.solver.base import InnerSolver
from bilevel_pde.boundary_values import BoundaryValues, on_side
from bilevel_pde.grid import Grid


class Effort(eqx.Module):
    """What a step is computed with; taken from a fidelity, or given one by one."""

    budget: Budget | None = None
    adjoint_budget: Budget | None = None
    probe: Probe | None = None

    @classmethod
    def of(
        cls, fidelity: Fidelity | None, budget: Budget | None, adjoint_budget: Budget | None
    ) -> "Effort":
        """One of the two ways to say it.

        **Raises:** `TypeError` for both at once, and for other types.
        """
        if fidelity is not None:
            if not isinstance(fidelity, Fidelity):
                hint = " Write budget=..." if isinstance(fidelity, Budget) else ""
                msg = f"step: fidelity should be a Fidelity, got {fidelity!r}.{hint}"
                raise TypeError(msg)
            if budget is not None or adjoint_budget is not None:
                msg = "step: fidelity already holds both budgets: give one of the two, not both."
                raise TypeError(msg)
            budget, adjoint_budget = fidelity.budget, fidelity.adjoint_budget
            return cls(traced(budget), traced(adjoint_budget), fidelity.probe)
        for name, value in (("budget", budget), ("adjoint_budget", adjoint_budget)):
            if value is not None and not isinstance(value, Budget):
                msg = f"step: {name} should be a Budget, got {value!r}. Write bl.Budget(...)."
                raise TypeError(msg)
        return cls(traced(budget), traced(adjoint_budget))


class Stepper(eqx.Module):
    """An implicit time step as one inner solve; the base of all steppers.

    A subclass has an equation, `problem()`, of θ = (stepper, u): everything in it that is an
    array, and the field before the step, is differentiated.  `parameters` names what may be
    replaced step by step.
    """

    parameters: ClassVar[tuple[str, ...]] = ("dt",)

    grid: Grid = eqx.field(static=True)
    dt: Float[Array, ""]
    solver: InnerSolver
    estimator: Estimator

    @abc.abstractmethod
    def problem(self) -> InnerProblem:
        """The equation of one step; its θ is (stepper, u)."""

    @property
    def like(self) -> PyTree:
        """Shapes and dtypes of a state."""
        return self.grid.like

    def step(
        self,
        u: PyTree,
        *,
        fidelity: Fidelity | None = None,
        budget: Budget | None = None,
        adjoint_budget: Budget | None = None,
        theta: Mapping[str, Any] | None = None,
        guess: PyTree | None = None,
    ) -> Any:
        """The state one step of `dt` later, differentiable.

        **Arguments:**

        - `u`: the state, like `stepper.like`.
        - `fidelity`: both budgets and the probe in one; or
        - `budget`, `adjoint_budget`: of the linear solve and of its adjoint; by default to
            within rounding.
        - `theta`: parameters for this step in place of the stepper's own, by name.
        - `guess`: where the solve starts; by default at u, a warm start.

        **Returns:** a state like u.

        **Raises:** `ValueError` for a state of another shape and a parameter that there is not,
        `TypeError` for another dtype and what is no budget.
        """
        return self.step_with_solution(
            u,
            fidelity=fidelity,
            budget=budget,
            adjoint_budget=adjoint_budget,
            theta=theta,
            guess=guess,
        )[0]

    def step_with_solution(
        self,
        u: PyTree,
        *,
        fidelity: Fidelity | None = None,
        budget: Budget | None = None,
        adjoint_budget: Budget | None = None,
        theta: Mapping[str, Any] | None = None,
        guess: PyTree | None = None,
    ) -> tuple[Any, Solution]:
        """The next state, and how far its solve got; arguments as of `step`."""
        effort = Effort.of(fidelity, budget, adjoint_budget)
        u = as_state("u", u, self.like)
        guess = u if guess is None else as_state("guess", guess, self.like)
        solution = self.replaced(theta).solved(u, guess, effort)
        return solution.value, solution

    def replaced(self, theta: Mapping[str, Any] | None) -> Self:
        """The stepper with some parameters replaced.

        **Raises:** `ValueError` naming a parameter that there is not.
        """
        if not theta:
            return self
        for name in theta:
            if name not in self.parameters:
                known = ", ".join(self.parameters)
                msg = f"{type(self).__name__}: theta may replace {known}, got {name!r}."
                raise ValueError(msg)
        checked = {name: self._checked(name, value) for name, value in theta.items()}
        return self._with(**checked)

    def _with(self, **values: Any) -> Self:
        made = object.__new__(type(self))
        for name in self.__dataclass_fields__:
            object.__setattr__(made, name, values.get(name, getattr(self, name)))
        return made

    @abc.abstractmethod
    def _checked(self, name: str, value: Any) -> Any:
        """A parameter as it is kept."""

    def solved(self, u: PyTree, guess: PyTree, effort: Effort) -> Solution:
        """The inner solve of a step, started at a guess."""
        return solve(
            self.problem(),
            (self._data(), u),
            guess,
            solver=self.solver,
            estimator=self.estimator,
            budget=effort.budget,
            adjoint_budget=effort.adjoint_budget,
            probe=effort.probe,
        )

    def _data(self) -> Self:
        """The stepper without what only says how to solve."""
        return self._with(solver=None, estimator=None)


def traced(budget: Budget | None) -> Budget | None:
    """The budget with arrays for numbers, so that other ones compile nothing anew."""
    if budget is None:
        return None
    leaves = (budget.iterations, budget.rtol, budget.atol)
    arrays = tuple(
        leaf if isinstance(leaf, jax.Array) else np.asarray(leaf, dtype)
        for leaf, dtype in zip(leaves, (np.int32, float, float), strict=True)
    )
    return eqx.tree_at(lambda b: (b.iterations, b.rtol, b.atol), budget, arrays)


def as_state(name: str, u: PyTree, like: PyTree) -> Any:
    """A state with array leaves.

    **Raises:** `ValueError` for another structure or shape, `TypeError` for another dtype.
    """
    expected, given = jax.tree.structure(like), jax.tree.structure(u)
    if expected != given:
        msg = f"{name} should be a state of structure {expected}, got {given}."
        raise ValueError(msg)

    def convert(leaf: Any, wanted: jax.ShapeDtypeStruct) -> Array:
        field = jnp.asarray(leaf)
        if field.shape != wanted.shape:
            msg = f"{name} should have the grid's shape {wanted.shape}, got {field.shape}."
            raise ValueError(msg)
        if field.dtype != wanted.dtype:
            msg = (
                f"{name} should be {wanted.dtype} as the grid is, got {field.dtype}. Use "
                f"{name}.astype({wanted.dtype}), or Grid(..., dtype={field.dtype})."
            )
            raise TypeError(msg)
        return field

    return jax.tree.map(convert, u, like)


def positive(owner: str, name: str, value: Any, dtype: Any, *, zero: bool = False) -> Array:
    """A real array whose entries are positive, as far as they are known.

    **Raises:** `ValueError` for entries that are not, `TypeError` for complex ones.
    """
    if jnp.issubdtype(jnp.result_type(value), jnp.complexfloating):
        msg = f"{owner}: {name} should be real, got {jnp.result_type(value)}."
        raise TypeError(msg)
    if not isinstance(value, Tracer):
        least = float(np.min(np.asarray(value)))
        if not (least > 0 or (zero and least == 0)):
            bound = "not be negative" if zero else "be positive"
            msg = f"{owner}: {name} should {bound}, got {least} somewhere."
            raise ValueError(msg)
    return jnp.asarray(value, dtype)


def field_or_number(owner: str, name: str, value: Any, grid: Grid) -> Array:
    """A real number or field of the grid's shape, in its dtype.

    **Raises:** `ValueError` for another shape, `TypeError` for a complex one.
    """
    if jnp.issubdtype(jnp.result_type(value), jnp.complexfloating):
        msg = f"{owner}: {name} should be real, got {jnp.result_type(value)}."
        raise TypeError(msg)
    if np.shape(value) not in {(), grid.shape}:
        msg = (
            f"{owner}: {name} should be a number or a field of shape {grid.shape}, got shape "
            f"{np.shape(value)}."
        )
        raise ValueError(msg)
    return jnp.asarray(value, grid.dtype)


def side_values(grid: Grid, values: BoundaryValues | None) -> dict[tuple[int, int], Array]:
    """Boundary values as arrays.

    **Raises:** `ValueError` for sides that take none, and values of another shape.
    """
    return {side: on_side(grid, *side, given) for side, given in (values or {}).items()}
