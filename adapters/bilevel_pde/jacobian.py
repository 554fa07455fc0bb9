"""Jacobian: the derivative of a quasilinear system, entry by entry."""

import itertools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import scipy.sparse as sp
from jaxtyping import Array, PyTree

from bilevel import vector
from bilevel_pde.operator import Operator
from bilevel_pde.sum import joined

REACH = (-1, 0, 1)
"""How far along an axis the coefficients of a matrix may depend on the unknowns, in points."""


class Jacobian(Operator):
    """J v = M(x) v + (∂M/∂x v) x - ∂b/∂x v, the derivative of M(x) x - b(x).

    Its entries are those of M and of what remains, found by applying that to sums of unit
    vectors that are far enough apart (Curtis, Powell & Reid 1974), so that M and b may depend on
    the fields at a point and next to it, on whatever component, and no farther: entries are NaN
    where they do.

    **Arguments:**

    - `matrix`: M(x).
    - `system`: system(x, theta) -> (M, b).
    - `x`, `theta`: where the derivative is taken. Fields of x have the same number of axes.
    - `flipped`: whether this is the transpose.
    """

    matrix: Operator
    system: Callable[[Any, Any], tuple[Any, Any]]
    x: PyTree
    theta: PyTree
    flipped: bool = eqx.field(static=True, default=False)

    @property
    def like(self) -> PyTree:
        """As x."""
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), self.x)

    def matvec(self, v: PyTree) -> PyTree:
        """J v, or Jᵀ v of a transpose."""
        return self._backward(v) if self.flipped else self._forward(v)

    def rmatvec(self, v: PyTree) -> PyTree:
        """Jᵀ v, or J v of a transpose."""
        return self._forward(v) if self.flipped else self._backward(v)

    def transposed(self) -> "Jacobian":
        """Jᵀ."""
        return Jacobian(self.matrix, self.system, self.x, self.theta, not self.flipped)

    def diagonal(self) -> None:
        """Not at hand."""

    def entries(self) -> tuple[Any, Any, Array]:
        """Those of M, and those of what the derivative adds."""
        parts = [self.matrix.entries(), self.rest()]
        rows, columns = (joined([part[axis] for part in parts]) for axis in (0, 1))
        values = jnp.concatenate([part[2] for part in parts])
        return (columns, rows, values) if self.flipped else (rows, columns, values)

    def to_scipy(self) -> sp.csr_array:
        """The matrix."""
        rows, columns, values = (np.asarray(part) for part in self.rest())
        rest = sp.coo_array((values, (rows, columns)), shape=self.shape)
        total = sp.csr_array(self.matrix.to_scipy() + rest)
        return sp.csr_array(total.T) if self.flipped else total

    def rest(self) -> tuple[np.ndarray, np.ndarray, Array]:
        """The entries of J - M: rows and columns, which are static, and values."""
        fields = jax.tree.leaves(self.x)
        tables = [_colours(leaf.shape) for leaf in fields]
        first = np.cumsum([0, *(table.max() + 1 for table in tables)])
        seeds = [
            (table == np.arange(first[-1]).reshape(-1, *[1] * table.ndim) - start).astype(
                leaf.dtype
            )
            for leaf, table, start in zip(fields, tables, first[:-1], strict=True)
        ]
        _, change = self._change()
        probes = jax.tree.unflatten(jax.tree.structure(self.x), [jnp.asarray(s) for s in seeds])
        images = [
            image.reshape(first[-1], -1) for image in jax.tree.leaves(jax.vmap(change)(probes))
        ]
        places = np.cumsum([0, *(leaf.size for leaf in fields)])
        parts: list[tuple[np.ndarray, np.ndarray, Array]] = []
        for a, image in enumerate(images):
            for b, table in enumerate(tables):
                row, column = _neighbours(fields[a].shape, fields[b].shape)
                colour = first[b] + table.reshape(-1)[column]
                parts.append((row + places[a], column + places[b], image[colour, row]))
        rows, columns = (np.concatenate([part[axis] for part in parts]) for axis in (0, 1))
        values = jnp.concatenate([part[2] for part in parts])
        return rows, columns, jnp.where(self._explained(rows, columns, values), values, jnp.nan)

    def _explained(self, rows: np.ndarray, columns: np.ndarray, values: Array) -> Array:
        """Whether the entries are all there is, by what they do to one vector."""
        flat, unflatten = jax.flatten_util.ravel_pytree(self.x)
        v = jnp.cos(jnp.arange(flat.size, dtype=flat.dtype))
        expected = jax.flatten_util.ravel_pytree(self._change()[1](unflatten(v)))[0]
        terms = values * v[columns]
        found = jnp.zeros_like(expected).at[rows].add(terms)
        size = jnp.zeros_like(expected).at[rows].add(jnp.abs(terms))
        rounding = 1e4 * jnp.finfo(flat.dtype).eps
        return jnp.max(jnp.abs(found - expected)) <= rounding * jnp.max(size)

    def _change(self) -> tuple[Any, Callable[[Any], Any]]:
        """V -> J v - M v."""

        def held(x: Any) -> Any:
            matrix, rhs = self.system(x, self.theta)
            return vector.subtract(matrix.matvec(self.x), rhs)

        return jax.linearize(held, self.x)

    def _forward(self, v: PyTree) -> PyTree:
        return vector.add(self.matrix.matvec(v), self._change()[1](v))

    def _backward(self, v: PyTree) -> PyTree:
        (rest,) = jax.linear_transpose(self._change()[1], self.x)(v)
        return vector.add(self.matrix.rmatvec(v), rest)


def _colours(shape: tuple[int, ...]) -> np.ndarray:
    """A number for each point; of three in a row, round the end, along any axis, none twice."""
    table = np.zeros(shape, int)
    for axis, n in enumerate(shape):
        colour = np.arange(n) % len(REACH)
        left = n % len(REACH) if n > len(REACH) else 0
        colour[n - left :] = len(REACH) + np.arange(left)
        column = colour.reshape([-1 if d == axis else 1 for d in range(len(shape))])
        table = table * (colour.max(initial=0) + 1) + column
    return table


def _neighbours(rows: tuple[int, ...], columns: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of points, one of each of two grids, whose indices are near, round the end."""
    points = np.indices(rows).reshape(len(rows), -1)
    reach = [REACH if n >= len(REACH) else range(n) for n in columns]
    pairs = [
        np.ravel_multi_index(
            tuple((i + o) % n for i, o, n in zip(points, offset, columns, strict=True)), columns
        )
        for offset in itertools.product(*reach)
    ]
    return np.tile(np.arange(points.shape[1]), len(pairs)), np.concatenate(pairs)
