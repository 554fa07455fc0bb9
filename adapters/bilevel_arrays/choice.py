"""Choice: which stepping belongs to a solver of bilevel, and which solver where none is named."""

import dataclasses
from collections.abc import Callable
from typing import Any

from jaxtyping import PyTree

from bilevel.bound import BoundProblem
from bilevel.solver.anderson import Anderson
from bilevel.solver.base import IncompatibleError, InnerSolver
from bilevel.solver.bicgstab import BiCGStab
from bilevel.solver.conjugate_gradient import ConjugateGradient
from bilevel.solver.fixed_point_iteration import FixedPointIteration
from bilevel.solver.gmres import GMRES
from bilevel.solver.gradient_descent import GradientDescent
from bilevel.solver.jacobi import Jacobi
from bilevel.solver.preconditioning import JacobiPreconditioner
from bilevel.solver.richardson import Richardson
from bilevel_arrays.anderson import AndersonSteps
from bilevel_arrays.gmres import GMRESSteps
from bilevel_arrays.krylov import BiCGStabSteps, ConjugateGradientSteps
from bilevel_arrays.space import Space
from bilevel_arrays.stationary import (
    FixedPointSteps,
    GradientDescentSteps,
    JacobiSteps,
    RichardsonSteps,
    divide,
)
from bilevel_arrays.stepping import Stepping

STEPPINGS: dict[type[InnerSolver], type[Stepping]] = {
    GradientDescent: GradientDescentSteps,
    FixedPointIteration: FixedPointSteps,
    Anderson: AndersonSteps,
    Richardson: RichardsonSteps,
    Jacobi: JacobiSteps,
    ConjugateGradient: ConjugateGradientSteps,
    BiCGStab: BiCGStabSteps,
    GMRES: GMRESSteps,
}
"""The solvers that run on any arrays."""


def stepping_of(solver: InnerSolver, space: Space) -> Callable[[], Stepping]:
    """Makes the steps of a solver on a space.

    **Raises:** `IncompatibleError` for a solver that runs on JAX's arrays alone.
    """
    kind = STEPPINGS.get(type(solver))
    if kind is None:
        names = ", ".join(f"bl.{solver.__name__}" for solver in STEPPINGS)
        msg = (
            f"{type(solver).__name__} runs on JAX's arrays alone. Use one of {names}; or write the "
            "problem in JAX and call it from PyTorch by bilevel_arrays.torch.function."
        )
        raise IncompatibleError(msg)
    return lambda: kind(solver, space)


def default_solver(problem: BoundProblem) -> InnerSolver:
    """The solver of a problem whose user names none.

    **Raises:** `TypeError` where none does without a setting.
    """
    if problem.operator is not None:
        return default_linear_solver(problem)
    if problem.mapping is not None:
        return Anderson()
    which = "GradientDescent" if problem.objective is not None else "Richardson"
    msg = f"{problem.name}: give solver=bl.{which}(step_size=...): there is none without a setting."
    raise TypeError(msg)


def default_linear_solver(problem: BoundProblem) -> InnerSolver:
    """Conjugate gradients where they may be used, GMRES elsewhere."""
    return ConjugateGradient() if problem.symmetric and problem.positive_definite else GMRES()


def prepared(problem: BoundProblem, solver: InnerSolver, x: PyTree, space: Space) -> BoundProblem:
    """The problem with the solver's preconditioner in it.

    **Raises:** `IncompatibleError` for a preconditioner that runs on JAX's arrays alone or finds no
    diagonal, `TypeError` for what is none.
    """
    preconditioner: Any = getattr(solver, "preconditioner", None)
    if preconditioner is None:
        return problem
    if isinstance(preconditioner, JacobiPreconditioner):
        diagonal = None if problem.operator is None else problem.operator.diagonal
        if diagonal is None:
            msg = (
                f"JacobiPreconditioner cannot precondition this {problem.name}: its operator "
                "has no diagonal. Give the operator as a matrix or as an object with a diagonal "
                "method, or write the preconditioner as a function v -> M⁻¹v."
            )
            raise IncompatibleError(msg)
        entries = space.xp.abs(diagonal) if problem.symmetric else diagonal
        return dataclasses.replace(problem, precondition=lambda v: divide(space, v, entries))
    if type(preconditioner).__module__.partition(".")[0] in {"bilevel", "bilevel_pde"}:
        msg = (
            f"{type(preconditioner).__name__} runs on JAX's arrays alone. Give a function "
            "v -> M⁻¹v of yours, or bl.JacobiPreconditioner()."
        )
        raise IncompatibleError(msg)
    setup = getattr(preconditioner, "at", None)
    apply: Any = setup(problem, x) if callable(setup) else preconditioner
    if not callable(apply):
        msg = (
            "preconditioner must be a function v -> M⁻¹v or an object whose at(problem, x) returns "
            f"one, got {preconditioner!r}."
        )
        raise TypeError(msg)
    space.require_like("preconditioner(v)", apply(x))
    return dataclasses.replace(problem, precondition=apply)
