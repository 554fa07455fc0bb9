"""bilevel: optimise through inner problems that an iterative solver solves to a budget."""

import importlib
from typing import TYPE_CHECKING, Any

_EXPORTS = {
    "AdjointProbe": "bilevel.probe",
    "BiCGStab": "bilevel.solver.bicgstab",
    "Budget": "bilevel.budget",
    "CertifiedBound": "bilevel.error.certified",
    "ConjugateGradient": "bilevel.solver.conjugate_gradient",
    "Direct": "bilevel.solver.direct",
    "ErrorControlled": "bilevel.refinement.error_controlled",
    "ErrorEstimator": "bilevel.error.base",
    "Estimator": "bilevel.estimator.base",
    "Fidelity": "bilevel.refinement.fidelity",
    "FixedFidelity": "bilevel.refinement.fixed",
    "FixedPoint": "bilevel.problem",
    "FixedPointIteration": "bilevel.solver.fixed_point_iteration",
    "GMRES": "bilevel.solver.gmres",
    "GradientDescent": "bilevel.solver.gradient_descent",
    "Hypergradient": "bilevel.evaluation",
    "Implicit": "bilevel.estimator.implicit",
    "IncompatibleError": "bilevel.solver.base",
    "InnerProblem": "bilevel.problem",
    "InnerSolver": "bilevel.solver.base",
    "Jacobi": "bilevel.solver.jacobi",
    "JacobiPreconditioner": "bilevel.solver.preconditioning",
    "Ladder": "bilevel.refinement.ladder",
    "LinearOperator": "bilevel.operator",
    "LinearSystem": "bilevel.problem",
    "MINRES": "bilevel.solver.minres",
    "Minimization": "bilevel.problem",
    "Neumann": "bilevel.estimator.neumann",
    "Newton": "bilevel.solver.newton",
    "Nystrom": "bilevel.estimator.nystrom",
    "NystromInverse": "bilevel.solver.nystrom_inverse",
    "OneStep": "bilevel.estimator.one_step",
    "Probe": "bilevel.probe",
    "ProgressiveRefinement": "bilevel.refinement.progressive",
    "ResidualCorrection": "bilevel.error.correction",
    "Richardson": "bilevel.solver.richardson",
    "RootFinding": "bilevel.problem",
    "ScheduledFidelity": "bilevel.refinement.scheduled",
    "Solution": "bilevel.solution",
    "Status": "bilevel.solution",
    "TruncationError": "bilevel.error.base",
    "Unrolled": "bilevel.estimator.unrolled",
    "hypergradient": "bilevel.evaluation",
    "solve": "bilevel.inner_solve",
    "truncation_error": "bilevel.evaluation",
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
