"""The dense matrix of an operator, without multiplying by the identity."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree

from bilevel import vector
from bilevel.operator import LinearOperator

BLOCKS = 4
"""Block rows that a lower triangle is computed in: 10 of 16 blocks instead of all."""

SMALLEST = 128
"""Below so many unknowns a product in blocks saves nothing."""

ENTRYWISE = frozenset(
    {"add", "add_any", "sub", "mul", "div", "neg", "convert_element_type", "copy", "reshape"}
)
"""Primitives whose outcome at one place depends on their operands at that place alone."""


def dense_matrix(
    operator: LinearOperator, like: PyTree, *, lower: bool = False
) -> Float[Array, "n n"]:
    """The matrix of an operator: its own, or made by applying it to every unit vector.

    Made so, it acts on real coordinates: real and imaginary parts of complex unknowns are
    unknowns of their own, for a Hessian is linear over the reals only.

    **Arguments:**

    - `like`: a vector of the space, for its structure, shapes and dtypes.
    - `lower`: whether the lower triangle is all that matters, the operator being symmetric;
        what is above the diagonal may then be anything.
    """
    if operator.matrix is not None:
        return operator.matrix
    flatten, unflatten = coordinates(like, real=True)
    size = flatten(like).size
    unit = jnp.zeros(size, vector.real_dtype(like))
    # Row i is A eᵢ, that is column i of A.
    lower = lower and operator.symmetric is True
    rows = apply_to_identity(lambda v: flatten(operator.matvec(unflatten(v))), unit, lower=lower)
    return rows if operator.symmetric else rows.T


def coordinates(like: PyTree, *, real: bool) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Functions from a vector to a flat array and back."""
    flat, unravel = ravel_pytree(like)
    if not (real and jnp.iscomplexobj(flat)):
        return lambda v: ravel_pytree(v)[0], unravel

    # Leaf by leaf: a real leaf beside a complex one has no imaginary part to solve for.
    _, unravel_pairs = ravel_pytree(_as_real(like))

    def flatten(v: PyTree) -> Array:
        return ravel_pytree(_as_real(v))[0]

    def unflatten(values: Array) -> PyTree:
        return jax.tree.map(
            lambda leaf, part: jax.lax.complex(*part) if jnp.iscomplexobj(leaf) else part,
            like,
            unravel_pairs(values),
        )

    return flatten, unflatten


def _as_real(v: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: (leaf.real, leaf.imag) if jnp.iscomplexobj(leaf) else leaf, v)


def apply_to_identity(
    function: Callable[[Array], Array], like: Array, *, lower: bool = False
) -> Float[Array, "n m"]:
    """A linear function applied to every unit vector: row i is function(eᵢ).

    The same as `jax.vmap(function)(jnp.eye(n))`, but a matrix that meets the identity is
    taken as it is: for a Hessian Xᵀ D X the product X·I would cost as much as all the
    rest.

    **Arguments:**

    - `function`: linear, traceable, from (n,) to (m,).
    - `like`: an array of shape (n,), for its dtype.
    - `lower`: whether entry j of row i matters only where j ≤ i.
    """
    closed = jax.make_jaxpr(function)(like)
    identity = _Identity(like.shape[0], like.dtype)
    (outcome,) = _evaluate(closed.jaxpr, closed.consts, [identity], lower=lower)
    if isinstance(outcome, _Rows | _Identity):
        return outcome.rows()
    return jnp.broadcast_to(outcome, (like.shape[0], *jnp.shape(outcome)))


class _Identity:
    """All unit vectors at once, not formed until something needs them."""

    def __init__(self, size: int, dtype: Any):
        self.size = size
        self.dtype = dtype

    def rows(self) -> Array:
        return jnp.eye(self.size, dtype=self.dtype)


class _Rows:
    """A value for every unit vector, along the leading axis."""

    def __init__(self, values: Array):
        self.values = values

    def rows(self) -> Array:
        return self.values


def _evaluate(jaxpr: core.Jaxpr, consts: Any, inputs: list[Any], *, lower: bool) -> list[Any]:
    needed_whole = _needed_whole(jaxpr, lower=lower)
    env: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    env.update(zip(jaxpr.invars, inputs, strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, core.Literal) else env[atom]

    for equation in jaxpr.eqns:
        values = [read(atom) for atom in equation.invars]
        half = not needed_whole.intersection(equation.outvars)
        env.update(zip(equation.outvars, _apply(equation, values, lower=half), strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _needed_whole(jaxpr: core.Jaxpr, *, lower: bool) -> set[Any]:
    """The variables of which more than entries j ≤ i are needed to know those of the result."""

    def variables(atoms: Any) -> list[Any]:
        return [atom for atom in atoms if not isinstance(atom, core.Literal)]

    whole = set() if lower else set(variables(jaxpr.outvars))
    for equation in reversed(jaxpr.eqns):
        inputs = variables(equation.invars)
        name = equation.primitive.name
        shapes = {np.shape(atom.aval) for atom in variables((*inputs, *equation.outvars))} - {()}
        entrywise = name in ENTRYWISE or (name in {"pjit", "jit"} and len(equation.outvars) == 1)
        if name in {"pjit", "jit"} and entrywise:
            inner = equation.params["jaxpr"].jaxpr
            needed = _needed_whole(inner, lower=not whole.intersection(equation.outvars))
            pairs = zip(equation.invars, inner.invars, strict=True)
            whole.update(variables(outer for outer, own in pairs if own in needed))
        elif not (entrywise and len(shapes) <= 1) or whole.intersection(equation.outvars):
            whole.update(inputs)
    return whole


def _apply(equation: Any, values: list[Any], *, lower: bool) -> list[Any]:
    varying = [isinstance(value, _Identity | _Rows) for value in values]
    inner = equation.params.get("jaxpr")
    if any(varying) and equation.primitive.name in {"pjit", "jit"}:
        return _evaluate(inner.jaxpr, inner.consts, values, lower=lower)
    if len(values) == 1 and isinstance(values[0], _Identity) and _leaves_as_is(equation):
        return values
    product = _matrix_times_identity(equation, values)
    if product is None and lower:
        product = _lower_product(equation, values)
    if product is not None:
        return [product]

    def bind(*operands: Any) -> list[Any]:
        params = equation.primitive.get_bind_params(equation.params)
        outcome = equation.primitive.bind(*operands, **params)
        return list(outcome) if equation.primitive.multiple_results else [outcome]

    if not any(varying):
        return bind(*values)
    operands = [
        value.rows() if flag else value for value, flag in zip(values, varying, strict=True)
    ]
    outcome = jax.vmap(bind, in_axes=tuple(0 if flag else None for flag in varying))(*operands)
    return [_Rows(part) for part in outcome]


def _leaves_as_is(equation: Any) -> bool:
    """Whether the equation merely passes its only operand on."""
    if equation.primitive.name not in {"split", "reshape", "convert_element_type", "copy"}:
        return False
    if len(equation.invars) != 1 or len(equation.outvars) != 1:
        return False
    before, after = equation.invars[0].aval, equation.outvars[0].aval
    return before.shape == after.shape and before.dtype == after.dtype


def _matrix_times_identity(equation: Any, values: list[Any]) -> _Rows | None:
    """For a plain product of a constant and a unit vector: the constant's own slices."""
    if equation.primitive.name != "dot_general":
        return None
    contracting, batch = equation.params["dimension_numbers"]
    if any(batch) or len(contracting[0]) != 1:
        return None
    for place, value in enumerate(values):
        other = values[1 - place]
        if isinstance(value, _Identity) and not isinstance(other, _Identity | _Rows):
            slices = jnp.moveaxis(other, contracting[1 - place][0], 0)
            # A captured matrix is a constant to XLA, which would fold Xᵀ X while compiling,
            # in minutes; behind a barrier it is no constant.
            slices = jax.lax.optimization_barrier(slices)
            return _Rows(slices.astype(equation.outvars[0].aval.dtype))
    return None


def _lower_product(equation: Any, values: list[Any]) -> _Rows | None:
    """For a product of rows and a constant matrix: entries j ≤ i, and zeros instead of others.

    Half of a symmetric product such as Xᵀ D X, which BLAS calls syrk and XLA has nothing
    for.
    """
    if equation.primitive.name != "dot_general":
        return None
    contracting, batch = equation.params["dimension_numbers"]
    if any(batch) or len(contracting[0]) != 1:
        return None
    for place, value in enumerate(values):
        other = values[1 - place]
        if not isinstance(value, _Rows) or isinstance(other, _Identity | _Rows):
            continue
        rows = value.rows()
        matrix = jnp.moveaxis(other, contracting[1 - place][0], -1)
        size = rows.shape[0]
        if rows.ndim != 2 or matrix.ndim != 2 or matrix.shape[0] != size or size < SMALLEST:
            return None
        dtype = equation.outvars[0].aval.dtype
        ends = [size * (block + 1) // BLOCKS for block in range(BLOCKS)]
        parts = [
            jnp.pad((rows[start:end] @ matrix[:end].T).astype(dtype), ((0, 0), (0, size - end)))
            for start, end in zip([0, *ends], ends, strict=False)
        ]
        return _Rows(jnp.concatenate(parts))
    return None
