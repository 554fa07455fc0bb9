"""AssembledMatrix: an operator whose entries are stored, whatever the format."""

import abc
import dataclasses
from typing import Self

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse as sp
from jaxtyping import Array, Bool, Float, Int

from bilevel_pde.operator import Operator
from bilevel_pde.triangle import Part, keeps


class AssembledMatrix(Operator):
    """A sparse matrix in one of the formats that `from_scipy` chooses from.

    It acts on vectors (n,) and on several at once, (n, k).

    - `values`: the stored entries, in the order of `to_scipy().data`: row by row, columns
        ascending, duplicates summed. Explicit zeros count.
    - `with_values(values)`: the same structure with other entries, traced or not.
    - `stored`: the same entries as the format lays them out, with padding; the one leaf that
        derivatives with respect to the operator refer to. That of the padding is zero.
        For a derivative in the order of `values`, differentiate through `with_values`, or
        take `equinox.combine(gradient, operator).values`. A matrix known to be symmetric may
        be applied from half of its entries, each of which still has a derivative of its own:
        where they change one by one, change them by `with_values`, which forgets what was
        known.
    - `reason`: why this format was chosen.
    """

    stored: Float[Array, " size"]
    extent: tuple[int, int] = eqx.field(static=True)
    count: int = eqx.field(static=True)
    reason: str = eqx.field(static=True)
    is_symmetric: bool | None = eqx.field(static=True)
    is_positive_definite: bool | None = eqx.field(static=True)
    is_singular: bool = eqx.field(static=True)

    @property
    @abc.abstractmethod
    def slots(self) -> Int[Array, " size"]:
        """Of each number of `stored` its place in `values`; `count` for padding."""

    @abc.abstractmethod
    def coordinates(self) -> tuple[Int[Array, " size"], Int[Array, " size"]]:
        """Row and column of each number of `stored`; somewhere in the matrix for padding."""

    @property
    def like(self) -> jax.ShapeDtypeStruct:
        """A vector with an entry a column."""
        return jax.ShapeDtypeStruct((self.extent[1],), self.stored.dtype)

    @property
    def range_like(self) -> jax.ShapeDtypeStruct:
        """A vector with an entry a row."""
        return jax.ShapeDtypeStruct((self.extent[0],), self.stored.dtype)

    @property
    def symmetric(self) -> bool | None:
        """Whether A = Aᵀ: looked at by `from_scipy`, declared to `with_values`."""
        return self.is_symmetric

    @property
    def positive_definite(self) -> bool | None:
        """Whether A was declared to be symmetric positive definite."""
        return self.is_positive_definite

    @property
    def singular(self) -> bool:
        """Whether rows add up to zero: looked at by `from_scipy`, unknown after `with_values`."""
        return self.is_singular

    @property
    def values(self) -> Float[Array, " count"]:
        """The stored entries in the order of `to_scipy().data`.

        **Raises:** `ValueError` from the derivative with respect to an operator, which has
        lost the structure.
        """
        if any(leaf is None for leaf in (self.stored, self.slots)):
            msg = (
                f"{type(self).__name__}.values: this is a derivative with respect to an operator, "
                "without its structure. Take equinox.combine(gradient, operator).values."
            )
            raise ValueError(msg)
        stored = without_padding(self.stored, self.slots < self.count)
        return jnp.zeros(self.count, stored.dtype).at[self.slots].set(stored, mode="drop")

    def with_values(
        self,
        values: Float[Array, " count"],
        *,
        symmetric: bool | None = None,
        positive_definite: bool | None = None,
    ) -> Self:
        """The matrix of the same structure with other entries.

        What assembles them may be traced, so that θ -> entries -> solution works under jit
        and differentiates with respect to θ at the cost of the entries.

        **Arguments:**

        - `values`: shape (count,), in the order of `to_scipy().data`; its dtype becomes
            the operator's.
        - `symmetric`, `positive_definite`: what is known of the new matrix. What was known
            of the old one is forgotten.

        **Raises:** `ValueError` for a wrong shape, `TypeError` for entries that are not
        real.

        >>> import jax, jax.numpy as jnp, scipy.sparse as sp, bilevel_pde as pde
        >>> operator = pde.from_scipy(sp.eye_array(3))
        >>> jax.grad(lambda t: operator.with_values(t * jnp.ones(3)).matvec(jnp.ones(3)).sum())(2.0)
        Array(3., dtype=float32, weak_type=True)
        """
        values = jnp.asarray(values)
        if values.shape != (self.count,):
            msg = (
                f"with_values: values must have shape ({self.count},), one for each stored entry "
                f"in the order of to_scipy().data, got {values.shape}."
            )
            raise ValueError(msg)
        if not jnp.issubdtype(values.dtype, jnp.floating):
            msg = f"with_values: entries must be real, got {values.dtype}. Use values.astype(float)"
            raise TypeError(msg)
        stored = values.at[self.slots].get(mode="fill", fill_value=0)
        declared = True if positive_definite and symmetric is None else symmetric
        return dataclasses.replace(
            self,
            stored=stored,
            is_symmetric=declared,
            is_positive_definite=positive_definite,
            is_singular=False,
        )

    def entries(self) -> tuple[Int[Array, " size"], Int[Array, " size"], Float[Array, " size"]]:
        """Rows, columns and entries; padding is among them, with entries that are zero."""
        rows, columns = self.coordinates()
        return rows, columns, without_padding(self.stored, self.slots < self.count)

    def triangle(self, part: Part, *, diagonal: bool) -> Self:
        """The same structure with zeros on the other side of the diagonal."""
        if self.extent[0] != self.extent[1]:
            super().triangle(part, diagonal=diagonal)
        rows, columns, stored = self.entries()
        kept = jnp.where(keeps(part, rows, columns, diagonal=diagonal), stored, 0)
        return dataclasses.replace(
            self,
            stored=kept,
            is_symmetric=None,
            is_positive_definite=None,
            is_singular=False,
        )

    def to_scipy(self) -> sp.csr_array:
        """The matrix as it was given, in CSR, explicit zeros included."""
        slots = np.asarray(self.slots)
        real = slots < self.count
        rows, columns = (np.asarray(part)[real] for part in self.coordinates())
        data = np.empty(self.count, self.stored.dtype)
        indices = np.empty(self.count, np.int32)
        data[slots[real]] = np.asarray(self.stored)[real]
        indices[slots[real]] = columns
        lengths = np.bincount(rows, minlength=self.extent[0])
        indptr = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        return sp.csr_array((data, indices, indptr), shape=self.extent)

    def __repr__(self) -> str:
        """Format, size, what is known, and why this format."""
        known = ", symmetric" if self.symmetric else ""
        known = ", positive definite" if self.positive_definite else known
        rows, columns = self.extent
        return (
            f"{type(self).__name__}({rows:,} × {columns:,}, {self.count:,} entries, "
            f"{self.stored.dtype}{known}; {self.reason})"
        )


@jax.custom_jvp
def without_padding(stored: Float[Array, " size"], real: Bool[Array, " size"]) -> Array:
    """The stored numbers themselves, with a derivative that leaves padding alone.

    Padding is zero and must stay so: a gradient step that moved it would put entries where
    the matrix has none. Nothing is computed but in the derivative.

    **Arguments:**

    - `real`: where `stored` holds entries and no padding.
    """
    del real
    return stored


@without_padding.defjvp
def _(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    stored, real = primals
    return without_padding(stored, real), jnp.where(real, tangents[0], 0)


def checked_vector(operator: AssembledMatrix, v: Array, *, transposed: bool = False) -> Array:
    """V as an array of JAX, refused where gathers would read out of its bounds.

    **Raises:** `ValueError`.
    """
    length = operator.extent[0 if transposed else 1]
    if jnp.ndim(v) not in {1, 2} or jnp.shape(v)[0] != length:
        what = "rmatvec" if transposed else "matvec"
        msg = (
            f"{type(operator).__name__}.{what}: v must have shape ({length},), or ({length}, k) "
            f"for several vectors, got {jnp.shape(v)}."
        )
        raise ValueError(msg)
    return jnp.asarray(v)


def times(entries: Array, v: Array) -> Array:
    """Entry times vector, along the first axis of v."""
    return entries.reshape(-1, *([1] * (v.ndim - 1))) * v
