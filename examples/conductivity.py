"""Find a conductivity from the fields it lets through: on a coarse grid first, then on finer ones.

    bilevel compare examples/conductivity.py
    JAX_ENABLE_X64=1 bilevel compare examples/conductivity.py --set precision=mixed

The fields solve -∇·(k ∇u) = f on the unit square, zero on its boundary, for four sources f.  Each
is seen in every cell of the finest grid, and Adam recovers θ = log k there, one number a cell.

What is coarse here is not the number of iterations but the grid.  At a coarse level θ and f are
restricted to its cells by the transfer of multigrid, the fields are solved for there, by
conjugate gradients with a multigrid cycle, and interpolated back to the cells where they were
seen.  So θ and the data stay what they are, the gradient goes through both transfers, and the
controllers refine the grid as they refine everything else.  A grid compiles once, when it is
first used.  `auto` is told by gradients on three grids how far the coarse ones are off.

`precision=mixed` also computes in single precision on all but the finest grid, and in double
precision there.
"""

from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float
from pydantic import Field

import bilevel as bl
import bilevel_pde as pde

COARSEST = 16
"""Cells a side of the coarsest grid."""

SMOOTHNESS = 1e-5
"""Weight of the squared differences of θ between neighbours."""

BUDGET = bl.Budget(iterations=20, rtol=1e-4)
"""Of every solve: about six iterations."""


class Level:
    """The equation on one grid, and the way between it and the finest."""

    def __init__(self, finest: int, cells: int, dtype: Any):
        box = (pde.Grid((n, n), centering="cell", dtype=dtype) for n in _halved(finest, cells))
        self.grids = list(box)
        self.grid = self.grids[-1]
        self.dtype = dtype

    def restricted(self, field: Array, boundary: pde.Boundary) -> Array:
        """A field of the finest grid on this one."""
        for fine, coarse in zip(self.grids[:-1], self.grids[1:], strict=True):
            field = _transfer(fine, coarse, boundary).restrict(field)
        return field

    def prolonged(self, field: Array) -> Array:
        """A field of this grid, zero on the boundary, on the finest one."""
        for fine, coarse in zip(self.grids[-2::-1], self.grids[:0:-1], strict=True):
            field = _transfer(fine, coarse, pde.Dirichlet()).prolong(field)
        return field

    def fields(
        self,
        theta: Float[Array, "n n"],
        sources: Float[Array, "sources n n"],
        fidelity: bl.Fidelity,
    ) -> Float[Array, "sources n n"]:
        """The fields at the finest grid's cells for θ and f given there."""
        theta, sources = theta.astype(self.dtype), sources.astype(self.dtype)
        coarse = self.restricted(theta, pde.Neumann())
        loads = jax.vmap(lambda f: self.restricted(f, pde.Neumann()))(sources)
        solver = bl.ConjugateGradient(preconditioner=pde.Multigrid())
        problem = bl.LinearSystem(
            lambda both: pde.Diffusion(self.grid, jnp.exp(both[0]), mean="harmonic"),
            lambda both: both[1],
            symmetric=True,
            positive_definite=True,
        )

        def solved(load: Array) -> Array:
            return bl.solve(
                problem,
                (coarse, load),
                jnp.zeros_like(load),
                solver=solver,
                estimator=bl.Implicit(solver),
                fidelity=fidelity,
            ).value

        return jax.vmap(lambda load: self.prolonged(solved(load)))(loads)


def _halved(finest: int, cells: int) -> list[int]:
    sizes = [finest]
    while sizes[-1] > cells:
        sizes.append(sizes[-1] // 2)
    return sizes


def _transfer(fine: pde.Grid, coarse: pde.Grid, boundary: pde.Boundary) -> pde.Transfer:
    grids = (
        pde.Grid(grid.shape, boundary=boundary, centering="cell", dtype=grid.dtype)
        for grid in (fine, coarse)
    )
    return pde.Transfer(*grids)


def task(
    cells: Annotated[int, Field(ge=COARSEST)] = 64,
    epochs: Annotated[int, Field(ge=1)] = 200,
    precision: Literal["default", "mixed"] = "default",
    noise: Annotated[float, Field(ge=0)] = 1e-3,
    seed: int = 0,
) -> bl.Task:
    """Recover the conductivity on a square of cells² cells.

    Args:
        cells: of the finest grid along each axis: 16, 32, 64, ...
        epochs: outer steps.
        precision: "default", or "mixed" for single precision on all grids but the finest and
            double precision on it.
        noise: of what is seen of the fields, as a part of their size.
        seed: of the noise.

    """
    sizes = _halved(cells, COARSEST)[::-1]
    if sizes[0] * 2 ** (len(sizes) - 1) != cells or sizes[0] != COARSEST:
        msg = f"cells is {COARSEST} times a power of two, got {cells}."
        raise ValueError(msg)
    kinds = ["float32"] * (len(sizes) - 1) + ["float64"]
    if precision == "default":
        kinds = [jnp.dtype(jnp.result_type(float)).name] * len(sizes)
    elif jnp.result_type(float) != jnp.float64:
        msg = "precision=mixed needs double precision: set JAX_ENABLE_X64=1 in the environment."
        raise ValueError(msg)
    levels = {n: Level(cells, n, jnp.dtype(kind)) for n, kind in zip(sizes, kinds, strict=True)}
    finest = levels[cells]

    x, y = finest.grid.mesh()
    truth = 1.0 * ((x - 0.65) ** 2 + (y - 0.6) ** 2 < 0.03) - 0.7 * (jnp.abs(x - 0.3) < 0.1)
    sources = jnp.stack(
        [
            10.0 * jnp.exp(-20.0 * ((x - 0.5 - a) ** 2 + (y - 0.5 - b) ** 2))
            for a, b in ((0.25, 0.25), (-0.25, 0.25), (0.25, -0.25), (-0.25, -0.25))
        ]
    )
    exact = finest.fields(truth, sources, bl.Fidelity(bl.Budget(iterations=30)))
    blur = jax.random.normal(jax.random.key(seed), exact.shape, exact.dtype)
    seen = exact + noise * jnp.std(exact) * blur

    def loss(theta: Array, batch: None, fidelity: bl.Fidelity) -> Array:
        del batch
        fields = levels[fidelity["cells"]].fields(theta, sources, fidelity).astype(theta.dtype)
        misfit = jnp.sum((fields - seen) ** 2) / jnp.sum(seen**2)
        rough = jnp.sum(jnp.diff(theta, axis=0) ** 2) + jnp.sum(jnp.diff(theta, axis=1) ** 2)
        return misfit + SMOOTHNESS * rough / len(theta)

    def validate(theta: Array) -> Array:
        return jnp.linalg.norm(theta - truth) / jnp.linalg.norm(truth)

    ladder = bl.Ladder.of(bl.Fidelity(BUDGET, BUDGET, static={"cells": n}) for n in sizes)
    return bl.Task(
        jnp.zeros_like(truth),
        loss,
        validate=validate,
        name="conductivity",
        metric_name="relative error of log k",
        optimizer=optax.adam(optax.cosine_decay_schedule(0.1, epochs, alpha=0.1)),
        epochs=epochs,
        ladder=ladder,
        policies=("full", "prdp", "auto"),
    )


if __name__ == "__main__":
    import sys

    from bilevel.cli import main

    sys.exit(main(["compare", __file__, "--overwrite", *sys.argv[1:]]))
