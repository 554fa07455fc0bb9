"""Random initial states fit the sides, the dtype and the statistics they promise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel_pde as pde
from tests.pde.cases import few

D, N, P = pde.Dirichlet(), pde.Neumann(), pde.Periodic()
KEY = jax.random.key(3)
STATES = {
    "truncated_fourier": pde.truncated_fourier,
    "sine_waves": lambda key, grid: pde.sine_waves(key, grid, 3),
    "boxes": lambda key, grid: pde.boxes(key, grid, 2),
    "gaussian_random_field": lambda key, grid: pde.gaussian_random_field(key, grid, 0.2, modes=4),
}


SIDES = {"D": D, "P": P, "ND": (N, D)}


@pytest.mark.parametrize(
    ("sides", "shape", "name"),
    few(
        lambda sides, shape, name: (sides, len(shape)) in {("P", 2), ("ND", 1)},
        SIDES,
        [(12,), (8, 7), (6, 5, 4)],
        STATES,
    ),
)
def test_shape_dtype_and_repeatability(sides, shape, name):
    boundary = SIDES[sides]
    grid = pde.Grid(shape, boundary=[boundary] * len(shape), dtype="float32")
    field = STATES[name](KEY, grid)
    assert (field.shape, field.dtype) == (shape, jnp.float32)
    np.testing.assert_array_equal(field, STATES[name](KEY, grid))
    other = STATES[name](jax.random.key(4), grid)
    assert float(jnp.max(jnp.abs(field - other))) > 1e-3
    assert bool(jnp.all(jnp.isfinite(field)))


@pytest.mark.parametrize(
    "name",
    few(
        lambda name: name == "sine_waves",
        ["truncated_fourier", "sine_waves", "gaussian_random_field"],
    ),
)
def test_same_function_on_a_finer_grid(name):
    """Every other point of a grid with half the spacing is a point of the coarse one."""
    for boundary, coarse, fine, pick in (
        (D, 15, 31, slice(1, None, 2)),
        (P, 16, 32, slice(0, None, 2)),
    ):
        fields = [STATES[name](KEY, pde.Grid((n, n), 2.0, boundary)) for n in (coarse, fine)]
        np.testing.assert_allclose(fields[1][pick, pick], fields[0], atol=1e-12)


@pytest.mark.parametrize("name", few(lambda name: name in {"boxes", "sine_waves"}, STATES))
def test_sides_hold(name):
    """Very near a Dirichlet side the field is near zero, near a Neumann side it is flat."""
    grid = pde.Grid(4000, 1.0, [(D, N)])
    field = STATES[name](KEY, grid)
    assert abs(float(field[0])) < 2e-2
    assert abs(float(field[-1] - field[-2])) < 1e-3
    around = STATES[name](KEY, pde.Grid(4000, 1.0, P))
    steps = jnp.sort(jnp.abs(jnp.diff(around, append=around[:1])))
    assert float(steps[-9]) < 5e-2  # at most two boxes of two edges jump


def test_origin_and_extent_move_the_field_along():
    here = pde.truncated_fourier(KEY, pde.Grid((8, 8), 1.0))
    there = pde.truncated_fourier(KEY, pde.Grid((8, 8), 3.0, origin=(-1.0, 5.0)))
    np.testing.assert_allclose(here, there, atol=1e-12)


def test_fourier_series_has_no_more_modes_than_asked_for_and_the_mean():
    field = pde.truncated_fourier(KEY, pde.Grid((32, 32), boundary=P), 3, mean=0.7)
    spectrum = np.abs(np.fft.fft2(field)) / field.size
    k = np.abs(np.fft.fftfreq(32, 1 / 32))
    beyond = (k[:, None] > 3) | (k[None, :] > 3)
    assert spectrum[beyond].max() < 1e-14
    assert spectrum[3].max() > 1e-3  # and the highest is there
    assert abs(spectrum[0, 0] - 0.7) < 1e-14


@pytest.mark.parametrize("smoothness", [None, 1.5])
def test_gaussian_field_has_its_covariance(smoothness):
    """On a long period: unit variance, and at one length exp(-1/2), or Matérn's."""
    grid = pde.Grid(128, 16.0, P)
    draw = jax.vmap(lambda key: pde.gaussian_random_field(key, grid, 0.5, smoothness=smoothness))
    fields = draw(jax.random.split(KEY, 2000))
    assert abs(float(jnp.mean(fields**2)) - 1.0) < 0.02
    lag = float(jnp.mean(fields * jnp.roll(fields, 4, axis=1)))  # 4 spacings of 1/8
    scaled = np.sqrt(3.0)
    expected = np.exp(-0.5) if smoothness is None else (1 + scaled) * np.exp(-scaled)
    # The mean is left out: its variance is missing everywhere, √(2π) L/16 of the whole.
    share = (np.sqrt(2 * np.pi) if smoothness is None else 4 / scaled) * 0.5 / 16
    assert abs(lag - (expected - share) / (1 - share)) < 0.02


def test_boxes_take_heights_and_widths_in_their_bounds():
    grid = pde.Grid(200, boundary=P)
    for seed in range(5):
        field = pde.boxes(jax.random.key(seed), grid, width=(0.2, 0.3), height=(2.0, 2.0))
        assert set(np.unique(field)) == {0.0, 2.0}
        assert 0.19 <= float(jnp.mean(field)) / 2 <= 0.31


def test_gaussian_length_may_be_traced_and_differentiated():
    grid = pde.Grid(16)
    slope = jax.jit(jax.grad(lambda ell: jnp.sum(pde.gaussian_random_field(KEY, grid, ell) ** 3)))
    assert np.isfinite(slope(0.2))


def test_bad_input():
    grid = pde.Grid(8)
    with pytest.raises(ValueError, match="modes should be an integer of at least 1, got 0"):
        pde.truncated_fourier(KEY, grid, 0)
    with pytest.raises(ValueError, match="mean should be 0 on a grid with a Dirichlet side"):
        pde.truncated_fourier(KEY, grid, mean=1.0)
    with pytest.raises(ValueError, match="Robin"):
        pde.truncated_fourier(KEY, pde.Grid(8, boundary=pde.Robin(1.0, 1.0)))
    with pytest.raises(ValueError, match="waves should be"):
        pde.sine_waves(KEY, grid, 0)
    with pytest.raises(ValueError, match="width should be"):
        pde.boxes(KEY, grid, width=(0.5, 0.2))
    with pytest.raises(ValueError, match="height should be"):
        pde.boxes(KEY, grid, height=(1.0, 0.2))
    with pytest.raises(ValueError, match="length should be positive"):
        pde.gaussian_random_field(KEY, grid, -1.0)
