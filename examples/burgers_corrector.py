"""Learn what a coarse solver of Burgers' equation gets wrong: a corrector from the PRDP paper.

    bilevel compare examples/burgers_corrector.py --seeds 1,2,25
    bilevel compare examples/burgers_corrector.py --size small --policies full,prdp,fixed=8

A step P of ∂u/∂t + u ∂u/∂x = ν ∂²u/∂x² on the periodic unit interval is one Picard step of
implicit Euler with upwind differences: one linear system M(u) w = u, with the advecting velocity
of the step before.  A network c corrects it, u₁ = P(u₀) + c(P(u₀)), and is trained through two
corrected steps to meet a reference:

    loss = mean (u₁ - v₁)² + mean (u₂ - v₂)²,

v being computed on four times as many points with a quarter of the time step, and every fourth
point of it taken.  The metric is the relative squared error after five corrected steps, each
solved to a residual of 1e-6, the mean over the validation states: it knows no budget.

The paper (Bhatia, Koehler and Thuerey, ICLR 2025) says how the step is made, that a residual of
1e-5 takes 24 iterations, and nothing more.  Here it is Jacobi's iteration from zero, as for the
paper's heat emulators; M(u) is diagonally dominant, and dt is such that this takes about as
many iterations (21 to 24).  All states of a batch are
solved as one system: an iteration is one of all of them.  `full` stops at 1e-5.

What is differentiated is all of the step: M and the right-hand side both depend on the state
before, and so on the network; the derivative of M(u)⁻¹u is an adjoint solve with M(u)ᵀ, by
Jacobi's iteration, too, under its own budget and relative to its own right-hand side.  For one
Picard step that is the exact derivative.  That of the converged implicit step,
`pde.Burgers(derivative="implicit")`, would be one of an equation which this step does not solve,
and `"frozen"` drops what M does, the slope of u, which is large where the waves are steep.
"""

from collections.abc import Iterator
from typing import Annotated, Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PRNGKeyArray
from networks import ResidualConvolution
from pydantic import Field

import bilevel as bl
import bilevel_pde as pde

VISCOSITY, DT, MODES = 1e-3, 0.03, 5
FINER = 4
"""How much finer the reference is, in space and in time."""

TRAINED, VALIDATED = 2, 5
"""Steps that are trained through, and steps that are validated by."""

CAP, TOLERANCE = 60, 1e-5
"""Most iterations of a solve, and the relative residual at which it stops before."""

REFERENCE = bl.Budget(iterations=200, rtol=1e-6)
BATCH, VALIDATION = 25, 5


Count = Annotated[int, Field(ge=1)]
Batches = Annotated[int, Field(ge=BATCH, multiple_of=BATCH)]


class Size(NamedTuple):
    """How large everything is; `channels` and `blocks` of the network."""

    points: int
    channels: int
    blocks: int
    samples: int
    epochs: int


SIZES = {"paper": Size(64, 64, 3, 200, 100), "small": Size(64, 16, 2, 200, 100)}


class Batched(eqx.Module):
    """M(u) of each state of a batch: one system, so one loop over iterations."""

    operators: Any

    def matvec(self, w: Array) -> Array:
        """M w of every state."""
        return jax.vmap(lambda operator, one: operator.matvec(one))(self.operators, w)

    def rmatvec(self, w: Array) -> Array:
        """Mᵀ w of every state."""
        return jax.vmap(lambda operator, one: operator.rmatvec(one))(self.operators, w)

    def diagonal(self) -> Array:
        """The diagonals, of the states' shape."""
        return jax.vmap(lambda operator: operator.diagonal())(self.operators)


class Flow:
    """The coarse step, on batches of states of shape (states, points)."""

    def __init__(self, grid: pde.Grid):
        burgers = pde.Burgers(grid, VISCOSITY, DT)

        def matrix(u: Array) -> Any:
            return pde.identity(grid) + DT * burgers.transport((u,))

        self.system = bl.LinearSystem(lambda u: Batched(jax.vmap(matrix)(u)), lambda u: u)
        self.solver = bl.Jacobi()
        self.estimator = bl.Implicit(self.solver)

    def solved(self, u: Array, fidelity: bl.Fidelity) -> bl.Solution:
        """P(u), as far as the fidelity goes, and how far that was."""
        return bl.solve(
            self.system,
            u,
            jnp.zeros_like(u),
            solver=self.solver,
            estimator=self.estimator,
            fidelity=fidelity,
        )

    def corrected(self, network: Any, u: Array, steps: int, fidelity: bl.Fidelity) -> list[Array]:
        """The states after 1, 2, ..., `steps` corrected steps."""
        # Written out: XLA's convolutions are far slower within a scan on a CPU.
        states: list[Array] = []
        for _ in range(steps):
            u = self.solved(u, fidelity).value
            u += jax.vmap(network)(u[:, None])[:, 0]
            states.append(u)
        return states


def trajectories(key: PRNGKeyArray, points: int, states: int) -> Array:
    """Initial states and the reference after each step, of shape (states, 1 + steps, points)."""
    fine = pde.Grid(FINER * points, boundary=pde.Periodic())
    stepper = pde.Burgers(fine, VISCOSITY, DT / FINER, outer_budget=1)

    def trajectory(key: PRNGKeyArray) -> Array:
        start = pde.truncated_fourier(key, fine, MODES)
        later = pde.rollout(stepper, start, FINER * VALIDATED, budget=REFERENCE)
        return jnp.concatenate([start[None], later[FINER - 1 :: FINER]])[:, ::FINER]

    return jax.jit(jax.vmap(trajectory))(jax.random.split(key, states))


def task(
    size: Literal["paper", "small"] = "paper",
    seed: int = 0,
    points: Annotated[int, Field(ge=3)] | None = None,
    channels: Count | None = None,
    blocks: Count | None = None,
    samples: Batches | None = None,
    epochs: Count | None = None,
) -> bl.Task:
    """The correction task.

    Args:
        size: "paper" or "small".
        seed: of the data and of the network.
        points: of the grid, in place of those of the size.
        channels: of the network, in place of those of the size.
        blocks: of the network, in place of those of the size.
        samples: initial states trained on, in place of those of the size; whole batches of 25.
        epochs: passes over them, in place of those of the size.

    """
    given = (points, channels, blocks, samples, epochs)
    of_size = SIZES[size]
    used = Size(*(own if n is None else n for n, own in zip(given, of_size, strict=True)))
    data_key, network_key = jax.random.split(jax.random.key(seed))
    flow = Flow(pde.Grid(used.points, boundary=pde.Periodic()))
    data = trajectories(data_key, used.points, used.samples + VALIDATION)
    unseen, train = data[:VALIDATION], data[VALIDATION:, : TRAINED + 1]
    network = ResidualConvolution(
        network_key, 1, 1, 1, channels=used.channels, blocks=used.blocks, final_scale=0.01
    )

    def loss(network: Any, batch: Array, fidelity: bl.Fidelity) -> Array:
        states = flow.corrected(network, batch[:, 0], TRAINED, fidelity)
        return sum(
            (jnp.mean((u - batch[:, index]) ** 2) for index, u in enumerate(states, start=1)),
            start=jnp.zeros((), batch.dtype),
        )

    def validate(network: Any) -> Array:
        last = flow.corrected(network, unseen[:, 0], VALIDATED, bl.Fidelity(REFERENCE))[-1]
        wanted = unseen[:, -1]
        return jnp.mean(jnp.sum((last - wanted) ** 2, 1) / jnp.sum(wanted**2, 1))

    def batches(epoch: int, key: PRNGKeyArray) -> Iterator[Array]:
        del epoch
        order = jax.random.permutation(key, used.samples)
        for first in range(0, used.samples - BATCH + 1, BATCH):
            yield train[order[first : first + BATCH]]

    updates = used.epochs * (used.samples // BATCH)
    return bl.Task(
        network,
        loss,
        batches,
        validate,
        name="burgers corrector",
        metric_name=f"{VALIDATED}-step nMSE",
        optimizer=optax.adam(optax.cosine_decay_schedule(1e-3, updates, alpha=0.1)),
        epochs=used.epochs,
        ladder=bl.Ladder.iterations(1, 1, CAP).with_tolerances(bl.Budget(rtol=TOLERANCE)),
        policies=("full", "prdp"),
    )


if __name__ == "__main__":
    import sys

    from bilevel.cli import main

    sys.exit(main(["compare", __file__, "--overwrite", *sys.argv[1:]]))
