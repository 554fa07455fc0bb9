"""Automatic refinement: the level that a measured error asks for, and no other."""

# Wrong types and missing arguments are under test here.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOptionalMemberAccess=false

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bilevel.budget import Budget
from bilevel.refinement.automatic import AutomaticRefinement, Differences
from bilevel.refinement.controller import Controller
from bilevel.refinement.ladder import Ladder, positions

LADDER = Ladder.iterations(1, 1, 200)

TIED = LADDER.with_adjoint(Budget(50))
"""One adjoint budget at all levels: there is one side to be moved."""


class Solver:
    """A solver whose gradient is off by `size` · `rate` ** K; it is what a loop measures."""

    def __init__(self, rate, size=1.0, noise=0.0):
        self.rate, self.size, self.noise = rate, size, noise

    def error(self, fidelity):
        return self.size * self.rate ** float(fidelity.budget.iterations)

    def differences(self, compared):
        coarse, middle, fine = (self.error(fidelity) for fidelity in compared)
        return Differences(coarse - middle, middle - fine, self.noise)


def trained(controller, solver, norms, state=None):
    """What a loop does; the levels, the work and the comparisons' work."""
    state = controller.init() if state is None else state
    path, work, spent = [], 0.0, 0.0
    for norm in norms:
        fidelity = controller.fidelity(state)
        path.append(int(fidelity.budget.iterations))
        work += path[-1]
        error = None
        if bool(controller.due(state)):
            compared = controller.compared(state)
            error = solver.differences(compared)
            spent += sum(int(f.budget.iterations) for f in compared) - path[-1]
        state = controller.update(state, gradient_norm=norm, error=error)
    return path, state, work, spent


def automatic(ladder, **parts):
    """With parts that the figures below are for, whatever the defaults are."""
    return AutomaticRefinement(ladder, **({"signal": 0.1, "noise": 0.3} | parts))


def needed(solver, signal, noise=0.0):
    """Fewest iterations that leave an error e <= 0.1 (signal - e) + 0.3 noise."""
    allowed = (0.1 * signal + 0.3 * noise) / 1.1
    return math.log(solver.size / allowed) / -math.log(solver.rate)


@given(rate=st.floats(0.3, 0.97), size=st.floats(1e-3, 1e3), norm=st.floats(1e-4, 1e4))
def test_it_settles_at_the_fewest_iterations_that_the_allowance_takes(rate, size, norm):
    solver, controller = Solver(rate, size), automatic(LADDER, signal=0.1)
    path, *_ = trained(controller, solver, [norm] * 400)
    least = needed(solver, norm)
    # Rounding of a model kept in single precision may cost an iteration or two.
    assert max(1.0, least - 0.1) <= path[-1] <= max(1.0, min(least, 200)) * 1.02 + 1.1 or (
        least > 200 and path[-1] == 200
    )


def test_it_follows_a_gradient_that_shrinks():
    """K grows by log(shrinkage) / log(rate) an update: the error stays a tenth of the norm."""
    solver, controller = Solver(0.9), automatic(Ladder.iterations(1, 1, 500))
    norms = 0.95 ** np.arange(300)
    path, *_ = trained(controller, solver, norms)
    least = [needed(solver, norm) for norm in norms]
    # The average of the norm lags behind by three updates, and half an iteration each.
    assert all(k >= l - 3 for k, l in zip(path[20:], least[20:], strict=True))
    assert all(k <= l + 3 for k, l in zip(path[20:], least[20:], strict=True))


def test_it_comes_down_where_the_gradient_grows():
    solver, controller = Solver(0.8), automatic(LADDER)
    path, state, *_ = trained(controller, solver, [1e-3] * 100)
    after, *_ = trained(controller, solver, [1.0] * 300, state)
    assert path[-1] > 35
    assert after[-1] == math.ceil(needed(solver, 1.0))


def test_noise_hides_an_error_in_its_own_proportion():
    quiet, noisy = Solver(0.8), Solver(0.8, noise=0.6)
    controller = automatic(LADDER, signal=0.1, noise=0.3)
    at = [trained(controller, solver, [1.0] * 200)[0][-1] for solver in (quiet, noisy)]
    # Signal and noise are the legs of the norm: 0.8 and 0.6.
    assert at[0] == math.ceil(needed(quiet, 1.0))
    assert at[1] == math.ceil(needed(noisy, 0.8, 0.6))


def test_noise_that_was_not_measured_leaves_what_is_known_of_it():
    controller = automatic(LADDER)
    state = controller.update(
        controller.init(), gradient_norm=1.0, error=Differences(0.4, 0.2, 0.5)
    )
    after = controller.update(state, gradient_norm=1.0, error=Differences(0.4, 0.2, math.nan))
    assert float(state.noise) == float(after.noise) == 0.5
    assert int(after.rejected) == 0


def test_comparisons_take_their_share_of_the_work():
    for share in (0.02, 0.05, 0.2):
        controller = automatic(LADDER, share=share)
        *_, work, spent = trained(controller, Solver(0.8), [1e-2] * 2000)
        # Besides the share: after 1, 2, 4, ..., 1024 updates, at 2 · 32 iterations.
        assert 0.8 * share * work < spent < share * work + 11 * 64


def test_steps_into_the_unknown_are_compared_and_double_at_the_most():
    # A model of the first comparison alone would go from 3 to 70 at once.
    controller = automatic(LADDER)
    path, *_ = trained(controller, Solver(0.9), [1e-2] * 60)
    assert all(later <= 2 * before + 1 for before, later in itertools.pairwise(path))
    assert path[-1] == math.ceil(needed(Solver(0.9), 1e-2))


def test_a_solver_that_does_not_converge_is_given_the_whole_ladder():
    class Stuck(Solver):
        def differences(self, compared):
            return Differences(1.0, 1.0)

    ladder = Ladder.iterations(1, 1, 40)
    path, *_ = trained(automatic(ladder), Stuck(0.5), [1.0] * 400)
    assert path[-1] == 40


def test_differences_within_rounding_leave_the_rate_alone():
    controller = automatic(LADDER)
    *_, state = trained(controller, Solver(0.5), [1.0] * 50)[:2]
    after = controller.update(state, gradient_norm=np.float32(1.0), error=Differences(2e-8, 3e-8))
    assert np.array_equal(after.rate, state.rate)
    assert int(after.level) <= int(state.level)


def test_a_gradient_that_is_mostly_error_is_not_accepted():
    controller = automatic(TIED)
    state = controller.init()
    for coarser, finer, accepted in ((0.8, 0.4, False), (0.05, 0.025, True)):
        after = controller.update(state, gradient_norm=1.0, error=Differences(coarser, finer))
        assert bool(after.accepted) is accepted
        # Its norm is no measure of the next.
        assert float(after.norm) == float(accepted)
        assert int(after.level) == (2 if not accepted else 1)


@pytest.mark.parametrize("norm", [math.nan, math.inf, -1.0])
def test_a_norm_that_is_none_is_answered_by_more_iterations(norm):
    controller = automatic(LADDER)
    _, state, *_ = trained(controller, Solver(0.5), [1.0] * 50)
    after = controller.update(state, gradient_norm=norm)
    assert positions(LADDER)[after.level] == 2 * positions(LADDER)[state.level] + 1 or (
        positions(LADDER)[after.level] == 2 * positions(LADDER)[state.level]
    )
    assert int(after.rejected) == 1
    assert float(after.norm) == float(state.norm)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0])
def test_differences_that_are_none_change_nothing_of_the_model(bad):
    controller = automatic(LADDER)
    _, state, *_ = trained(controller, Solver(0.5), [1.0] * 50)
    for error in (Differences(bad, 0.1), Differences(0.2, bad)):
        after = controller.update(state, gradient_norm=1.0, error=error)
        assert int(after.rejected) == 1
        assert int(after.level) == int(state.level)
        for name in ("log_error", "place", "rate", "noise"):
            assert np.array_equal(getattr(after, name), getattr(state, name)), name


def test_a_ladder_of_one_level_is_never_compared():
    controller = automatic(Ladder.iterations(7, 1, 7))
    path, state, _, spent = trained(controller, Solver(0.5), [1.0, 1e-9, math.nan] * 5)
    assert set(path) == {7}
    assert spent == 0
    assert not bool(controller.due(state))


def test_a_ladder_of_two_levels_takes_the_second_where_the_first_is_off():
    controller = automatic(Ladder.of([Budget(2), Budget(20)]))
    coarse, *_ = trained(controller, Solver(0.1), [1.0] * 50)
    fine, *_ = trained(controller, Solver(0.9), [1.0] * 50)
    assert (coarse[-1], fine[-1]) == (2, 20)


def test_tolerances_are_a_ladder_like_any_other():
    ladder = Ladder.tolerances(1e-1, 0.1, 1e-10)

    class ByTolerance(Solver):
        def error(self, fidelity):
            return 5.0 * float(fidelity.budget.rtol)

    controller = automatic(ladder)
    state = controller.init()
    for _ in range(200):
        error = None
        if bool(controller.due(state)):
            error = ByTolerance(0.1).differences(controller.compared(state))
        state = controller.update(state, gradient_norm=1e-3, error=error)
    # 5 rtol <= 1e-4 at 1e-5, but not at 1e-4.
    assert float(controller.fidelity(state).budget.rtol) == pytest.approx(1e-5)


def test_jit_decides_as_numpy_does():
    controller, solver = automatic(LADDER), Solver(0.85, noise=0.3)
    update, due, compared = (
        jax.jit(controller.update),
        jax.jit(controller.due),
        jax.jit(controller.compared),
    )
    state, traced = controller.init(), jax.tree.map(jnp.asarray, controller.init())
    for norm in 0.97 ** np.arange(120, dtype=np.float32):
        assert int(state.level) == int(traced.level)
        assert bool(controller.due(state)) == bool(due(traced))
        error = None
        if bool(controller.due(state)):
            found = [int(f.budget.iterations) for f in controller.compared(state)]
            assert found == [int(f.budget.iterations) for f in compared(traced)]
            error = Differences(*map(np.float32, solver.differences(controller.compared(state))))
        state = controller.update(state, gradient_norm=norm, error=error)
        traced = update(traced, gradient_norm=norm, error=error)
    assert update._cache_size() == 2  # with a comparison, and without


def test_its_state_never_changes_its_kind():
    controller = automatic(LADDER)
    state = controller.init()
    kinds = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state)
    for norm, error in ((1.0, Differences(0.4, 0.2)), (np.float64(1e-9), None), (math.nan, None)):
        state = controller.update(state, gradient_norm=norm, error=error)
        assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state) == kinds
    assert isinstance(controller, Controller)
    assert hash(controller) == hash(automatic(LADDER))


def test_levels_compared_hold_the_one_that_is_used():
    controller = automatic(TIED)
    for level in (0, 1, 2, 50, 198, 199):
        state = controller.init()._replace(levels=np.int32([level]))
        places = [int(f.level) for f in controller.compared(state)]
        assert level in places
        assert places == sorted(set(places))


def test_what_it_needs_is_asked_for():
    controller = automatic(LADDER)
    state = controller.init()
    with pytest.raises(TypeError, match="gradient_norm is missing"):
        controller.update(state, 0.3)
    with pytest.raises(TypeError, match=r"error should be bl\.Differences"):
        controller.update(state, gradient_norm=1.0, error=0.1)
    for name in ("signal", "noise", "share"):
        with pytest.raises(ValueError, match=name):
            AutomaticRefinement(LADDER, **{name: 1.0})


def test_levels_that_agree_because_of_a_tolerance_do_not_let_the_level_fall_through():
    """Above 60 iterations all gradients are one: the error of the lowest compared is what is known.

    The error allowed, 0.1, takes 46 iterations. The level may step below that where it is compared
    at once, by a factor of two, and not on to where the solver has hardly begun.
    """
    controller = automatic(Ladder.iterations(1, 1, 400).with_adjoint(Budget(9)))

    def gradient(fidelity):
        return 1.0 + math.exp(-0.05 * min(int(fidelity.budget.iterations), 60))

    state = controller.init()._replace(
        levels=np.int32([199]),
        comparisons=np.int32([3]),
        updates=np.int32(64),
        compared_at=np.int32([32]),
        rate=np.float32([0.05]),
        place=np.float32([200]),
        log_error=np.float32([-3.0]),
        least=np.float32([100]),
        highest=np.float32([200]),
        norm=np.float32(1),
        due=np.True_,
    )
    visited = []
    for _ in range(40):
        difference = None
        if controller.due(state):
            a, b, c = (gradient(fidelity) for fidelity in controller.compared(state))
            difference = Differences(abs(a - b), abs(b - c))
        g = gradient(controller.fidelity(state))
        state = controller.update(state, gradient_norm=g, error=difference)
        visited.append(int(controller.fidelity(state).budget.iterations))
    assert min(visited) > 20
    assert 40 <= visited[-1] <= 60
