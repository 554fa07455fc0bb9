"""Preconditioners: how one gets into a solver."""

import dataclasses
from typing import Any

from jaxtyping import PyTree

from bilevel.bound import BoundProblem


def prepare_preconditioner(problem: BoundProblem, preconditioner: Any, x: PyTree) -> BoundProblem:
    """Put a preconditioner into the problem, set up once before the loop.

    **Arguments:**

    - `preconditioner`: v -> M⁻¹v; or an object with `at(problem, x)` returning such a
        function, for those that look at the operator; or `None`.

    **Raises:** `TypeError` for anything else.
    """
    if preconditioner is None:
        return problem
    setup: Any = getattr(preconditioner, "at", None)
    apply = setup(problem, x) if callable(setup) else preconditioner
    if not callable(apply):
        msg = (
            "preconditioner must be a function v -> M⁻¹v or an object whose at(problem, x) "
            f"returns one, got {preconditioner!r}."
        )
        raise TypeError(msg)
    return dataclasses.replace(problem, precondition=apply)


def precondition(problem: BoundProblem, v: PyTree) -> PyTree:
    """M⁻¹v; v itself without a preconditioner."""
    return v if problem.precondition is None else problem.precondition(v)
