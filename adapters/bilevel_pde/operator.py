"""Operator: a sparse linear map that knows its transpose, its diagonal and its matrix."""

import abc
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse as sp
from jaxtyping import Array, Float, PyTree

from bilevel import vector
from bilevel.solver.base import IncompatibleError


class Operator(eqx.Module):
    """A sparse linear map between fields; every operator of this adapter is one.

    Its arrays (coefficients, stored entries) are leaves, so derivatives with respect to them
    have their own length and never that of a dense matrix.  Given to `bl.LinearSystem`, it
    is what solvers and preconditioners of this adapter find as the operator's `source`.

    A subclass says what it maps, and how, and how back:

    - `like`: shapes and dtypes of what it acts on, a pytree of `jax.ShapeDtypeStruct`;
        `range_like`: of what comes out, the same unless it is rectangular.
    - `matvec(v)`: A v. `rmatvec(v)`: Aᵀ v, for real coefficients also the adjoint.
    - `transposed()`: Aᵀ as an operator.
    - `diagonal()`: like the field; `None` where it is not to be had cheaply.
    - `to_scipy()`: the same numbers on the host.
    - `entries()`: rows, columns and values, also of a traced operator; optional.
    - `symmetric`, `positive_definite`: what is known; `None` for unknown.

    Operators add, subtract, negate, scale by numbers (`2 * A`, `A / h`), and compose:
    `A @ B` is an operator, `A @ v` a field.
    """

    @property
    @abc.abstractmethod
    def like(self) -> PyTree:
        """Shapes and dtypes of the fields it acts on."""

    @property
    def range_like(self) -> PyTree:
        """Shapes and dtypes of the fields it returns."""
        return self.like

    @abc.abstractmethod
    def matvec(self, v: PyTree) -> PyTree:
        """A v."""

    @abc.abstractmethod
    def rmatvec(self, v: PyTree) -> PyTree:
        """Aᵀ v, written out and not found by automatic transposition."""

    @abc.abstractmethod
    def transposed(self) -> "Operator":
        """Aᵀ as an operator of its own."""

    @abc.abstractmethod
    def diagonal(self) -> PyTree | None:
        """The diagonal, like the field, of a square operator; `None` if it has none at hand."""

    @abc.abstractmethod
    def to_scipy(self) -> sp.csr_array:
        """The matrix, for fields flattened leaf by leaf in C order.

        **Raises:** `jax.errors.ConcretizationTypeError` where coefficients are traced.
        """

    def entries(self) -> tuple[Any, Any, Array]:
        """The matrix entry by entry, for fields flattened leaf by leaf in C order.

        **Returns:** rows, columns and values, each of shape (count,), in any order;
        what stands at one place several times adds up, and zeros are allowed. Rows and
        columns are NumPy arrays where the structure is known while tracing, which spares
        moving them; values may be traced, and differentiate.

        **Raises:** `IncompatibleError` from an operator that does not know its entries.
        """
        msg = (
            f"{type(self).__name__} does not list its entries while they are traced. Use its "
            "to_scipy() outside of the traced function."
        )
        raise IncompatibleError(msg)

    @property
    def symmetric(self) -> bool | None:
        """Whether A = Aᵀ; `None` for unknown."""
        return None

    @property
    def positive_definite(self) -> bool | None:
        """Whether A is symmetric positive definite; `None` for unknown."""
        return None

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the matrix."""
        return vector.size(self.range_like), vector.size(self.like)

    @property
    def T(self) -> "Operator":  # noqa: N802
        """Aᵀ."""
        return self.transposed()

    def __matmul__(self, other: Any) -> Any:
        """A @ B, an operator, or A @ v, a field."""
        if isinstance(other, Operator):
            from bilevel_pde.product import Product  # noqa: PLC0415

            return Product(self, other)
        return self.matvec(other)

    def __add__(self, other: "Operator") -> "Operator":
        """A + B."""
        from bilevel_pde.sum import Sum  # noqa: PLC0415

        if not isinstance(other, Operator):
            return NotImplemented
        return Sum.of(self, other)

    def __sub__(self, other: "Operator") -> "Operator":
        """A - B."""
        return self + (-other)

    def __neg__(self) -> "Operator":
        """-A."""
        return self * -1.0

    def __mul__(self, factor: Array | float) -> "Operator":
        """C A for a number c, traced or not."""
        from bilevel_pde.scaled import Scaled  # noqa: PLC0415

        if isinstance(factor, Operator) or jnp.ndim(factor) != 0:
            return NotImplemented
        return Scaled.of(factor, self)

    def __rmul__(self, factor: Array | float) -> "Operator":
        """C A for a number c."""
        return self * factor

    def __truediv__(self, divisor: Array | float) -> "Operator":
        """A / c for a number c."""
        return self * (1.0 / divisor)


def transpose_defect(operator: Operator, seed: int = 0) -> Float[Array, ""]:
    """|⟨A x, y⟩ − ⟨x, Aᵀ y⟩| / (‖A x‖ ‖y‖) for random x and y: rounding, where Aᵀ is right.

    **Arguments:**

    - `seed`: of the random fields.
    """
    x, y = random_like(operator.like, seed), random_like(operator.range_like, seed + 1)
    image = operator.matvec(x)
    forward, backward = vector.dot(image, y), vector.dot(x, operator.rmatvec(y))
    return jnp.abs(forward - backward) / (vector.norm(image) * vector.norm(y))


def symmetry_defect(operator: Operator, seed: int = 0) -> Float[Array, ""]:
    """‖A x − Aᵀ x‖ / ‖A x‖ for a random x: rounding, where A is symmetric.

    **Arguments:**

    - `seed`: of the random field.
    """
    x = random_like(operator.like, seed)
    image = operator.matvec(x)
    return vector.norm(vector.subtract(image, operator.rmatvec(x))) / vector.norm(image)


def norm_estimate(operator: Operator, iterations: int = 20, seed: int = 0) -> Float[Array, ""]:
    """‖A‖₂ from below, by power iteration with AᵀA: within some per cent.

    **Arguments:**

    - `iterations`: applications of A and of Aᵀ.
    - `seed`: of the random start.
    """

    def step(_: int, v: PyTree) -> PyTree:
        image = operator.rmatvec(operator.matvec(v))
        norm = vector.norm(image)
        return vector.scale(1.0 / jnp.where(norm > 0, norm, 1.0), image)

    v = jax.lax.fori_loop(0, iterations, step, random_like(operator.like, seed))
    return vector.norm(operator.matvec(v)) / vector.norm(v)


def random_like(like: PyTree, seed: int) -> PyTree:
    """A field of standard normal numbers."""
    generator = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(generator.standard_normal(leaf.shape), leaf.dtype), like
    )
