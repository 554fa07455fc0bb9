"""Staggered: pressure in cells and velocity on their faces, for incompressible flow."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse as sp
from jaxtyping import Array, Float

from bilevel_pde import folding
from bilevel_pde.block import Block, block_diagonal
from bilevel_pde.boundary import Boundary, Dirichlet, Neumann, Periodic
from bilevel_pde.boundary_values import insert
from bilevel_pde.grid import Grid
from bilevel_pde.laplace_operator import laplacian
from bilevel_pde.operator import Operator
from bilevel_pde.scaled import Scaled
from bilevel_pde.shift import shift

Velocity = tuple[Float[Array, "..."], ...]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, init=False)
class Staggered:
    """A marker-and-cell grid (Harlow & Welch 1965) in two or three dimensions.

    Pressure is in the cells, component d of the velocity on the faces across axis d.  Between
    walls these are the inner faces only, one less than cells, since the wall says the rest;
    on a periodic axis as many as cells, face i below cell i.

    **Arguments:**

    - `shape`: cells along each axis.
    - `extent`: length of the domain along each axis, or one for all.
    - `boundary`: of the velocity, for all sides or each axis as for [`Grid`][]: `Dirichlet()`,
        a wall without slip (default), `Neumann()`, a wall with free slip, or `Periodic()`.
        Across both kinds of wall flows what `boundary_term` says, zero by default.
    - `origin`, `dtype`: as for [`Grid`][].

    **Raises:** `ValueError` for one dimension, and what [`Grid`][] refuses.

    >>> cavity = Staggered((8, 8))
    >>> [grid.shape for grid in cavity.components], cavity.cells.shape
    ([(7, 8), (8, 7)], (8, 8))
    """

    cells: Grid
    components: tuple[Grid, ...]

    def __init__(
        self,
        shape: Sequence[int],
        extent: float | Sequence[float] = 1.0,
        boundary: Boundary | Sequence[Boundary | Sequence[Boundary]] = Dirichlet(),  # noqa: B008
        origin: float | Sequence[float] = 0.0,
        dtype: Any = None,
    ):
        velocity = Grid(shape, extent, boundary, "cell", origin, dtype)
        ndim = velocity.ndim
        if ndim == 1:
            msg = f"Staggered: shape should have two or three axes, got {velocity.shape}."
            raise ValueError(msg)
        for axis, pair in enumerate(velocity.boundary):
            if not all(isinstance(side, Dirichlet | Neumann | Periodic) for side in pair):
                msg = (
                    f"Staggered: sides should be Dirichlet(), Neumann() or Periodic(), got {pair} "
                    f"on axis {axis}."
                )
                raise ValueError(msg)
            if velocity.shape[axis] < 2:
                msg = f"Staggered: axis {axis} takes at least 2 cells, got {velocity.shape[axis]}."
                raise ValueError(msg)
        wall = (Neumann(), Neumann())
        pressure = [
            pair if velocity.is_periodic(axis) else wall
            for axis, pair in enumerate(velocity.boundary)
        ]
        object.__setattr__(self, "cells", _replaced(velocity, boundary=pressure))
        components = tuple(_component(velocity, axis) for axis in range(ndim))
        object.__setattr__(self, "components", components)

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return self.cells.ndim

    @property
    def like(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes and dtypes of a velocity."""
        return tuple(grid.like for grid in self.components)


class Gradient(Operator):
    """∇p on the faces, of second order; minus the transpose of [`Divergence`][], exactly.

    **Arguments:**

    - `staggered`: where pressure and velocity are.

    >>> import jax.numpy as jnp
    >>> x, y = Gradient(Staggered((2, 2), extent=2.0)) @ jnp.array([[1.0, 2.0], [4.0, 8.0]])
    >>> x.tolist(), y.tolist()
    ([[3.0, 6.0]], [[1.0], [4.0]])
    """

    staggered: Staggered = eqx.field(static=True)

    @property
    def like(self) -> jax.ShapeDtypeStruct:
        """A pressure."""
        return self.staggered.cells.like

    @property
    def range_like(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """A velocity."""
        return self.staggered.like

    @property
    def symmetric(self) -> bool:
        """It is rectangular."""
        return False

    def matvec(self, v: Array) -> Velocity:
        """∇v."""
        cells = self.staggered.cells
        v = folding.checked(cells, v)
        parts: list[Array] = []
        for axis, h in enumerate(cells.spacing):
            if cells.is_periodic(axis):
                part = v - _wrapped(v, axis, -1)
            else:
                inner = (slice(None),) * axis
                part = v[(*inner, slice(1, None))] - v[(*inner, slice(None, -1))]
            parts.append(part * np.asarray(1 / h, v.dtype))
        return tuple(parts)

    def rmatvec(self, v: Velocity) -> Array:
        """−∇·v."""
        return -Divergence(self.staggered).matvec(v)

    def transposed(self) -> Operator:
        """Minus the divergence."""
        return Scaled(-1.0, Divergence(self.staggered))

    def diagonal(self) -> None:
        """It is rectangular."""
        return

    def entries(self) -> tuple[Any, Any, Array]:
        """The matrix, which is known while tracing."""
        return _listed(self.to_scipy())

    def to_scipy(self) -> sp.csr_array:
        """The matrix, from cells to the faces of component after component."""
        cells = self.staggered.cells
        parts: list[Any] = []
        for axis, h in enumerate(cells.spacing):
            n = cells.shape[axis]
            # Face i of a periodic axis is below cell i, between walls it is above.
            low = -1 if cells.is_periodic(axis) else 0
            line = sp.eye_array(n, k=low + 1) - sp.eye_array(n, k=low)
            if cells.is_periodic(axis):
                line = line - sp.eye_array(n, k=n - 1)
            else:
                line = sp.csr_array(line)[:-1]
            line = line / h
            whole = sp.eye_array(1)
            for d, points in enumerate(cells.shape):
                whole = sp.kron(whole, line if d == axis else sp.eye_array(points))
            parts.append(whole)
        return sp.csr_array(sp.vstack(parts)).astype(cells.dtype)


class Divergence(Operator):
    """∇·u in the cells, of second order; minus the transpose of [`Gradient`][], exactly.

    **Arguments:**

    - `staggered`: where pressure and velocity are.

    >>> import jax.numpy as jnp
    >>> u = (jnp.array([[3.0, 6.0]]), jnp.array([[1.0], [4.0]]))
    >>> (Divergence(Staggered((2, 2), extent=2.0)) @ u).tolist()
    [[4.0, 5.0], [1.0, -10.0]]
    """

    staggered: Staggered = eqx.field(static=True)

    @property
    def like(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """A velocity."""
        return self.staggered.like

    @property
    def range_like(self) -> jax.ShapeDtypeStruct:
        """A pressure."""
        return self.staggered.cells.like

    @property
    def symmetric(self) -> bool:
        """It is rectangular."""
        return False

    def matvec(self, v: Velocity) -> Array:
        """∇·v."""
        cells = self.staggered.cells
        v = _checked(self.staggered, v)
        total: Any = None
        for axis, (part, h) in enumerate(zip(v, cells.spacing, strict=True)):
            if cells.is_periodic(axis):
                difference = _wrapped(part, axis, 1) - part
            else:
                difference = _padded(part, axis, 0, 1) - _padded(part, axis, 1, 0)
            term = difference * np.asarray(1 / h, part.dtype)
            total = term if total is None else total + term
        return total

    def rmatvec(self, v: Array) -> Velocity:
        """−∇v."""
        return tuple(-part for part in Gradient(self.staggered).matvec(v))

    def transposed(self) -> Operator:
        """Minus the gradient."""
        return Scaled(-1.0, Gradient(self.staggered))

    def diagonal(self) -> None:
        """It is rectangular."""
        return

    def entries(self) -> tuple[Any, Any, Array]:
        """The matrix, which is known while tracing."""
        return _listed(self.to_scipy())

    def to_scipy(self) -> sp.csr_array:
        """The matrix, from the faces of component after component to cells."""
        return sp.csr_array(-Gradient(self.staggered).to_scipy().T)

    def boundary_term(
        self, values: Sequence[Mapping[tuple[int, int], Any] | None]
    ) -> Float[Array, "..."]:
        """What flows through the walls adds to ∇·u.

        **Arguments:**

        - `values`: for each component, its values on sides (axis, 0 or 1) or `None`; those
            along the wall add nothing.
        """
        cells = self.staggered.cells
        total = jnp.zeros(cells.shape, cells.dtype)
        for axis, (given, h) in enumerate(zip(values, cells.spacing, strict=True)):
            through = {side: value for side, value in (given or {}).items() if side[0] == axis}
            factor = np.asarray(1 / h, cells.dtype)
            sources = {(axis, 0): (-factor,), (axis, 1): (factor,)}
            total += insert(cells, sources, through)
        return total


def _listed(matrix: sp.csr_array) -> tuple[Any, Any, Array]:
    rows = np.repeat(np.arange(matrix.shape[0], dtype=np.int32), np.diff(matrix.indptr))
    return rows, matrix.indices.astype(np.int32), jnp.asarray(matrix.data)


def velocity_laplacian(staggered: Staggered) -> Block:
    """Δ of each component, a block-diagonal operator; `boundary_term` takes moving walls.

    >>> cavity = Staggered((4, 4))
    >>> (-1.0 * velocity_laplacian(cavity)).symmetric
    True
    >>> lid = velocity_laplacian(cavity).boundary_term(({(1, 1): 1.0}, None))
    >>> lid[0][0].tolist()
    [0.0, 0.0, 0.0, 32.0]
    """
    return block_diagonal(*(laplacian(grid) for grid in staggered.components))


def _checked(staggered: Staggered, velocity: Any) -> Velocity:
    """A velocity of the right shapes."""
    expected = tuple(grid.shape for grid in staggered.components)
    found = [jnp.shape(part) for part in velocity] if isinstance(velocity, Sequence) else []
    if tuple(found) != expected:
        msg = f"A velocity on this grid should be a tuple of fields {expected}, got {found}."
        raise ValueError(msg)
    grids = zip(staggered.components, velocity, strict=True)
    return tuple(folding.checked(grid, part) for grid, part in grids)


def _replaced(grid: Grid, **changes: Any) -> Grid:
    """The grid with some of its arguments changed."""
    names = ("shape", "extent", "boundary", "centering", "origin", "dtype")
    return Grid(**{**{name: getattr(grid, name) for name in names}, **changes})


def _component(velocity: Grid, axis: int) -> Grid:
    """The grid of the component across an axis: vertices along it, cells along the others."""
    shape, centering = list(velocity.shape), ["cell"] * velocity.ndim
    boundary = list(velocity.boundary)
    centering[axis] = "vertex"
    if not velocity.is_periodic(axis):
        shape[axis] -= 1
        boundary[axis] = (Dirichlet(), Dirichlet())
    return _replaced(velocity, shape=shape, boundary=boundary, centering=cast("Any", centering))


def _wrapped(v: Array, axis: int, step: int) -> Array:
    return shift(v, tuple(step * int(d == axis) for d in range(v.ndim)), (True,) * v.ndim)


def _padded(v: Array, axis: int, low: int, high: int) -> Array:
    padding = [(0, 0, 0)] * v.ndim
    padding[axis] = (low, high, 0)
    return jax.lax.pad(v, np.zeros((), v.dtype), padding)
