"""Train a network to be one step of the heat equation, through the solver of the next step.

    bilevel compare examples/heat_emulator.py --seeds 1,2,25
    bilevel compare examples/heat_emulator.py --set dimensions=2
    bilevel compare examples/heat_emulator.py --set dimensions=3 --size small

The heat emulators of the PRDP paper (Bhatia, Koehler and Thuerey, ICLR 2025), in one, two and
three dimensions.  A step is implicit Euler, (I - κΔt Δ) v = u with κΔt = 1e-3, on 30 points a
side and zero on the boundary; its solver P_K is K Jacobi iterations from zero.  The network f
comes first and the solver second:

    loss = mean (P_K(f(u₀)) - u₂)²,

u₂ being two exact steps from u₀.  So f learns one step although it never sees the state after
one, and what P_K lacks f must make up for: a coarse solver pulls it away from the truth.

The metric is that of a rollout and knows no budget: f applied twice, its result and u₂ compared,
‖f(f(u₀)) - u₂‖² / ‖u₂‖², the mean over the validation states.

`full` does as many iterations as the paper needed for a residual of 1e-5 (25, 43 and 29); the
ladder goes there one by one.  The thresholds of refinement are the paper's, in three dimensions,
where it prints none, the rule's defaults.  All states of a batch are solved as one system: an
iteration is one of all of them, which is how the paper counts.
"""

import dataclasses
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PRNGKeyArray
from networks import FieldMLP, ResidualConvolution
from pydantic import Field

import bilevel as bl
import bilevel_pde as pde

DT = 1e-3
MODES = 5
VALIDATION, BATCH = 5, 25

Count = Annotated[int, Field(ge=1)]
Batches = Annotated[int, Field(ge=BATCH, multiple_of=BATCH)]


@dataclasses.dataclass(frozen=True)
class Setting:
    """What depends on the number of dimensions and on the size.

    - `width`, `blocks`: of the network; neurons and hidden layers in one and two dimensions,
        channels and residual blocks in three.
    - `full`: iterations of the full solve.
    """

    points: int
    width: int
    blocks: int
    epochs: int
    full: int


SETTINGS = {
    (1, "paper"): Setting(points=30, width=64, blocks=3, epochs=100, full=25),
    (2, "paper"): Setting(points=30, width=3000, blocks=3, epochs=70, full=43),
    (3, "paper"): Setting(points=30, width=32, blocks=3, epochs=100, full=29),
    (1, "small"): Setting(points=30, width=64, blocks=3, epochs=100, full=25),
    (2, "small"): Setting(points=20, width=256, blocks=3, epochs=70, full=43),
    (3, "small"): Setting(points=14, width=8, blocks=1, epochs=100, full=29),
}

REFINEMENT: dict[int, dict[str, Any]] = {
    1: {"stepping_threshold": 0.98, "stopping_threshold": 0.9, "ema_window": 8, "error_window": 3},
    2: {"stepping_threshold": 0.9, "stopping_threshold": 0.9, "ema_window": 6, "error_window": 3},
    3: {},
}


class Batched(eqx.Module):
    """An operator on each field of a batch: one system, so one loop over iterations."""

    operator: pde.Operator
    count: int = eqx.field(static=True)
    symmetric = True
    positive_definite = True

    def matvec(self, fields: Array) -> Array:
        """The operator on every field."""
        return jax.vmap(self.operator.matvec)(fields)

    def diagonal(self) -> Array:
        """That of one field, for each."""
        diagonal = jnp.asarray(self.operator.diagonal())
        return jnp.broadcast_to(diagonal, (self.count, *diagonal.shape))


def initial_state(key: PRNGKeyArray, grid: pde.Grid) -> Array:
    """Σₖ aₖ sin(πk x) sin(πk y) …, normal aₖ: a truncated Fourier series of five modes in all."""
    modes = jnp.arange(1, MODES + 1)
    field = jax.random.normal(key, modes.shape, grid.dtype) / jnp.sqrt(float(MODES))
    for x in grid.coordinates():
        line = jnp.sqrt(2.0) * jnp.sin(jnp.pi * modes * x[:, None])
        field = field[..., None, :] * line
    return jnp.sum(field, axis=-1).astype(grid.dtype)


class Emulation:
    """The equation, its solver, and the data."""

    def __init__(self, grid: pde.Grid, states: int, key: PRNGKeyArray):
        self.solver = bl.Jacobi()
        self.estimator = bl.Implicit(self.solver)
        self.matrix = pde.Heat(grid, 1.0, dt=DT).matrix()
        exact = bl.Richardson(1.0, preconditioner=pde.FastSolver())
        exactly = pde.Heat(grid, 1.0, dt=DT, solver=exact)
        keys = jax.random.split(key, states)
        start = jax.vmap(lambda one: initial_state(one, grid))(keys)
        later = jax.vmap(lambda u: pde.rollout(exactly, u, 2)[-1])(start)
        self.train = start[VALIDATION:], later[VALIDATION:]
        self.validation = start[:VALIDATION], later[:VALIDATION]

    def step(
        self, fields: Array, fidelity: bl.Fidelity, start: bl.WarmStart | None = None
    ) -> Array:
        """P_K: the fields one step later, as far as the fidelity goes, from zero or a start."""
        return bl.solve(
            bl.LinearSystem(Batched(self.matrix, len(fields)), lambda source: source),
            fields,
            jnp.zeros_like(fields) if start is None else start.value,
            adjoint_guess=None if start is None else start.adjoint,
            probe=None if start is None else start.probe,
            solver=self.solver,
            estimator=self.estimator,
            fidelity=fidelity,
        ).value


def task(
    dimensions: Literal[1, 2, 3] = 1,
    size: Literal["paper", "small"] = "paper",
    seed: int = 0,
    points: Count | None = None,
    width: Count | None = None,
    samples: Batches = 200,
    epochs: Count | None = None,
    warm: bool = False,  # noqa: FBT001, FBT002
    precision: Literal["single", "mixed"] = "single",
) -> bl.Task:
    """The emulator.

    Args:
        dimensions: of space, 1, 2 or 3.
        size: "paper" or "small"; the same in one dimension, where a run takes seconds.
        seed: of the data and of the network.
        points: inner grid points a side, in place of those of the size.
        width: of the network, in place of that of the size.
        samples: initial states trained on: whole batches of 25.
        epochs: passes over them, in place of those of the size.
        warm: whether the solves of a state, and their adjoints, start from those of the epoch
            before, in place of zero.
        precision: "single", or "mixed" for a network that is evaluated in bfloat16 on the lower
            half of the ladder, and in single precision above it.

    """
    if (dimensions, size) not in SETTINGS:
        msg = f"dimensions is 1, 2 or 3 and size is paper or small, got {dimensions} and {size!r}."
        raise ValueError(msg)
    given = {"points": points, "width": width, "epochs": epochs}
    setting = dataclasses.replace(
        SETTINGS[dimensions, size], **{name: n for name, n in given.items() if n is not None}
    )
    data_key, network_key = jax.random.split(jax.random.key(seed))
    grid = pde.Grid((setting.points,) * dimensions)
    emulation = Emulation(grid, samples + VALIDATION, data_key)

    starts, targets = emulation.train

    def applied(network: Any, fields: Array, fidelity: bl.Fidelity) -> Array:
        each = bl.mixed_precision(
            lambda network, fields: jax.vmap(network)(fields),
            fidelity["dtype"] if precision == "mixed" else fields.dtype,
        )
        return each(network, fields)

    def loss(network: Any, batch: Array, fidelity: bl.Fidelity) -> Array:
        found = emulation.step(applied(network, starts[batch], fidelity), fidelity)
        return jnp.mean((found - targets[batch]) ** 2)

    def warm_loss(
        network: Any, batch: Array, fidelity: bl.Fidelity, memory: bl.WarmStarts
    ) -> tuple[Array, bl.WarmStarts]:
        moved = applied(network, starts[batch], fidelity)
        found = emulation.step(moved, fidelity, memory.at(batch))
        return jnp.mean((found - targets[batch]) ** 2), memory.stored(batch, found)

    def validate(network: Any) -> Array:
        start, later = emulation.validation
        twice = jax.vmap(lambda u: network(network(u)))(start)
        axes = tuple(range(1, start.ndim))
        return jnp.mean(jnp.sum((twice - later) ** 2, axes) / jnp.sum(later**2, axes))

    def batches(epoch: int, key: PRNGKeyArray) -> Iterator[Array]:
        del epoch
        order = jax.random.permutation(key, samples)
        for first in range(0, samples, BATCH):
            yield order[first : first + BATCH]

    ladder = bl.Ladder.iterations(start=1, step=1, stop=setting.full)
    if precision == "mixed":
        half = setting.full // 2
        kinds = ["bfloat16"] * half + [grid.dtype.name] * (setting.full - half)
        ladder = ladder.with_static(dtype=kinds)

    return bl.Task(
        _network(network_key, grid, setting),
        warm_loss if warm else loss,
        batches,
        validate,
        memory=bl.WarmStarts.zeros(samples, starts[0]) if warm else None,
        name=f"heat emulator {dimensions}d",
        metric_name="2-step nMSE",
        optimizer=optax.adam(optax.exponential_decay(1e-3, 100, 0.94)),
        epochs=setting.epochs,
        ladder=ladder,
        full=ladder.finest,
        refinement=REFINEMENT[dimensions],
        policies=("full", "prdp"),
    )


class Scalar(eqx.Module):
    """A network of one component on a bare field."""

    network: ResidualConvolution

    def __call__(self, field: Array) -> Array:
        """A field of the same shape."""
        return self.network(field[None])[0]


def _network(key: PRNGKeyArray, grid: pde.Grid, setting: Setting) -> FieldMLP | Scalar:
    if grid.ndim < 3:
        return FieldMLP(key, grid.shape, setting.width, setting.blocks)
    return Scalar(
        ResidualConvolution(
            key, 3, 1, 1, channels=setting.width, blocks=setting.blocks, periodic=False
        )
    )


if __name__ == "__main__":
    import sys

    from bilevel.cli import main

    sys.exit(main(["compare", __file__, "--overwrite", *sys.argv[1:]]))
