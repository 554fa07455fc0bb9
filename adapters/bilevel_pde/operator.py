"""Operator: a sparse linear map that knows its transpose, its diagonal and its matrix."""

import abc
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse as sp
from jax.core import Tracer
from jaxtyping import Array, Float, PyTree

from bilevel import vector
from bilevel.solver.base import IncompatibleError
from bilevel_pde.triangle import Part


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
    - `lower()`, `upper()`: its triangular parts as operators.
    - `norm_bound()`: of ‖A‖₂.
    - `check_transpose()`, `check_symmetry()`: whether Aᵀ and what is claimed are right.
    - `symmetric`, `positive_definite`: what is known; `None` for unknown.
    - `singular`: whether A is known to map constants to zero; `False` for unknown, too.
    - `kernel()`: a field that a symmetric A maps to zero; `None` for unknown or not singular.

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

    def kernel(self) -> PyTree | None:
        """A field that A maps to zero, where one is known: constants, for closed boundaries."""
        if not self.singular:
            return None
        return jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), self.like)

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

    def lower(self, *, diagonal: bool = True) -> "Operator":
        """The triangle of A below the diagonal, for fields flattened leaf by leaf in C order.

        **Arguments:**

        - `diagonal`: whether the diagonal belongs to it.

        **Raises:** `ValueError` for a rectangular A, `IncompatibleError` from an operator
        that does not know its entries.
        """
        return self.triangle("lower", diagonal=diagonal)

    def upper(self, *, diagonal: bool = True) -> "Operator":
        """The triangle of A above the diagonal; see `lower`."""
        return self.triangle("upper", diagonal=diagonal)

    def triangle(self, part: Part, *, diagonal: bool) -> "Operator":
        """One of the two."""
        name = type(self).__name__
        if self.shape[0] != self.shape[1]:
            msg = f"{name} is rectangular, {self.shape}, and has no {part} triangle."
            raise ValueError(msg)
        from bilevel_pde.listed_entries import ListedEntries  # noqa: PLC0415

        return ListedEntries.triangle_of(self, part, diagonal=diagonal)

    def norm_bound(self) -> Float[Array, ""]:
        """A bound of ‖A‖₂ from sums of sizes over rows and over columns, after Gershgorin.

        See [`norm_estimate`][] for one from below that is nearer.

        **Returns:** the geometric mean of the largest ones, √(‖A‖₁ ‖A‖∞).

        **Raises:** `IncompatibleError` from an operator that does not know its entries.
        """
        rows, columns, values = self.entries()
        sizes = jnp.abs(values)
        largest = [
            jnp.max(jax.ops.segment_sum(sizes, index, count), initial=0.0)
            for index, count in zip((rows, columns), self.shape, strict=True)
        ]
        return jnp.sqrt(largest[0] * largest[1])

    def check_transpose(self, tolerance: float | None = None) -> None:
        """See to it that ⟨A x, y⟩ = ⟨x, Aᵀ y⟩, by `rmatvec` and by `transposed()`.

        **Arguments:**

        - `tolerance`: of [`transpose_defect`][]; some thousand units of rounding by default.

        **Raises:** `ValueError` saying by how much.

        >>> import bilevel_pde as pde
        >>> pde.advection(pde.Grid(9), 1.0).check_transpose()
        """
        allowed = _rounding(self) if tolerance is None else tolerance
        flipped = self.transposed()
        for what, operator in (("rmatvec", self), ("transposed()", _Swapped(self, flipped))):
            found = float(transpose_defect(operator))
            if not found <= allowed:
                msg = (
                    f"{type(self).__name__}.{what} is not the transpose: ⟨A x, y⟩ and ⟨x, Aᵀ y⟩ "
                    f"differ by {found:.1e} of ‖A x‖ ‖y‖, {allowed:.1e} is allowed."
                )
                raise ValueError(msg)

    def check_symmetry(self, tolerance: float | None = None) -> None:
        """See to it that A x = Aᵀ x.

        **Arguments:**

        - `tolerance`: of [`symmetry_defect`][]; some thousand units of rounding by default.

        **Raises:** `ValueError` saying by how much, or that A is rectangular.

        >>> import bilevel_pde as pde
        >>> pde.laplacian(pde.Grid(9)).check_symmetry()
        """
        name = type(self).__name__
        _refuse_rectangular(self)
        allowed = _rounding(self) if tolerance is None else tolerance
        # What claims to be symmetric returns itself for the transpose: transpose anew.
        found = float(_plain_symmetry_defect(self))
        if not found <= allowed:
            msg = (
                f"{name} is not symmetric: A x and Aᵀ x differ by {found:.1e} of ‖A x‖, "
                f"{allowed:.1e} is allowed. Vertices on a Neumann or Robin side need weighted()."
            )
            raise ValueError(msg)

    @property
    def symmetric(self) -> bool | None:
        """Whether A = Aᵀ; `None` for unknown."""
        return None

    @property
    def positive_definite(self) -> bool | None:
        """Whether A is symmetric positive definite; `None` for unknown."""
        return None

    @property
    def singular(self) -> bool:
        """Whether constant fields are known to be in the kernel."""
        return False

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
        if isinstance(other, str | bytes | None) or sp.issparse(other):
            hint = " Make it an operator with pde.from_scipy." if sp.issparse(other) else ""
            msg = (
                f"{type(self).__name__} @ v: v should be a field like {self.like} or an operator, "
                f"got {type(other).__name__}.{hint}"
            )
            raise TypeError(msg)
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

        if not is_factor(self, factor):
            return NotImplemented
        return Scaled.of(factor, self)

    def __rmul__(self, factor: Array | float) -> "Operator":
        """C A for a number c."""
        return self * factor

    def __truediv__(self, divisor: Array | float) -> "Operator":
        """A / c for a number c."""
        if isinstance(divisor, Operator) or not is_factor(self, divisor):
            return NotImplemented
        if not isinstance(divisor, Tracer) and float(np.asarray(divisor)) == 0:
            msg = f"{type(self).__name__} / 0: the divisor should not be zero."
            raise ZeroDivisionError(msg)
        return self * (1.0 / divisor)


def is_factor(operator: Operator, value: Any) -> bool:
    """Whether an operator can be multiplied with a value: a real number, traced or not.

    **Raises:** `TypeError` for a complex number, `ValueError` for one that is not finite,
    where that can be seen.
    """
    if isinstance(value, Operator | str | bytes | None) or jnp.ndim(value) != 0:
        return False
    name = type(operator).__name__
    if jnp.iscomplexobj(value):
        msg = (
            f"{name}: operators are real, got the factor {value}. Write the real system "
            "[[Re, -Im], [Im, Re]] with pde.Block."
        )
        raise TypeError(msg)
    if not isinstance(value, Tracer) and not np.isfinite(np.asarray(value, float)):
        msg = f"{name}: a factor should be finite, got {value}."
        raise ValueError(msg)
    return True


def transpose_defect(operator: Any, seed: int = 0) -> Float[Array, ""]:
    """|⟨A x, y⟩ − ⟨x, Aᵀ y⟩| / (‖A x‖ ‖y‖) for random x and y: rounding, where Aᵀ is right.

    **Arguments:**

    - `seed`: of the random fields.
    """
    x, y = random_like(operator.like, seed), random_like(operator.range_like, seed + 1)
    image = operator.matvec(x)
    forward, backward = vector.dot(image, y), vector.dot(x, operator.rmatvec(y))
    return jnp.abs(forward - backward) / _positive(vector.norm(image) * vector.norm(y))


def symmetry_defect(operator: Operator, seed: int = 0) -> Float[Array, ""]:
    """‖A x − Aᵀ x‖ / ‖A x‖ for a random x: rounding, where A is symmetric.

    **Arguments:**

    - `seed`: of the random field.

    **Raises:** `ValueError` for a rectangular A.
    """
    _refuse_rectangular(operator)
    x = random_like(operator.like, seed)
    image = operator.matvec(x)
    return vector.norm(vector.subtract(image, operator.rmatvec(x))) / _positive(vector.norm(image))


def _refuse_rectangular(operator: Operator) -> None:
    if operator.shape[0] != operator.shape[1]:
        name = type(operator).__name__
        msg = f"{name} is rectangular, {operator.shape}, and cannot be symmetric."
        raise ValueError(msg)


class _Swapped(eqx.Module):
    """A, with the transpose of an operator of its own."""

    operator: Operator
    flipped: Operator

    @property
    def like(self) -> PyTree:
        return self.operator.like

    @property
    def range_like(self) -> PyTree:
        return self.operator.range_like

    def matvec(self, v: PyTree) -> PyTree:
        return self.operator.matvec(v)

    def rmatvec(self, v: PyTree) -> PyTree:
        return self.flipped.matvec(v)


def _plain_symmetry_defect(operator: Operator) -> Float[Array, ""]:
    """|⟨A x, y⟩ − ⟨x, A y⟩| / (‖A x‖ ‖y‖), which uses no transpose."""
    x, y = random_like(operator.like, 0), random_like(operator.like, 1)
    image = operator.matvec(x)
    forward, backward = vector.dot(image, y), vector.dot(x, operator.matvec(y))
    return jnp.abs(forward - backward) / _positive(vector.norm(image) * vector.norm(y))


def _positive(size: Array) -> Array:
    return jnp.where(size > 0, size, 1.0)


def _rounding(operator: Operator) -> float:
    """Some thousand units of rounding of the coarsest dtype."""
    leaves = jax.tree.leaves((operator.like, operator.range_like))
    return 4096 * max(float(jnp.finfo(leaf.dtype).eps) for leaf in leaves)


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
    return vector.norm(operator.matvec(v)) / _positive(vector.norm(v))


def random_like(like: PyTree, seed: int) -> PyTree:
    """A field of standard normal numbers."""
    generator = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(generator.standard_normal(leaf.shape), leaf.dtype), like
    )
