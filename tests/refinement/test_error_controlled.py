"""Error control: which solve moves, when, and how far."""

# Wrong types and missing arguments are under test here.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOptionalMemberAccess=false

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bilevel.budget import Budget
from bilevel.refinement.error_controlled import ErrorControlled
from bilevel.refinement.ladder import Ladder

LADDER = Ladder.tolerances(start=1e-1, factor=0.5, stop=1e-6)
TOP = len(LADDER) - 1


class Parts(NamedTuple):
    primal: float
    adjoint: float
    total: float


def both(primal, adjoint):
    return Parts(primal, adjoint, primal + adjoint)


@functools.cache
def compiled(controller):
    return jax.jit(controller.update)


def run(controller, errors, norm=1.0, state=None):
    state = controller.init() if state is None else state
    update = compiled(controller)
    path = []
    for error in errors:
        state = update(state, gradient_norm=norm, error=error)
        path.append((int(state.level), int(state.adjoint_level)))
    return path, state


def test_the_hypergradient_is_accepted_below_the_allowance():
    controller = ErrorControlled(LADDER, eta=0.25)
    for error, accepted in ((0.75, True), (0.7500001, False), (0.0, True)):
        _, state = run(controller, [error])
        assert bool(state.accepted) is accepted
        assert int(state.level) == int(state.adjoint_level) == int(not accepted)
    assert not bool(controller.init().accepted)


@pytest.mark.parametrize(
    ("error", "moved"),
    [
        (both(0.8, 0.1), (1, 0)),
        (both(0.1, 0.8), (0, 1)),
        (both(0.3, 0.3), (1, 1)),
        (both(0.2, 0.2), (0, 0)),
        # The parts keep to their shares, but the estimate of the whole does not add up.
        (Parts(0.2, 0.1, 0.9), (1, 0)),
        (Parts(0.1, 0.2, 0.9), (0, 1)),
        (Parts(0.2, 0.2, 0.9), (1, 1)),
        # Each above its share, but the whole is small enough: they cancel.
        (Parts(0.4, 0.4, 0.1), (0, 0)),
        (0.9, (1, 1)),
        (0.4, (0, 0)),
    ],
)
def test_the_solve_to_blame_is_tightened(error, moved):
    path, state = run(ErrorControlled(LADDER), [error])
    assert path == [moved]
    assert bool(state.accepted) is (moved == (0, 0))


def test_the_budgets_come_from_two_levels():
    controller = ErrorControlled(LADDER, growth=1)
    _, state = run(controller, [both(0.9, 0.9), both(0.9, 0.0), both(0.9, 0.0)])
    fidelity = controller.fidelity(state)
    assert float(fidelity.budget.rtol) == pytest.approx(0.1 * 0.5**3)
    assert float(fidelity.adjoint_budget.rtol) == pytest.approx(0.1 * 0.5)
    assert int(fidelity.level) == 3


def test_failures_in_a_row_take_growing_strides():
    path, state = run(ErrorControlled(LADDER), [both(9.0, 0.0)] * 6)
    assert path == [(1, 0), (3, 0), (7, 0), (15, 0), (TOP, 0), (TOP, 1)]
    assert int(state.stride) <= 2 * (TOP + 1)
    single, _ = run(ErrorControlled(LADDER, growth=1), [both(9.0, 0.0)] * 4)
    assert [level for level, _ in single] == [1, 2, 3, 4]


def test_a_success_ends_the_row():
    path, _ = run(ErrorControlled(LADDER), [0.9, 0.9, 0.4, 0.9])
    assert [level for level, _ in path] == [1, 3, 3, 4]


def test_where_one_stands_at_the_top_the_other_one_moves():
    controller = ErrorControlled(Ladder.tolerances(1e-1, 0.5, 2.5e-2), growth=1)
    path, _ = run(controller, [both(0.9, 0.0)] * 6)
    assert path == [(1, 0), (2, 0), (2, 1), (2, 2), (2, 2), (2, 2)]
    path, _ = run(controller, [both(0.0, 0.9)] * 4)
    assert path == [(0, 1), (0, 2), (1, 2), (2, 2)]


def test_small_errors_give_back_one_level_after_a_while():
    controller = ErrorControlled(LADDER, patience=3, margin=0.5)
    _, high = run(controller, [both(9.0, 9.0)] * 3)
    assert int(high.level) == 7
    # Allowed is 0.5, a share of it 0.25, and small is below 0.125.
    path, _ = run(controller, [both(0.1, 0.2)] * 7, state=high)
    assert path == [(7, 7), (7, 7), (6, 7), (6, 7), (6, 7), (5, 7), (5, 7)]
    # One that is accepted but not small starts the count anew.
    errors = [both(0.1, 0.1)] * 2 + [both(0.2, 0.1)] + [both(0.1, 0.1)] * 3
    path, _ = run(controller, errors, state=high)
    assert path == [(7, 7), (7, 7), (7, 6), (7, 6), (7, 6), (6, 5)]


def test_patience_none_never_gives_back():
    controller = ErrorControlled(LADDER, patience=None)
    path, _ = run(controller, [0.9] + [0.0] * 30)
    assert path[-1] == (1, 1)


def test_nothing_is_coarser_than_the_coarsest():
    path, _ = run(ErrorControlled(LADDER, patience=1), [0.0] * 4)
    assert path == [(0, 0)] * 4


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0])
def test_an_unusable_measurement_tightens_and_is_counted(bad):
    # An error that cannot be estimated is not a small one: to hold the level would freeze a
    # controller that starts with one iteration, from which no rate can be told.
    controller = ErrorControlled(LADDER)
    path, state = run(controller, [bad, bad])
    assert path == [(1, 1), (3, 3)]
    assert (int(state.rejected), bool(state.accepted)) == (2, False)
    path, state = run(controller, [0.1], norm=bad)
    assert path == [(1, 1)]
    assert (int(state.rejected), bool(state.accepted)) == (1, False)
    for error, moved in ((Parts(bad, 0.0, bad), (1, 0)), (Parts(0.0, bad, bad), (0, 1))):
        path, state = run(controller, [error])
        assert path == [moved]
        assert int(state.rejected) == 1
    # The parts are known and equal, the whole is not.
    path, _ = run(controller, [Parts(0.1, 0.1, bad)])
    assert path == [(1, 1)]


def test_it_recovers_after_unusable_measurements():
    controller = ErrorControlled(LADDER, patience=2)
    path, state = run(controller, [math.nan, 0.1, 0.1, 0.1, 0.1])
    assert path[0] == (1, 1)
    assert path[-1] == (0, 0)
    assert (int(state.rejected), bool(state.accepted)) == (1, True)


def test_a_zero_hypergradient_is_accepted_only_without_error():
    # At a stationary point; a zero that the error says may be anything is not one.
    controller = ErrorControlled(LADDER)
    assert bool(run(controller, [0.0], norm=0.0)[1].accepted)
    assert not bool(run(controller, [1e-9], norm=0.0)[1].accepted)


@given(
    scale=st.sampled_from([1e-30, 1e-8, 1e8, 1e30]),
    errors=st.lists(st.tuples(st.floats(0, 2), st.floats(0, 2)), min_size=1, max_size=20),
)
def test_scale_does_not_matter(scale, errors):
    controller = ErrorControlled(LADDER, patience=2)
    scale = 2.0 ** round(math.log2(scale))  # exactly, so that ties stay ties
    plain, _ = run(controller, [both(*error) for error in errors])
    scaled, _ = run(
        controller, [Parts(*(scale * p for p in both(*error))) for error in errors], norm=scale
    )
    assert plain == scaled


def test_it_settles_where_the_error_is_just_small_enough():
    # Errors proportional to the tolerances, as those of a linear solve are.
    ladder = Ladder.tolerances(start=1.0, factor=0.5, stop=1e-9)
    controller = ErrorControlled(ladder, eta=0.5, margin=0.4, patience=5)
    update, state, path = compiled(controller), controller.init(), []
    for step in range(120):
        norm = 1.0 if step < 60 else 0.01
        fidelity = controller.fidelity(state)
        error = both(20.0 * float(fidelity.budget.rtol), 0.5 * float(fidelity.adjoint_budget.rtol))
        state = update(state, gradient_norm=norm, error=error)
        path.append((int(state.level), int(state.adjoint_level), bool(state.accepted)))
    # 20 tol <= 0.25 from level 7, 0.5 tol <= 0.25 from level 1; a hundred times less: 13, 8.
    assert all(accepted for *_, accepted in path[10:60])
    assert all(accepted for *_, accepted in path[70:])
    # One more is kept where it is not small enough to be given back.
    assert path[59][0] in (7, 8)
    assert path[119][0] in (13, 14)
    assert path[59][1] in (1, 2)
    assert path[119][1] in (8, 9)


def test_levels_stay_on_the_longest_of_ladders():
    ladder = Ladder.iterations(1, 1, 2**31 - 1)
    controller = ErrorControlled(ladder, growth=16)
    path, state = run(controller, [9.0] * 200)
    assert all(0 <= level < len(ladder) for level, _ in path)
    assert path[-1] == (len(ladder) - 1,) * 2
    assert int(state.stride) > 0


def test_a_plain_loop_jit_scan_and_vmap_agree():
    controller = ErrorControlled(LADDER, patience=2)
    rng = np.random.default_rng(0)
    primal, adjoint = rng.uniform(0, 0.6, (2, 40))
    primal[5], adjoint[11] = np.nan, np.inf
    errors = [both(*pair) for pair in zip(primal.tolist(), adjoint.tolist(), strict=True)]
    path, jitted = run(controller, errors)
    plain = controller.init()
    for error in errors:
        plain = controller.update(plain, gradient_norm=1.0, error=error)

    def body(state, error):
        state = controller.update(state, gradient_norm=1.0, error=error)
        return state, (state.level, state.adjoint_level)

    stacked = both(jnp.asarray(primal), jnp.asarray(adjoint))
    scanned, (levels, adjoint_levels) = jax.lax.scan(body, controller.init(), stacked)
    assert list(zip(levels.tolist(), adjoint_levels.tolist(), strict=True)) == path
    for other in (jitted, scanned):
        for one, two in zip(jax.tree.leaves(plain), jax.tree.leaves(other), strict=True):
            assert one == two
    batch = jax.tree.map(lambda leaf: jnp.stack([leaf] * 40), controller.init())
    moved = jax.vmap(lambda state, error: controller.update(state, gradient_norm=1.0, error=error))(
        batch, stacked
    )
    expected = [run(controller, [error])[0][0] for error in errors[:6]]
    found = zip(moved.level.tolist(), moved.adjoint_level.tolist(), strict=True)
    assert list(found)[:6] == expected


def test_one_compilation_for_all_levels():
    controller = ErrorControlled(LADDER)
    traced = []

    @jax.jit
    def step(state, error):
        traced.append(error)
        state = controller.update(state, gradient_norm=1.0, error=error)
        return state, controller.fidelity(state)

    state = controller.init()
    for error in (9.0, 9.0, 9.0, 0.1, 0.1):
        state, _ = step(state, error)
    assert len(traced) == 1


def test_float32_stays_float32():
    controller = ErrorControlled(LADDER, eta=0.3)
    # In float32 the allowance is float32(0.7), above the float64 value.
    error = np.float32(0.7)
    assert float(error) < 0.7
    state = controller.update(
        controller.init(), gradient_norm=np.float32(1.0), error=np.nextafter(error, np.float32(1))
    )
    assert not bool(state.accepted)
    assert bool(
        controller.update(controller.init(), gradient_norm=np.float32(1.0), error=error).accepted
    )


@pytest.mark.parametrize(
    ("measurements", "error", "message"),
    [
        ({"error": 0.1}, TypeError, "gradient_norm is missing. Pass gradient_norm= and error="),
        ({"gradient_norm": 0.1}, TypeError, "error is missing"),
        ({"gradient_norm": "1", "error": 0.1}, TypeError, "gradient_norm should be a real number"),
        ({"gradient_norm": 1.0, "error": object()}, TypeError, "error should be a real number"),
        (
            {"gradient_norm": np.ones(2), "error": 0.1},
            ValueError,
            r"gradient_norm should be one number, got shape \(2,\)",
        ),
        (
            {"gradient_norm": 1.0, "error": Parts(0.1, None, 0.1)},
            TypeError,
            "error.adjoint should be a real number, got None",
        ),
    ],
)
def test_bad_measurements_are_refused(measurements, error, message):
    controller = ErrorControlled(LADDER)
    with pytest.raises(error, match=f"^ErrorControlled.update: {message}"):
        controller.update(controller.init(), 0.5, **measurements)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ErrorControlled(Budget(3)), "ladder should be an instance of Ladder"),
        (lambda: ErrorControlled(LADDER, eta=1.0), "eta should be less than 1, got 1.0"),
        (lambda: ErrorControlled(LADDER, eta=0.0), "eta should be greater than 0, got 0.0"),
        (lambda: ErrorControlled(LADDER, patience=0), "patience should be greater than or equal"),
        (lambda: ErrorControlled(LADDER, patience=1.5), "patience should be a valid integer"),
        (lambda: ErrorControlled(LADDER, margin=1.0), "margin should be less than 1, got 1.0"),
        (lambda: ErrorControlled(LADDER, growth=0), "growth should be greater than or equal to 1"),
        (lambda: ErrorControlled(LADDER.with_adjoint(None)), "ladder should have adjoint budgets"),
        (
            lambda: ErrorControlled(Ladder.iterations(1, 1, 2).with_static(grid=[8, 16])),
            "the static parts of ladder should be the same at every level",
        ),
    ],
)
def test_bad_settings_are_refused_in_one_line(build, message):
    with pytest.raises(ValueError, match=f"^ErrorControlled: {message}") as caught:
        build()
    assert "\n" not in str(caught.value)
