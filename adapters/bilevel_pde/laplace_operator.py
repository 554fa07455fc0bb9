"""The Laplacian Δ, its square, and the identity."""

import itertools

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


def biharmonic(grid: Grid) -> Stencil:
    """Δ² on a periodic grid, of second order: the square of `laplacian(grid)` as one stencil.

    In one dimension this is ∂⁴u/∂x⁴.  Sides that are not periodic take two conditions each: of
    a plate that rests on its sides (u = Δu = 0) it is `laplacian(grid) @ laplacian(grid)`.

    **Raises:** `ValueError` for a grid that is not periodic all around, or has less than five
    points along an axis.

    >>> from bilevel_pde.boundary import Periodic
    >>> operator = biharmonic(Grid(6, extent=6.0, boundary=Periodic()))
    >>> operator.to_scipy().toarray()[2].tolist()
    [1.0, -4.0, 6.0, -4.0, 1.0, 0.0]
    """
    if not all(grid.is_periodic(axis) for axis in range(grid.ndim)):
        msg = (
            "biharmonic: grid should be periodic along all axes; another side takes two "
            "conditions. Where the field and its Laplacian are zero there, use "
            "laplacian(grid) @ laplacian(grid)."
        )
        raise ValueError(msg)
    second = laplacian(grid).terms
    terms: dict[tuple[int, ...], float] = {}
    for (a, first), (b, other) in itertools.product(second.items(), repeat=2):
        offset = tuple(i + j for i, j in zip(a, b, strict=True))
        terms[offset] = terms.get(offset, 0.0) + float(first[0]) * float(other[0])
    return Stencil(grid, terms)


def identity(grid: Grid) -> Stencil:
    """The identity, for `identity(grid) + dt * operator`.

    >>> identity(Grid((3, 4))).positive_definite
    True
    """
    return Stencil(grid, {(0,) * grid.ndim: np.ones((), grid.dtype)})
