"""Staggered grids: exact transposes, constants in the kernel, and Stokes flow of second order."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse.linalg as spla

import bilevel_pde as pde
from tests.pde.cases import few
from tests.pde.manufactured import D, N, P, at, boundary_values, slope

GRIDS = [pde.Staggered((4, 3), (1.0, 2.0), boundary) for boundary in (D, N, P, [P, D], [(D, N), P])]
GRIDS += [pde.Staggered((3, 4, 5), 1.0, [P, D, (N, D)])]


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def random(like, seed):
    generator = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(generator.standard_normal(leaf.shape)), like)


@pytest.mark.parametrize("staggered", GRIDS, ids=range(len(GRIDS)))
def test_divergence_is_minus_the_transposed_gradient(staggered):
    gradient, divergence = pde.Gradient(staggered), pde.Divergence(staggered)
    p, u = random(gradient.like, 0), random(divergence.like, 1)
    matrix = gradient.to_scipy().toarray()

    @jax.jit
    def apply(p, u):
        forward = gradient @ p, divergence @ u
        defects = pde.transpose_defect(gradient), pde.transpose_defect(divergence)
        return forward, (divergence.rmatvec(p), gradient.rmatvec(u)), defects

    (slopes, source), (to_faces, to_cells), defects = apply(p, u)
    np.testing.assert_allclose(flat(slopes), matrix @ flat(p), atol=1e-12)
    np.testing.assert_allclose(flat(source), -matrix.T @ flat(u), atol=1e-12)
    np.testing.assert_array_equal(flat(to_cells), -flat(source))
    np.testing.assert_array_equal(flat(to_faces), -flat(slopes))
    np.testing.assert_array_equal(divergence.to_scipy().toarray(), -matrix.T)
    np.testing.assert_array_equal(gradient.T.to_scipy().toarray(), matrix.T)
    assert max(defects) < 1e-12


@pytest.mark.parametrize("staggered", GRIDS, ids=range(len(GRIDS)))
def test_divergence_of_the_gradient_is_the_laplacian_of_pressure(staggered):
    product = pde.Divergence(staggered) @ pde.Gradient(staggered)
    expected = pde.laplacian(staggered.cells).to_scipy().toarray()
    np.testing.assert_allclose(product.to_scipy().toarray(), expected, atol=1e-11)


FEW = [0, 1, 2]


@pytest.mark.parametrize("number", few(lambda number: number in FEW, range(len(GRIDS))))
def test_places_of_components(number):
    """A linear pressure has its slope everywhere, a linear velocity its divergence."""
    staggered = GRIDS[number]
    slopes = (2.0, -3.0, 0.5)[: staggered.ndim]

    def pressure(p):
        return sum(s * x for s, x in zip(slopes, p, strict=True))

    gradient = pde.Gradient(staggered) @ at(staggered.cells, pressure)
    for axis, (part, expected) in enumerate(zip(gradient, slopes, strict=True)):
        start = 1 if staggered.cells.is_periodic(axis) else 0
        np.testing.assert_allclose(np.moveaxis(part, axis, 0)[start:], expected, atol=1e-12)
    components = [
        at(grid, lambda p, s=s, d=d: s * p[d] + p.sum() - p[d])
        for d, (grid, s) in enumerate(zip(staggered.components, slopes, strict=True))
    ]
    values = [
        boundary_values(grid, lambda p, s=s, d=d: s * p[d] + p.sum() - p[d])
        for d, (grid, s) in enumerate(zip(staggered.components, slopes, strict=True))
    ]
    divergence = pde.Divergence(staggered)
    image = divergence @ tuple(components) + divergence.boundary_term(values)
    inner = tuple(
        slice(None, -1) if staggered.cells.is_periodic(axis) else slice(None)
        for axis in range(staggered.ndim)
    )
    np.testing.assert_allclose(image[inner], sum(slopes), atol=1e-12)


def stokes(staggered, viscosity=1.0):
    gradient, divergence = pde.Gradient(staggered), pde.Divergence(staggered)
    viscous = -viscosity * pde.velocity_laplacian(staggered)
    return pde.Block([[viscous, gradient], [-divergence, None]])


def test_the_stokes_operator_is_symmetric_with_constant_pressure_in_its_kernel():
    staggered = pde.Staggered((4, 4))
    operator = stokes(staggered)
    assert operator.symmetric
    assert operator.positive_definite is False
    values = np.linalg.eigvalsh(operator.to_scipy().toarray())
    assert int((np.abs(values) < 1e-10).sum()) == 1
    constant = (tuple(jnp.zeros(g.shape) for g in staggered.components), jnp.ones((4, 4)))
    np.testing.assert_allclose(flat(operator @ constant), 0.0, atol=1e-13)


FLOWS = [pytest.param(b, marks=pytest.mark.slow) for b in (D, P, [P, D])] + [[(D, N), D]]


@pytest.mark.slow
@pytest.mark.parametrize("boundary", FLOWS, ids=str)
def test_stokes_flow_is_of_second_order(boundary):
    """From a stream function; its velocity is also prescribed on walls, moving or not."""
    periodic = boundary != D and (boundary == P or boundary[0] == P)

    def stream(p):
        x, y = p
        along = jnp.sin(2 * jnp.pi * x) if periodic else jnp.sin(1.5 * x + 0.3)
        across = jnp.cos(2 * jnp.pi * y + 0.4) if boundary == P else jnp.exp(y) * jnp.cos(y + 0.2)
        return along * across / 3

    def pressure(p):
        x, y = p
        along = jnp.cos(2 * jnp.pi * x) if periodic else jnp.cos(2 * x)
        return along * (jnp.sin(2 * jnp.pi * y) if boundary == P else y**2 - 0.5)

    exact = [lambda p: jax.grad(stream)(p)[1], lambda p: -jax.grad(stream)(p)[0]]
    velocity_errors, pressure_errors = [], []
    for n in (16, 32):
        staggered = pde.Staggered((n, n), boundary=boundary)
        operator = stokes(staggered, viscosity=0.5)
        values = [
            boundary_values(grid, u) for grid, u in zip(staggered.components, exact, strict=True)
        ]
        term = pde.velocity_laplacian(staggered).boundary_term(values)
        forces = [
            at(
                grid,
                lambda p, u=u, d=d: -0.5 * jnp.trace(jax.hessian(u)(p)) + jax.grad(pressure)(p)[d],
            )
            + 0.5 * given
            for d, (grid, u, given) in enumerate(
                zip(staggered.components, exact, term, strict=True)
            )
        ]
        mass = pde.Divergence(staggered).boundary_term(values)
        rhs = flat((tuple(forces), mass))
        # The kernel: constant pressure, and constant velocity where all is periodic.
        matrix = operator.to_scipy().tolil()
        rows = [sum(g.size for g in staggered.components)]
        if boundary == P:
            rows += [0, staggered.components[0].size]
        true = flat(
            (
                tuple(at(g, u) for g, u in zip(staggered.components, exact, strict=True)),
                at(staggered.cells, pressure),
            )
        )
        for row in rows:
            matrix[row] = 0
            matrix[row, row] = 1.0
            rhs[row] = true[row]
        solution = spla.spsolve(matrix.tocsc(), rhs)
        difference = solution - true
        velocity_errors.append(np.sqrt(np.mean(difference[: rows[0]] ** 2)))
        pressures = difference[rows[0] :]
        pressure_errors.append(np.sqrt(np.mean((pressures - pressures.mean()) ** 2)))
    assert abs(slope(velocity_errors) - 2) < 0.1, velocity_errors
    # Next to walls the pressure is of first order, as known of this scheme.
    assert slope(pressure_errors) > 1.1, pressure_errors


def test_a_moving_lid_drives_a_cavity():
    staggered = pde.Staggered((8, 8))
    lid = pde.velocity_laplacian(staggered).boundary_term(({(1, 1): 1.0}, None))
    assert float(lid[0][:, -1].min()) == pytest.approx(2 * 8**2)
    np.testing.assert_array_equal(lid[0][:, :-1], 0.0)
    np.testing.assert_array_equal(lid[1], 0.0)


def test_single_precision():
    staggered = pde.Staggered((4, 4), dtype=jnp.float32)
    p = jnp.ones((4, 4), jnp.float32)
    for part in pde.Gradient(staggered) @ p:
        assert part.dtype == jnp.float32
    assert pde.Gradient(staggered).to_scipy().dtype == np.float32


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"shape": (4,)}, "two or three"),
        ({"shape": (4, 4), "boundary": pde.Robin(1.0, 1.0)}, "Dirichlet"),
        ({"shape": (4, 1)}, "at least 2 cells"),
        ({"shape": (4, 2), "boundary": P}, "at least 3"),
        ({"shape": (4, 4), "boundary": [(P, D), D]}, "both sides"),
    ],
)
def test_what_is_no_staggered_grid(arguments, words):
    with pytest.raises(ValueError, match=words):
        pde.Staggered(**arguments)


def test_wrong_velocities():
    staggered = pde.Staggered((4, 4))
    good = random(staggered.like, 0)
    for bad in (good[:1], (good[1], good[0]), good[0]):
        with pytest.raises(ValueError, match="velocity"):
            pde.Divergence(staggered).matvec(bad)
    with pytest.raises(ValueError, match="shape"):
        pde.Gradient(staggered).matvec(jnp.ones((3, 4)))


def test_every_pairing_of_walls_makes_components_that_fit():
    for pair, other in itertools.product([(D, D), (N, D), (P, P)], repeat=2):
        staggered = pde.Staggered((4, 5), boundary=[pair, other])
        assert pde.velocity_laplacian(staggered).like == staggered.like
        assert (-1.0 * pde.velocity_laplacian(staggered)).symmetric
        definite = (-1.0 * pde.velocity_laplacian(staggered)).positive_definite
        assert definite == (not (pair[0] == P and other[0] == P))
