"""The search for the cheapest level: exact where levels are in order, bounded where not."""

import math
from collections.abc import Callable, Sequence

from hypothesis import given
from hypothesis import strategies as st

from bilevel.outer.search import cheapest_level

LEVELS = st.integers(1, 130)


class Watch:
    """A function of a level that notes where it was called."""

    def __init__(self, function: Callable[[int], float]):
        self.function = function
        self.calls: list[int] = []

    def __call__(self, level: int) -> float:
        self.calls.append(level)
        return self.function(level)


@st.composite
def rising(draw: st.DrawFn) -> Sequence[float]:
    """Sizes of levels, evenly or unevenly apart."""
    steps = draw(st.lists(st.integers(1, 1000), min_size=1, max_size=130))
    return [sum(steps[: place + 1]) for place in range(len(steps))]


@given(rising(), st.data())
def test_levels_in_order_are_searched_exactly(sizes: Sequence[float], data: st.DataObject):
    top = len(sizes) - 1
    answer = data.draw(st.integers(0, top))
    steepness = data.draw(st.floats(1e-3, 10.0))
    look = Watch(lambda level: steepness * (answer - level))
    trials = max(3, math.ceil(math.log2(len(sizes))))
    assert cheapest_level(look, sizes, trials, known={top: 0.0}) == answer
    assert len(look.calls) == len(set(look.calls)) <= trials
    assert top not in look.calls


@given(rising(), st.integers(3, 9), st.data())
def test_any_noise_leaves_it_in_its_trials_and_with_what_it_saw(
    sizes: Sequence[float], trials: int, data: st.DataObject
):
    values = st.floats(-2.0, 2.0) | st.just(math.inf)
    count = len(sizes)
    seen = data.draw(st.lists(values, min_size=count, max_size=count))
    truth = data.draw(st.lists(values, min_size=count, max_size=count))
    known = {count - 1: truth[-1]} if data.draw(st.booleans()) else {}
    look, judge = Watch(seen.__getitem__), Watch(truth.__getitem__)
    level = cheapest_level(look, sizes, trials, judge=judge, known=known)
    assert len(look.calls) == len(set(look.calls)) <= trials
    assert len(judge.calls) == len(set(judge.calls))
    # Looks are for what is judged; without any left some more levels may be judged at once.
    assert len(judge.calls) <= len(look.calls) + trials
    # The answer was judged; it is the lowest that passed all the looks that it had.
    final = {each: seen[each] for each in look.calls}
    final |= {each: truth[each] for each in [*judge.calls, *known]}
    passed = [each for each, by in final.items() if by <= 0]
    assert level == min(passed, default=None)
    assert level is None or level in judge.calls or level in known


def test_one_lucky_look_is_found_out():
    # Level 4 seems good enough once, and is not; from 8 on levels really are.
    look = Watch(lambda level: -1.0 if level == 4 else 0.1 * (8 - level))
    judge = Watch(lambda level: 0.1 * (8 - level))
    sizes = range(1, 17)
    assert cheapest_level(look, sizes, 9, judge=judge, known={15: -0.7}) == 8


def test_what_a_lucky_look_leaves_open_is_judged():
    """Trials are used up below 8, which one seed took for enough: 25 is not the answer yet."""
    judge = Watch(lambda level: 10 - level)
    look = Watch(lambda level: 7 - level)
    found = cheapest_level(look, range(1, 26), 4, judge=judge, known={24: -1.0})
    assert found is not None
    assert 10 <= found <= 12
    assert len(judge.calls) <= 4 + 4


def test_one_unlucky_look_is_given_another():
    # Level 7 misses by little once, and is good enough on the average.
    look = Watch(lambda level: 0.1 if level == 7 else 0.1 * (7 - level))
    judge = Watch(lambda level: 0.1 * (7 - level))
    assert cheapest_level(look, range(1, 17), 9, judge=judge, known={15: -0.8}) == 7
    assert 7 in judge.calls


def test_what_misses_by_far_is_not_looked_at_twice():
    look = Watch(lambda level: 5.0 * (8 - level))
    judge = Watch(lambda level: 5.0 * (8 - level))
    assert cheapest_level(look, range(1, 17), 9, judge=judge, known={15: -1.0}) == 8
    assert judge.calls == [8]


def test_no_level_may_be_good_enough():
    look = Watch(lambda level: 1.0)
    assert cheapest_level(look, range(1, 100), 5) is None
    assert len(look.calls) <= 5
    assert cheapest_level(lambda level: math.inf, [1.0], 3, known={0: 0.5}) is None


def test_a_ladder_of_one_level_takes_one_look():
    look = Watch(lambda level: 0.0)
    assert cheapest_level(look, [7.0], 5) == 0
    assert look.calls == [0]
    assert cheapest_level(look, [7.0], 5, known={0: 0.0}) == 0
    assert look.calls == [0]


@given(st.integers(2, 400))
def test_the_first_look_halves_the_ratio_of_sizes(count: int):
    # 1 to 400 iterations: 20 says more than 200, where twice as many are twice as dear.
    look = Watch(lambda level: -1.0)
    cheapest_level(look, range(1, count + 1), 20, known={count - 1: 0.0})
    if count > 4:
        size = look.calls[0] + 1
        assert abs(math.log(size / math.sqrt(count / 2))) < 0.6
