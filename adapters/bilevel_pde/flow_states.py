"""Flow states: velocities without divergence on a staggered grid."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from bilevel_pde.convection_operator import Walls
from bilevel_pde.diffusion import Diffusion
from bilevel_pde.fast_solver import FastSolver
from bilevel_pde.grid import Grid
from bilevel_pde.laplace_operator import identity, laplacian
from bilevel_pde.staggered import Divergence, Gradient, Staggered, Velocity
from bilevel_pde.stepper import as_state, positive


def divergence_free(
    staggered: Staggered, velocity: Sequence[Any], walls: Walls | None = None
) -> Velocity:
    """The nearest velocity without divergence: u - ∇q with Δq = ∇·u.

    With it any field becomes a flow, such as one of [`gaussian_random_field`][] or
    [`truncated_fourier`][] for each of `staggered.components`.

    **Arguments:**

    - `velocity`: a field for each component, differentiable.
    - `walls`: for each component its values on sides, as for [`Divergence`][]; what flows in
        must flow out.

    **Returns:** a velocity whose discrete divergence is zero to rounding.

    **Raises:** `ValueError` for another shape, `TypeError` for another dtype.

    >>> import jax.numpy as jnp, bilevel_pde as pde
    >>> cavity = pde.Staggered((8, 8))
    >>> flow = divergence_free(cavity, [grid.mesh()[1] for grid in cavity.components])
    >>> bool(jnp.max(jnp.abs(pde.Divergence(cavity) @ flow)) < 1e-4)
    True
    """
    u: Velocity = as_state("velocity", tuple(velocity), staggered.like, "a tuple of components")
    divergence = Divergence(staggered)
    source = divergence.matvec(u)
    if walls is not None:
        source += divergence.boundary_term(walls)
    potential = FastSolver(laplacian(staggered.cells)).at(_NOTHING, source)(source)
    slope = Gradient(staggered).matvec(potential)
    return tuple(part - change for part, change in zip(u, slope, strict=True))


def smoothed_noise(
    key: PRNGKeyArray, grid: Grid, smoothing: Float[Array, ""] | float = 3e-3
) -> Float[Array, "..."]:
    """White noise after one implicit step of the heat equation, of unit variance over the grid.

    **Arguments:**

    - `key`: of the random numbers, one for each point.
    - `smoothing`: diffusivity times step, σ ≥ 0 (length²): waves longer than 2π√σ remain.

    **Returns:** a field of mean square one; of mean zero, too, on a periodic grid.

    **Raises:** `ValueError` for a negative smoothing, and a grid of fewer than 3 points along an
    axis.

    >>> import jax
    >>> field = smoothed_noise(jax.random.key(0), Grid((8, 8)))
    >>> round(float((field**2).mean()), 3)
    1.0
    """
    if min(grid.shape) < 3:
        msg = (
            "smoothed_noise: grid should have at least 3 points along each axis, got shape "
            f"{grid.shape}."
        )
        raise ValueError(msg)
    smoothing = positive("smoothed_noise", "smoothing", smoothing, grid.dtype, zero=True)
    noise = jax.random.normal(key, grid.shape, grid.dtype)
    operator = identity(grid) + Diffusion(grid, smoothing).stencil()
    field = FastSolver(operator).at(_NOTHING, noise)(noise)
    if all(grid.is_periodic(axis) for axis in range(grid.ndim)):
        field = field - jnp.mean(field)
    return field / jnp.sqrt(jnp.mean(field**2))


def random_velocity(
    key: PRNGKeyArray, staggered: Staggered, smoothing: Float[Array, ""] | float = 3e-3
) -> Velocity:
    """A random velocity without divergence: [`smoothed_noise`][] made [`divergence_free`][].

    It is what the progressive-refinement paper starts its Navier–Stokes runs from (Bhatia,
    Koehler & Thuerey 2025).

    **Arguments:**

    - `key`: of the random numbers.
    - `smoothing`: as of [`smoothed_noise`][].

    >>> import jax, bilevel_pde as pde
    >>> box = pde.Staggered((8, 8), boundary=pde.Periodic())
    >>> [part.shape for part in random_velocity(jax.random.key(0), box)]
    [(8, 8), (8, 8)]
    """
    keys = jax.random.split(key, staggered.ndim)
    parts = zip(keys, staggered.components, strict=True)
    return divergence_free(staggered, [smoothed_noise(k, grid, smoothing) for k, grid in parts])


def taylor_green(
    staggered: Staggered,
    viscosity: Float[Array, ""] | float = 0.0,
    time: Float[Array, ""] | float = 0.0,
    waves: int = 1,
) -> tuple[Velocity, Float[Array, "..."]]:
    """The vortices of Taylor and Green (1937) in two dimensions, which only decay.

    u = sin kx cos ly e, v = -(k/l) cos kx sin ly e with e = exp(-ν(k² + l²)t) solves the
    Navier–Stokes equations.  The ratio k/l is that of differences, so that the discrete
    divergence is zero; between cells of equal sides it makes no difference.

    **Arguments:**

    - `staggered`: periodic along both axes.
    - `viscosity`, `time`: ν and t, both zero by default.
    - `waves`: periods along each axis, at least 1.

    **Returns:** velocity and pressure.

    **Raises:** `ValueError` for a grid that is not periodic or not two-dimensional.

    >>> import bilevel_pde as pde
    >>> box = pde.Staggered((8, 8), boundary=pde.Periodic())
    >>> (u, v), p = taylor_green(box)
    >>> bool(jnp.max(jnp.abs(pde.Divergence(box) @ (u, v))) < 1e-5), round(float(p.max()), 3)
    (True, 0.354)
    """
    cells = staggered.cells
    if cells.ndim != 2 or not all(cells.is_periodic(axis) for axis in (0, 1)):
        msg = (
            "taylor_green: staggered should be periodic along two axes, got boundary "
            f"{cells.boundary}. Write Staggered(shape, extent, Periodic())."
        )
        raise ValueError(msg)
    if isinstance(waves, bool) or not isinstance(waves, int) or waves < 1:
        msg = f"taylor_green: waves should be an integer of at least 1, got {waves!r}."
        raise ValueError(msg)
    k, l = (2 * math.pi * waves / length for length in cells.extent)
    differences = (
        math.sin(number * h / 2) / h for number, h in zip((k, l), cells.spacing, strict=True)
    )
    ratio = next(differences) / next(differences)
    decay = jnp.exp(-jnp.asarray(viscosity * time * (k**2 + l**2), cells.dtype))

    def phases(grid: Grid) -> tuple[Array, Array]:
        x, y = (a - start for a, start in zip(grid.mesh(), grid.origin, strict=True))
        return k * x, l * y

    (x, y), (ex, ey), (px, py) = map(phases, (*staggered.components, cells))
    velocity = (jnp.sin(x) * jnp.cos(y) * decay, -ratio * jnp.cos(ex) * jnp.sin(ey) * decay)
    pressure = 0.25 * (jnp.cos(2 * px) + ratio**2 * jnp.cos(2 * py)) * decay**2
    return velocity, pressure


_NOTHING: Any = None
"""The problem that a solver with an operator of its own does not look at."""
