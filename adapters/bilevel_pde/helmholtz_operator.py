"""The Helmholtz operator."""

from typing import Any

from jaxtyping import Array, Float

from bilevel_pde.grid import Grid
from bilevel_pde.laplace_operator import laplacian
from bilevel_pde.operator import Operator
from bilevel_pde.stencil import Stencil


def helmholtz(grid: Grid, wavenumber: Float[Array, "..."] | float) -> Operator:
    """Δ + k², symmetric where Δ is, and indefinite unless k is small.

    **Arguments:**

    - `wavenumber`: k, a number or a field, traced or not; units of 1 / length.

    >>> from bilevel_pde.grid import Grid
    >>> helmholtz(Grid(3, extent=4.0), 2.0).diagonal().tolist()
    [2.0, 2.0, 2.0]
    """
    k: Any = wavenumber
    return laplacian(grid) + Stencil(grid, {(0,) * grid.ndim: k * k}, symmetric=True)
