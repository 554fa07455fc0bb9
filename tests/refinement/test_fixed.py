"""The fixed fidelity, and what all controllers have in common."""

# Wrong types and missing arguments are under test here.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOptionalMemberAccess=false

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilevel.budget import Budget
from bilevel.refinement.controller import Controller
from bilevel.refinement.error_controlled import ErrorControlled
from bilevel.refinement.fidelity import Fidelity
from bilevel.refinement.fixed import FixedFidelity
from bilevel.refinement.ladder import Ladder
from bilevel.refinement.progressive import ProgressiveRefinement
from bilevel.refinement.scheduled import ScheduledFidelity

LADDER = Ladder.iterations(5, 5, 50).with_tolerances(Budget(rtol=1e-6))

CONTROLLERS = [
    FixedFidelity(Budget(20)),
    FixedFidelity(LADDER.finest),
    ScheduledFidelity(LADDER),
    ScheduledFidelity.hoag("cubic"),
    ProgressiveRefinement(LADDER),
    ErrorControlled(LADDER),
]


def typed(tree):
    return jax.tree.structure(tree), [jax.typeof(leaf) for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize("controller", CONTROLLERS, ids=lambda c: type(c).__name__)
def test_every_controller_keeps_the_contract(controller):
    assert isinstance(controller, Controller)
    assert controller.requires <= {"metric", "gradient_norm", "error"}
    assert isinstance(hash(controller), int)
    state = controller.init()
    measurements = {"gradient_norm": 1.0, "error": 0.9}
    after = controller.update(state, 0.5, **measurements)
    compiled = jax.jit(controller.update)(after, 0.5, **measurements)
    assert typed(state) == typed(after) == typed(compiled)
    for one in (state, after, compiled):
        assert (one.level.dtype, one.level.shape) == (jnp.int32, ())
        assert int(one.rejected) == 0
        assert typed(controller.fidelity(one)) == typed(jax.jit(controller.fidelity)(one))
    scanned, _ = jax.lax.scan(
        lambda carry, metric: (controller.update(carry, metric, **measurements), None),
        state,
        np.full(3, 0.5),
    )
    assert typed(scanned) == typed(state)


@pytest.mark.parametrize("controller", CONTROLLERS, ids=lambda c: type(c).__name__)
def test_a_state_may_be_donated(controller):
    # One array standing for two counts would be given away twice.
    measurements = {"gradient_norm": 1.0, "error": 0.9}
    placed = jax.jit(controller.init)
    leaves = jax.tree.leaves(placed())
    assert len({leaf.unsafe_buffer_pointer() for leaf in leaves}) == len(leaves)
    update = jax.jit(lambda s: controller.update(s, 0.5, **measurements), donate_argnums=0)
    assert int(update(update(placed())).rejected) == 0


def test_the_fidelity_is_what_was_given():
    controller = FixedFidelity(Budget(20, rtol=1e-3))
    state = controller.update(controller.init(), float("nan"))
    fidelity = controller.fidelity(state)
    for budget in (fidelity.budget, fidelity.adjoint_budget):
        assert (int(budget.iterations), float(budget.rtol), float(budget.atol)) == (20, 1e-3, 0.0)
    own = FixedFidelity(Budget(20), Budget(7)).fidelity(state)
    assert (int(own.budget.iterations), int(own.adjoint_budget.iterations)) == (20, 7)
    bare = FixedFidelity(Fidelity(Budget(20), static={"grid": 8})).fidelity(state)
    assert bare.adjoint_budget is None
    assert bare["grid"] == 8


def test_all_fixed_budgets_share_one_compilation_with_a_ladder():
    traced = []

    @eqx.filter_jit
    def loss(fidelity):
        traced.append(fidelity)
        return fidelity.budget.iterations * fidelity.budget.rtol

    ladder = Ladder.iterations(1, 1, 3).with_tolerances(Budget(rtol=0.5))
    fixed = [
        FixedFidelity(fidelity)
        for fidelity in (
            *ladder,
            Fidelity(Budget(5), Budget(7), level=2),
            Fidelity(Budget(jnp.int32(5), rtol=jnp.float64(0.1)), Budget(7), level=jnp.int32(2)),
        )
    ]
    for fidelity in (*ladder, *(controller.fidelity(controller.init()) for controller in fixed)):
        loss(fidelity)
    assert len(traced) == 1


def test_a_traced_budget_may_be_fixed():
    def iterations(count):
        controller = FixedFidelity(Budget(count))
        return controller.fidelity(controller.init()).adjoint_budget.iterations

    np.testing.assert_array_equal(jax.vmap(iterations)(jnp.arange(3)), [0, 1, 2])


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: FixedFidelity(20), TypeError, "fidelity should be a Fidelity or a Budget, got 20"),
        (lambda: FixedFidelity(None), TypeError, "got None of type NoneType. Use for example"),
        (
            lambda: FixedFidelity(Fidelity(Budget(2)), Budget(3)),
            ValueError,
            "adjoint_budget goes with a bare Budget",
        ),
        (lambda: FixedFidelity(Budget(2), 3), TypeError, "adjoint_budget should be a Budget"),
    ],
)
def test_bad_input_is_refused(build, error, message):
    with pytest.raises(error, match=message):
        build()
