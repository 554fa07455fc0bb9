"""Ladders: what stands on each level, traced or not."""

# Wrong types and missing arguments are under test here.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOptionalMemberAccess=false

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bilevel.budget import UNLIMITED, Budget
from bilevel.probe import Probe
from bilevel.refinement.fidelity import Fidelity, as_fidelity, is_traced
from bilevel.refinement.ladder import Ladder


def counts(ladder):
    return [int(fidelity.budget.iterations) for fidelity in ladder]


def rtols(ladder):
    return [float(fidelity.budget.rtol) for fidelity in ladder]


LADDERS = {
    "iterations": Ladder.iterations(25, 10, 600),
    "one level": Ladder.iterations(7, 3, 7),
    "geometric": Ladder.geometric(1, 1.3, 50),
    "tolerances": Ladder.tolerances(1e-1, 0.5, 1e-6, iterations=500),
    "absolute": Ladder.tolerances(1e-1, 0.5, 1e-6, absolute=True),
    "schedule": Ladder.from_schedule(optax.exponential_decay(0.1, 1, 0.7), levels=12),
    "of": Ladder.of([Budget(3, rtol=0.1), Budget(9, atol=1e-3), Budget(4)]),
    "both": Ladder.iterations(5, 5, 40).with_tolerances(Ladder.tolerances(1e-1, 0.1, 1e-4)),
    "own adjoint": Ladder.iterations(1, 1, 5).with_adjoint(Ladder.geometric(2, 2.0, 64)),
    "no adjoint": Ladder.iterations(1, 1, 5).with_adjoint(None),
}


@pytest.mark.parametrize("name", LADDERS)
def test_a_traced_level_gives_what_the_concrete_one_does(name):
    ladder = LADDERS[name]
    last = len(ladder) - 1
    look_up = jax.jit(ladder.fidelity)
    for level in sorted({0, 1, last // 2, last - 1, last} & set(range(len(ladder)))):
        concrete = ladder.fidelity(level)
        for other in (look_up(level), ladder.fidelity(jnp.int32(level))):
            assert jax.tree.structure(other) == jax.tree.structure(concrete)
            for one, two in zip(jax.tree.leaves(concrete), jax.tree.leaves(other), strict=True):
                # The same types, weakness included, or a compiled update would compile twice.
                assert jax.typeof(one) == jax.typeof(two)
                np.testing.assert_allclose(one, two, rtol=1e-15)


@pytest.mark.parametrize("name", LADDERS)
def test_array_levels_beyond_the_ends_are_the_ends(name):
    ladder = LADDERS[name]
    far = jax.vmap(ladder.fidelity)(jnp.array([-5, 0, len(ladder) - 1, 10**6]))
    first, last = jax.tree.leaves(ladder.coarsest), jax.tree.leaves(ladder.finest)
    for leaf, low, high in zip(jax.tree.leaves(far), first, last, strict=True):
        np.testing.assert_array_equal(leaf, [low, low, high, high])


def test_levels_of_any_shape_are_looked_up_together():
    fidelity = LADDERS["own adjoint"].fidelity(jnp.array([[0, 1], [2, 3]]))
    np.testing.assert_array_equal(fidelity.budget.iterations, [[1, 2], [3, 4]])
    np.testing.assert_array_equal(fidelity.adjoint_budget.iterations, [[2, 4], [8, 16]])


@pytest.mark.parametrize("dtype", ["int8", "uint8", "uint32", "int64"])
def test_levels_of_any_integer_dtype_are_int32_inside(dtype):
    ladder = Ladder.iterations(100, 100, 50_000)
    for look_up in (ladder.fidelity, jax.jit(ladder.fidelity)):
        fidelity = look_up(jnp.asarray(100, dtype))
        assert int(fidelity.budget.iterations) == 10_100
        assert jnp.asarray(fidelity.level).dtype == jnp.int32
    top = ladder.fidelity(jnp.asarray([jnp.iinfo(dtype).max], dtype))
    np.testing.assert_array_equal(top.level, [min(jnp.iinfo(dtype).max, 499)])


def test_the_published_ladder_has_59_budgets_capped_at_600():
    ladder = Ladder.iterations(start=25, step=10, stop=600)
    assert counts(ladder) == [*range(25, 600, 10), 600]
    assert len(ladder) == 59
    assert ladder.max_iterations == 600


@given(st.integers(1, 50), st.integers(1, 20), st.integers(0, 200))
def test_iterations_are_a_range_cut_at_the_stop(start, step, span):
    ladder = Ladder.iterations(start, step, start + span)
    assert counts(ladder)[:-1] == list(range(start, start + span, step))
    assert counts(ladder)[-1] == start + span


@given(st.integers(1, 20), st.floats(1.001, 4.0), st.integers(0, 300))
def test_geometric_counts_rise_strictly_by_about_the_factor(start, factor, span):
    found = counts(Ladder.geometric(start, factor, start + span))
    assert found[0] == start
    assert found[-1] == start + span
    assert all(after > before for before, after in itertools.pairwise(found))
    # Rounding moves either count by half, and one at least is always added.
    assert all(
        after <= max(before + 1, factor * (before + 0.5) + 0.5)
        for before, after in itertools.pairwise(found)
        if before > len(found)
    )


def test_tolerances_meet_the_stop_without_a_level_for_rounding():
    assert rtols(Ladder.tolerances(1e-1, 0.1, 1e-8)) == pytest.approx(
        [10.0**-power for power in range(1, 9)], rel=1e-12
    )
    assert rtols(Ladder.tolerances(1e-1, 0.1, 3e-3)) == pytest.approx([1e-1, 1e-2, 3e-3])
    assert rtols(Ladder.tolerances(1e-1, 0.1, 1e-1)) == [1e-1]


def test_absolute_tolerances_leave_the_relative_one_at_zero():
    budget = LADDERS["absolute"].fidelity(2).budget
    assert (float(budget.rtol), float(budget.atol)) == (0.0, 0.025)
    assert int(budget.iterations) == UNLIMITED


def test_the_adjoint_gets_the_primals_numbers_unless_told_otherwise():
    fidelity = Ladder.iterations(3, 2, 9).fidelity(1)
    assert int(fidelity.adjoint_budget.iterations) == 5
    own = Ladder.iterations(3, 2, 9).with_adjoint(Budget(77, rtol=1e-3)).fidelity(1)
    assert (int(own.budget.iterations), int(own.adjoint_budget.iterations)) == (5, 77)
    assert float(own.adjoint_budget.rtol) == 1e-3
    assert Ladder.iterations(3, 2, 9).with_adjoint(None).fidelity(1).adjoint_budget is None


def test_the_adjoint_budget_may_come_from_a_level_of_its_own():
    fidelity = Ladder.iterations(10, 10, 50).fidelity(4, adjoint_level=jnp.int32(1))
    assert int(fidelity.budget.iterations) == 50
    assert int(fidelity.adjoint_budget.iterations) == 20
    assert int(fidelity.level) == 4


def test_the_shorter_of_two_ladders_stays_at_its_last_level():
    both = Ladder.iterations(10, 10, 50).with_tolerances(Ladder.tolerances(1e-1, 0.1, 1e-3))
    assert counts(both) == [10, 20, 30, 40, 50]
    assert rtols(both) == pytest.approx([1e-1, 1e-2, 1e-3, 1e-3, 1e-3])
    longer = Ladder.iterations(10, 10, 20).with_tolerances(Ladder.tolerances(1e-1, 0.1, 1e-3))
    assert counts(longer) == [10, 20, 20]
    assert float(longer.fidelity(2).adjoint_budget.rtol) == pytest.approx(1e-3)


def test_listed_fidelities_come_back():
    listed = [
        Fidelity(Budget(5, rtol=1e-2), Budget(9)),
        Fidelity(Budget(jnp.int32(50), rtol=jnp.float32(0.25)), Budget(99, atol=2.0)),
    ]
    ladder = Ladder.of(listed)
    for level, fidelity in enumerate(listed):
        found = ladder.fidelity(level)
        for one, two in zip(
            jax.tree.leaves((fidelity.budget, fidelity.adjoint_budget)),
            jax.tree.leaves((found.budget, found.adjoint_budget)),
            strict=True,
        ):
            assert float(one) == float(two)
    assert Ladder.of([Fidelity(Budget(5))]).fidelity(0).adjoint_budget is None


def test_static_parts_need_a_concrete_level_only_where_they_differ():
    same = Ladder.iterations(1, 1, 4).with_static(grid=64)
    assert jax.jit(lambda level: same.fidelity(level)["grid"] * level)(2) == 128
    differing = same.with_static(grid=[16, 32, 32, 64], dtype="float32")
    assert [differing.fidelity(level)["grid"] for level in range(4)] == [16, 32, 32, 64]
    assert differing.fidelity(jnp.int32(9))["grid"] == 64
    assert differing.fidelity(np.int64(1))["dtype"] == "float32"
    with pytest.raises(ValueError, match=r"static parts \(dtype, grid\) differ.*outside jit"):
        jax.jit(lambda level: differing.fidelity(level).budget)(1)
    with pytest.raises(ValueError, match="concrete number"):
        differing.fidelity(jnp.array([0, 1]))
    with pytest.raises(ValueError, match="keeps its 4 levels"):
        differing.with_tolerances(Ladder.tolerances(0.1, 0.1, 1e-9))


def test_one_compilation_for_each_distinct_static_part():
    ladder = Ladder.iterations(1, 1, 6).with_static(grid=[16, 16, 32, 32, 32, 64])
    traced = []

    @jax.jit
    def loss(fidelity):
        traced.append(fidelity["grid"])
        return fidelity.budget.iterations * jnp.ones(fidelity["grid"]).sum()

    for fidelity in ladder:
        loss(fidelity)
    assert traced == [16, 32, 64]


@pytest.mark.parametrize("compiled", [jax.jit, eqx.filter_jit])
def test_no_level_compiles_anything_anew(compiled):
    traced = []

    @compiled
    def loss(fidelity):
        traced.append(fidelity)
        return fidelity.budget.iterations * 1.0 + fidelity.budget.rtol

    for name in ("iterations", "geometric", "tolerances", "of", "both"):
        for fidelity in LADDERS[name]:
            loss(fidelity)
    assert len(traced) == 1


def test_a_look_up_costs_the_same_on_a_ladder_of_any_length():
    def operations(ladder):
        return str(jax.make_jaxpr(ladder.fidelity)(0)).count("=")

    short, long = Ladder.iterations(1, 1, 10), Ladder.iterations(1, 1, 2**31 - 1)
    assert operations(short) == operations(long)
    assert "gather" not in str(jax.make_jaxpr(long.fidelity)(jnp.int32(0)))
    assert int(jax.jit(long.fidelity)(2**31 - 5).budget.iterations) == 2**31 - 4
    assert int(jax.jit(long.fidelity)(2**31 - 1).budget.iterations) == 2**31 - 1
    wide = Ladder.iterations(1, 10**9, 2**31 - 1)
    found = jax.vmap(wide.fidelity)(jnp.arange(4)).budget.iterations
    np.testing.assert_array_equal(found, counts(wide))


def test_ladders_are_compared_and_hashed_by_value():
    assert Ladder.iterations(1, 2, 9) == Ladder.iterations(1, 2, 9)
    assert hash(Ladder.iterations(1, 2, 9)) == hash(Ladder.iterations(1, 2, 9))
    assert Ladder.iterations(1, 2, 9) != Ladder.iterations(1, 2, 11)
    assert not jax.tree.leaves(LADDERS["of"])


def test_numpy_and_jax_scalars_count_as_numbers():
    assert Ladder.iterations(np.int64(1), jnp.int32(2), 9) == Ladder.iterations(1, 2, 9)
    assert rtols(Ladder.tolerances(np.float32(0.5), 0.5, jnp.float32(0.25))) == [0.5, 0.25]


def test_a_ladder_may_be_built_and_used_inside_a_trace():
    schedule = optax.exponential_decay(0.1, 1, 0.5)

    @jax.jit
    def inside(level):
        return Ladder.from_schedule(schedule, levels=8).fidelity(level).budget.rtol

    assert float(inside(3)) == pytest.approx(0.0125)


def test_representation_names_what_changes():
    assert repr(LADDERS["iterations"]) == "Ladder(59 levels, iterations 25 to 600)"
    text = repr(LADDERS["own adjoint"].with_static(grid=[8, 8, 8, 16, 16, 32]))
    assert text == "Ladder(6 levels, iterations 1 to 5, adjoint iterations 2 to 64, grid 8 to 32)"
    assert "left to the estimator" in repr(LADDERS["no adjoint"])


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: Ladder.iterations(start=0), ValueError, "start should be greater than or equal"),
        (lambda: Ladder.iterations(step=2.5), ValueError, "step should be a valid integer, got 2"),
        (
            lambda: Ladder.iterations(stop="9"),
            ValueError,
            "stop should be a valid integer",
        ),
        (lambda: Ladder.iterations(start=True), ValueError, "start should be a valid integer"),
        (lambda: Ladder.iterations(9, 1, 3), ValueError, "start 9 finer than stop 3"),
        (lambda: Ladder.iterations(9, 1, 2**40), ValueError, "stop should be less than or equal"),
        (lambda: Ladder.iterations(begin=1), TypeError, "no argument begin; there is start, step"),
        (lambda: Ladder.iterations(1, 2, 3, 4), TypeError, "too many arguments, got 4 besides"),
        (lambda: Ladder.geometric(factor=1.0), ValueError, "factor should be greater than 1"),
        (lambda: Ladder.geometric(factor=float("inf")), ValueError, "should be a finite number"),
        (lambda: Ladder.geometric(1, 1 + 1e-9, 10**8), ValueError, "Use a larger step"),
        (lambda: Ladder.tolerances(start=0.0), ValueError, "start should be greater than 0"),
        (lambda: Ladder.tolerances(start=float("nan")), ValueError, "start should be a finite"),
        (lambda: Ladder.tolerances(factor=2.0), ValueError, "factor should be less than 1"),
        (lambda: Ladder.tolerances(1e-8, 0.1, 1e-1), ValueError, "start 1e-08 finer than stop 0.1"),
        (lambda: Ladder.tolerances(iterations=0), ValueError, "iterations should be greater"),
        (lambda: Ladder.from_schedule(0.1, 3), ValueError, "schedule should be callable"),
        (
            lambda: Ladder.from_schedule(eqx.Partial(jnp.add, jnp.ones(2)), 3),
            ValueError,
            "schedule should be hashable",
        ),
        (lambda: Ladder.from_schedule(lambda level: -1.0, 3), ValueError, "at level 0"),
        (lambda: Ladder.from_schedule(lambda level: 0.0 * level, 3), ValueError, "nothing would"),
        (lambda: Ladder.from_schedule(lambda level: 1.0), TypeError, "argument levels is missing"),
        (lambda: Ladder.of([]), ValueError, "at least one"),
        (lambda: Ladder.of([5]), TypeError, "should be a Fidelity or a Budget, got 5 of type int"),
        (
            lambda: Ladder.of([Fidelity(Budget(1)), Budget(2)]),
            ValueError,
            "either every fidelity has an adjoint_budget or none has, got 1 of 2",
        ),
        (
            lambda: Ladder.of([Budget(9), Budget(5)]),
            ValueError,
            r"level 1 after Budget\(iterations=9",
        ),
        (
            lambda: Ladder.of([Budget(5), Budget(9, rtol=1e-3), Budget(9, rtol=1e-2)]),
            ValueError,
            "at level 2 after",
        ),
        (
            lambda: Ladder.of([Fidelity(Budget(5), Budget(9)), Fidelity(Budget(5), Budget(8))]),
            ValueError,
            "levels go from coarse to fine",
        ),
        (lambda: Ladder.of([Budget(jnp.array([1, 2]))]), TypeError, "concrete scalars"),
        (
            lambda: Ladder.tolerances().with_tolerances(Budget(5)),
            ValueError,
            "nothing would stop the iteration at level 0",
        ),
        (lambda: Ladder.iterations().with_tolerances(1e-3), TypeError, "a Ladder or a Budget"),
        (lambda: Ladder.iterations().with_adjoint("cg"), TypeError, "a Ladder or a Budget"),
        (lambda: Ladder.iterations().with_static(grid=[1, 2]), ValueError, "each of the 120"),
        (lambda: Ladder.iterations(1, 1, 1).with_static(a=np.ones(2)), TypeError, "hashable"),
        (lambda: Ladder.iterations().fidelity(120), IndexError, "from 0 to 119, got 120"),
        (lambda: Ladder.iterations().fidelity(-1), IndexError, "from 0 to 119, got -1"),
        (lambda: Ladder.iterations().fidelity(1.0), TypeError, "level should be an int"),
        (lambda: Ladder.iterations().fidelity("top"), TypeError, "got 'top' of type str"),
        (lambda: Ladder.iterations().fidelity(jnp.float32(1)), TypeError, "level should be an int"),
        (lambda: Ladder.iterations().fidelity(0, adjoint_level=True), TypeError, "adjoint_level"),
    ],
)
def test_bad_input_is_refused_in_one_line(build, error, message):
    with pytest.raises(error, match=message) as caught:
        build()
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(("Ladder", "Fidelity"))


def test_a_traced_budget_cannot_be_listed():
    with pytest.raises(TypeError, match="Build the ladder outside jit"):
        jax.jit(lambda count: Ladder.of([Budget(count)]).coarsest)(3)


def test_a_fidelity_is_a_pytree_whose_static_parts_are_not_leaves():
    fidelity = Fidelity(Budget(3, rtol=0.5), static={"grid": 4, "dtype": "float32"})
    assert jax.tree.leaves(fidelity) == [3, 0.5, 0.0]
    other = Fidelity(Budget(9), static={"dtype": "float32", "grid": 4})
    assert jax.tree.structure(fidelity) == jax.tree.structure(other)
    assert other["grid"] == 4
    with pytest.raises(KeyError, match="no static part 'size'; there is dtype, grid"):
        fidelity["size"]
    filled = fidelity.with_probe(Probe.zeros())
    assert filled.probe is not None
    assert filled.static == fidelity.static
    assert not is_traced(fidelity)
    assert jax.jit(lambda traced: jnp.asarray(is_traced(traced)))(fidelity)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Fidelity(5), "Fidelity: budget should be a Budget, got 5 of type int"),
        (Fidelity, "Fidelity: budget should be a Budget, got None"),
        (lambda: Fidelity(None), "budget should be a Budget"),
        (lambda: Fidelity(Budget(5), 3), "adjoint_budget should be a Budget, got 3"),
        (lambda: Fidelity(Budget(5), static={"a": [1]}), "static part 'a' should be hashable"),
        (lambda: as_fidelity("Owner", "part", None), "Owner: part should be a Fidelity"),
    ],
)
def test_a_fidelity_refuses_what_is_no_budget(build, message):
    with pytest.raises(TypeError, match=message):
        build()


def test_levels_that_cannot_be_compared_are_taken_in_the_given_order():
    cheaper_but_tighter = Ladder.of([Budget(50, rtol=1e-2), Budget(20, rtol=1e-6)])
    assert len(cheaper_but_tighter) == 2
    on_a_finer_grid = Ladder.of(
        [Fidelity(Budget(50), static=(("grid", 8),)), Fidelity(Budget(20), static=(("grid", 16),))]
    )
    assert on_a_finer_grid.fidelity(1)["grid"] == 16
    adjoint_for_primal = [Fidelity(Budget(9), Budget(2)), Fidelity(Budget(5), Budget(5))]
    assert len(Ladder.of(adjoint_for_primal)) == 2
