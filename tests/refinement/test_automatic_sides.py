"""Automatic refinement of primal and adjoint apart: each by its own part of the error."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bilevel.budget import Budget
from bilevel.refinement.automatic import AutomaticRefinement, Differences
from bilevel.refinement.fidelity import Fidelity
from bilevel.refinement.ladder import Ladder

LADDER = Ladder.iterations(1, 1, 400)


class Solves:
    """A gradient off by a ρᴷ for the primal's truncation and |g| b σᴹ for the adjoint's."""

    def __init__(self, primal, adjoint, size=1.0, part=1.0):
        self.primal, self.adjoint, self.size, self.part = primal, adjoint, size, part

    def errors(self, fidelity, norm):
        K, M = float(fidelity.budget.iterations), float(fidelity.adjoint_budget.iterations)
        return self.size * self.primal**K, norm * self.part * self.adjoint**M

    def gradient(self, fidelity, norm):
        return norm + sum(self.errors(fidelity, norm))


def automatic(ladder):
    """With parts that the figures below are for, whatever the defaults are."""
    return AutomaticRefinement(ladder, signal=0.1, noise=0.3)


def trained(controller, solves, norms):
    """What a loop does that computes a gradient again where it is not accepted."""
    state, path = controller.init(), []
    for norm in norms:
        for _ in range(12):
            fidelity = controller.fidelity(state)
            found = None
            if bool(controller.due(state)):
                a, b, c = (solves.gradient(f, norm) for f in controller.compared(state))
                found = Differences(abs(a - b), abs(b - c))
            state = controller.update(state, gradient_norm=norm, error=found)
            if bool(state.accepted):
                break
        path.append((int(fidelity.budget.iterations), int(fidelity.adjoint_budget.iterations)))
    return path, state


@settings(max_examples=40)
@given(
    primal=st.floats(0.5, 0.95),
    adjoint=st.floats(0.5, 0.95),
    size=st.floats(1.0, 1e3),
    norm=st.floats(1e-3, 1.0),
)
def test_both_settle_where_they_cost_least_together(primal, adjoint, size, norm):
    """min K + M with e_K + e_M <= a tenth of what is no error, K >= M."""
    solves = Solves(primal, adjoint, size)
    path, _ = trained(automatic(LADDER), solves, [norm] * 80)
    K, M = path[-1]
    allowed = 0.1 * norm / 1.1
    fixed = Fidelity(Budget(K), Budget(M))
    # Never more error than is allowed, but for a model in single precision.
    assert sum(solves.errors(fixed, norm)) <= 1.05 * allowed
    least = min(
        k + m
        for m in range(1, 400)
        if (left := allowed - norm * adjoint**m) > 0
        and (k := max(m, math.ceil(math.log(left / size) / math.log(primal)))) <= 400
    )
    assert K >= M
    # Its rule is for errors of any size; whole numbers cost it up to one iteration a side.
    assert 1.05 * least + 3 >= K + M


def test_an_adjoint_that_shrinks_with_the_gradient_keeps_its_budget():
    """The primal's error is absolute: K grows by log 0.95 / log 0.9 = 0.49 an update."""
    norms = 0.95 ** np.arange(200)
    path, _ = trained(automatic(LADDER), Solves(0.9, 0.9), norms)
    assert path[150][0] - path[50][0] == pytest.approx(0.487 * 100, abs=3)
    assert abs(path[150][1] - path[50][1]) <= 1


def test_a_side_that_costs_no_error_leaves_all_of_it_to_the_other():
    """Where no adjoint is iterated, K is what the whole allowance takes, and M the coarsest."""
    norm = 1e-2
    path, _ = trained(automatic(LADDER), Solves(0.9, 0.9, part=0.0), [norm] * 100)
    K, M = path[-1]
    assert math.ceil(math.log(0.1 * norm / 1.1) / math.log(0.9)) == K
    assert M == 1


def test_the_primal_is_no_coarser_than_the_adjoint():
    """Of a primal without error (a network that is zero yet) nothing is known for long."""
    path, _ = trained(automatic(LADDER), Solves(0.9, 0.9, size=0.0), [1.0] * 50)
    assert all(K >= M for K, M in path)
    assert path[-1][1] > 10


def test_both_are_compared_before_a_gradient_is_used():
    controller = automatic(LADDER)
    state = controller.init()
    sides = []
    for accepted in (False, True):
        assert bool(controller.due(state))
        sides.append([int(f.adjoint_budget.iterations) for f in controller.compared(state)])
        state = controller.update(state, gradient_norm=1.0, error=Differences(0.02, 0.01))
        assert bool(state.accepted) is accepted
    assert sides == [[1, 1, 1], [1, 2, 3]]


def test_budgets_of_an_adjoint_of_its_own_are_its_places():
    """Ten times the iterations at each level: ten times fewer levels."""
    ladder = LADDER.with_adjoint(Ladder.iterations(10, 10, 4000))
    one, other = (
        trained(automatic(chosen), Solves(0.8, 0.95), [1.0] * 100)[0][-1]
        for chosen in (LADDER, ladder)
    )
    assert one[1] <= other[1] <= one[1] + 15


@pytest.mark.parametrize("adjoint", [None, Budget(20)])
def test_without_budgets_to_move_apart_there_is_one_level(adjoint):
    controller = automatic(LADDER.with_adjoint(adjoint))
    state = controller.init()
    assert state.levels.shape == (1,)
    fidelity = controller.fidelity(state)
    assert (fidelity.adjoint_budget is None) is (adjoint is None)


def test_jit_decides_as_numpy_does():
    controller, solves = automatic(LADDER), Solves(0.85, 0.7, 3.0)
    update, compared = jax.jit(controller.update), jax.jit(controller.compared)
    state, traced = controller.init(), jax.tree.map(jnp.asarray, controller.init())
    for norm in 0.97 ** np.arange(100, dtype=np.float32):
        assert np.array_equal(state.levels, traced.levels)
        assert int(state.side) == int(traced.side)
        assert bool(state.due) == bool(traced.due)
        found = None
        if bool(controller.due(state)):
            numbers = [
                [(int(f.budget.iterations), int(f.adjoint_budget.iterations)) for f in levels]
                for levels in (controller.compared(state), compared(traced))
            ]
            assert numbers[0] == numbers[1]
            a, b, c = (solves.gradient(f, norm) for f in controller.compared(state))
            found = Differences(np.float32(abs(a - b)), np.float32(abs(b - c)))
        state = controller.update(state, gradient_norm=norm, error=found)
        traced = update(traced, gradient_norm=norm, error=found)
