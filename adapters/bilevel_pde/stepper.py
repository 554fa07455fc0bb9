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
from bilevel.solver.linear import trusted
from bilevel.status import Status
from bilevel_pde.boundary_values import BoundaryValues, on_side, sided
from bilevel_pde.grid import Grid

UNSOLVED = 1e-3
"""Where nobody gave a budget, a relative residual above this at the cap is no solution."""

SIGNED = ("dt", "viscosity", "hyperviscosity", "diffusivity")
"""Parameters that are positive."""


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
    replaced step by step, `zero` which of the positive ones may also be zero.
    """

    parameters: ClassVar[tuple[str, ...]] = ("dt",)
    zero: ClassVar[tuple[str, ...]] = ()

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

    @property
    def state_kind(self) -> str:
        """What a state is, in words."""
        return f"a field of shape {self.grid.shape}"

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

        **Returns:** a state like u; NaN where the solve failed, as its gradient then is. A
        budget that was given and ran out is no failure. Where none was given, a relative
        residual above 1e-3 after the default number of iterations is one (`DIVERGED`).

        **Raises:** `ValueError` for a state of another shape, a parameter that there is not and
        one that is not finite; `TypeError` for another dtype and what is no budget.
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
        """The next state, and how far its solve got; arguments as of `step`.

        The solution's `value` is the state, NaN where the solve failed.
        """
        effort = Effort.of(fidelity, budget, adjoint_budget)
        u = self.checked_state("u", u)
        guess = u if guess is None else self.checked_state("guess", guess)
        solution = self.replaced(theta).advanced(u, guess, effort)
        return solution.value, solution

    def checked_state(self, name: str, u: PyTree) -> Any:
        """A state with array leaves.

        **Raises:** `ValueError` for another structure or shape, `TypeError` for another dtype.
        """
        return as_state(name, u, self.like, self.state_kind)

    def advanced(self, u: PyTree, guess: PyTree, effort: Effort) -> Solution:
        """The inner solve of a step, with a value that is NaN where it failed."""
        solution = self.solved(u, guess, effort)
        if self.outermost(effort) is None:
            # Nobody asked for less than all of it.
            missed = (solution.status == Status.BUDGET) & (solution.relative_residual > UNSOLVED)
            solution = with_status(solution, missed, Status.DIVERGED)
        return eqx.tree_at(lambda s: s.value, solution, trusted(solution))

    def outermost(self, effort: Effort) -> Budget | None:
        """The budget that a step's iterations count against, where one was given."""
        return effort.budget

    def replaced(self, theta: Mapping[str, Any] | None) -> Self:
        """The stepper with some parameters replaced.

        **Raises:** `ValueError` naming a parameter that there is not, `TypeError` for what is no
        mapping.
        """
        if theta is None:
            return self
        self._check_names("theta", theta)
        checked = {name: self._checked(name, value) for name, value in theta.items()}
        return self._with(**checked)

    def check_controls(self, controls: Mapping[str, Any]) -> None:
        """Refuse parameters of several steps, an axis in front, that no step can be done with.

        **Raises:** `ValueError` naming one that there is not, that has the wrong sign, or that is
        not finite.
        """
        self._check_names("controls", controls)
        owner = type(self).__name__
        for name, value in controls.items():
            for leaf in jax.tree.leaves(value):
                if name in SIGNED:
                    positive(owner, name, leaf, self.grid.dtype, zero=name in self.zero)
                check_finite(owner, f"controls[{name!r}]", leaf, self.grid.dtype)

    def _check_names(self, argument: str, given: Any) -> None:
        owner, known = type(self).__name__, ", ".join(self.parameters)
        if not isinstance(given, Mapping):
            msg = (
                f"{owner}: {argument} should be a mapping from names among {known}, got "
                f"{type(given).__name__}. Write {argument}={{{self.parameters[0]!r}: ...}}."
            )
            raise TypeError(msg)
        for name in given:
            if name not in self.parameters:
                msg = f"{owner}: {argument} may replace {known}, got {name!r}."
                raise ValueError(msg)

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


def with_status(solution: Solution, condition: Any, status: Status) -> Solution:
    """The solution with another status where a condition holds and it has not failed already."""
    changed = condition & (solution.status < Status.DIVERGED)
    code = jnp.where(changed, jnp.int32(status), solution.status)
    return eqx.tree_at(lambda s: s.status, solution, code)


def as_state(name: str, u: PyTree, like: PyTree, kind: str) -> Any:
    """A state with array leaves.

    **Arguments:**

    - `kind`: what it should be, in words.

    **Raises:** `ValueError` for another structure or shape, `TypeError` for another dtype.
    """
    if jax.tree.structure(like) != jax.tree.structure(u):
        msg = f"{name} should be {kind}, got {_described(u)}."
        raise ValueError(msg)

    def convert(leaf: Any, wanted: jax.ShapeDtypeStruct) -> Array:
        field = as_array("", name, leaf)
        if field.shape != wanted.shape:
            msg = f"{name} should have the grid's shape {wanted.shape}, got {field.shape}."
            raise ValueError(msg)
        if field.dtype != wanted.dtype:
            # A grid has the dtype of its unknowns, which are floating-point numbers.
            floating = jnp.issubdtype(field.dtype, jnp.floating)
            instead = f", or Grid(..., dtype={field.dtype})" if floating else ""
            msg = (
                f"{name} should be {wanted.dtype} as the grid is, got {field.dtype}. Use "
                f".astype({wanted.dtype}){instead}."
            )
            raise TypeError(msg)
        return field

    return jax.tree.map(convert, u, like)


def _described(u: Any) -> str:
    """What a wrong state is."""
    if isinstance(u, tuple | list):
        return f"a {type(u).__name__} of ({', '.join(map(_described, u))})"
    shape = getattr(u, "shape", None)
    return type(u).__name__ if shape is None else f"an array of shape {shape}"


def as_array(owner: str, name: str, value: Any) -> Array:
    """A number or an array.

    **Raises:** `TypeError` for anything else.
    """
    # NumPy takes a letter for a type.
    given: Any = object() if isinstance(value, str | bytes) else value
    try:
        return jnp.asarray(given)
    except (TypeError, ValueError):
        start = f"{owner}: " if owner else ""
        msg = f"{start}{name} should be a number or an array, got {value!r}."
        raise TypeError(msg) from None


def check_finite(owner: str, name: str, value: Any, dtype: Any) -> None:
    """See to it that numbers are finite in a dtype, as far as they are known.

    **Raises:** `ValueError`.
    """
    if isinstance(value, Tracer):
        return
    with np.errstate(over="ignore"):
        numbers = np.asarray(value).astype(dtype)
    finite = np.isfinite(numbers)
    if not finite.all():
        msg = f"{owner}: {name} should be finite, got {numbers[~finite].flat[0]} somewhere."
        raise ValueError(msg)


def as_real(owner: str, name: str, value: Any) -> Array:
    """A real number or array.

    **Raises:** `TypeError` for a complex one and for what is none.
    """
    found = as_array(owner, name, value)
    if jnp.iscomplexobj(found):
        msg = f"{owner}: {name} should be real, got {found.dtype}."
        raise TypeError(msg)
    return found


def positive(owner: str, name: str, value: Any, dtype: Any, *, zero: bool = False) -> Array:
    """A real array whose entries are positive and finite, as far as they are known.

    **Raises:** `ValueError` for entries that are not, `TypeError` for complex ones.
    """
    as_real(owner, name, value)
    if not isinstance(value, Tracer):
        least = float(np.min(np.asarray(value)))
        if not (least > 0 or (zero and least == 0)):
            bound = "not be negative" if zero else "be positive"
            msg = f"{owner}: {name} should {bound}, got {least} somewhere."
            raise ValueError(msg)
    check_finite(owner, name, value, dtype)
    return jnp.asarray(value, dtype)


def field_or_number(owner: str, name: str, value: Any, grid: Grid) -> Array:
    """A finite real number or field of the grid's shape, in its dtype.

    **Raises:** `ValueError` for another shape and numbers that are not finite, `TypeError` for a
    complex one.
    """
    shape = as_real(owner, name, value).shape
    if shape not in {(), grid.shape}:
        msg = (
            f"{owner}: {name} should be a number or a field of shape {grid.shape}, got shape "
            f"{shape}."
        )
        raise ValueError(msg)
    check_finite(owner, name, value, grid.dtype)
    return jnp.asarray(value, grid.dtype)


def side_values(
    owner: str, grid: Grid, values: BoundaryValues | None
) -> dict[tuple[int, int], Array]:
    """Finite boundary values as arrays.

    **Raises:** `ValueError` for sides that take none, values of another shape and numbers that
    are not finite; `TypeError` for what is no mapping.
    """
    given = sided(grid, {} if values is None else values)
    for side, value in given.items():
        as_real(owner, f"boundary_values[{side}]", value)
        check_finite(owner, f"boundary_values[{side}]", value, grid.dtype)
    return {side: on_side(grid, *side, value) for side, value in given.items()}
