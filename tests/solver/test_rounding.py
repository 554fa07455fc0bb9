"""Single precision: what rounding leaves of a residual is no failure, and a failure no rounding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel as bl
import bilevel_pde as pde


def laplacian(points: int) -> bl.LinearSystem:
    grid = pde.Grid(points, dtype="float32")
    return bl.LinearSystem(
        lambda theta: theta * -pde.laplacian(grid), jnp.ones(points, jnp.float32)
    )


@pytest.mark.parametrize(
    "solver", [bl.ConjugateGradient(), bl.MINRES(), pde.SparseDirect()], ids=repr
)
def test_a_smooth_source_is_solved_for_as_well_as_rounding_lets_it(solver):
    """ε κ is 2e-3 on 200 points: more than √ε, and yet the solution is good to three digits."""
    problem, start = laplacian(200), jnp.zeros(200, jnp.float32)
    one = jnp.float32(1.0)

    def outer(theta):
        return jnp.mean(bl.solve(problem, theta, start, solver=solver).value)

    solution = bl.solve(problem, one, start, solver=solver)
    assert not bl.Status(int(solution.status)).failed
    x = np.arange(1, 201) / 201
    assert np.allclose(solution.value, x * (1 - x) / 2, rtol=5e-3)
    # x = A⁻¹ b / θ, so dx/dθ = −x at θ = 1.
    assert float(jax.grad(outer)(one)) == pytest.approx(-np.mean(x * (1 - x) / 2), rel=5e-3)


def test_a_source_outside_of_the_range_is_not_called_rounding():
    """A closed box takes up no net source: the iterates grow until rounding seems to explain it."""
    rng = np.random.default_rng(0)
    factor = rng.standard_normal((40, 40)).astype(np.float32)
    factor[:, 0] = 0
    singular = jnp.asarray(factor.T @ factor)
    for part in (0.01, 0.05, 0.3):
        inside = singular @ jnp.asarray(rng.standard_normal(40), jnp.float32)
        outside = jnp.zeros(40, jnp.float32).at[0].set(part * jnp.linalg.norm(inside))
        problem = bl.LinearSystem(singular, inside + outside)
        for solver in (bl.ConjugateGradient(), bl.MINRES(), bl.GMRES()):
            solution = bl.solve(problem, None, jnp.zeros(40, jnp.float32), solver=solver)
            status = bl.Status(int(solution.status))
            assert status.failed or status is bl.Status.BUDGET, (part, solver, status)
