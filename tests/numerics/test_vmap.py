"""The numerical matrix as one batch: what is bad of it leaves the rest alone."""

import jax
import jax.numpy as jnp
import pytest

import bilevel as bl
from tests.core.compiling import jitted
from tests.marks import others_slow
from tests.numerics.cases import DTYPES, SOLVERS, N, by_name, stacked, systems
from tests.numerics.judgement import about_solution


@pytest.mark.parametrize("dtype", others_slow(DTYPES, "float64"))
@pytest.mark.parametrize("subject", others_slow(SOLVERS, "FixedPointIteration"), ids=by_name)
def test_no_solve_says_more_than_is_true(subject, dtype, count):
    def solve(theta):
        return bl.solve(subject.problem, theta, jnp.zeros(N, dtype), **subject.options(dtype))

    solution = jitted(jax.vmap(solve))(stacked(dtype))
    count(len(systems()), about_solution(subject, dtype, solution))
    assert bl.Status(int(solution.status[0])) in {bl.Status.CONVERGED, bl.Status.BUDGET}
