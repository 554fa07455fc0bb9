"""The published rule, against a plain transcription of it, and without its traps."""

# Wrong types and missing arguments are under test here.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOptionalMemberAccess=false

import math
from fractions import Fraction
from itertools import groupby

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from bilevel.refinement.ladder import Ladder
from bilevel.refinement.progressive import ProgressiveRefinement

LADDER = Ladder.iterations(start=1, step=1, stop=1000)

SETTINGS = {
    "default": {},
    "poisson": {"stepping_threshold": 0.92, "ema_window": None, "error_window": 2},
    "heat 1D": {"ema_window": 8, "error_window": 3},
    "heat 2D": {"stepping_threshold": 0.9},
    "wide": {"ema_window": 2.5, "error_window": 5, "stopping_threshold": 0.7},
}


def published_rule(
    metrics,
    stepping_threshold=0.98,
    stopping_threshold=0.9,
    ema_window=6,
    error_window=3,
    checkpoint=100,
    number=Fraction,
    near=None,
):
    """The level after each entry, by the paper's words, from the whole history each time."""
    step, stop = number(stepping_threshold), number(stopping_threshold)
    checkpoint = number(checkpoint)
    level, levels, history = 0, [], []
    for metric in metrics:
        history.append(number(metric))
        levels.append(level)
        if len(history) < error_window + 1:
            continue
        smoothed = history
        if ema_window is not None:
            weight = number(2) / (number(ema_window) + 1)
            smoothed = history[:1]
            for entry in history[1:]:
                smoothed.append(weight * entry + (1 - weight) * smoothed[-1])
        ratio = smoothed[-1] / smoothed[-error_window]
        to_checkpoint = smoothed[-1] / checkpoint
        if near is not None:
            near.extend([ratio - step, to_checkpoint - stop, to_checkpoint - 1])
        if ratio <= step:
            continue
        if to_checkpoint < stop or to_checkpoint > 1:
            checkpoint = smoothed[-1]
            level += 1
            levels[-1] = level
    return levels


CONTROLLERS = {name: ProgressiveRefinement(LADDER, **kw) for name, kw in SETTINGS.items()}
UPDATES = {name: jax.jit(controller.update) for name, controller in CONTROLLERS.items()}


def levels_of(update, state, metrics):
    levels = []
    for metric in metrics:
        state = update(state, metric)
        levels.append(int(state.level))
    return levels, state


def same_state(one, two, **tolerance):
    assert jax.tree.structure(one) == jax.tree.structure(two)
    for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        assert jax.typeof(left) == jax.typeof(right)
        np.testing.assert_allclose(left, right, **(tolerance or {"rtol": 0}))


# Plateaus, slow and fast falls, and rises: every branch of the rule comes up.
ratios = st.sampled_from([0.3, 0.85, 0.93, 0.97, 0.995, 1.0, 1.004, 1.3])
falling = st.lists(ratios, min_size=1, max_size=60).map(lambda steps: list(np.cumprod(steps)))
anything = st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=30)


@pytest.mark.parametrize("name", SETTINGS)
@given(metrics=st.one_of(falling, anything), scale=st.sampled_from([1e-6, 1.0, 95.0, 1e4]))
def test_levels_are_the_published_rules(name, metrics, scale):
    metrics = [float(metric * scale) for metric in metrics]
    near = []
    expected = published_rule(metrics, **SETTINGS[name], near=near)
    # The transcription is exact; rounding may decide only where the rule is a tie but for it.
    assume(all(gap == 0 or abs(gap) > 1e-11 for gap in near))
    levels, state = levels_of(UPDATES[name], CONTROLLERS[name].init(), metrics)
    assert levels == expected
    assert int(state.rejected) == 0


@pytest.mark.parametrize("window", [None, 6])
@given(metrics=st.one_of(falling, anything))
def test_float32_decides_as_numpy_does_in_float32(window, metrics):
    metrics = [np.float32(metric) for metric in metrics]
    settings = {"stepping_threshold": 0.92, "ema_window": window}
    controller = ProgressiveRefinement(LADDER, **settings)
    # NumPy keeps float32 when a Python number meets it, as the published code does.
    near = []
    expected = published_rule(metrics, **settings, number=np.float32, near=near)
    if window is not None:
        assume(all(gap == 0 or abs(gap) > 1e-5 for gap in near))
    levels, _ = levels_of(controller.update, controller.init(), metrics)
    assert levels == expected


def test_the_dtype_of_the_metric_decides_not_that_of_the_state():
    # 0.98 lies between these two ratios: 0.98 - 4e-9 in float64 rounds to 0.98 in float32.
    rng = np.random.default_rng(0)
    before = rng.uniform(0.5, 1.0, 200_000).astype(np.float32)
    after = (before * np.float32(0.98)).astype(np.float32)
    narrow = after / before > np.float32(0.98)
    wide = after.astype(float) / before.astype(float) > 0.98
    i = int(np.flatnonzero(narrow != wide)[0])
    controller = ProgressiveRefinement(LADDER, ema_window=None, error_window=2)
    for dtype, refines in ((np.float32, narrow[i]), (np.float64, wide[i])):
        metrics = [dtype(1.0), dtype(before[i]), dtype(after[i])]
        for update in (controller.update, jax.jit(controller.update)):
            levels, state = levels_of(update, controller.init(), metrics)
            assert levels[-1] == int(refines)
            assert state.smoothed.dtype == jnp.float64


def test_without_double_precision_everything_is_float32():
    with jax.enable_x64(False):
        controller = CONTROLLERS["default"]
        state = controller.init()
        assert state.smoothed.dtype == state.checkpoint.dtype == jnp.float32
        after = jax.jit(controller.update)(state, np.float64(0.5))
        assert [leaf.dtype for leaf in jax.tree.leaves(after)] == [
            leaf.dtype for leaf in jax.tree.leaves(state)
        ]
        assert {leaf.dtype for leaf in jax.tree.leaves(controller.fidelity(after))} == {
            jnp.dtype("int32"),
            jnp.dtype("float32"),
        }


def test_half_precision_metrics_are_widened():
    # In bfloat16 the ratio, 0.9815, and the threshold, 0.98, are one number.
    controller = ProgressiveRefinement(LADDER, ema_window=None, error_window=2)
    metrics = [jnp.bfloat16(value) for value in (1.0, 54 / 64, 53 / 64)]
    levels, _ = levels_of(controller.update, controller.init(), metrics)
    assert levels == [0, 0, 1]


@pytest.mark.parametrize("real", [float, np.float32])
def test_the_published_poisson_run(real):
    # The source is an eigenvector of the 30-point Laplacian, so K Jacobi sweeps from zero
    # give 1 - rho**K of the solution, and the whole published run is a scalar recurrence.
    h = 1 / 31
    rho = math.cos(2 * math.pi * h)
    eigenvalue = (2 - 2 * rho) / h**2
    curvature = (31 / 2) / eigenvalue**2 / 30
    ladder = Ladder.iterations(start=25, step=10, stop=600)
    controller = ProgressiveRefinement(
        ladder, stepping_threshold=0.92, stopping_threshold=0.9, ema_window=None, error_window=2
    )
    update, theta = jax.jit(controller.update), real(5.0)
    state = update(controller.init(), abs(theta - real(2)) / real(2))
    used, reached = [], {}
    for step in range(1, 181):
        used.append(int(controller.fidelity(state).budget.iterations))
        gain = real(1 - rho ** used[-1])
        theta = theta - real(275) * gain * (gain * theta - real(2)) * real(curvature)
        error = abs(theta - real(2)) / real(2)
        for target in (1e-3, 1e-4):
            if error <= target:
                reached.setdefault(target, (step, sum(used)))
        state = update(state, error)
    path = [(count, len(list(group))) for count, group in groupby(used)]
    assert path[:6] == [(25, 2), (35, 13), (45, 7), (55, 5), (65, 4), (75, 3)]
    assert [count for count, _ in path] == [*range(25, 600, 10), 600]
    # Published: 119 steps and 23,895 iterations, 147 steps and 37,585.
    assert reached[1e-3] == (119, 23895)
    assert reached[1e-4][0] == 147
    assert reached[1e-4][1] == pytest.approx(37585, rel=1e-3)


def test_ten_thousand_entries_neither_overflow_nor_stop_refining():
    # The published average divides by (1 - weight)**n, which is zero after some 2,150 entries.
    metrics = 0.5 ** np.repeat(np.arange(50.0), 200)
    controller = CONTROLLERS["default"]

    def body(state, metric):
        state = controller.update(state, metric)
        return state, state

    _, states = jax.jit(lambda: jax.lax.scan(body, controller.init(), jnp.asarray(metrics)))()
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(states))
    # Once a plateau, each: the first on its 4th entry, the others as the average settles.
    assert states.level.shape == (10_000,)
    assert [int(level) for level in states.level[199::200]] == list(range(1, 51))
    assert int(states.level[0]) == 0
    assert int(states.rejected[-1]) == 0
    # No history grows with them.
    assert sum(leaf.size for leaf in jax.tree.leaves(controller.init())) == 5 + 3


def test_extreme_magnitudes_stay_finite():
    controller = CONTROLLERS["default"]
    metrics = [3e38, 3e38, 1e-38, 1e-45, 3e38, 0.0, 0.0, 0.0, 0.0, 3e38]
    _, state = levels_of(controller.update, controller.init(), [np.float32(m) for m in metrics])
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(state))
    assert int(state.rejected) == 0


@pytest.mark.parametrize(
    ("ema_window", "real"), [(6, np.float32), (5, np.float64), (50, np.float64)]
)
def test_a_constant_metric_refines_once_and_then_never(ema_window, real):
    # By rounding alone the published average rises above the checkpoint now and then, and
    # refines two to four times in sixty entries; as a weighted sum it would move as well.
    controller = ProgressiveRefinement(LADDER, ema_window=ema_window, error_window=2)

    def last(value):
        def body(state, _):
            return controller.update(state, value), None

        return jax.lax.scan(body, controller.init(), length=60)[0]

    values = np.random.default_rng(3).uniform(1e-3, 10.0, 2000).astype(real)
    states = jax.jit(jax.vmap(last))(values)
    np.testing.assert_array_equal(states.level, 1)
    np.testing.assert_array_equal(states.smoothed, np.stack([values, values], axis=1))


def test_zero_is_a_metric_like_any_other():
    with jax.debug_nans(True), jax.debug_infs(True):
        controller = CONTROLLERS["poisson"]
        metrics = [1.0, 0.0, 0.0, 0.0, 0.5, 0.5]
        levels, state = levels_of(jax.jit(controller.update), controller.init(), metrics)
    # Nothing moves at zero; the rise from it is infinitely many times worse.
    assert levels == [0, 0, 0, 0, 1, 1]
    assert int(state.rejected) == 0


@given(
    metrics=falling,
    holes=st.lists(
        st.tuples(st.integers(0, 59), st.sampled_from([math.nan, math.inf, -math.inf, -1.0])),
        max_size=12,
    ),
)
def test_unusable_entries_are_left_out_and_counted(metrics, holes):
    entries = [(index, 0, metric) for index, metric in enumerate(metrics)]
    entries += [(index, -1, bad) for index, bad in holes]
    entries.sort(key=lambda entry: entry[:2])
    update, start = UPDATES["default"], CONTROLLERS["default"].init()
    levels, clean = levels_of(update, start, metrics)
    disturbed, state = levels_of(update, start, [entry for _, _, entry in entries])
    assert int(state.rejected) == len(holes)
    same_state(eqx.tree_at(lambda s: s.rejected, state, clean.rejected), clean)
    # Every usable entry decides as it would have, and the others hold the level.
    kept = [level for level, (_, kind, _) in zip(disturbed, entries, strict=True) if kind == 0]
    assert kept == levels


def test_nan_does_not_freeze_the_rule():
    controller = CONTROLLERS["poisson"]
    metrics = [1.0, 0.5, math.nan, 0.5, 0.5, math.nan, 0.25, 0.25]
    levels, state = levels_of(controller.update, controller.init(), metrics)
    assert levels == [0, 0, 0, 1, 1, 1, 1, 2]
    assert int(state.rejected) == 2


def test_the_level_never_falls_and_ends_at_the_top():
    controller = ProgressiveRefinement(Ladder.iterations(1, 1, 3), ema_window=None, error_window=2)
    levels, state = levels_of(controller.update, controller.init(), [float(2**i) for i in range(9)])
    assert levels == [0, 0, 1, 2, 2, 2, 2, 2, 2]
    assert int(controller.fidelity(state).budget.iterations) == 3


def test_the_stop_is_not_final():
    controller = CONTROLLERS["poisson"]
    metrics = [1.0, 1.0, 1.0, 0.95, 0.95, 0.95, 0.5, 0.5]
    levels, _ = levels_of(controller.update, controller.init(), metrics)
    assert levels == [0, 0, 1, 1, 1, 1, 1, 2]


def test_the_first_checkpoint_decides_about_the_first_plateau():
    # The trap of the published 100: a metric that stands at 95 when it first comes to rest.
    for checkpoint, expected in ((100.0, 0), (math.inf, 1)):
        controller = ProgressiveRefinement(LADDER, checkpoint=checkpoint)
        levels, state = levels_of(controller.update, controller.init(), [95.0] * 6)
        assert levels[-1] == expected
        assert float(state.checkpoint) == (95.0 if expected else 100.0)


def test_jit_scan_and_a_plain_loop_agree():
    controller = CONTROLLERS["default"]
    rng = np.random.default_rng(1)
    metrics = np.abs(np.cumprod(rng.uniform(0.9, 1.06, 80)))
    metrics[[7, 30]] = np.nan, -1.0
    levels, plain = levels_of(controller.update, controller.init(), metrics.tolist())
    jitted, compiled = levels_of(UPDATES["default"], controller.init(), metrics)
    scanned, states = jax.lax.scan(
        lambda state, metric: (controller.update(state, metric),) * 2, controller.init(), metrics
    )
    assert levels == jitted == states.level.tolist()
    assert max(levels) > 2
    same_state(plain, compiled, rtol=1e-14)
    same_state(plain, scanned, rtol=1e-14)


def test_under_vmap_each_sample_has_its_own_rule():
    controller = CONTROLLERS["default"]
    rng = np.random.default_rng(2)
    metrics = np.cumprod(rng.uniform(0.85, 1.1, (40, 5)), axis=0)
    metrics[3, 2] = np.nan
    state = jax.tree.map(lambda leaf: jnp.stack([leaf] * 5), controller.init())
    update = jax.jit(jax.vmap(controller.update))
    for row in metrics:
        state = update(state, row)
    for sample in range(5):
        _, alone = levels_of(UPDATES["default"], controller.init(), metrics[:, sample])
        same_state(jax.tree.map(lambda leaf, i=sample: leaf[i], state), alone, rtol=1e-14)
    assert len(set(state.level.tolist())) > 1
    batch = jax.vmap(controller.fidelity)(state)
    np.testing.assert_array_equal(batch.budget.iterations, state.level + 1)


def test_one_compilation_for_all_levels():
    controller = CONTROLLERS["poisson"]
    traced = []

    @jax.jit
    def step(state, metric):
        traced.append("step")
        state = controller.update(state, metric)
        return state, controller.fidelity(state).budget.iterations

    @eqx.filter_jit
    def loss(fidelity):
        traced.append("loss")
        return fidelity.budget.iterations + 0.0

    state, seen = controller.init(), set[int]()
    for metric in 0.5 ** np.repeat(np.arange(30.0), 2):
        state, iterations = step(state, metric)
        loss(controller.fidelity(state))
        seen.add(int(iterations))
    assert len(seen) == 30
    assert sorted(traced) == ["loss", "step"]


def test_the_state_keeps_its_types():
    controller = CONTROLLERS["default"]
    state = controller.init()
    for metric in (0.5, np.float32(0.5), np.float64(0.5), jnp.float32(0.5), 1, jnp.asarray(1)):
        for update in (controller.update, UPDATES["default"]):
            after = update(state, metric)
            assert [jax.typeof(leaf) for leaf in jax.tree.leaves(after)] == [
                jax.typeof(leaf) for leaf in jax.tree.leaves(state)
            ]


def test_scalars_of_other_libraries_are_read():
    class Tensor:
        def __float__(self):
            return 0.25

    controller = CONTROLLERS["default"]
    assert float(controller.update(controller.init(), Tensor()).smoothed.max()) == 0.25
    torch = pytest.importorskip("torch")
    state = controller.update(controller.init(), torch.tensor(0.5, dtype=torch.float64))
    assert float(state.smoothed.max()) == 0.5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"stepping_threshold": 98},
            "stepping_threshold should be .* equal to 1, got 98",
        ),
        ({"stepping_threshold": 0.0}, "stepping_threshold should be greater than 0, got 0"),
        ({"stopping_threshold": "0.9"}, "stopping_threshold should be a valid number, got '0.9'"),
        ({"stopping_threshold": math.nan}, "stopping_threshold should be .*, got nan"),
        ({"ema_window": 0}, "ema_window should be greater than or equal to 1, got 0"),
        ({"ema_window": "none"}, "ema_window should be a valid number, got 'none'"),
        ({"error_window": 1}, "error_window should be greater than or equal to 2, got 1"),
        ({"error_window": 2.5}, "error_window should be a valid integer, got 2.5"),
        ({"checkpoint": 0.0}, "checkpoint should be greater than 0, got 0"),
        ({"checkpoint": math.nan}, "checkpoint should be .*, got nan"),
        ({"ladder": 25}, "ladder should be an instance of Ladder, got 25. Use for example"),
    ],
)
def test_bad_settings_are_refused_in_one_line(settings, message):
    with pytest.raises(ValueError, match=f"^ProgressiveRefinement: {message}") as caught:
        ProgressiveRefinement(**{"ladder": LADDER, **settings})
    assert "\n" not in str(caught.value)


def test_missing_and_unknown_settings_are_type_errors():
    with pytest.raises(TypeError, match="ProgressiveRefinement: the argument ladder is missing"):
        ProgressiveRefinement()
    with pytest.raises(TypeError, match="no argument tau; there is ladder, stepping_threshold"):
        ProgressiveRefinement(LADDER, tau=0.9)


@pytest.mark.parametrize(
    ("metric", "error", "message"),
    [
        (None, TypeError, "metric should be a real number, got None"),
        ("0.5", TypeError, "metric should be a real number, got '0.5' of type str"),
        (True, TypeError, "metric should be a real number, got True"),
        (1j, TypeError, "metric should be a real number"),
        (jnp.complex64(1j), TypeError, "metric should be a real number, got dtype complex64"),
        (np.ones(3), ValueError, r"metric should be one number, got shape \(3,\)"),
        (jnp.ones((1,)), ValueError, r"metric should be one number, got shape \(1,\)"),
        ([0.5], TypeError, "metric should be a real number"),
    ],
)
def test_bad_metrics_are_refused_in_one_line(metric, error, message):
    controller = CONTROLLERS["default"]
    with pytest.raises(error, match=f"^ProgressiveRefinement.update: {message}"):
        controller.update(controller.init(), metric)
