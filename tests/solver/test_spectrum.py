"""Estimates of spectra, against dense eigenvalues."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilevel.operator import LinearOperator, as_operator
from bilevel.solver.lanczos import extreme_eigenvalues
from bilevel.solver.spectrum import contraction_rate, largest_eigenvalue, largest_singular_value
from tests.marks import others_slow
from tests.solver.systems import SIZE, system


@pytest.mark.parametrize("complex_valued", others_slow([False, True], True))
def test_extreme_eigenvalues_of_a_symmetric_operator(complex_valued):
    matrix, rhs, _ = system("symmetric", complex_valued=complex_valued)
    values = np.linalg.eigvalsh(matrix)
    # More steps than dimensions: the subspace is exhausted on the way.
    for steps in (SIZE, 3 * SIZE):
        found = extreme_eigenvalues(lambda v: matrix @ v, jnp.asarray(rhs), steps)
        np.testing.assert_allclose(found.smallest, values[0], rtol=1e-6)
        np.testing.assert_allclose(found.largest, values[-1], rtol=1e-6)
        assert found.upper >= values[-1] * (1 - 1e-12)
    few = extreme_eigenvalues(lambda v: matrix @ v, jnp.asarray(rhs), 5)
    assert values[0] <= few.smallest <= few.largest <= values[-1] <= few.upper
    assert np.min(np.abs(values - few.smallest)) <= few.uncertainty


def test_eigenvalues_of_a_preconditioned_operator():
    matrix = system("definite").matrix
    weights = np.linspace(1.0, 5.0, SIZE)
    values = np.linalg.eigvals(matrix / weights[:, None]).real
    found = extreme_eigenvalues(
        lambda v: matrix @ v, jnp.zeros(SIZE), 2 * SIZE, lambda v: v / weights
    )
    np.testing.assert_allclose(found.smallest, values.min(), rtol=1e-6)
    np.testing.assert_allclose(found.largest, values.max(), rtol=1e-6)


@pytest.mark.parametrize("steps", others_slow([1, 2, 20], 2))
@pytest.mark.parametrize("factor", [3.0, 0.0, -2.0])
def test_multiples_of_the_identity_exhaust_the_space_at_once(factor, steps):
    found = extreme_eigenvalues(lambda v: factor * v, jnp.zeros(5), steps)
    np.testing.assert_allclose(found, [factor, factor, factor, 0.0], atol=1e-12)
    operator = LinearOperator(lambda v: factor * v, symmetric=True)
    np.testing.assert_allclose(largest_eigenvalue(operator, jnp.zeros(5), steps), abs(factor))


@pytest.mark.parametrize("scale", others_slow([1e-8, 1.0, 1e8], 1e-8, 1e8))
def test_estimates_scale_with_the_operator(scale):
    matrix = system("general").matrix
    operator = as_operator(jnp.asarray(scale * matrix))
    like = jnp.zeros(SIZE)
    norm = np.linalg.norm(matrix, 2)
    radius = np.max(np.abs(np.linalg.eigvals(matrix)))
    np.testing.assert_allclose(largest_singular_value(operator, like, 12) / scale, norm, rtol=1e-6)
    np.testing.assert_allclose(largest_eigenvalue(operator, like, 400) / scale, radius, rtol=1e-2)
    # Twenty steps are enough to set a step size by.
    assert 0.9 * norm <= largest_singular_value(operator, like) / scale <= norm * (1 + 1e-12)


def test_a_pair_of_complex_eigenvalues_does_not_make_the_rate_oscillate():
    angle = 0.7
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    skewed = np.diag([1.0, 4.0]) @ turn @ np.diag([1.0, 0.25])
    for rate in (0.5, 0.99, 1.01):
        found = contraction_rate(lambda v, rate=rate: rate * (skewed @ v), jnp.zeros(2), 100)
        np.testing.assert_allclose(found, rate, rtol=3e-2)


def test_a_nilpotent_map_contracts_at_once():
    shift = jnp.eye(4, k=1)
    assert contraction_rate(lambda v: shift @ v, jnp.zeros(4)) == 0.0
    np.testing.assert_allclose(
        largest_singular_value(as_operator(shift), jnp.zeros(4)), 1.0, rtol=1e-6
    )


def test_pytrees_and_single_precision_under_jit_and_vmap():
    like = {"a": jnp.zeros((2, 2), jnp.float32), "b": jnp.zeros(3, jnp.complex64)}
    diagonal = {"a": jnp.array([[1.0, 2.0], [3.0, 4.0]], jnp.float32), "b": jnp.float32(-6.0)}

    def estimates(scale):
        operator = LinearOperator(
            lambda v: jax.tree.map(lambda d, leaf: scale * d * leaf, diagonal, v), symmetric=True
        )
        found = extreme_eigenvalues(operator.matvec, like, 8)
        return *found, largest_singular_value(operator, like), largest_eigenvalue(operator, like)

    batch = jax.jit(jax.vmap(estimates))(jnp.array([1.0, 2.0], jnp.float32))
    assert {leaf.dtype for leaf in batch} == {jnp.dtype("float32")}
    smallest, largest, _, _, norm, modulus = batch
    np.testing.assert_allclose(smallest, [-6.0, -12.0], rtol=1e-5)
    np.testing.assert_allclose(largest, [4.0, 8.0], rtol=1e-5)
    np.testing.assert_allclose(norm, [6.0, 12.0], rtol=1e-5)
    np.testing.assert_allclose(modulus, [6.0, 12.0], rtol=1e-5)


def test_not_a_number_comes_out():
    like = jnp.zeros(4)
    operator = LinearOperator(lambda v: jnp.nan * v, symmetric=True)
    assert np.isnan(largest_eigenvalue(operator, like))
    assert np.isnan(largest_singular_value(operator, like))
    assert np.isnan(contraction_rate(operator.matvec, like))


def test_estimates_are_constants():
    matrix = jnp.asarray(system("symmetric").matrix)

    def estimate(scale):
        operator = as_operator(scale * matrix, symmetric=True)
        like = jnp.zeros(SIZE)
        return (
            largest_eigenvalue(operator, like)
            + largest_singular_value(operator, like)
            + contraction_rate(operator.matvec, like)
        )

    assert jax.grad(estimate)(2.0) == 0.0


def test_too_few_steps_are_refused():
    with pytest.raises(ValueError, match="steps must be a whole number, at least 2, got 1"):
        contraction_rate(lambda v: v, jnp.zeros(3), 1)
