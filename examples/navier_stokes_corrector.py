"""Learn what a coarse flow solver gets wrong: the Navier–Stokes experiment of the PRDP paper.

    bilevel compare examples/navier_stokes_corrector.py --set size=small
    bilevel run examples/navier_stokes_corrector.py --set size=small --set derivative=detached

A step P of the flow is one linear solve for both velocities and the pressure together, M(u) w =
u / dt, with the advecting velocity of the step before.  A network c corrects it, u₁ = P(u₀) +
c(P(u₀)), and is trained through two corrected steps to meet a reference that was computed on a
finer grid.  The solve is GMRES without a preconditioner, in cycles of 8 from zero; one iteration
of a budget is one such cycle, as in the paper (Bhatia, Koehler and Thuerey, ICLR 2025).

Settings are the paper's with `size=paper`: 48² cells (6,912 unknowns), every second point of a
reference on 97², ν = 1e-4, steps of 0.1, relative tolerance 1e-5.  97 is no multiple of 48: a
cell is lost at the seam of the periodic box, and the points of a component lie half a fine cell
off the coarse faces.  `subsampling=faces` takes 96² instead, and the mean of the two fine faces
that make up a coarse one, so that what flows through it is the reference's and no divergence
comes in.

`derivative` says what of a step is differentiated:

- `kept`: all of it.  M(u) and the right-hand side both depend on the state before, and so on the
    network; the linear solve is differentiated by an adjoint solve under its own budget and a
    tolerance relative to its own right-hand side.
- `frozen`: the right-hand side only; M is taken as a constant.
- `detached`: nothing, so that the network learns one step at a time.  The published runs were of
    this kind, by accident: their adjoint got the primal's absolute tolerance, which was above
    its right-hand side, and stopped at zero.

The reference, and the five steps that the network is validated by, are solved with a
preconditioner, to a relative residual of 1e-6: what the policies are compared by does not depend
on a budget.

`grids=True` trains on every second cell first, up to a budget of ten cycles, and then on all: a
convolution does not mind, and each grid compiles once.
"""

import functools
from collections.abc import Iterator
from functools import partial
from typing import Annotated, Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PRNGKeyArray
from networks import ResidualConvolution
from pydantic import Field

import bilevel as bl
import bilevel_pde as pde

VISCOSITY, DT, SMOOTHING = 1e-4, 0.1, 3e-3
TRAINED, VALIDATED = 2, 5
"""Steps that are trained through, and steps that are validated by."""

CYCLES, TOLERANCE = 120, 1e-5
"""Most restart cycles of a solve, and the relative residual at which it stops before."""

COARSE_CYCLES = 10
"""With two grids, the largest budget that is spent on the coarser one."""

REFERENCE = bl.Budget(iterations=200, rtol=1e-6)

Count = Annotated[int, Field(ge=1)]


class Size(NamedTuple):
    """How large everything is.

    - `cells`: along each axis of the grid that is trained on.
    - `channels`, `blocks`: of the network.
    - `samples`, `validation`: initial states to train on, and to validate by.
    - `batch`: states an update.
    """

    cells: int
    channels: int
    blocks: int
    samples: int
    validation: int
    batch: int
    epochs: int


SIZES = {
    "paper": Size(48, 64, 3, 200, 5, 25, 100),
    "small": Size(24, 16, 3, 80, 5, 10, 100),
}


def task(
    size: str = "paper",
    derivative: str = "kept",
    subsampling: str = "stride",
    grids: bool = False,  # noqa: FBT001, FBT002
    together: bool = False,  # noqa: FBT001, FBT002
    seed: int = 0,
    epochs: Count | None = None,
) -> bl.Task:
    """The correction task.

    Args:
        size: "paper" or "small" (24² cells, 16 channels, 80 samples in batches of 10).
        derivative: "kept", "frozen" or "detached": what of a step is differentiated.
        subsampling: "stride" (every second point, as published) or "faces" (means).
        grids: whether small budgets are spent on a grid of half as many cells.
        together: whether the samples of a batch are solved side by side, which suits a GPU; one
            by one takes 40 % less time on two cores, and each stops when it is done.
        seed: of data, parameters and shuffles.
        epochs: passes over the samples, in place of those of the size.

    """
    chosen = _choice("size", size, SIZES)
    if epochs is not None:
        chosen = chosen._replace(epochs=epochs)
    return build(chosen, derivative, subsampling, grids, together, seed)


def build(
    size: Size,
    derivative: str = "kept",
    subsampling: str = "stride",
    grids: bool = False,  # noqa: FBT001, FBT002
    together: bool = False,  # noqa: FBT001, FBT002
    seed: int = 0,
) -> bl.Task:
    """The task at any size; arguments as of `task`."""
    step = _choice("derivative", derivative, DERIVATIVES)
    flow = stepper(size.cells)
    (starts, targets), (unseen, expected) = data(size, subsampling, seed, flow.grid.dtype)
    network = ResidualConvolution(
        jax.random.key(seed),
        dimensions=2,
        inputs=2,
        outputs=2,
        channels=size.channels,
        blocks=size.blocks,
    )

    def loss(network: ResidualConvolution, batch: Any, fidelity: bl.Fidelity) -> Array:
        start, wanted = batch
        used = flow
        if grids and fidelity["cells"] != size.cells:
            used = stepper(fidelity["cells"])
            start, wanted = start[..., ::2, ::2], wanted[..., ::2, ::2]
        each = partial(step, used, fidelity=fidelity)
        solved = jax.vmap(each) if together else partial(jax.lax.map, each)

        # Written out, as XLA's convolutions take forty times as long within a scan on a CPU.
        u, total = start, jnp.zeros((), start.dtype)
        for index in range(TRAINED):
            moved, report = solved(u)
            u = corrected(network, moved)
            total += jnp.mean((u - wanted[:, index]) ** 2) + jnp.sum(report)
        return total

    def batches(epoch: int, key: PRNGKeyArray) -> Iterator[tuple[Array, Array]]:
        del epoch
        order = jax.random.permutation(key, size.samples)
        for first in range(0, size.samples - size.batch + 1, size.batch):
            chosen = order[first : first + size.batch]
            yield starts[chosen], targets[chosen]

    @jax.jit
    def advance(u: Array) -> Array:
        return jax.lax.map(partial(referred, flow), u)

    correct = eqx.filter_jit(corrected)

    def validate(network: ResidualConvolution) -> Array:
        """The error of the x-velocity after five steps, over its own size."""
        u = unseen
        for _ in range(VALIDATED):
            u = correct(network, advance(u))
        wanted = expected[:, -1, 0]
        square = partial(jnp.sum, axis=(1, 2))
        return jnp.mean(square((u[:, 0] - wanted) ** 2) / square(wanted**2))

    ladder = bl.Ladder.iterations(1, 1, CYCLES).with_tolerances(bl.Budget(rtol=TOLERANCE))
    if grids:
        ladder = ladder.with_static(
            cells=[size.cells // (2 if k < COARSE_CYCLES else 1) for k in range(CYCLES)]
        )
    updates = size.epochs * (size.samples // size.batch)
    return bl.Task(
        network,
        loss,
        batches,
        validate,
        name="Navier–Stokes corrector",
        metric_name=f"{VALIDATED}-step nMSE of the x-velocity",
        optimizer=optax.adam(optax.cosine_decay_schedule(1e-3, updates, alpha=0.1)),
        epochs=size.epochs,
        ladder=ladder,
        refinement={
            "stepping_threshold": 0.95,
            "stopping_threshold": 0.9,
            "ema_window": 6,
            "error_window": 3,
        },
        policies=("full", "prdp"),
        jit_validate=False,  # its five steps share one program for a step
    )


def stepper(cells: int) -> pde.NavierStokes:
    """Periodic and upwind, with one Picard linearisation; solved with a preconditioner."""
    box = pde.Staggered((cells, cells), boundary=pde.Periodic())
    return pde.NavierStokes(box, VISCOSITY, DT, outer_budget=1)


def referred(flow: pde.NavierStokes, u: Array) -> Array:
    """A step of one velocity, of shape (2, cells, cells), that no policy has a part in."""
    return jnp.stack(flow.step(flow.state(tuple(u)), budget=REFERENCE)[0])


def corrected(network: ResidualConvolution, moved: Array) -> Array:
    """A batch of velocities, of shape (samples, 2, cells, cells), with the network's correction."""
    return moved + jax.vmap(network)(moved)


# One step of the velocity u, of shape (2, cells, cells), and what it adds to the loss: zero, with
# the derivative with respect to the probe that a backward pass would have reported.


def kept(flow: pde.NavierStokes, u: Array, fidelity: bl.Fidelity) -> tuple[Array, Array]:
    """A step whose derivative is all of it: of M(u)⁻¹ u / dt."""
    solution = solved((flow, u, u), fidelity)
    return jnp.stack(solution.value[0]), jnp.zeros((), u.dtype)


def frozen(flow: pde.NavierStokes, u: Array, fidelity: bl.Fidelity) -> tuple[Array, Array]:
    """A step whose derivative holds the matrix."""
    solution = solved((flow, jax.lax.stop_gradient(u), u), fidelity)
    return jnp.stack(solution.value[0]), jnp.zeros((), u.dtype)


def detached(flow: pde.NavierStokes, u: Array, fidelity: bl.Fidelity) -> tuple[Array, Array]:
    """A step without a derivative; no backward pass reports, so its iterations are put in here."""
    probe = fidelity.probe
    solution = jax.lax.stop_gradient(solved((flow, u, u), fidelity.with_probe(None)))
    report = jnp.zeros((), u.dtype)
    if probe is not None:
        for counter, number in (
            (probe.solves, 1),
            (probe.primal_iterations, solution.iterations),
            (probe.primal_applications, solution.applications),
            (probe.primal_residual, solution.relative_residual),
            (probe.primal_capped, solution.status == bl.Status.BUDGET),
            (probe.failures, solution.status >= bl.Status.DIVERGED),
        ):
            report += (counter * number).astype(u.dtype)
    return jnp.stack(solution.value[0]), report


def solved(theta: tuple[pde.NavierStokes, Array, Array], fidelity: bl.Fidelity) -> bl.Solution:
    """M(v) w = u / dt for θ = (stepper, v, u), from zero."""
    cycles = bl.GMRES(restart=8)
    zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), theta[0].like)
    return bl.solve(
        SYSTEM, theta, zero, solver=cycles, estimator=bl.Implicit(cycles), fidelity=fidelity
    )


def _matrix(theta: tuple[pde.NavierStokes, Array, Array]) -> Any:
    flow, v, _ = theta
    return flow.matrix(tuple(v))


def _source(theta: tuple[pde.NavierStokes, Array, Array]) -> Any:
    flow, _, u = theta
    return tuple(u / flow.dt), jnp.zeros(flow.grid.shape, flow.grid.dtype)


SYSTEM = bl.LinearSystem(_matrix, _source)


@functools.lru_cache(maxsize=1)
def data(size: Size, subsampling: str, seed: int, dtype: Any) -> tuple[tuple[Array, Array], ...]:
    """What is trained on and what is validated by, kept for the next policy of the same seed.

    Returns:
        For each of the two the first states, of shape (samples, 2, cells, cells), and those of
        the steps, of shape (samples, steps, 2, cells, cells).

    """
    del dtype  # the default one; part of what identifies the data
    factor, sampled = _choice("subsampling", subsampling, SUBSAMPLINGS)
    flow = stepper(factor(size.cells))

    # One sample and one step at a time: two small programs serve any number of both.
    @jax.jit
    def begin(key: PRNGKeyArray) -> Array:
        return jnp.stack(pde.random_velocity(key, flow.staggered, SMOOTHING))

    @jax.jit
    def advance(u: Array) -> Array:
        return referred(flow, u)

    def trajectory(key: PRNGKeyArray, steps: int) -> Array:
        states = [begin(key)]
        for _ in range(steps):
            states.append(advance(states[-1]))
        return jnp.stack([sampled(u, size.cells) for u in states])

    def trajectories(stream: int, samples: int, steps: int) -> tuple[Array, Array]:
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), stream), samples)
        states = jnp.stack([trajectory(key, steps) for key in keys])
        return states[:, 0], states[:, 1:]

    return trajectories(1, size.samples, TRAINED), trajectories(2, size.validation, VALIDATED)


def stride(fields: Array, cells: int) -> Array:
    """Every second point, from the second one on."""
    return fields[..., 1::2, 1::2][..., :cells, :cells]


def faces(fields: Array, cells: int) -> Array:
    """The mean of the two fine faces that make up a coarse one."""
    u, v = fields[..., 0, ::2, :], fields[..., 1, :, ::2]
    shape = u.shape[:-2]
    u = u.reshape(*shape, cells, cells, 2).mean(-1)
    v = v.reshape(*shape, cells, 2, cells).mean(-2)
    return jnp.stack([u, v], axis=-3)


DERIVATIVES = {"kept": kept, "frozen": frozen, "detached": detached}
SUBSAMPLINGS = {
    "stride": (lambda cells: 2 * cells + 1, stride),
    "faces": (lambda cells: 2 * cells, faces),
}


def _choice(name: str, value: str, known: dict[str, Any]) -> Any:
    if value not in known:
        msg = f"{name} is {' or '.join(known)}, got {value!r}."
        raise ValueError(msg)
    return known[value]


if __name__ == "__main__":
    import sys

    from bilevel.cli import main

    sys.exit(main(["compare", __file__, "--overwrite", *sys.argv[1:]]))
