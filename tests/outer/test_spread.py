"""Spreads: the mean over seeds, and how well it is known."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bilevel.outer import text
from bilevel.outer.spread import Spread


def test_what_is_missing_does_not_count():
    assert Spread.of([]) is None
    assert Spread.of([None, None]) is None
    assert Spread.of([1.0, None]) == Spread(1.0, None, 1)


def test_one_infinite_value_leaves_no_interval():
    assert Spread.of([1.0, math.inf]) == Spread(math.inf, None, 2)
    undefined = Spread.of([1.0, math.nan])
    assert undefined is not None
    assert math.isnan(undefined.mean)
    assert undefined.confidence is None


# The 0.975 quantiles of Student's t, from printed tables: 1, 2, 4 and 9 degrees of freedom.
@pytest.mark.parametrize(
    ("values", "deviation", "quantile"),
    [
        ([1.0, 3.0], math.sqrt(2.0), 12.706),
        ([1.0, 2.0, 3.0], 1.0, 4.303),
        ([1.0, 2.0, 3.0, 4.0, 5.0], math.sqrt(2.5), 2.776),
        ([0.0] * 5 + [2.0] * 5, math.sqrt(10 / 9), 2.262),
    ],
)
def test_the_interval_is_student_s(values: list[float], deviation: float, quantile: float):
    spread = Spread.of(values)
    assert spread is not None
    assert spread.deviation == pytest.approx(deviation)
    half = quantile * deviation / math.sqrt(len(values))
    assert spread.confidence == pytest.approx(half, rel=2e-4)


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=6), st.floats(0.1, 10.0))
def test_the_interval_scales_with_the_numbers(values: list[float], factor: float):
    one, other = Spread.of(values), Spread.of([factor * value for value in values])
    assert one is not None
    assert other is not None
    assert one.confidence is not None
    assert other.confidence == pytest.approx(factor * one.confidence, abs=1e-9)


@pytest.mark.parametrize(
    ("mean", "half", "form", "shown"),
    [
        (12.3456, 0.72, text.number, "12.35 ± 0.72"),
        # The mean has no more digits than what is uncertain.
        (0.44613, 0.7129, text.number, "0.45 ± 0.71"),
        (7.04984, 2.7745, text.seconds, "7.0 ± 2.8"),
        (7185.0, 56.15, text.count, "7,185 ± 56"),
        (712845.3, 8404.9, text.count, "712,800 ± 8,400"),
        (1.23456e-6, 3.21e-8, text.number, "(1.235 ± 0.032)e-06"),
        (1.23456e-6, 4e-5, text.number, "(0.1 ± 4.0)e-05"),
        # Sure to more digits than are shown.
        (0.11972685, 1e-9, text.number, "0.1197"),
        (5.0, 0.0, text.number, "5"),
        (5.0, None, text.number, "5"),
        (math.inf, None, text.number, "inf"),
        (0.0, 0.25, text.number, "0.00 ± 0.25"),
    ],
)
def test_only_digits_that_say_something_are_shown(
    mean: float, half: float | None, form: text.Form, shown: str
):
    assert Spread(mean, None, 3, half).show(form) == shown


@given(st.floats(-1e9, 1e9), st.floats(1e-12, 1e9))
def test_every_spread_can_be_shown(mean: float, half: float):
    assert Spread(mean, half, 3, half).show(text.number)
