"""bilevel: optimise through inner problems that an iterative solver solves to a budget."""

import importlib
from typing import TYPE_CHECKING, Any

_EXPORTS = {
    "Budget": "bilevel.budget",
    "ConjugateGradient": "bilevel.solver.conjugate_gradient",
    "Direct": "bilevel.solver.direct",
    "Estimator": "bilevel.estimator.base",
    "Fidelity": "bilevel.refinement.fidelity",
    "FixedPoint": "bilevel.problem",
    "FixedPointIteration": "bilevel.solver.fixed_point_iteration",
    "GradientDescent": "bilevel.solver.gradient_descent",
    "Implicit": "bilevel.estimator.implicit",
    "IncompatibleError": "bilevel.solver.base",
    "InnerProblem": "bilevel.problem",
    "InnerSolver": "bilevel.solver.base",
    "Jacobi": "bilevel.solver.jacobi",
    "LinearOperator": "bilevel.operator",
    "LinearSystem": "bilevel.problem",
    "Minimization": "bilevel.problem",
    "Newton": "bilevel.solver.newton",
    "Probe": "bilevel.probe",
    "Richardson": "bilevel.solver.richardson",
    "RootFinding": "bilevel.problem",
    "Solution": "bilevel.solution",
    "Status": "bilevel.solution",
    "Unrolled": "bilevel.estimator.unrolled",
    "solve": "bilevel.inner_solve",
}

__all__ = sorted(_EXPORTS)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that the command line starts at once."""
    if name not in _EXPORTS:
        msg = f"module 'bilevel' has no attribute {name!r}"
        raise AttributeError(msg)
    value = getattr(importlib.import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names."""
    return [*__all__]
