"""Warm starts: what a task's loss keeps from update to update."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel as bl
from bilevel.outer.optimize import optimize

SAMPLES, SIZE = 4, 3
MATRIX = jnp.array([[2.0, 0.5, 0.0], [0.5, 1.5, 0.2], [0.0, 0.2, 1.0]])
SOURCES = jnp.array(np.random.default_rng(0).standard_normal((SAMPLES, SIZE)))
WANTED = jnp.linalg.solve(1.3 * MATRIX, SOURCES.T).T


class Matrix(eqx.Module):
    """θ A, symmetric."""

    theta: jax.Array
    symmetric = True

    def matvec(self, x):
        """θ A x."""
        return self.theta * (MATRIX @ x)


def solved(theta, source, start, fidelity, iterations=None):
    richardson = bl.Richardson(0.3)
    budget = {"fidelity": fidelity} if iterations is None else {"budget": bl.Budget(iterations)}
    return bl.solve(
        bl.LinearSystem(lambda both: Matrix(both[0]), lambda both: both[1]),
        (theta, source),
        start.value,
        adjoint_guess=start.adjoint,
        probe=start.probe,
        solver=richardson,
        estimator=bl.Implicit(richardson),
        **budget,
    ).value


def loss(theta, batch, fidelity, memory):
    x = jax.vmap(lambda source, start: solved(theta, source, start, fidelity))(
        SOURCES[batch], memory.at(batch)
    )
    return jnp.mean((x - WANTED[batch]) ** 2), memory.stored(batch, x)


def task(iterations=2, **settings):
    settings = {
        "batches": [jnp.array([2, 0]), jnp.array([1, 3])],
        "memory": bl.WarmStarts.zeros(SAMPLES, SOURCES[0]),
        "full": bl.Budget(iterations),
        **settings,
    }
    return bl.Task(jnp.asarray(0.8), loss, **settings)


def test_both_solves_go_on_where_they_were_left():
    """θ held: E epochs of K iterations are one solve of E K iterations, primal and adjoint.

    The adjoint's right-hand side is 2 (x - wanted) / n, which changes with x; once the primal
    has converged to rounding it no longer does, so the adjoint is looked at after more epochs.
    """
    run = optimize(task(), optax.sgd(0.0), epochs=30, progress=False, directory=None)
    assert run.status == "completed"
    keep = _memory_after(task(), epochs=30)
    exact = jnp.linalg.solve(0.8 * MATRIX, SOURCES.T).T
    np.testing.assert_allclose(keep.value, exact, atol=1e-4)
    side = 2 * (exact - WANTED) / (2 * SIZE)
    adjoint = jnp.linalg.solve(0.8 * MATRIX, side.T).T
    np.testing.assert_allclose(np.abs(keep.adjoint), np.abs(adjoint), atol=1e-4)
    assert not keep.fresh.any()
    few = _memory_after(task(), epochs=3)
    once = jax.vmap(
        lambda source, start: solved(jnp.asarray(0.8), source, start, None, iterations=6)
    )(SOURCES, bl.WarmStarts.zeros(SAMPLES, SOURCES[0]).at(jnp.arange(SAMPLES)))
    np.testing.assert_allclose(few.value, once, rtol=1e-12)


def _memory_after(given, epochs, learning_rate=0.0):
    update, state = _update(given, learning_rate)
    for _ in range(epochs):
        for batch in given.batches:
            state, _ = update(state, batch, given.full_fidelity)
    return state.memory


def _update(given, learning_rate):
    from bilevel.outer.update import State, make_update

    optimizer = optax.sgd(learning_rate)
    state = State(given.parameters, optimizer.init(given.parameters), given.first_memory)
    return jax.jit(make_update(given, optimizer)), state


@pytest.mark.slow
def test_gradient_is_that_of_the_solution_when_the_starts_have_converged():
    memory = _memory_after(task(), epochs=60)
    given = task(memory=memory)
    update, state = _update(given, 1.0)
    batch = given.batches[0]
    after, report = update(state, batch, given.full_fidelity)

    def exact(theta):
        x = jnp.linalg.solve(theta * MATRIX, SOURCES[batch].T).T
        return jnp.mean((x - WANTED[batch]) ** 2)

    np.testing.assert_allclose(state.trained - after.trained, jax.grad(exact)(0.8), rtol=1e-6)
    assert report[0] == 1


@pytest.mark.slow
def test_few_iterations_suffice_where_cold_starts_are_biased():
    warm = optimize(task(1), optax.sgd(0.2), epochs=150, progress=False)
    assert abs(float(warm.theta) - 1.3) < 1e-3

    def cold(theta, batch, fidelity):
        nothing = bl.WarmStarts.zeros(SAMPLES, SOURCES[0])
        return loss(theta, batch, fidelity, nothing)[0]

    biased = bl.Task(jnp.asarray(0.8), cold, batches=task().batches, full=bl.Budget(1))
    run = optimize(biased, optax.sgd(0.2), epochs=150, progress=False)
    assert abs(float(run.theta) - 1.3) > 0.1


def test_an_update_that_is_not_made_leaves_the_memory():
    def failing(theta, batch, fidelity, memory):
        value, after = loss(theta, batch, fidelity, memory)
        return value * jnp.nan, after

    given = bl.Task(
        jnp.asarray(0.8), failing, memory=task().memory, batches=task().batches, full=bl.Budget(2)
    )
    update, state = _update(given, 0.1)
    after, report = update(state, given.batches[0], given.full_fidelity)
    assert report[0] == 0
    for new, old in zip(jax.tree.leaves(after.memory), jax.tree.leaves(state.memory), strict=True):
        np.testing.assert_array_equal(new, old)


def test_what_is_not_finite_is_not_stored():
    starts = bl.WarmStarts.of(jnp.ones((3, 2)))
    found = jnp.array([[5.0, 5.0], [jnp.nan, 1.0]])
    kept = starts.stored(jnp.array([2, 0]), found, adjoint=found)
    np.testing.assert_array_equal(kept.value, [[1, 1], [1, 1], [5, 5]])
    np.testing.assert_array_equal(kept.adjoint, [[0, 0], [0, 0], [5, 5]])
    reported = starts.stored(1, jnp.zeros(2)).collected(jnp.full((3, 2), jnp.inf))
    np.testing.assert_array_equal(reported.adjoint, np.zeros((3, 2)))


def test_a_resumed_run_goes_on_bit_for_bit(tmp_path):
    controller = bl.AutomaticRefinement(bl.Ladder.iterations(1, 1, 8))
    whole = optimize(task(), optax.adam(0.05), controller=controller, epochs=8, progress=False)
    for epochs in (3, 8):
        part = optimize(
            task(),
            optax.adam(0.05),
            controller=controller,
            epochs=epochs,
            directory=tmp_path / "run",
            resume=epochs > 3,
            progress=False,
        )
    assert float(part.theta) == float(whole.theta)
    assert part.history[-1].level == whole.history[-1].level


def test_hypergradient_tasks_store_both_solutions():
    system = bl.LinearSystem(Matrix, SOURCES[0])
    richardson = bl.Richardson(0.3)

    def hypergradient(theta, batch, fidelity, memory):
        start = memory.at(0)
        result = bl.hypergradient(
            lambda x, theta: jnp.mean((x - WANTED[0]) ** 2),
            system,
            theta,
            start.value,
            adjoint_guess=start.adjoint,
            solver=richardson,
            estimator=bl.Implicit(richardson),
            fidelity=fidelity,
        )
        return result, memory.stored(0, result.primal.value, result.adjoint.value)

    given = bl.Task(
        jnp.asarray(0.8),
        hypergradient=hypergradient,
        memory=bl.WarmStarts.zeros(1, SOURCES[0]),
        full=bl.Budget(1),
    )
    run = optimize(given, optax.sgd(0.2), epochs=200, progress=False)
    assert abs(float(run.theta) - 1.3) < 1e-3


def test_messages():
    with pytest.raises(TypeError, match=r"memory should hold arrays and numbers only.*'tanh'"):
        bl.Task(1.0, loss, memory={"f": "tanh"})
    with pytest.raises(TypeError, match="memory"):
        bl.Task(1.0, lambda theta, batch, fidelity: theta, memory=jnp.ones(2))
    with pytest.raises(ValueError, match="the same length"):
        bl.WarmStarts.of({"a": jnp.ones((2, 3)), "b": jnp.ones((3, 3))})
    alone = bl.Task(
        1.0, lambda theta, batch, fidelity, memory: theta**2, memory=jnp.ones(2), full=bl.Budget(1)
    )
    with pytest.raises(TypeError, match="loss should return two things"):
        optimize(alone, optax.sgd(0.1), epochs=1, progress=False)
    other = bl.Task(
        1.0,
        lambda theta, batch, fidelity, memory: (theta**2, memory[:1]),
        memory=jnp.ones(2),
        full=bl.Budget(1),
    )
    with pytest.raises(TypeError, match=r"should be like the one it was given.*\[2\].*\[1\]"):
        optimize(other, optax.sgd(0.1), epochs=1, progress=False)
