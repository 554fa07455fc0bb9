"""host_result: what NumPy found, in the form of `bl.hypergradient`."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

import bilevel as bl
from bilevel.evaluation import Cost

Array = NDArray[np.float64]


def host_result(
    value: float,
    gradient: dict[str, Array],
    x: Array,
    adjoint: Array,
    *,
    iterations: NDArray[np.int32],
    adjoint_iterations: NDArray[np.int32],
    residual: Array,
    converged: NDArray[np.bool_],
) -> bl.Hypergradient:
    """A `bl.Hypergradient` without an error, all of its arrays NumPy's.

    **Arguments:**

    - `x`, `adjoint`: a row a fold.
    - `iterations`, `adjoint_iterations`, `residual`, `converged`: one number a fold.
    """
    status = np.where(converged, bl.Status.CONVERGED, bl.Status.BUDGET).astype(np.int32)

    def solution(x: Array, steps: NDArray[np.int32], residual: Array) -> bl.Solution:
        unknown = np.full(len(status), np.nan)
        parts: Any = {
            "value": x,
            "status": status,
            "residual_norm": residual,
            "iterations": steps,
            "inner_iterations": steps,
            "applications": steps,
            "tolerance": unknown,
            "scale": unknown,
            "rate": unknown,
        }
        return bl.Solution(**parts)

    none: Any = np.zeros_like(iterations)
    primal_count: Any = iterations
    adjoint_count: Any = adjoint_iterations
    loss: Any = np.float64(value)
    return bl.Hypergradient(
        loss,
        gradient,
        solution(x, iterations, residual),
        solution(adjoint, adjoint_iterations, np.zeros_like(residual)),
        None,
        Cost(primal_count, adjoint_count, primal_count, adjoint_count, none),
    )
