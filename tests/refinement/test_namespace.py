"""Decisions made by NumPy are those that XLA makes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bilevel import (
    Budget,
    ErrorControlled,
    FixedFidelity,
    Ladder,
    ProgressiveRefinement,
    ScheduledFidelity,
)
from bilevel.refinement.namespace import on_host

LADDER = Ladder.iterations(start=1, step=3, stop=40)
CONTROLLERS = [
    FixedFidelity(Budget(20)),
    ScheduledFidelity(LADDER),
    ScheduledFidelity(LADDER, optax.linear_schedule(0, 12, 9)),
    ProgressiveRefinement(LADDER),
    ProgressiveRefinement(LADDER, ema_window=None, error_window=2),
    ErrorControlled(LADDER),
    ErrorControlled(LADDER, patience=2, growth=1),
]
# XLA takes numbers below the smallest normal one as zero, which NumPy does not.
# One controller of each kind, in one precision, both of them over the table.
DEFAULT = {(0, np.float64), (2, np.float32), (3, np.float64), (5, np.float32)}
NUMBERS = (
    st.sampled_from([np.nan, np.inf, -np.inf, 0.0, -0.0, -1.0])
    | st.floats(2.0**-60, 2.0**60, width=32)
    | st.floats(0.125, 2, width=32)
)
SEQUENCES = st.lists(st.tuples(NUMBERS, NUMBERS), max_size=25)


def walk(controller, sequence, dtype, place):
    update = jax.jit(controller.update) if place is jnp.asarray else controller.update
    state = jax.tree.map(place, controller.init())
    for metric, error in sequence:
        state = update(
            state,
            place(metric, dtype=dtype),
            gradient_norm=place(1.0, dtype=dtype),
            error=place(error, dtype=dtype),
        )
    return state


@pytest.mark.parametrize(
    ("index", "dtype"),
    [
        pytest.param(index, dtype, marks=[] if (index, dtype) in DEFAULT else pytest.mark.slow)
        for index in range(len(CONTROLLERS))
        for dtype in (np.float32, np.float64)
    ],
)
@given(sequence=SEQUENCES)
@settings(max_examples=20, deadline=None)
def test_numpy_and_xla_decide_alike(index, dtype, sequence):
    controller = CONTROLLERS[index]
    host = walk(controller, sequence, dtype, np.asarray)
    device = walk(controller, sequence, dtype, jnp.asarray)
    assert on_host(host)
    assert on_host(controller.fidelity(host))
    assert not on_host(device)
    for one, other in zip(jax.tree.leaves(host), jax.tree.leaves(device), strict=True):
        np.testing.assert_array_equal(one, other)
    for one, other in zip(
        jax.tree.leaves(controller.fidelity(host)),
        jax.tree.leaves(controller.fidelity(device)),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)


def test_on_the_host_nothing_compiles(caplog):
    def train():
        for controller in CONTROLLERS:
            if getattr(controller, "schedule", None) is None:
                state = controller.update(
                    controller.init(), 0.5, gradient_norm=1.0, error=np.float32(0.1)
                )
                controller.fidelity(state)

    with jax.log_compiles(), caplog.at_level("WARNING"):
        train()
    assert [record.message for record in caplog.records if "ompil" in record.message] == []
