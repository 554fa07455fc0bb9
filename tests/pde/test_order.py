"""Manufactured solutions reach the order of each scheme under every boundary condition."""

import jax
import jax.numpy as jnp
import pytest

import bilevel_pde as pde
from tests.pde.manufactured import D, N, P, R, around, at, error, slope, smooth

LINES = [(D, D), (N, D), (D, N), (R, R), (D, R), (N, R), P]

LOWER_ORDER = {
    "laplacian",
    "helmholtz",
    "diffusion",
    "central",
    "upwind",
    "conservative central",
    "conservative upwind",
}


def names(boundary):
    if isinstance(boundary, pde.Boundary):
        return type(boundary).__name__
    return "-".join(names(side) for side in boundary)


def laplace(u):
    return lambda p: jnp.trace(jax.hessian(u)(p))


def operators(grid, u):
    """Each operator and its action on u."""
    # Of the period of the domain, or slower, that grids need not be fine.
    rate = 2 * jnp.pi if u is around else 1.0

    def conductivity(p):
        return 1.5 + 0.5 * jnp.sin(rate * p[0] + 1.0) * jnp.cos(rate * p[-1])

    def stream(p):
        return jnp.stack([jnp.cos(rate * x + d) + 0.2 for d, x in enumerate(p)])

    one = pde.identity(grid)
    lap = pde.laplacian(grid)
    k, v = at(grid, conductivity), [at(grid, lambda p, d=d: stream(p)[d]) for d in range(grid.ndim)]
    grad = jax.grad(u)
    flux = lambda p: conductivity(p) * grad(p)  # noqa: E731
    carried = lambda p: stream(p) * u(p)  # noqa: E731
    divergence = lambda f: lambda p: jnp.trace(jax.jacfwd(f)(p))  # noqa: E731
    mixed = lambda p: u(p) - 0.3 * laplace(u)(p)  # noqa: E731
    viscous = one - 0.3 * lap
    along = lambda p: stream(p) @ grad(p)  # noqa: E731
    fourth = lambda p: u(p) + 1e-3 * laplace(laplace(u))(p)  # noqa: E731
    periodic = {"biharmonic": lambda: (one + 1e-3 * pde.biharmonic(grid), fourth, 2)}
    return (periodic if u is around else {}) | {
        "laplacian": lambda: (one - lap, lambda p: u(p) - laplace(u)(p), 2),
        "helmholtz": lambda: (
            pde.helmholtz(grid, 0.7),
            lambda p: laplace(u)(p) + 0.49 * u(p),
            2,
        ),
        "diffusion": lambda: (
            one + pde.Diffusion(grid, k),
            lambda p: u(p) - divergence(flux)(p),
            2,
        ),
        "central": lambda: (
            viscous + pde.advection(grid, v, "central"),
            lambda p: mixed(p) + along(p),
            2,
        ),
        "upwind": lambda: (viscous + pde.advection(grid, v), lambda p: mixed(p) + along(p), 1),
        "conservative central": lambda: (
            viscous + pde.advection(grid, v, "central", conservative=True),
            lambda p: mixed(p) + divergence(carried)(p),
            2,
        ),
        "conservative upwind": lambda: (
            viscous + pde.advection(grid, v, conservative=True),
            lambda p: mixed(p) + divergence(carried)(p),
            1,
        ),
    }


def check(boundary, centering, ndim, sizes, names=None, extent=1.0):
    periodic = boundary == P
    u = around if periodic else smooth
    errors = {}
    for n in sizes:
        grid = pde.Grid((n,) * ndim, extent, boundary, centering)
        for name, made in operators(grid, u).items():
            if names is None or name in names:
                operator, source, order = made()
                errors.setdefault((name, order), []).append(error(operator, grid, u, source))
    for (name, order), found in errors.items():
        # On three grids without what the slope itself still changes by half of, each time.
        measured = slope(found) if len(found) < 3 else 2 * slope(found) - slope(found[:-1])
        assert abs(measured - order) < 0.1, (name, found)


@pytest.mark.slow
@pytest.mark.parametrize("centering", ["vertex", "cell"])
@pytest.mark.parametrize("boundary", LINES, ids=names)
def test_every_operator_has_its_order_under_every_condition(boundary, centering):
    check(boundary, centering, 1, (128, 256))


def test_order_in_one_dimension():
    """One of the table that is slow."""
    check((D, R), "vertex", 1, (64, 128), {"diffusion"})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("boundary", "centering", "sizes"),
    [
        ([(D, R), (N, D)], "vertex", (64, 128, 256)),
        ([(N, R), (D, D)], "cell", (32, 64, 128)),
        ([(D, N), (R, D)], ["vertex", "cell"], (32, 64, 128)),
        ([(N, N), (R, R)], "cell", (64, 128, 256)),
        (P, "vertex", (64, 128)),
    ],
    ids=["vertex", "cell", "one each", "closed", "periodic"],
)
def test_order_in_two_dimensions(boundary, centering, sizes):
    check(boundary, centering, 2, sizes)


CORNERS = [(D, D), (D, N), (R, D)]
# Their errors on the coarsest of the grids still cancel each other in part.
LATE = {"diffusion", "conservative central"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("boundary", "centering", "sizes", "operators"),
    [
        ([(D, R), (N, D), (D, D)], "cell", (8, 16, 32), LOWER_ORDER),
        (CORNERS, "vertex", (8, 16, 32), LOWER_ORDER - LATE),
        (CORNERS, "vertex", (16, 32, 64), LATE),
        (P, "cell", (8, 16, 32), LOWER_ORDER),
    ],
    ids=["cell", "vertex", "vertex, late", "periodic"],
)
def test_order_in_three_dimensions(boundary, centering, sizes, operators):
    sides = 1.0 if boundary == P else 0.5
    check(boundary, centering, 3, sizes, operators, sides)


def test_diffusion_with_a_jump_has_its_order_with_harmonic_means():
    """The flux is continuous where the coefficient jumps by a factor of hundred."""
    errors = []
    for n in (32, 64, 128):
        grid = pde.Grid(n, centering="cell")
        x = grid.coordinates()[0]
        k = jnp.where(x < 0.5, 1.0, 100.0)
        operator = pde.Diffusion(grid, k, mean="harmonic")

        def exact(p):
            return jnp.where(p[0] < 0.5, p[0] ** 2 + p[0] - 0.75, (p[0] ** 2 + p[0] - 0.75) / 100)

        values = {(0, 0): -0.75, (0, 1): 1.25 / 100}
        errors.append(error(operator, grid, exact, lambda p: -2.0 + 0 * p[0], values))
    assert abs(slope(errors) - 2) < 0.1, errors


@pytest.mark.slow
def test_boundary_flux_of_varying_diffusion_uses_the_coefficient_on_the_side():
    """A first-order value of k there would leave the solution of first order."""
    check((N, R), "cell", 1, (128, 256), {"diffusion"})
