"""Pytrees as elements of a real or complex vector space."""

import functools
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

V = TypeVar("V")
"""A pytree of inexact arrays."""


def add(x: V, y: V) -> V:
    """x + y."""
    return jax.tree.map(jnp.add, x, y)


def subtract(x: V, y: V) -> V:
    """x - y."""
    return jax.tree.map(jnp.subtract, x, y)


def negative(x: V) -> V:
    """-x."""
    return jax.tree.map(jnp.negative, x)


def scale(factor: Array | float, x: V) -> V:
    """factor * x, in the dtypes of x."""
    return jax.tree.map(lambda leaf: _cast(factor, leaf) * leaf, x)


def add_scaled(x: V, factor: Array | float, y: V) -> V:
    """x + factor * y, in the dtypes of x."""
    return jax.tree.map(lambda a, b: a + _cast(factor, a) * b, x, y)


def zeros_like(x: V) -> V:
    """The zero vector of the space of x."""
    return jax.tree.map(jnp.zeros_like, x)


def conjugate(x: V) -> V:
    """The complex conjugate; x itself where it is real."""
    return jax.tree.map(lambda leaf: leaf.conj() if jnp.iscomplexobj(leaf) else leaf, x)


def arbitrary(x: V, seed: int) -> V:
    """Numbers between -1 and 1 without a pattern, like x; cheaper to compile than random ones."""

    def numbers(leaf: Array, seed: int) -> Array:
        hashed = jax.lax.iota(jnp.uint32, leaf.size) * jnp.uint32(2654435761)
        hashed = hashed + jnp.uint32(seed * 0x9E3779B9 & 0xFFFFFFFF)
        hashed = (hashed ^ (hashed >> 15)) * jnp.uint32(2246822519)
        hashed = (hashed ^ (hashed >> 13)) * jnp.uint32(3266489917)
        real = (hashed >> 8).astype(jnp.finfo(leaf.dtype).dtype) / 2.0**23 - 1.0
        return real.reshape(leaf.shape)

    leaves, treedef = jax.tree.flatten(x)
    found: list[Array] = []
    for place, leaf in enumerate(leaves):
        own = 16 * place + 4 * seed
        part = numbers(leaf, own)
        if jnp.iscomplexobj(leaf):
            part = jax.lax.complex(part, numbers(leaf, own + 1))
        found.append(part)
    return jax.tree.unflatten(treedef, found)


def where(condition: Array, x: V, y: V) -> V:
    """x where the scalar condition holds, y elsewhere."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), x, y)


def dot(x: PyTree, y: PyTree) -> Array:
    """Re⟨x, y⟩, the inner product of the space seen as a real one."""
    products = (_dot(a, b) for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True))
    return _sum(product.real if jnp.iscomplexobj(product) else product for product in products)


def complex_dot(x: PyTree, y: PyTree) -> Array:
    """⟨x, y⟩ with x conjugated."""
    return _sum(_dot(a, b) for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True))


def norm(x: PyTree) -> Float[Array, ""]:
    """Euclidean norm over all leaves.

    A norm below the square root of the smallest normal number counts as zero, as its
    square cannot be represented.
    """
    return jnp.sqrt(dot(x, x))


def robust_norm(x: PyTree) -> Float[Array, ""]:
    """Euclidean norm over all leaves, right for every number that single precision can hold.

    One more pass over x than [`norm`][], so for what is not in a loop; the squares of double
    precision reach from 1e-308 to 1e308 without it.
    """
    dtype = real_dtype(x)
    if jnp.finfo(dtype).bits == 64:
        return norm(x)
    leaves = [jnp.max(jnp.abs(leaf), initial=0).astype(dtype) for leaf in jax.tree.leaves(x)]
    one = unit(functools.reduce(jnp.maximum, leaves))
    return one * norm(scale(1.0 / one, x))


def unit(size: Float[Array, ""]) -> Float[Array, ""]:
    """The power of two just below a size, to measure in without rounding.

    1 for zero and for what is not finite, and in double precision, which does without.
    """
    information = jnp.finfo(size.dtype)
    if information.bits == 64:
        return jnp.ones_like(size)
    integers = jnp.dtype(f"uint{information.bits}")
    mantissa = jnp.array((1 << information.nmant) - 1, integers)
    bits = jax.lax.bitcast_convert_type(size, integers) & ~mantissa
    power = jax.lax.bitcast_convert_type(bits, size.dtype)
    # The inverse has to be a normal number, too.
    tiny = float(information.tiny)
    power = jnp.clip(power, 4 * tiny, 0.25 / tiny)
    return jnp.where((size > 0) & jnp.isfinite(size), power, 1.0).astype(size.dtype)


def size(x: PyTree) -> int:
    """Number of entries, a Python integer known while tracing."""
    return sum(leaf.size for leaf in jax.tree.leaves(x))


def real_dtype(x: PyTree) -> jnp.dtype:
    """The widest real dtype among the leaves: float32 for complex64."""
    leaves = jax.tree.leaves(x)
    if not leaves:
        return jnp.dtype(jnp.result_type(float))
    return jnp.finfo(jnp.result_type(*leaves)).dtype


def epsilon(x: PyTree) -> float:
    """The distance from 1 to the next number of the coarsest dtype among the leaves."""
    leaves = jax.tree.leaves(x)
    return max((float(jnp.finfo(leaf.dtype).eps) for leaf in leaves), default=0.0)


def _dot(a: Array, b: Array) -> Array:
    """The inner product of two arrays, without making vectors of them.

    `jnp.vdot` does, and an array cut over several devices along two axes is gathered for that.
    """
    return jnp.tensordot(jnp.conj(a) if jnp.iscomplexobj(a) else a, b, axes=a.ndim)


def _cast(factor: Array | float, leaf: Array) -> Array:
    factor = jnp.asarray(factor)
    if jnp.iscomplexobj(factor):
        return factor.astype(jnp.result_type(leaf.dtype, jnp.complex64))
    return factor.astype(jnp.finfo(leaf.dtype).dtype)


def _sum(terms: "object") -> Array:
    total: Array | None = None
    for term in terms:  # pyright: ignore[reportGeneralTypeIssues]
        total = term if total is None else total + term
    return jnp.zeros(()) if total is None else total
