"""Samples: random vectors, and a problem for a solver that comes without one."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from bilevel import vector
from bilevel.problem import FixedPoint, InnerProblem, LinearSystem, Minimization
from bilevel.solver.base import InnerSolver


def random_like(x: PyTree, seed: int) -> PyTree:
    """Standard normal numbers in the shape and dtype of x; zero where x is not inexact."""
    generator = np.random.default_rng(seed)

    def draw(leaf: Any) -> Any:
        array = jnp.asarray(leaf)
        if not jnp.issubdtype(array.dtype, jnp.inexact):
            return array
        numbers = generator.normal(size=array.shape)
        if jnp.iscomplexobj(array):
            numbers = numbers + 1j * generator.normal(size=array.shape)
        return jnp.asarray(numbers, array.dtype)

    return jax.tree.map(draw, x)


def inexact(tree: PyTree) -> PyTree:
    """The tree with arrays for leaves, and `None` for those that no derivative is taken of."""
    arrays = jax.tree.map(jnp.asarray, tree)
    return eqx.filter(arrays, eqx.is_inexact_array)


def with_inexact(tree: PyTree, replacement: PyTree) -> PyTree:
    """The tree with other values for its inexact leaves."""
    return eqx.combine(replacement, jax.tree.map(jnp.asarray, tree))


def single_precision(tree: PyTree) -> PyTree:
    """The tree with its double-precision arrays rounded to single precision."""
    narrow = {"float64": jnp.float32, "complex128": jnp.complex64}

    def convert(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array | np.ndarray):
            return leaf
        return jnp.asarray(leaf, narrow.get(leaf.dtype.name, leaf.dtype))

    return jax.tree.map(convert, tree)


def stays_single(problem: InnerProblem, theta: PyTree, x0: PyTree) -> bool:
    """Whether the problem itself keeps single precision."""
    try:
        outcome = jax.eval_shape(lambda t, x: problem.at(t).residual(x), theta, x0)
    except TypeError:
        return False
    leaves = zip(jax.tree.leaves(outcome), jax.tree.leaves(x0), strict=True)
    return all(a.dtype == b.dtype for a, b in leaves)


def all_nan(tree: PyTree) -> PyTree:
    """The tree with NaN in all inexact leaves."""
    return with_inexact(
        tree, jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), inexact(tree))
    )


def stack(trees: list[PyTree]) -> PyTree:
    """One pytree with a leading axis over those given."""
    return jax.tree.map(lambda *leaves: jnp.stack([jnp.asarray(leaf) for leaf in leaves]), *trees)


def sample_problem(solver: InnerSolver) -> tuple[InnerProblem, PyTree, PyTree]:
    """A well-conditioned problem with what the solver requires: (problem, theta, x0)."""
    theta, x0 = jnp.array([0.3, -0.2, 0.5]), jnp.zeros(3)
    if "mapping" in solver.requires:
        return FixedPoint(_contraction), theta, x0
    if solver.requires & {"objective", "proximal"}:
        return Minimization(_convex), theta, x0
    system = LinearSystem(
        _matrix, lambda theta: 1.0 + theta, symmetric=True, positive_definite=True
    )
    return system, theta, x0


def _contraction(x: Any, theta: Any) -> Any:
    return 0.3 * jnp.cos(jnp.roll(x, 1)) + theta


def _convex(x: Any, theta: Any) -> Any:
    return (
        jnp.sum(0.05 * x**4 + 0.5 * (1.0 + theta**2) * x**2 - theta * x)
        + vector.dot(jnp.diff(x), jnp.diff(x)) / 8
    )


def _matrix(theta: Any) -> Any:
    neighbours = jnp.eye(3, k=1) + jnp.eye(3, k=-1)
    return (jnp.diag(1.0 + 0.1 * theta) + 0.2 * neighbours).astype(theta.dtype)
