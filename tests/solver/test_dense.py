"""The dense matrix of an operator, whole and its lower triangle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilevel.operator import LinearOperator
from bilevel.solver.dense import SMALLEST, dense_matrix
from tests.marks import others_slow

SIZE = SMALLEST + 9
DESIGN = jnp.asarray(np.random.default_rng(0).standard_normal((40, SIZE)))
WEIGHTS = jnp.linspace(0.5, 2.0, 40)
FLIP = jnp.arange(SIZE)[::-1]


def gram(v):
    return (WEIGHTS * (DESIGN @ v)) @ DESIGN


def hessian(objective):
    return lambda v: jax.jvp(jax.grad(objective), (jnp.ones(SIZE),), (v,))[1]


@jax.custom_vjp
def with_rule(v):
    return 3.0 * v


with_rule.defvjp(lambda v: (with_rule(v), None), lambda _, cotangent: (3.0 * cotangent,))

SYMMETRIC = {
    "ridge": lambda v: -(-gram(v) / 3.0 - jnp.exp(jnp.arange(SIZE) / SIZE) * v),
    "logistic": hessian(lambda w: jnp.sum(jax.nn.softplus(DESIGN @ w)) + jnp.sum(w**4)),
    "inside jit": lambda v: jax.jit(lambda v: gram(v) + v)(v) * 2.0,
    "two products": lambda v: gram(v) + 3.0 * (DESIGN[:5] @ v) @ DESIGN[:5],
    "custom rule": lambda v: gram(v) * jax.nn.relu(1.0) + with_rule(v),
    "loop": lambda v: jax.lax.fori_loop(0, 3, lambda i, u: 0.5 * (u + gram(v)), v),
    # None of these keeps an entry of a product in its place: half of it would not do.
    "flipped": lambda v: gram(v[FLIP])[FLIP],
    "summed": lambda v: gram(v) + jnp.sum(gram(v) + gram(jnp.ones(SIZE)) * jnp.sum(v)),
    "twice": lambda v: gram(gram(v)),
    "scanned": lambda v: jnp.cumsum(jnp.cumsum(v[::-1])[::-1]),
}


def as_operator(matvec):
    return LinearOperator(matvec=matvec, symmetric=True, positive_definite=True)


@pytest.mark.parametrize(
    "name", others_slow(SYMMETRIC, *(name for name in SYMMETRIC if name != "logistic"))
)
def test_the_lower_triangle_is_that_of_the_matrix(name):
    like, operator = jnp.zeros(SIZE), as_operator(SYMMETRIC[name])
    expected = jax.vmap(operator.matvec)(jnp.eye(SIZE))
    scale = np.abs(expected).max()
    np.testing.assert_allclose(dense_matrix(operator, like), expected, atol=1e-13 * scale)
    lower = dense_matrix(operator, like, lower=True)
    np.testing.assert_allclose(np.tril(lower), np.tril(expected), atol=1e-13 * scale)


def test_half_of_a_product_is_left_out():
    lower = dense_matrix(as_operator(SYMMETRIC["ridge"]), jnp.zeros(SIZE), lower=True)
    assert np.count_nonzero(lower[0]) < SIZE // 2


def test_of_a_general_operator_nothing_is_left_out():
    operator = LinearOperator(matvec=lambda v: gram(v) + jnp.roll(v, 1))
    expected = jax.vmap(operator.matvec)(jnp.eye(SIZE)).T
    whole = dense_matrix(operator, jnp.zeros(SIZE), lower=True)
    np.testing.assert_allclose(whole, expected, atol=1e-12)


def test_several_leaves_and_both_precisions():
    like = {"a": jnp.zeros(SIZE - 3, jnp.float32), "b": jnp.zeros(3, jnp.float32)}
    design = DESIGN.astype(jnp.float32)

    def matvec(v):
        out = design.T @ (design @ jnp.concatenate([v["a"], v["b"]]))
        return {"a": out[:-3], "b": out[-3:]}

    lower = dense_matrix(as_operator(matvec), like, lower=True)
    assert lower.dtype == jnp.float32
    expected = np.asarray(design, float).T @ np.asarray(design, float)
    np.testing.assert_allclose(np.tril(lower), np.tril(expected), atol=1e-4)
