"""One derivative and no more: OneStep's second one would be another thing than it looks like."""

import jax
import jax.numpy as jnp
import pytest

import bilevel as bl
from bilevel.once_only import SecondDerivativeError, once_only

ROOT = bl.RootFinding(lambda x, theta: x * x - theta)


def square_root(theta):
    return bl.solve(ROOT, theta, 1.0, solver=bl.Newton(), estimator=bl.OneStep()).value


def explicit(theta):
    return bl.hypergradient(
        lambda x, _: x**3, ROOT, theta, 1.0, solver=bl.Newton(), estimator=bl.OneStep(), error=False
    ).gradient


@pytest.mark.parametrize("mode", [jax.grad, jax.jacfwd, lambda f: jax.jit(jax.grad(f))])
def test_one_derivative_in_any_mode(mode):
    assert float(mode(square_root)(4.0)) == pytest.approx(0.25)
    assert jnp.allclose(
        jax.vmap(mode(square_root))(jnp.array([4.0, 9.0])), jnp.array([1 / 4, 1 / 6])
    )


@pytest.mark.parametrize(
    "twice",
    [
        jax.hessian(square_root),
        jax.grad(jax.grad(square_root)),
        jax.jacfwd(jax.jacfwd(square_root)),
        jax.jacrev(jax.jacfwd(square_root)),
        jax.grad(jax.jit(jax.grad(square_root))),
        lambda theta: jax.vmap(jax.grad(jax.grad(square_root)))(jnp.stack([theta, theta])),
        jax.grad(explicit),
    ],
    ids=["hessian", "reverse twice", "forward twice", "reverse over forward", "jit", "vmap", "bl"],
)
def test_no_second_one(twice):
    with pytest.raises(SecondDerivativeError, match=r"no second derivative.*Use Implicit"):
        twice(jnp.array(4.0))


def test_what_lies_beside_it_may_be_differentiated_as_often_as_one_likes():
    def beside(x, y):
        return once_only(x, "no") * jnp.sin(y)

    assert float(jax.grad(jax.grad(beside, 1), 1)(2.0, 3.0)) == pytest.approx(-2 * jnp.sin(3.0))
    assert float(jax.grad(jax.grad(beside, 0), 1)(2.0, 3.0)) == pytest.approx(jnp.cos(3.0))
