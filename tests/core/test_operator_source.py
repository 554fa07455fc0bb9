"""Preconditioners see the object that an operator was made of, in the adjoint its transpose."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel as bl

RHS = jnp.arange(1.0, 6.0)


class Shifted(eqx.Module):
    """D + S with a cyclic shift S; `direction` is -1 in the transpose."""

    entries: jax.Array
    direction: int = eqx.field(static=True, default=1)
    name: str = "not an array"

    def matvec(self, v):
        return self.entries * v + jnp.roll(v, self.direction)

    def transposed(self):
        return Shifted(self.entries, -self.direction)


class Watching:
    """Division by the entries of the source."""

    def __init__(self):
        self.directions = []

    def at(self, problem, x):
        source = problem.operator.source
        self.directions.append(source.direction)
        return lambda v: v / source.entries


@pytest.mark.parametrize("solver", [pytest.param(bl.GMRES, marks=pytest.mark.slow), bl.BiCGStab])
def test_the_adjoint_sees_the_transpose(solver):
    watching = Watching()
    preconditioned = solver(preconditioner=watching)
    problem = bl.LinearSystem(Shifted, RHS)

    def loss(theta):
        solution = bl.solve(
            problem,
            theta,
            jnp.zeros(5),
            solver=preconditioned,
            estimator=bl.Implicit(solver=preconditioned),
        )
        return jnp.sum(solution.value**2)

    def exact(theta):
        matrix = jnp.diag(theta) + jnp.roll(jnp.eye(5), 1, axis=0)
        return jnp.sum(jnp.linalg.solve(matrix, RHS) ** 2)

    theta = jnp.linspace(3.0, 7.0, 5)
    thetas = jnp.stack([theta, theta + 1.0])
    got = jax.jit(jax.vmap(jax.grad(loss)))(thetas)
    np.testing.assert_allclose(got, jax.vmap(jax.grad(exact))(thetas), rtol=1e-8)
    # The solve itself, the tangent that is traced beside it, and the adjoint.
    assert watching.directions[0] == 1
    assert watching.directions[-1] == -1


def test_the_transpose_of_a_source_without_one_is_none():
    class OneWay(Shifted):
        transposed = None

    operator = bl.LinearOperator(lambda v: v, source=OneWay(jnp.ones(5)))
    assert operator.transposed(RHS).source is None
    symmetric = bl.LinearOperator(lambda v: v, symmetric=True, source=OneWay(jnp.ones(5)))
    assert symmetric.transposed(RHS).source is symmetric.source
