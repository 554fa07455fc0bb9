"""Mean: what is constant in a field, which makes systems that leave it open regular."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse as sp
from jaxtyping import Array, Float

from bilevel.solver.base import IncompatibleError
from bilevel_pde import folding
from bilevel_pde.grid import Grid
from bilevel_pde.operator import Operator
from bilevel_pde.triangle import Part

LARGEST = 64**2
"""The most points whose matrix, which is full, is written out."""


class Mean(Operator):
    """P v = the mean of v at every point: an orthogonal projection.

    Added to an operator with constant fields in kernel and range, as for pressure between
    walls, it makes it regular: a right-hand side without a mean then has the solution without
    one.

    **Arguments:**

    - `grid`: where the field is; of points that all stand for the same volume.

    **Raises:** `ValueError` for a grid with vertices on its sides.

    >>> import jax.numpy as jnp
    >>> (Mean(Grid(4)) @ jnp.array([1.0, 2.0, 3.0, 6.0])).tolist()
    [3.0, 3.0, 3.0, 3.0]
    """

    grid: Grid = eqx.field(static=True)

    def __check_init__(self) -> None:
        """Refuse points of different volumes."""
        if any(np.any(weight != 1) for weight in self.grid.weights()):
            msg = "Mean: grid should have points of equal volume, got vertices on its sides."
            raise ValueError(msg)

    @property
    def like(self) -> jax.ShapeDtypeStruct:
        """A field on the grid."""
        return self.grid.like

    @property
    def symmetric(self) -> bool:
        """It is."""
        return True

    @property
    def positive_definite(self) -> bool:
        """Only of a single point."""
        return self.grid.size == 1

    def matvec(self, v: Array) -> Array:
        """The mean of v."""
        v = folding.checked(self.grid, v)
        return jnp.broadcast_to(jnp.mean(v), v.shape)

    def rmatvec(self, v: Array) -> Array:
        """The same."""
        return self.matvec(v)

    def transposed(self) -> "Mean":
        """Itself."""
        return self

    def diagonal(self) -> Array:
        """One over the number of points."""
        return jnp.full(self.grid.shape, 1.0 / self.grid.size, self.grid.dtype)

    def triangle(self, part: Part, *, diagonal: bool) -> Operator:
        """Not of a full matrix.

        **Raises:** `IncompatibleError`.
        """
        del diagonal
        msg = (
            f"Mean is full and has no sparse {part} triangle. Of A + pde.Mean(grid) take that of A."
        )
        raise IncompatibleError(msg)

    def norm_bound(self) -> Float[Array, ""]:
        """The norm itself, that of a projection."""
        return jnp.ones((), self.grid.dtype)

    def to_scipy(self) -> sp.csr_array:
        """The matrix, which is full.

        **Raises:** `ValueError` for more than 64² points.
        """
        size = self.grid.size
        if size > LARGEST:
            msg = (
                f"Mean: its matrix is full, and of {size} points too large to write out (at most "
                f"{LARGEST}). pde.SparseDirect and iterative solvers need no matrix."
            )
            raise ValueError(msg)
        return sp.csr_array(np.full((size, size), 1.0 / size, self.grid.dtype))
