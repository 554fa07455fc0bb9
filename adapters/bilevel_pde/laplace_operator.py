"""The Laplacian Δ and the identity."""

import numpy as np

from bilevel_pde.grid import Grid
from bilevel_pde.stencil import Stencil


def laplacian(grid: Grid) -> Stencil:
    """Δ by central second differences, of second order; negative semidefinite.

    `-laplacian(grid)` is positive definite if one side at least is Dirichlet or Robin (with
    coefficients of one sign), and singular otherwise.  Vertices on a Neumann or Robin side
    leave it unsymmetric, see `Stencil.weighted`.

    >>> import jax.numpy as jnp
    >>> operator = laplacian(Grid(3, extent=4.0))
    >>> [float(v) for v in operator @ jnp.array([1.0, 4.0, 9.0])]
    [2.0, 2.0, -14.0]
    >>> (-operator).positive_definite
    True
    """
    coefficients = {(0,) * grid.ndim: -2.0 * sum(h**-2 for h in grid.spacing)}
    for axis, h in enumerate(grid.spacing):
        for step in (-1, 1):
            coefficients[tuple(step * int(d == axis) for d in range(grid.ndim))] = h**-2
    return Stencil(grid, coefficients)


def identity(grid: Grid) -> Stencil:
    """The identity, for `identity(grid) + dt * operator`.

    >>> identity(Grid((3, 4))).positive_definite
    True
    """
    return Stencil(grid, {(0,) * grid.ndim: np.ones((), grid.dtype)})
