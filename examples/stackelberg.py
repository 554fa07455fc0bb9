"""Set prices for firms that compete: a Stackelberg game with many followers.

    bilevel compare examples/stackelberg.py --policies full,prdp,auto
    bilevel run examples/stackelberg.py --set demand=linear

A supplier, the leader, sells an input to firms that sell what they make of it in several markets.
It names a price w for every firm and market before demand is known.  Then the firms see demand
and compete in quantities (Cournot): each maximises its own profit given what the others sell,

    Σₘ q (Pₘ(Qₘ) - w - c) - d/2 (Σₘ q)²,    q ≥ 0,    Qₘ = Σ q over firms,

and their equilibrium is the inner problem, the variational inequality that the projected
gradient play q = max(q + τ ∂profit/∂q, 0) has as its fixed point.  Some firms stay out of some
markets.  Its Jacobian is not symmetric unless demand is linear, so the adjoint is solved by
BiCGStab.  The leader maximises Σ (w - c₀) q, the mean over random demand: batches of demand make
an update noisy, and every one has an equilibrium and a count of its own.

The metric is the share of the channel's profit that the leader fails to get, with demand that was
not trained on: 1 - (its mean profit) / (the mean profit of a monopolist who owned the firms, too).
That is reached by no prices, for the firms keep what competition leaves them.

With linear demand, and all firms in all markets, the game is linear-quadratic and its solution
known: the marginal profits are α - M q - w with a symmetric M, and half-way prices
w = (α + c₀) / 2 are optimal, α being the mean over demand (Stackelberg 1934; Tirole, The Theory of
Industrial Organization, 1988, chapter 4).
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray

import bilevel as bl

SUPPLY_COST = 1.0
"""c₀, what a unit of the input costs the leader."""

SPREAD = 0.2
"""Standard deviation of the logarithm of demand."""

BATCH, BATCHES, VALIDATION = 16, 4, 64

START = 2.0
"""Every price before training."""

TOLERANCE, CAP = 1e-5, 400
"""Of the full solves: relative residual, and the most iterations.  They take about 240."""


class Game:
    """Firms, markets, and their equilibrium at given prices.

    **Arguments:**

    - `key`: of the firms' costs and the markets' sizes.
    - `firms`, `markets`: how many.
    - `demand`: the price at which a market takes Q: "exponential", a exp(-Q / s), or "linear",
        a (1 - Q / s).
    """

    def __init__(self, key: PRNGKeyArray, firms: int, markets: int, demand: str):
        keys = jax.random.split(key, 3)
        self.shape = firms, markets
        self.linear = demand == "linear"
        self.level = 10.0
        self.size = jax.random.uniform(keys[0], (markets,), minval=1.0, maxval=2.0)
        # Little spread with linear demand: its formula holds where no firm stays out.
        spread = 0.25 if self.linear else 1.0
        self.cost = 2.0 + spread * jax.random.uniform(keys[1], self.shape, minval=-1.0)
        self.congestion = jax.random.uniform(keys[2], (firms, 1), minval=0.5, maxval=2.0)
        # A bound of the Jacobian's norm, at the highest price that there is.
        steepest = 1.5 * self.level * (firms + 1) / self.size.min()
        self.step_size = 1.0 / (steepest + markets * self.congestion.max())
        self.problem = bl.FixedPoint(self._play)
        self.united = bl.FixedPoint(self._united_play)

    def draw(self, key: PRNGKeyArray, count: int) -> Float[Array, "count markets"]:
        """Random levels a of demand."""
        noise = jax.random.normal(key, (count, self.shape[1]))
        return self.level * jnp.exp(SPREAD * noise - SPREAD**2 / 2)

    def price(self, total: Array, level: Array) -> tuple[Array, Array]:
        """What each market pays, and its derivative in the total."""
        if self.linear:
            return level * (1 - total / self.size), -level / self.size
        price = level * jnp.exp(-total / self.size)
        return price, -price / self.size

    def marginal(self, q: Array, w: Array, level: Array, *, united: bool = False) -> Array:
        """What one more unit brings: each firm's own profit, or that of all together."""
        total = jnp.sum(q, 0)
        price, slope = self.price(total, level)
        own = total if united else q
        burden = self.congestion * jnp.sum(q, 1, keepdims=True)
        return price + own * slope - w - self.cost - burden

    def _play(self, q: Array, given: tuple[Array, Array]) -> Array:
        return jnp.maximum(q + self.step_size * self.marginal(q, *given), 0.0)

    def _united_play(self, q: Array, level: Array) -> Array:
        step = self.marginal(q, jnp.asarray(SUPPLY_COST), level, united=True)
        return jnp.maximum(q + self.step_size * step, 0.0)

    def equilibria(
        self, w: Array, levels: Array, fidelity: bl.Fidelity
    ) -> Float[Array, "count firms markets"]:
        """What firms sell at each level of demand, as far as the fidelity goes."""

        def one(level: Array) -> Array:
            return bl.solve(
                self.problem,
                (w, level),
                jnp.zeros(self.shape),
                solver=bl.FixedPointIteration(),
                estimator=bl.Implicit(bl.BiCGStab()),
                fidelity=fidelity,
            ).value

        return jax.vmap(one)(levels)

    def profit(self, w: Array, levels: Array, fidelity: bl.Fidelity) -> Array:
        """The leader's, the mean over demand."""
        q = self.equilibria(w, levels, fidelity)
        return jnp.mean(jnp.sum((w - SUPPLY_COST) * q, (1, 2)))

    def channel(self, levels: Array) -> Array:
        """The profit of a monopolist who owns leader and firms, the mean over demand."""

        def one(level: Array) -> Array:
            q = bl.solve(
                self.united,
                level,
                jnp.zeros(self.shape),
                solver=bl.FixedPointIteration(),
                budget=bl.Budget(iterations=20_000, rtol=1e-6),
            ).value
            total = jnp.sum(q, 0)
            earned = jnp.sum(self.price(total, level)[0] * total)
            spent = jnp.sum((SUPPLY_COST + self.cost) * q)
            return earned - spent - jnp.sum(self.congestion[:, 0] * jnp.sum(q, 1) ** 2) / 2

        return jnp.mean(jax.vmap(one)(levels))

    def halfway(self) -> Array:
        """The optimal prices of linear demand, where every firm is in every market."""
        return (self.level - self.cost + SUPPLY_COST) / 2


EXACT = bl.Fidelity(bl.Budget(iterations=2000, rtol=1e-6), bl.Budget(iterations=1))


def task(
    demand: Literal["exponential", "linear"] = "exponential",
    firms: int = 8,
    markets: int = 4,
    epochs: int = 50,
    seed: int = 0,
) -> bl.Task:
    """The leader's problem.

    Args:
        demand: how a market's price falls with what is sold there.
        firms: followers.
        markets: that each may sell in.
        epochs: of four updates.
        seed: of the demand trained and validated on; the firms are always the same.

    """
    if demand not in ("exponential", "linear"):
        msg = f"demand is exponential or linear, got {demand!r}."
        raise ValueError(msg)
    game = Game(jax.random.key(0), firms, markets, demand)
    unseen = game.draw(jax.random.key(1_000 + seed), VALIDATION)
    channel = jax.jit(game.channel)(unseen)

    def loss(w: Array, levels: Array, fidelity: bl.Fidelity) -> Array:
        return -game.profit(w, levels, fidelity)

    def validate(w: Array) -> Array:
        return 1 - game.profit(w, unseen, EXACT) / channel

    def batches(epoch: int, key: PRNGKeyArray) -> Iterator[Array]:
        del epoch
        yield from game.draw(key, BATCHES * BATCH).reshape(BATCHES, BATCH, markets)

    ladder = bl.Ladder.geometric(start=4, factor=1.5, stop=CAP)
    return bl.Task(
        jnp.full(game.shape, START),
        loss,
        batches,
        validate,
        name=f"stackelberg, {demand} demand",
        metric_name="share of the channel's profit lost",
        optimizer=optax.adam(optax.cosine_decay_schedule(0.2, epochs * BATCHES, alpha=0.02)),
        epochs=epochs,
        ladder=ladder.with_tolerances(bl.Budget(rtol=TOLERANCE)),
        # Each level brings little of what is left, and the rule would stop at the second.
        refinement={"stopping_threshold": 1.0},
        report=lambda runs, directory: report(game, unseen, channel, runs, directory),
    )


def report(
    game: Game, levels: Array, channel: Array, runs: Sequence[Any], directory: Path | None
) -> dict[str, tuple[float, float]]:
    """Print what the prices bring, beside one price for all and, if it is known, the optimum.

    **Returns:** by name, the share of the channel's profit lost, and of firms and markets that
    trade with each other.
    """
    del directory

    @jax.jit
    def figures(w: Array) -> tuple[Array, Array]:
        lost = 1 - game.profit(w, levels, EXACT) / channel
        return lost, jnp.mean(game.equilibria(w, levels, EXACT) > 0)

    def found(w: Array) -> tuple[float, float]:
        lost, trading = figures(w)
        return float(lost), float(trading)

    lines = {"start": found(jnp.full(game.shape, START))}
    lines["best price for all"] = min(
        found(jnp.full(game.shape, price)) for price in jnp.linspace(2.0, 7.0, 26)
    )
    if game.linear:
        lines["half-way prices"] = found(game.halfway())
    lines |= {run.summary.policy: found(run.theta) for run in runs}
    print("\non the demand of the first seed    profit lost   trading")
    for name, (lost, trading) in lines.items():
        print(f"{name:34} {lost:11.4f} {trading:9.3f}")
    return lines


if __name__ == "__main__":
    import sys

    from bilevel.cli import main

    sys.exit(main(["compare", __file__, "--overwrite", *sys.argv[1:]]))
