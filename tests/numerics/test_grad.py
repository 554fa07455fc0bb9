"""The numerical matrix under `jax.grad`: a failed adjoint is never a gradient, and never zero."""

import jax
import jax.numpy as jnp
import pytest

import bilevel as bl
from tests.core.compiling import jitted
from tests.marks import others_slow
from tests.numerics.cases import DTYPES, GRADIENTS, N, by_name, stacked, systems
from tests.numerics.judgement import WEIGHT, about_gradient, about_solution


@pytest.mark.parametrize("dtype", others_slow(DTYPES, "float32"))
@pytest.mark.parametrize("subject", others_slow(GRADIENTS, "Neumann, Richardson"), ids=by_name)
def test_no_failed_adjoint_is_a_gradient(subject, dtype, count):
    weight = jnp.asarray(WEIGHT, dtype)

    def value(theta, probe):
        start = jnp.zeros(N, dtype)
        solution = bl.solve(subject.problem, theta, start, probe=probe, **subject.options(dtype))
        return weight @ solution.value, solution

    derivative = jax.grad(value, argnums=(0, 1), has_aux=True)
    (gradient, report), solution = jitted(jax.vmap(derivative, in_axes=(0, None)))(
        stacked(dtype), bl.Probe.zeros()
    )
    found = about_solution(subject, dtype, solution)
    found += about_gradient(subject, dtype, solution, gradient, report)
    count(len(systems()), found)
