"""The game of one leader and many followers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel as bl
from bilevel.testing import taylor_test
from tests.examples.loading import example


@pytest.fixture(scope="module")
def stackelberg():
    with example("stackelberg") as module:
        yield module


def reaction(game) -> np.ndarray:
    """M of the linear game: how marginal profits fall with what is sold, firm by market."""
    firms, markets = game.shape
    slope = game.level / np.asarray(game.size)
    same_firm, same_market = np.eye(firms), np.eye(markets)
    rivals = np.einsum("fg,mn->fmgn", np.ones((firms, firms)) + same_firm, np.diag(slope))
    burden = np.einsum(
        "fg,mn->fmgn", np.diag(np.asarray(game.congestion)[:, 0]), np.ones_like(same_market)
    )
    return (rivals + burden).reshape(firms * markets, firms * markets)


FULL = bl.Fidelity(bl.Budget(5000, rtol=1e-12), bl.Budget(500, rtol=1e-12))


def test_the_linear_equilibrium_is_that_of_the_matrix(stackelberg):
    """M q = α - w; a wrong sign of the slope or a rival counted twice changes M."""
    game = stackelberg.Game(jax.random.key(0), 3, 2, "linear")
    w = jnp.full(game.shape, 3.0)
    q = game.equilibria(w, jnp.full((1, 2), game.level), FULL)[0]
    margin = np.ravel(game.level - game.cost - w)
    exact = np.linalg.solve(reaction(game), margin)
    assert exact.min() > 0.05
    np.testing.assert_allclose(np.ravel(q), exact, rtol=1e-8)


def test_halfway_prices_are_optimal_where_demand_is_linear(stackelberg):
    """The leader's profit is ¼ (α - c₀)ᵀ M⁻¹ (α - c₀) there, and its gradient vanishes."""
    game = stackelberg.Game(jax.random.key(0), 3, 2, "linear")
    level = jnp.full((1, 2), game.level)
    profit, slope = jax.value_and_grad(game.profit)(game.halfway(), level, FULL)
    margin = np.ravel(game.level - game.cost - stackelberg.SUPPLY_COST)
    best = margin @ np.linalg.solve(reaction(game), margin) / 4
    assert profit == pytest.approx(best, rel=1e-9)
    assert np.abs(slope).max() < 1e-8


def test_no_firm_gains_by_selling_another_quantity(stackelberg):
    """Firms that sell have no marginal profit left, and those that do not would lose."""
    game = stackelberg.Game(jax.random.key(0), 4, 3, "exponential")
    w = jnp.full(game.shape, 6.0).at[0].set(8.5)
    level = game.draw(jax.random.key(1), 2)
    for q, a in zip(game.equilibria(w, level, FULL), level, strict=True):
        marginal = game.marginal(q, w, a)
        assert float(jnp.max(jnp.where(q > 0, jnp.abs(marginal), 0.0))) < 1e-8
        assert float(jnp.max(jnp.where(q > 0, -jnp.inf, marginal))) < 1e-8
        assert 0 < jnp.sum(q > 0) < q.size


@pytest.mark.slow
def test_the_gradient_is_that_of_the_profit(stackelberg):
    game = stackelberg.Game(jax.random.key(0), 3, 2, "exponential")
    level = game.draw(jax.random.key(1), 3)
    result = taylor_test(lambda w: game.profit(w, level, FULL), jnp.full(game.shape, 4.0))
    assert result.slope >= 1.95


def test_a_monopolist_earns_more_than_any_leader(stackelberg):
    game = stackelberg.Game(jax.random.key(0), 3, 2, "linear")
    level = jnp.full((1, 2), game.level)
    assert float(game.channel(level)) > 1.05 * float(game.profit(game.halfway(), level, FULL))


@pytest.mark.slow
def test_training_comes_near_the_closed_form(stackelberg, capsys):
    with jax.enable_x64(False):
        task = stackelberg.task("linear", firms=3, markets=2, epochs=25)
        run = bl.optimize(task, controller=bl.AutomaticRefinement(task.ladder), progress=False)
        lines = task.report([run], None)
    lost = {name: figures[0] for name, figures in lines.items()}
    (trained,) = (value for name, value in lost.items() if name == run.summary.policy)
    assert trained == pytest.approx(run.summary.final_metric, rel=1e-4)
    assert trained < 1.01 * lost["half-way prices"]
    # Costs differ little here, so that one price for all comes close.
    assert lost["half-way prices"] == pytest.approx(lost["best price for all"], rel=0.01)
    assert trained < 0.7 * lost["start"]
    assert "half-way prices" in capsys.readouterr().out
    assert run.summary.compilations == 1
    assert run.summary.failures == 0


def test_what_is_no_demand_is_refused(stackelberg):
    with pytest.raises(ValueError, match="demand is exponential or linear, got 'cubic'"):
        stackelberg.task("cubic")
