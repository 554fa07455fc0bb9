"""Find the strength of a source from the field it makes: the first experiment of the PRDP paper.

    bilevel compare examples/poisson_inverse.py
    bilevel compare examples/poisson_inverse.py --set parameters=3 --set solver=steepest
    bilevel run examples/poisson_inverse.py --set estimator=unrolled

The field solves u″ = -Σ θᵢ sin(2πi x) on (0, 1), zero at both ends, on a grid of `points`
inner points, by an iteration that starts from zero.  Gradient descent on the distance to a
given field recovers θ = 2 from θ = 5.  Jacobi would need 600 iterations a step; progressive
refinement (Bhatia, Koehler and Thuerey, ICLR 2025) starts with 25.

Settings are the paper's for one parameter.  Its three parameters have curvatures 1, 1/16 and
1/81, and one step size would leave the third where it is: here each has its own.
"""

from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from pydantic import Field

import bilevel as bl

TRUTH, START = 2.0, 5.0
STEP_SIZE = 275.0

FULL, LONGEST = 600, 5000
"""Iterations of the full solve, and the most that a policy may ask of one that is unrolled."""

Count = Annotated[int, Field(ge=1)]


class Laplacian:
    """-d²/dx² with zero boundary values, never stored as a matrix."""

    symmetric = True
    positive_definite = True

    def __init__(self, points: int):
        self.points = points
        self.weight = float((points + 1) ** 2)

    def matvec(self, u: jax.Array) -> jax.Array:
        """Three-point differences."""
        padded = jnp.pad(u, 1)
        return self.weight * (2 * u - padded[:-2] - padded[2:])

    def diagonal(self) -> jax.Array:
        """The same entry everywhere."""
        return jnp.full(self.points, 2 * self.weight)

    def dense(self) -> np.ndarray:
        """The matrix, for the reference field only."""
        return self.weight * (
            2 * np.eye(self.points) - np.eye(self.points, k=1) - np.eye(self.points, k=-1)
        )


def task(
    parameters: Count = 1,
    solver: Literal["jacobi", "steepest"] = "jacobi",
    estimator: Literal["implicit", "unrolled"] = "implicit",
    points: Annotated[int, Field(ge=2)] = 30,
    epochs: Count = 180,
) -> bl.Task:
    """The inverse problem.

    Args:
        parameters: strengths to recover, of sin 2πx, sin 4πx, ...
        solver: "jacobi" or "steepest" (steepest descent).
        estimator: "implicit" (adjoint by the same solver, under the same budget) or "unrolled".
        points: inner grid points.
        epochs: outer steps.

    """
    operator = Laplacian(points)
    grid = jnp.arange(1, points + 1) / (points + 1)
    modes = jnp.arange(1, parameters + 1)
    sources = jnp.sin(2 * jnp.pi * modes[:, None] * grid)
    if parameters > points // 2:
        msg = f"parameters is at most half of points, {points // 2}, got {parameters}."
        raise ValueError(msg)
    inner = _choice("solver", solver, {"jacobi": bl.Jacobi(), "steepest": bl.SteepestDescent()})
    how = _choice(
        "estimator",
        estimator,
        {"implicit": bl.Implicit(solver=inner), "unrolled": bl.Unrolled(max_iterations=LONGEST)},
    )
    exact = np.linalg.solve(operator.dense(), TRUTH * np.sum(np.asarray(sources, float), axis=0))
    wanted = jnp.asarray(exact, grid.dtype)
    problem = bl.LinearSystem(operator, lambda theta: theta @ sources)

    def loss(theta: jax.Array, batch: None, fidelity: bl.Fidelity) -> jax.Array:
        del batch
        field = bl.solve(
            problem, theta, jnp.zeros(points), solver=inner, estimator=how, fidelity=fidelity
        ).value
        return jnp.mean((field - wanted) ** 2) / 2

    def validate(theta: jax.Array) -> jax.Array:
        return jnp.linalg.norm(theta - TRUTH) / jnp.linalg.norm(jnp.full(parameters, TRUTH))

    step_sizes = STEP_SIZE * modes.astype(grid.dtype) ** 4
    return bl.Task(
        jnp.full(parameters, START),
        loss,
        validate=validate,
        name="poisson inverse",
        metric_name="relative parameter error",
        optimizer=optax.stateless_with_tree_map(lambda gradient, _: -step_sizes * gradient),
        epochs=epochs,
        ladder=bl.Ladder.iterations(start=25, step=10, stop=FULL),
        full=bl.Budget(iterations=FULL),
        refinement={
            "stepping_threshold": 0.92,
            "stopping_threshold": 0.9,
            "ema_window": None,
            "error_window": 2,
        },
        policies=("full", "prdp"),
    )


def _choice(name: str, value: str, known: dict[str, Any]) -> Any:
    if value not in known:
        msg = f"{name} is {' or '.join(known)}, got {value!r}."
        raise ValueError(msg)
    return known[value]


if __name__ == "__main__":
    import sys

    from bilevel.cli import main

    # Single precision ends near 5e-6: the work is compared where both policies get to.
    sys.exit(main(["compare", __file__, "--overwrite", "--target", "1e-4", *sys.argv[1:]]))
