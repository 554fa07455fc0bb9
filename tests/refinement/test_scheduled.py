"""Schedules: levels by the number of updates, and HOAG's tolerances."""

# Wrong types and missing arguments are under test here.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOptionalMemberAccess=false

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bilevel.budget import UNLIMITED
from bilevel.refinement.ladder import Ladder
from bilevel.refinement.scheduled import HoagTolerances, ScheduledFidelity

LADDER = Ladder.iterations(10, 10, 60)


def levels_of(controller, updates):
    state, levels = controller.init(), []
    update = jax.jit(controller.update)
    for _ in range(updates):
        levels.append(int(state.level))
        state = update(state)
    return levels, state


def test_without_a_schedule_each_update_takes_a_level():
    levels, state = levels_of(ScheduledFidelity(LADDER), 8)
    assert levels == [0, 1, 2, 3, 4, 5, 5, 5]
    assert int(state.updates) == 8


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (optax.linear_schedule(0, 4, 4), [0, 1, 2, 3, 4, 4, 4]),
        (optax.piecewise_constant_schedule(1.0, {2: 2.0, 4: 2.0}), [1, 1, 2, 2, 4, 4, 4]),
        (optax.join_schedules([lambda _: 0, lambda _: 5], [3]), [0, 0, 0, 5, 5, 5, 5]),
        (lambda count: 4.7 - count, [5, 4, 3, 2, 1, 0, 0]),
        (lambda count: count // 2, [0, 0, 1, 1, 2, 2, 3]),
        (lambda count: 3, [3] * 7),
    ],
)
def test_any_schedule_is_rounded_to_the_nearest_level(schedule, expected):
    levels, state = levels_of(ScheduledFidelity(LADDER, schedule), 7)
    assert levels == expected
    assert int(state.rejected) == 0


@pytest.mark.parametrize("far", [1e30, 2.0**31, 2**31 - 1])
def test_levels_beyond_the_ladder_are_its_ends(far):
    # Without bounds the conversion to int32 has no defined result.
    for ladder in (LADDER, Ladder.iterations(1, 1, 2**31 - 1)):
        assert int(ScheduledFidelity(ladder, lambda _: far).init().level) == len(ladder) - 1
        assert int(ScheduledFidelity(ladder, lambda _: -far).init().level) == 0


def test_where_the_schedule_is_not_finite_the_level_is_held():
    def schedule(count):
        return jnp.where((count == 2) | (count == 4), jnp.nan, 1.0 * count)

    levels, state = levels_of(ScheduledFidelity(LADDER, schedule), 6)
    assert levels == [0, 1, 1, 3, 3, 5]
    assert int(state.rejected) == 2
    infinite = ScheduledFidelity(LADDER, lambda _: jnp.inf).init()
    assert (int(infinite.level), int(infinite.rejected)) == (0, 1)


def test_measurements_are_not_read():
    controller = ScheduledFidelity(LADDER)
    state = controller.update(controller.init(), jnp.nan, gradient_norm=jnp.nan, error="none")
    assert (int(state.level), int(state.rejected)) == (1, 0)
    assert controller.requires == frozenset()


def test_the_count_of_updates_saturates():
    controller = ScheduledFidelity(LADDER, lambda count: jnp.where(count < 0, 0, 5))
    state = controller.init()
    end = jnp.asarray(2**31 - 1, jnp.int32)
    state = controller.update(type(state)(state.level, state.rejected, end))
    assert (int(state.level), int(state.updates)) == (5, 2**31 - 1)


def test_jit_scan_and_vmap_agree():
    controller = ScheduledFidelity(LADDER, optax.linear_schedule(0, 5, 9))
    levels, _ = levels_of(controller, 12)

    def body(state, _):
        return controller.update(state), controller.fidelity(state).budget.iterations

    _, scanned = jax.lax.scan(body, controller.init(), length=12)
    np.testing.assert_array_equal(scanned, [10 * level + 10 for level in levels])
    batch = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf + 3]), controller.init())
    moved = jax.vmap(controller.update)(batch)
    assert moved.level.tolist() == [levels[1], levels[4]]


@pytest.mark.parametrize(
    ("sequence", "formula"),
    [
        ("exponential", lambda k: 1e-3 * 0.9**k),
        ("quadratic", lambda k: 1e-3 / (k + 1) ** 2),
        ("cubic", lambda k: 1e-3 / (k + 1) ** 3),
    ],
)
def test_hoags_sequences(sequence, formula):
    schedule = HoagTolerances(sequence)
    updates = np.arange(2000)
    expected = np.maximum(formula(updates.astype(float)), 1e-12)
    # To 2000 updates: as whole numbers the cubes would leave int32 at 1291.
    np.testing.assert_allclose(schedule(jnp.asarray(updates, jnp.int32)), expected, rtol=1e-12)
    last = schedule.levels - 1
    assert float(schedule(last)) == pytest.approx(1e-12, rel=1e-9)
    assert float(schedule(last - 1)) > 1e-12 * (1 + 1e-9)
    controller = ScheduledFidelity.hoag(sequence, iterations=700)
    state = controller.init()
    update = jax.jit(controller.update)
    for update_number in range(4):
        fidelity = controller.fidelity(state)
        for budget in (fidelity.budget, fidelity.adjoint_budget):
            assert float(budget.rtol) == pytest.approx(formula(update_number), rel=1e-12)
            assert (int(budget.iterations), float(budget.atol)) == (700, 0.0)
        state = update(state)


def test_hoag_without_a_cap_has_none():
    controller = ScheduledFidelity.hoag("quadratic", start=1e-2, stop=1e-6)
    assert int(controller.fidelity(controller.init()).budget.iterations) == UNLIMITED
    assert len(controller.ladder) == 100
    assert float(controller.ladder.finest.budget.rtol) == pytest.approx(1e-6, rel=1e-12)


@given(
    st.sampled_from(["exponential", "quadratic", "cubic"]),
    st.floats(1e-4, 1.0),
    st.floats(0.2, 0.99),
    st.floats(1e-4, 1.0),
)
def test_hoags_ladder_is_no_longer_than_it_changes(sequence, start, factor, ratio):
    schedule = HoagTolerances(sequence, start, factor, start * ratio)
    last = schedule.levels - 1
    assert float(schedule(last)) == pytest.approx(schedule.stop, rel=1e-8)
    if last > 0:
        assert float(schedule(last - 1)) > schedule.stop


def test_equal_schedules_are_equal_controllers():
    assert ScheduledFidelity.hoag("cubic") == ScheduledFidelity.hoag("cubic")
    assert ScheduledFidelity.hoag("cubic") != ScheduledFidelity.hoag("quadratic")
    assert hash(ScheduledFidelity(LADDER)) == hash(ScheduledFidelity(LADDER))


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: ScheduledFidelity(5), ValueError, "ladder should be an instance of Ladder, got 5"),
        (lambda: ScheduledFidelity(LADDER, 3), ValueError, "schedule should be callable, got 3"),
        (ScheduledFidelity, TypeError, "the argument ladder is missing"),
        (lambda: ScheduledFidelity.hoag("linear"), ValueError, "sequence should be 'exponential'"),
        (lambda: ScheduledFidelity.hoag(start=-1.0), ValueError, "start should be greater than 0"),
        (lambda: ScheduledFidelity.hoag(factor=1.0), ValueError, "factor should be less than 1"),
        (lambda: ScheduledFidelity.hoag(stop=1.0), ValueError, "stop should be at most start"),
        (lambda: ScheduledFidelity.hoag(iterations=0), ValueError, "iterations should be greater"),
        (
            lambda: ScheduledFidelity(LADDER, lambda _: "high").init(),
            TypeError,
            r"schedule\(updates\) should be a real number, got 'high'",
        ),
        (
            lambda: ScheduledFidelity(LADDER, lambda _: jnp.ones(2)).init(),
            ValueError,
            r"schedule\(updates\) should be one number, got shape \(2,\)",
        ),
    ],
)
def test_bad_input_is_refused_in_one_line(build, error, message):
    with pytest.raises(error, match=message) as caught:
        build()
    assert "\n" not in str(caught.value)
