"""What must hold of a solve and of a gradient, whatever the system."""

from typing import Any

import numpy as np

import bilevel as bl
from tests.numerics.cases import N, Subject, System, systems

WEIGHT = np.random.default_rng(5).standard_normal(N)
"""The outer loss is WEIGHT · x."""

EXACT = {"float32": 1e-3, "float64": 1e-7}
"""Relative error of a gradient that nothing was said against, of a system of condition 10."""

TRUNCATED = ("Unrolled", "OneStep, FixedPoint", "Nystrom")
"""Estimators that differentiate something else than the solution, or by few directions."""


def true_residual(subject: Subject, system: System, x: Any) -> float:
    """In double precision, from the data before they were rounded to the dtype."""
    matrix, value = system.matrix, np.asarray(x, np.float64)
    if subject.kind in {"minimum", "composite"}:
        matrix = (matrix + matrix.T) / 2
    with np.errstate(all="ignore"):
        left = system.rhs - matrix @ value
    if subject.kind == "composite":  # a step of the proximal gradient, per unit of its length
        moved = value + 0.9 * left
        left = (np.sign(moved) * np.maximum(np.abs(moved) - 0.9e-3, 0) - value) / 0.9
    return float(np.linalg.norm(left)) * (0.9 if subject.kind == "map" else 1.0)


def about_solution(subject: Subject, dtype: str, solution: Any) -> list[str]:
    """Violations of a batch of solutions, one for each system."""
    found = []
    for place, system in enumerate(systems()):
        status = bl.Status(int(solution.status[place]))
        residual = true_residual(subject, system, solution.value[place])
        tolerance = float(solution.tolerance[place])
        where = f"{subject.name}, {dtype}, {system.name}: {status.name}"
        # What rounding the data to the dtype alone changes is no fault of the solver.
        rounded = np.finfo(dtype).eps * np.linalg.norm(np.asarray(solution.value[place], float))
        if status is bl.Status.CONVERGED and not residual <= 10 * tolerance + rounded:
            found.append(f"{where} with a residual of {residual:.1e}, tolerance {tolerance:.1e}")
        if system.failing and not status.failed:
            found.append(f"{where}, though the data are not finite")
        if not system.solvable and status is bl.Status.CONVERGED and subject.kind != "composite":
            found.append(f"{where}, though there is no solution")
    return found


def about_gradient(subject: Subject, dtype: str, solution: Any, gradient: Any, report: Any) -> Any:
    """Violations of a batch of gradients with respect to (A, b)."""
    found = []
    for place, system in enumerate(systems()):
        status = bl.Status(int(solution.status[place]))
        of_matrix, of_rhs = (np.asarray(part[place], np.float64) for part in gradient)
        every = np.concatenate([of_matrix.ravel(), of_rhs])
        size = np.linalg.norm(every)
        capped = status is bl.Status.BUDGET or int(report.adjoint_capped[place]) > 0
        where = f"{subject.name}, {dtype}, {system.name}: {status.name}, |gradient| {size:.1e}"
        if status.failed or int(report.failures[place]):
            if np.any(np.isfinite(every)):
                found.append(f"{where} after a failure")
            continue
        if not system.solvable and np.isfinite(size) and not capped:
            if subject.kind != "composite":
                found.append(f"{where}, though there is no solution")
        # With a penalty on |x|, zero is the solution for every small b, and so is its derivative.
        elif size == 0 and not (subject.kind == "composite" and not np.any(system.rhs)):
            found.append(f"{where}: zero")
        elif np.isfinite(size) and not capped and _told(subject, system, status):
            matrix = system.matrix
            if subject.kind == "minimum":
                matrix = (matrix + matrix.T) / 2
            exact = np.linalg.solve(matrix.T, WEIGHT)
            error = np.linalg.norm(of_rhs - exact) / np.linalg.norm(exact)
            if error > EXACT[dtype]:
                found.append(f"{where}: wrong by {error:.1e} of it")
    return found


def _told(subject: Subject, system: System, status: bl.Status) -> bool:
    converged = status is bl.Status.CONVERGED and system.condition < 1e2
    return converged and subject.kind != "composite" and not subject.name.startswith(TRUNCATED)
