"""Precision as a fidelity: levels in bfloat16 and in float32, and what they are worth."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel as bl

N = 40
DENSE = np.diag(np.linspace(1.0, 1.6, N)) + 0.1 * np.eye(N, k=1) + 0.1 * np.eye(N, k=-1)
MATRIX = jnp.asarray(DENSE, jnp.float32)
THETA = jnp.cos(jnp.arange(N, dtype=jnp.float32))
ROUNDOFF = {"bfloat16": 2.0**-8, "float32": 2.0**-24}


def operator(dtype):
    """The matrix, applied in another precision to vectors that stay in single."""
    return bl.mixed_precision(lambda v: MATRIX.astype(dtype) @ v, dtype)


def solve(theta, fidelity):
    problem = bl.LinearSystem(
        lambda theta: operator(fidelity["dtype"]),
        lambda theta: theta,
        symmetric=True,
        positive_definite=True,
    )
    solver = bl.Richardson(0.77)
    given = {"solver": solver, "estimator": bl.Implicit(solver), "fidelity": fidelity}
    return bl.solve(problem, theta, jnp.zeros(N, jnp.float32), **given)


def at(dtype, iterations=8):
    budget = bl.Budget(iterations)
    return bl.Fidelity(budget, budget, static={"dtype": dtype})


@pytest.mark.parametrize("dtype", ROUNDOFF)
def test_solutions_and_gradients_are_as_good_as_the_precision_and_no_better(dtype):
    def value(theta, fidelity):
        return jnp.sum(jnp.sin(solve(theta, fidelity).value))

    exact = np.linalg.solve(DENSE, np.asarray(THETA, float))
    pulled = np.linalg.solve(DENSE.T, np.cos(exact))
    solution = solve(THETA, at(dtype))
    gradient = jax.grad(value)(THETA, at(dtype))
    assert solution.value.dtype == gradient.dtype == jnp.float32
    for found, expected in ((solution.value, exact), (gradient, pulled)):
        error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
        # Rounding a few times over, and 0.4**8 of the start, which is as far away as x is large.
        assert error < 4 * ROUNDOFF[dtype] + 0.4**8
        if dtype == "bfloat16":
            assert error > ROUNDOFF[dtype] / 8  # or it would have been computed in single


def test_a_tolerance_below_the_roundoff_is_not_called_converged():
    budget = bl.Budget(iterations=500, rtol=1e-6)
    solution = solve(THETA, bl.Fidelity(budget, budget, static={"dtype": "bfloat16"}))
    assert not solution.diagnosis.startswith("CONVERGED")
    loose = bl.Budget(rtol=0.05)
    solution = solve(THETA, bl.Fidelity(loose, loose, static={"dtype": "bfloat16"}))
    assert solution.diagnosis.startswith("CONVERGED")


def test_refinement_goes_up_through_precisions_and_compiles_once_for_each():
    ladder = bl.Ladder.iterations(start=2, step=2, stop=8)  # 2, 4 | 6, 8
    ladder = ladder.with_static(dtype=["bfloat16", "bfloat16", "float32", "float32"])
    wanted = jnp.asarray(np.linalg.solve(DENSE, np.ones(N)), jnp.float32)

    def loss(theta, batch, fidelity):
        return jnp.mean((solve(theta, fidelity).value - wanted) ** 2)

    task = bl.Task(
        jnp.zeros(N, jnp.float32),
        loss,
        validate=lambda theta: jnp.linalg.norm(theta - 1) / N**0.5,
        optimizer=optax.sgd(20.0),
        epochs=40,
    )
    controller = bl.ScheduledFidelity(ladder, lambda updates: updates // 10)
    run = bl.optimize(task, controller=controller, progress=False)
    kinds = [record.static for record in run.history[1:]]
    assert ["bfloat16" in kind for kind in kinds] == [True] * 20 + [False] * 20
    assert all("float32" in kind for kind in kinds[20:])
    assert run.summary.compilations == 2
    # bfloat16 gets as far as its roundoff allows, float32 beyond.
    metrics = run.history.column("metric")
    assert metrics[20] > 10 * metrics[-1]
    assert metrics[-1] < 1e-4


def test_only_real_numbers_are_converted_and_come_back():
    seen = {}

    def function(tree, *, scale):
        seen.update(tree, scale=scale)
        return tree["x"] * scale, tree["n"] + 1, tree["z"]

    tree = {"x": jnp.ones(2, jnp.float32), "n": jnp.ones(2, jnp.int32), "z": jnp.ones(2, complex)}
    x, n, z = bl.mixed_precision(function, jnp.bfloat16)(tree, scale=0.5)
    assert (seen["x"].dtype, seen["scale"].dtype) == (jnp.bfloat16, jnp.bfloat16)
    assert (seen["n"].dtype, seen["z"].dtype) == (jnp.int32, tree["z"].dtype)
    assert (x.dtype, n.dtype, z.dtype) == (jnp.float32, jnp.int32, tree["z"].dtype)
    assert bl.mixed_precision(lambda: 3, "float32")() == 3


@pytest.mark.parametrize("dtype", ["int32", "complex64", "half a byte", None, 3])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(TypeError, match="should be a real floating-point dtype"):
        bl.mixed_precision(lambda x: x, dtype)
    with pytest.raises(TypeError, match="function should be a function of arrays, got 3"):
        bl.mixed_precision(3, "float32")
