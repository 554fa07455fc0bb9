"""Initial states: random fields that fit the sides of a grid."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, PRNGKeyArray

from bilevel_pde.boundary import Dirichlet, Neumann
from bilevel_pde.grid import Grid


def truncated_fourier(
    key: PRNGKeyArray, grid: Grid, modes: int = 5, *, mean: float = 0.0
) -> Float[Array, "..."]:
    """A Fourier series with the first few modes along each axis and normal coefficients.

    Modes fit the sides: sines and cosines of the period on a periodic axis, sines that vanish
    on Dirichlet sides, cosines that are flat on Neumann sides.  The same key gives the same
    function on every grid over the same domain.

    **Arguments:**

    - `key`: of the random numbers.
    - `modes`: wavenumbers along each axis, at least 1; what the grid cannot hold aliases.
    - `mean`: the constant mode, for grids without a Dirichlet side.

    **Returns:** a field whose coefficients have a sum of variances of one.

    **Raises:** `ValueError` for less than one mode, a mean on a grid with a Dirichlet side, and
    grids with a Robin side.

    >>> import jax
    >>> field = truncated_fourier(jax.random.key(0), Grid((20, 30)), modes=3)
    >>> field.shape
    (20, 30)
    """
    bases = _bases(grid, _positive("truncated_fourier", "modes", modes))
    shape = tuple(len(wavenumbers) for wavenumbers, _ in bases)
    weight = np.ones(shape)
    if _holds_constants(grid):
        weight[(0,) * grid.ndim] = 0.0
    elif isinstance(mean, jax.Array) or mean:
        msg = f"truncated_fourier: mean should be 0 on a grid with a Dirichlet side, got {mean}."
        raise ValueError(msg)
    weight /= math.sqrt(weight.sum())
    coefficients = jax.random.normal(key, shape, grid.dtype) * jnp.asarray(weight, grid.dtype)
    return _expand(coefficients, bases) + jnp.asarray(mean, grid.dtype)


def sine_waves(
    key: PRNGKeyArray, grid: Grid, waves: int = 1, *, highest: int = 5
) -> Float[Array, "..."]:
    """A sum of waves, each of one random wavenumber along each axis.

    Amplitudes are uniform in (-1, 1), wavenumbers in 1 ... `highest`.  On a periodic axis the
    phase is random, too; elsewhere it is what the sides want.

    **Arguments:**

    - `key`: of the random numbers.
    - `waves`: how many, at least 1.
    - `highest`: largest wavenumber, at least 1.

    **Raises:** `ValueError` for numbers below 1, and grids with a Robin side.

    >>> import jax
    >>> sine_waves(jax.random.key(0), Grid(16), 2).shape
    (16,)
    """
    _positive("sine_waves", "waves", waves)
    _positive("sine_waves", "highest", highest)
    amplitude_key, wave_key, phase_key = jax.random.split(key, 3)
    total = jax.random.uniform(amplitude_key, (waves,), grid.dtype, -1.0, 1.0)
    number = jax.random.randint(wave_key, (grid.ndim, waves), 1, highest + 1).astype(grid.dtype)
    phase = jax.random.uniform(phase_key, (grid.ndim, waves), grid.dtype, 0.0, 2 * math.pi)
    for axis, x in enumerate(_unit_coordinates(grid)):
        kind = _kind(grid, axis)
        shift = 0.5 if kind in {"DN", "ND"} else 0.0
        rate = math.pi * (2.0 if kind == "P" else 1.0)
        start = jnp.full_like(phase[axis], 0.0 if kind[0] == "D" else 0.5 * math.pi)
        start = phase[axis] if kind == "P" else start
        line = jnp.sin(rate * (number[axis] - shift) * x[:, None] + start)
        total = total[..., None, :] * line
    return jnp.sum(total, axis=-1)


def boxes(
    key: PRNGKeyArray,
    grid: Grid,
    count: int = 1,
    *,
    width: tuple[float, float] = (0.1, 0.4),
    height: tuple[float, float] = (0.5, 1.0),
) -> Float[Array, "..."]:
    """Discontinuities: boxes of random place, size and height on zero.

    They lie inside of the domain, and so vanish on its sides; on a periodic axis they may
    reach over its end.  The same key gives the same function on every grid.

    **Arguments:**

    - `key`: of the random numbers.
    - `count`: boxes, at least 1; where they overlap, heights add up.
    - `width`: least and largest width along each axis, in lengths of the domain, within (0, 1).
    - `height`: least and largest height.

    **Raises:** `ValueError` for less than one box and bounds out of order.

    >>> import jax
    >>> sorted(set(boxes(jax.random.key(1), Grid(50), height=(2.0, 2.0)).tolist()))
    [0.0, 2.0]
    """
    _positive("boxes", "count", count)
    if not 0 < width[0] <= width[1] < 1:
        msg = f"boxes: width should be (least, largest) with 0 < least <= largest < 1, got {width}."
        raise ValueError(msg)
    if not height[0] <= height[1]:
        msg = f"boxes: height should be (least, largest) with least <= largest, got {height}."
        raise ValueError(msg)
    height_key, width_key, place_key = jax.random.split(key, 3)
    total = jax.random.uniform(height_key, (count,), grid.dtype, *height)
    size = jax.random.uniform(width_key, (grid.ndim, count), grid.dtype, *width)
    place = jax.random.uniform(place_key, (grid.ndim, count), grid.dtype)
    for axis, x in enumerate(_unit_coordinates(grid)):
        if grid.is_periodic(axis):
            inside = (x[:, None] - place[axis]) % 1.0 < size[axis]
        else:
            start = place[axis] * (1.0 - size[axis])
            inside = (x[:, None] > start) & (x[:, None] < start + size[axis])
        total = total[..., None, :] * inside
    return jnp.sum(total, axis=-1)


def gaussian_random_field(
    key: PRNGKeyArray,
    grid: Grid,
    length: Float[Array, ""] | float = 0.1,
    *,
    smoothness: float | None = None,
    modes: int | None = None,
) -> Float[Array, "..."]:
    """A Gaussian random field with a squared-exponential or Matérn covariance.

    On a periodic domain much longer than `length` the covariance is exp(-r²/2L²), or Matérn's;
    it is made of the modes that fit the sides (see `truncated_fourier`), the constant one left
    out, weighted by the root of the spectral density (Lindgren, Rue & Lindström 2011,
    https://doi.org/10.1111/j.1467-9868.2011.00777.x).

    **Arguments:**

    - `key`: of the random numbers.
    - `length`: L, in units of the domain's lengths, traced or not.
    - `smoothness`: ν > 0 of the Matérn covariance; `None` for the squared exponential.
    - `modes`: the most wavenumbers along each axis; `None` for all that the grid holds. With
        a number, the same key gives the same function on every grid.

    **Returns:** a field of unit variance averaged over the domain.

    **Raises:** `ValueError` for a length or smoothness that is not positive, and grids with a
    Robin side.

    >>> import jax
    >>> gaussian_random_field(jax.random.key(0), Grid((16, 16)), 0.2).shape
    (16, 16)
    """
    name = "gaussian_random_field"
    for what, value in (("length", length), ("smoothness", smoothness)):
        if value is not None and not isinstance(value, Tracer) and not value > 0:
            msg = f"{name}: {what} should be positive, got {value}."
            raise ValueError(msg)
    bases = _bases(grid, None if modes is None else _positive(name, "modes", modes))
    square = functools.reduce(np.add.outer, [wavenumbers**2 for wavenumbers, _ in bases])
    if smoothness is None:
        power = jnp.exp(-0.5 * jnp.asarray(square) * length**2)
    else:
        power = (2.0 * smoothness / length**2 + square) ** (-smoothness - 0.5 * grid.ndim)
    if _holds_constants(grid):
        power = jnp.asarray(power).at[(0,) * grid.ndim].set(0.0)
    weight = jnp.sqrt(power / jnp.sum(power)).astype(grid.dtype)
    return _expand(jax.random.normal(key, square.shape, grid.dtype) * weight, bases)


def _bases(grid: Grid, modes: int | None) -> list[tuple[Any, Any]]:
    """For each axis wavenumbers (1 / length) and values (points, modes) of mean square one."""
    bases: list[tuple[Any, Any]] = []
    for axis, x in enumerate(_unit_coordinates(grid)):
        kind, points = _kind(grid, axis), grid.shape[axis]
        count = (points - 1) // 2 if kind == "P" else points - 1
        k = np.arange(1, (max(count, 1) if modes is None else modes) + 1)
        if kind in {"DN", "ND"}:
            k = k - 0.5
        angle = jnp.asarray(math.pi * k, grid.dtype) * x[:, None]
        if kind == "P":
            numbers = np.concatenate([[0.0], 2 * k, 2 * k])
            lines = jnp.concatenate([jnp.cos(2 * angle), jnp.sin(2 * angle)], axis=1)
        else:
            numbers = np.concatenate([[0.0], k]) if kind == "NN" else k
            lines = jnp.sin(angle) if kind[0] == "D" else jnp.cos(angle)
        values = math.sqrt(2.0) * lines
        if kind in {"P", "NN"}:
            values = jnp.concatenate([jnp.ones_like(x)[:, None], values], axis=1)
        wavenumbers = math.pi * numbers / grid.extent[axis]
        bases.append((wavenumbers, jnp.asarray(values, grid.dtype)))
    return bases


def _expand(coefficients: Array, bases: list[tuple[Any, Any]]) -> Array:
    for _, values in bases:
        # The first axis is summed and comes back as the last: after all, they are in order.
        coefficients = jnp.tensordot(coefficients, values, ([0], [1]))
    return coefficients


def _unit_coordinates(grid: Grid) -> list[Array]:
    return [
        (x - origin) / extent
        for x, origin, extent in zip(grid.coordinates(), grid.origin, grid.extent, strict=True)
    ]


def _kind(grid: Grid, axis: int) -> str:
    """P, or which of D and N holds on the low and the high side."""
    if grid.is_periodic(axis):
        return "P"
    letters = ""
    for side in grid.boundary[axis]:
        if not isinstance(side, Dirichlet | Neumann):
            msg = (
                f"initial states know modes between Dirichlet, Neumann and periodic sides, got "
                f"{side} on axis {axis}. Draw the field on a grid with one of these."
            )
            raise ValueError(msg)  # noqa: TRY004
        letters += "D" if isinstance(side, Dirichlet) else "N"
    return letters


def _holds_constants(grid: Grid) -> bool:
    return all(_kind(grid, axis) in {"P", "NN"} for axis in range(grid.ndim))


def _positive(owner: str, name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        msg = f"{owner}: {name} should be an integer of at least 1, got {value!r}."
        raise ValueError(msg)
    return value
