"""Arnoldi's decomposition, as a differentiable function."""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Inexact, Int, PyTree

from bilevel import vector
from bilevel.perturbation import along, instantiate
from bilevel.solver import basis as rows

REPEAT = 0.7071
"""A projection that leaves less than this share of a vector is done twice (Kahan, Parlett)."""

NEGLIGIBLE = 16.0
"""So many units of rounding are what a vector in the span leaves after its projection."""


class Decomposition(eqx.Module):
    """A M⁻¹ Qₖ = Qₖ₊₁ Hₖ with orthonormal columns of Q, the first along a given vector.

    - `basis`: the columns of Q, as `steps` + 1 rows; zero beyond those that were computed.
    - `preconditioned`: M⁻¹Qₖ, as `steps` rows, where it was asked for.
    - `hessenberg`: H, of shape (steps + 1, steps); its columns beyond `count` are zero.
    - `norm`: the norm of the given vector.
    - `count`: k, the steps that were done.
    """

    basis: PyTree
    preconditioned: PyTree | None
    hessenberg: Inexact[Array, "rows steps"]
    norm: Float[Array, ""]
    count: Int[Array, ""]


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is static: the most steps, the number field, whether M⁻¹Q is kept."""

    steps: int
    complex_linear: bool
    keep: bool


def arnoldi(
    matvec: Callable[[Any], Any],
    precondition: Callable[[Any], Any] | None,
    v: PyTree,
    floor: Float[Array, ""],
    steps: int,
    *,
    complex_linear: bool,
    keep: bool,
) -> Decomposition:
    """Orthogonalise the Krylov space of a vector, until the least-squares residual is small.

    Classical Gram–Schmidt with a second pass where the first one cancelled: as orthogonal
    as need be, and two matrix products instead of a chain of `steps` dot products.

    The loop ends early, so reverse mode cannot go through it.  The derivative has a rule
    of its own: it differentiates the orthogonalisation step by step, from the stored
    basis, in a loop of `steps` steps that can be transposed.  Nothing of that is paid for
    where nobody differentiates.

    **Arguments:**

    - `precondition`: v -> M⁻¹v, or `None`.
    - `floor`: a step is the last one when v can be combined from A M⁻¹Qₖ with a residual
        norm of at most this much.
    - `steps`: the most steps, static.
    - `complex_linear`: whether the operator is linear over the complex numbers.
    - `keep`: whether M⁻¹Q is kept, as a preconditioner that is not linear needs.
    """
    # A custom rule sees only its arguments: what the functions captured becomes one.
    functions = tuple(
        None if function is None else eqx.filter_closure_convert(function, v)
        for function in (precondition, matvec)
    )
    arrays, static = eqx.partition(functions, eqx.is_array)
    plan = _Plan(steps, complex_linear, keep)
    return _differentiable(static, plan)(arrays, v, floor)


def _differentiable(static: Any, plan: _Plan) -> Callable[..., Decomposition]:
    @jax.custom_jvp
    def decompose(arrays: Any, v: Any, floor: Any) -> Decomposition:
        return _decompose(eqx.combine(arrays, static), v, floor, plan)

    def rule(primals: Any, tangents: Any) -> tuple[Decomposition, Decomposition]:
        arrays, v, floor = primals
        outcome = decompose(arrays, v, floor)

        def step(inputs: Any) -> Any:
            arrays, q = inputs
            precondition, matvec = eqx.combine(arrays, static)
            z = q if precondition is None else precondition(q)
            return z, matvec(z)

        def derivative(q: Any, q_dot: Any) -> Any:
            return along(step, (arrays, q), (tangents[0], q_dot))

        return outcome, _differentiate(outcome, instantiate(tangents[1]), derivative, plan)

    decompose.defjvp(rule, symbolic_zeros=True)
    return decompose


def _decompose(functions: Any, v: Any, floor: Array, plan: _Plan) -> Decomposition:
    precondition, matvec = functions
    norm = vector.norm(v)
    size = plan.steps + 1
    dtype = rows.coefficient_dtype(v, complex_linear=plan.complex_linear)
    epsilon = vector.epsilon(v)
    # A cycle cannot reduce its residual by more than rounding lets it.
    floor = jnp.maximum(floor, epsilon * norm)

    def goes_on(carry: Any) -> Array:
        count, _, _, _, _, left, exhausted = carry
        return (count < plan.steps) & ~exhausted & ((count == 0) | (left > floor))

    def advance(carry: Any) -> Any:
        count, basis, kept, hessenberg, null, _, _ = carry
        q = rows.read(basis, count)
        z = q if precondition is None else precondition(q)
        w = matvec(z)
        length = vector.norm(w)
        h, w, rest = _orthogonalize(basis, w, length, plan)
        exhausted = rest <= NEGLIGIBLE * epsilon * length
        divisor = jnp.where(exhausted, 1.0, rest)
        following = jnp.where(exhausted, 0.0, rest)
        w = vector.scale(jnp.where(exhausted, 0.0, 1.0) / divisor, w)
        # The row vector with null H = 0 and a leading 1: v can be combined up to norm/|null|.
        null = null.at[count + 1].set(-jnp.dot(null, h) / divisor)
        left = norm / jnp.linalg.norm(null)
        h = h.at[count + 1].set(following.astype(dtype))
        hessenberg = jax.lax.dynamic_update_index_in_dim(hessenberg, h, count, 1)
        basis = rows.write(basis, count + 1, w)
        kept = rows.write(kept, count, z) if plan.keep else None
        return count + 1, basis, kept, hessenberg, null, left, exhausted

    first = vector.scale(1.0 / jnp.where(norm > 0, norm, 1.0), v)
    start = (
        jnp.int32(0),
        rows.write(rows.allocate(v, size), jnp.int32(0), first),
        rows.allocate(v, plan.steps) if plan.keep else None,
        jnp.zeros((size, plan.steps), dtype),
        jnp.zeros(size, dtype).at[0].set(1.0),
        norm,
        jnp.asarray(False),
    )
    count, basis, kept, hessenberg, *_ = jax.lax.while_loop(goes_on, advance, start)
    return Decomposition(basis, kept, hessenberg, norm, count)


def _orthogonalize(basis: Any, w: Any, length: Array, plan: _Plan) -> tuple[Array, Any, Array]:
    """The coefficients of w in the basis, what is left of it, and the norm of that."""

    def once(h: Array, w: Any) -> tuple[Array, Any, Array]:
        more = rows.project(basis, w, complex_linear=plan.complex_linear)
        w = vector.subtract(w, rows.combine(more, basis))
        return h + more, w, vector.norm(w)

    h = jnp.zeros(plan.steps + 1, rows.coefficient_dtype(w, complex_linear=plan.complex_linear))
    h, w, rest = once(h, w)
    return jax.lax.cond(
        rest < REPEAT * length,
        lambda h, w, _: once(h, w),
        lambda h, w, rest: (h, w, rest),
        h,
        w,
        rest,
    )


def _differentiate(
    outcome: Decomposition, v_dot: Any, derivative: Callable[..., Any], plan: _Plan
) -> Decomposition:
    """The tangent of a decomposition, linear in what it is made of and transposable.

    `derivative` maps (q, q̇) to (ż, ẇ), for z = M⁻¹q and w = A z.
    """
    basis, hessenberg, norm = outcome.basis, outcome.hessenberg, outcome.norm
    places = jnp.arange(plan.steps + 1)
    first = rows.read(basis, jnp.int32(0))
    norm_dot = vector.dot(first, v_dot)
    first_dot = vector.scale(
        jnp.where(norm > 0, 1.0, 0.0) / jnp.where(norm > 0, norm, 1.0),
        vector.add_scaled(v_dot, -norm_dot, first),
    )
    basis_dot = rows.write(rows.allocate(v_dot, plan.steps + 1), jnp.int32(0), first_dot)

    def advance(basis_dot: Any, index: Array) -> tuple[Any, Any]:
        active = index < outcome.count
        # Idle steps repeat the first one: what they give is dropped, but must be finite.
        place = jnp.where(active, index, 0)
        z_dot, w_dot = derivative(rows.read(basis, place), rows.read(basis_dot, place))
        h = hessenberg[:, place]
        following = rows.read(basis, place + 1)
        rest = h[place + 1].real
        goes_on = active & (rest > 0)
        h = jnp.where(places <= place, h, 0.0)
        w = vector.add_scaled(rows.combine(h, basis), rest, following)
        h_dot = rows.project(basis_dot, w, complex_linear=plan.complex_linear)
        h_dot = h_dot + rows.project(basis, w_dot, complex_linear=plan.complex_linear)
        h_dot = jnp.where(places <= place, h_dot, 0.0)
        w_dot = vector.subtract(w_dot, rows.combine(h, basis_dot))
        w_dot = vector.subtract(w_dot, rows.combine(h_dot, basis))
        rest_dot = vector.dot(following, w_dot)
        following_dot = vector.scale(
            jnp.where(goes_on, 1.0, 0.0) / jnp.where(goes_on, rest, 1.0),
            vector.add_scaled(w_dot, -rest_dot, following),
        )
        h_dot = jnp.where(places == place + 1, rest_dot.astype(h_dot.dtype), h_dot)
        basis_dot = rows.write(
            basis_dot,
            index + 1,
            vector.where(active, following_dot, vector.zeros_like(following_dot)),
        )
        return basis_dot, (z_dot if plan.keep else None, jnp.where(active, h_dot, 0.0))

    basis_dot, (kept_dot, columns_dot) = jax.lax.scan(advance, basis_dot, jnp.arange(plan.steps))
    if plan.keep:
        kept_dot = jax.tree.map(lambda leaf: _masked(leaf, outcome.count), kept_dot)
    return Decomposition(
        basis_dot,
        kept_dot,
        columns_dot.T,
        norm_dot.astype(norm.dtype),
        jax.custom_derivatives.zero_from_primal(outcome.count),
    )


def _masked(leaf: Array, count: Array) -> Array:
    places = jnp.arange(leaf.shape[0]).reshape(-1, *([1] * (leaf.ndim - 1)))
    return jnp.where(places < count, leaf, 0.0)
