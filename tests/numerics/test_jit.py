"""The numerical matrix, inside of `jax.jit`."""

import jax
import jax.numpy as jnp
import pytest

import bilevel as bl
from tests.core.compiling import jitted
from tests.marks import others_slow
from tests.numerics.cases import DTYPES, SOLVERS, N, by_name, data, systems
from tests.numerics.judgement import about_solution


@pytest.mark.parametrize("dtype", others_slow(DTYPES, "float32"))
@pytest.mark.parametrize("subject", others_slow(SOLVERS, "GMRES"), ids=by_name)
def test_no_solve_says_more_than_is_true(subject, dtype, count):
    @jitted
    def solve(theta):
        return bl.solve(subject.problem, theta, jnp.zeros(N, dtype), **subject.options(dtype))

    found = [solve(data(system, dtype)) for system in systems()]
    solution = jax.tree.map(lambda *leaves: jnp.stack(leaves), *found)
    assert solve._cache_size() == 1
    count(len(found), about_solution(subject, dtype, solution))
