"""Inner variable, adjoint and parameters that take their steps together."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel as bl
from bilevel.outer.update import State, make_update

DRAW = np.random.default_rng(3)
FEATURES, UNSEEN = DRAW.normal(size=(2, 60, 4))
WEIGHTS = np.array([1.0, -2.0, 0.0, 0.5])
TARGETS = FEATURES @ WEIGHTS + 0.3 * DRAW.normal(size=60)
EXPECTED = UNSEEN @ WEIGHTS + 0.3 * DRAW.normal(size=60)
THETA = jnp.zeros(4)


def objective(x, theta, batch):
    features, targets = batch
    return 0.5 * jnp.mean((features @ x - targets) ** 2) + 0.5 * jnp.sum(jnp.exp(theta) * x**2)


def outer_loss(x, theta, batch):
    features, targets = batch
    return 0.5 * jnp.mean((features @ x - targets) ** 2) + 1e-3 * jnp.sum(theta**2)


WHOLE = (
    (jnp.asarray(FEATURES), jnp.asarray(TARGETS)),
    (jnp.asarray(UNSEEN), jnp.asarray(EXPECTED)),
)


def by_hand(theta, x, adjoint, rho, batch):
    """The three directions of Dagréou et al., equations 5 to 7, in NumPy; λ has their v's sign."""
    (A, a), (B, b) = batch
    hessian = A.T @ A / len(A) + np.diag(np.exp(theta))
    down = hessian @ x - A.T @ a / len(A)
    left = hessian @ adjoint - B.T @ (B @ x - b) / len(B)
    gradient = 2e-3 * theta - np.exp(theta) * x * adjoint
    return gradient, x - rho * down, adjoint - rho * left


def batches(size=20):
    for first in range(0, 60, size):
        some = slice(first, first + size)
        yield tuple(tuple(part[some] for part in half) for half in WHOLE)


def test_tolerances_end_the_steps_on_a_batch_and_a_tolerance_alone_will_do():
    soba = bl.Simultaneous(
        lambda x, t, _: 0.5 * jnp.sum((x - t) ** 2),
        lambda x, t, _: jnp.sum((x - 1) ** 2),
        jnp.zeros(2),
        optax.sgd(0.3),
    )
    result, memory = soba(
        jnp.full(2, 3.0), (None, None), bl.Fidelity(bl.Budget(rtol=1e-6)), soba.memory
    )
    assert 30 < int(result.primal.iterations) < 100
    assert int(result.primal.status) == bl.Status.CONVERGED
    assert int(result.adjoint.status) == bl.Status.CONVERGED
    np.testing.assert_allclose(result.gradient, 2 * (memory.x - 1), rtol=1e-5)
    capped, _ = soba(jnp.ones(2), (None, None), bl.Fidelity(bl.Budget(4, rtol=1e-6)), soba.memory)
    assert int(capped.primal.iterations) == 4


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda made: made(x0=jnp.zeros(2, complex)), "x0 should be real"),
        (lambda made: made(objective=lambda x, t, b: x), "objective should return one real"),
        (lambda made: made(outer_loss=lambda x, t, b: x), "outer_loss should return one real"),
        (lambda made: made(memory=jnp.zeros(5)), "memory=soba.memory"),
    ],
)
def test_what_it_cannot_take_is_named(call, said: str):
    def made(**given):
        memory = given.pop("memory", None)
        parts = {
            "objective": lambda x, t, b: jnp.sum((x - t) ** 2),
            "outer_loss": lambda x, t, b: jnp.sum(x**2),
            "x0": jnp.zeros(2),
        } | given
        soba = bl.Simultaneous(**parts, optimizer=optax.sgd(0.1))
        memory = soba.memory if memory is None else memory
        return soba(jnp.ones(2), (None, None), bl.Fidelity(bl.Budget(1)), memory)

    with pytest.raises(TypeError, match=said):
        call(made)


def test_updates_are_those_of_the_published_algorithm():
    soba = bl.Simultaneous(objective, outer_loss, jnp.ones(4), optax.sgd(0.2))
    task = bl.Task(
        THETA, hypergradient=soba, memory=soba.memory, batches=list(batches()), full=bl.Budget(1)
    )
    optimizer = optax.sgd(0.3)
    update = jax.jit(make_update(task, optimizer))
    state = State(task.parameters, optimizer.init(task.parameters), task.first_memory)
    theta, x, adjoint = np.zeros(4), np.ones(4), np.zeros(4)
    for batch in [*batches(), *batches()]:
        gradient, x, adjoint = by_hand(theta, x, adjoint, 0.2, batch)
        theta = theta - 0.3 * gradient
        state, report = update(state, batch, task.full_fidelity)
        assert report[0] == 1
    np.testing.assert_allclose(state.trained, theta, rtol=1e-11)
    np.testing.assert_allclose(state.memory.x, x, rtol=1e-11)
    np.testing.assert_allclose(state.memory.adjoint, adjoint, rtol=1e-11)


def test_many_steps_are_the_exact_hypergradient():
    soba = bl.Simultaneous(objective, outer_loss, jnp.zeros(4), optax.sgd(0.3))
    fidelity = bl.Fidelity(bl.Budget(2000))
    result, after = jax.jit(soba)(THETA, WHOLE, fidelity, soba.memory)
    exact = bl.hypergradient(
        lambda x, theta: outer_loss(x, theta, WHOLE[1]),
        bl.Minimization(lambda x, theta: objective(x, theta, WHOLE[0])),
        THETA,
        jnp.zeros(4),
    )
    np.testing.assert_allclose(result.gradient, exact.gradient, rtol=1e-9)
    np.testing.assert_allclose(after.adjoint, exact.adjoint.value, rtol=1e-9)
    assert int(result.primal.iterations) == 2000
    assert result.primal.status == bl.Status.BUDGET


def test_one_compilation_serves_every_number_of_steps():
    count = 0

    def counted(x, theta, batch):
        nonlocal count
        count += 1
        return objective(x, theta, batch)

    soba = bl.Simultaneous(counted, outer_loss, jnp.zeros(4), optax.sgd(0.3))
    task = bl.Task(THETA, hypergradient=soba, memory=soba.memory, batches=[WHOLE])
    ladder = bl.Ladder.iterations(1, 1, 6)
    controller = bl.ScheduledFidelity(ladder, lambda step: step)
    run = bl.optimize(task, optax.sgd(0.1), controller=controller, epochs=6, progress=False)
    assert run.summary.compilations == 1
    assert run.summary.primal_iterations == run.summary.adjoint_iterations > 6


@pytest.mark.slow
def test_minibatches_lead_to_the_nested_solution():
    soba = bl.Simultaneous(objective, outer_loss, jnp.zeros(4), optax.sgd(0.2))

    def validate(theta):
        exact = bl.solve(
            bl.Minimization(lambda x, theta: objective(x, theta, WHOLE[0])), theta, jnp.zeros(4)
        ).value
        return outer_loss(exact, theta, WHOLE[1])

    nested = bl.Task(
        THETA,
        lambda theta, batch, fidelity: validate(theta),
        validate=validate,
        full=bl.Budget(1),
    )
    best = bl.optimize(nested, optax.sgd(1.0), epochs=300, progress=False)
    task = bl.Task(
        THETA,
        hypergradient=soba,
        memory=soba.memory,
        batches=list(batches(20)),
        validate=validate,
        full=bl.Budget(1),
    )
    schedule = optax.exponential_decay(1.0, 900, 0.05)
    run = bl.optimize(task, optax.sgd(schedule), epochs=300, progress=False)
    start, end = best.history[0].metric, best.history[-1].metric
    assert (run.history[-1].metric - end) < 0.02 * (start - end)


def test_steps_that_are_too_long_are_a_failure_and_no_gradient():
    soba = bl.Simultaneous(objective, outer_loss, jnp.zeros(4), optax.sgd(1e3))
    result, _ = soba(THETA, WHOLE, bl.Fidelity(bl.Budget(400)), soba.memory)
    assert result.primal.status == bl.Status.NONFINITE
    assert not np.isfinite(result.gradient).all()


def test_messages():
    with pytest.raises(TypeError, match=r"objective.*x, theta, batch"):
        bl.Simultaneous(lambda x, theta: x, outer_loss, jnp.zeros(4), optax.sgd(0.1))
    with pytest.raises(TypeError, match="optimizer should be an optax optimizer"):
        bl.Simultaneous(objective, outer_loss, jnp.zeros(4), 0.1)
    with pytest.raises(TypeError, match="x0 must be a float"):
        bl.Simultaneous(objective, outer_loss, jnp.arange(4), optax.sgd(0.1))
    soba = bl.Simultaneous(objective, outer_loss, jnp.zeros(4), optax.sgd(0.1))
    with pytest.raises(TypeError, match="a batch should be a pair"):
        soba(THETA, jnp.ones(3), bl.Fidelity(bl.Budget(1)), soba.memory)
