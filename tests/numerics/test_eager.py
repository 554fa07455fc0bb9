"""The numerical matrix, called as Python calls it, a system at a time."""

import jax
import jax.numpy as jnp
import pytest

import bilevel as bl
from tests.marks import others_slow
from tests.numerics.cases import DTYPES, SOLVERS, N, by_name, data, systems
from tests.numerics.judgement import about_solution


@pytest.mark.parametrize("dtype", others_slow(DTYPES, "float32"))
@pytest.mark.parametrize("subject", others_slow(SOLVERS, "ConjugateGradient"), ids=by_name)
def test_no_solve_says_more_than_is_true(subject, dtype, count):
    start = jnp.zeros(N, dtype)
    found = [
        # A concrete matrix may be refused; here θ is an argument, and a status has to tell.
        bl.solve(subject.problem, data(system, dtype), start, **subject.options(dtype))
        for system in systems()
    ]
    solution = jax.tree.map(lambda *leaves: jnp.stack(leaves), *found)
    count(len(found), about_solution(subject, dtype, solution))
