"""Linear systems that the tests of linear solvers share, and one problem that holds them all."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

import bilevel as bl

SIZE = 12

# Matrix and right-hand side are θ, so that all systems of a size share one compilation.
SYSTEM = bl.LinearSystem(lambda theta: theta[0], lambda theta: theta[1])


class System(NamedTuple):
    """A matrix, a right-hand side, and the solution."""

    matrix: np.ndarray
    rhs: np.ndarray
    solution: np.ndarray


def system(kind: str, *, complex_valued: bool = False, seed: int = 0, size: int = SIZE) -> System:
    """A well-conditioned system of a kind: "definite", "symmetric" (indefinite), "general"."""
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> np.ndarray:
        values = rng.standard_normal(shape)
        return values + 1j * rng.standard_normal(shape) if complex_valued else values

    noise, rhs = draw(size, size), draw(size)
    if kind == "general":
        matrix = 2.0 * np.eye(size) + noise / np.sqrt(size)
    else:
        vectors, _ = np.linalg.qr(noise)
        values = np.linspace(1.0, 10.0, size)
        if kind == "symmetric":
            values = values * np.where(np.arange(size) % 3 == 0, -1.0, 1.0)
        matrix = (vectors * values) @ vectors.conj().T
        matrix = 0.5 * (matrix + matrix.conj().T)
    return System(matrix, rhs, np.linalg.solve(matrix, rhs))


def solve(matrix: Any, rhs: Any, solver: bl.InnerSolver, **budget: Any) -> bl.Solution:
    """Solve from zero."""
    theta = (jnp.asarray(matrix), jnp.asarray(rhs))
    start = jnp.zeros(theta[1].shape, jnp.result_type(*theta))
    options = {"budget": bl.Budget(**budget)} if budget else {}
    return bl.solve(SYSTEM, theta, start, solver=solver, **options)


def krylov_minimiser(
    matrix: np.ndarray, rhs: np.ndarray, steps: int, inverse: np.ndarray | None = None
) -> np.ndarray:
    """The x in M⁻¹K_steps(A M⁻¹, b) with the smallest ‖b - A x‖, by dense least squares."""
    inverse = np.eye(len(rhs)) if inverse is None else inverse
    vectors = [rhs]
    for _ in range(steps - 1):
        vectors.append(matrix @ (inverse @ vectors[-1]))
        vectors[-1] = vectors[-1] / np.linalg.norm(vectors[-1])
    basis = inverse @ np.linalg.qr(np.stack(vectors, 1))[0]
    weights = np.linalg.lstsq(matrix @ basis, rhs, rcond=None)[0]
    return basis @ weights
