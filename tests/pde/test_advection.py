"""Advection and Helmholtz: what schemes promise beyond their order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel_pde as pde
from tests.pde.cases import few
from tests.pde.manufactured import D, N, P, R
from tests.pde.test_stencil import dense

GRIDS = [
    pde.Grid((5, 4), (1.0, 2.0), boundary, centering)
    for boundary in (D, N, P, R, [(D, N), P])
    for centering in ("vertex", "cell")
]


def velocity(grid, seed=0):
    generator = np.random.default_rng(seed)
    return tuple(jnp.asarray(generator.standard_normal(grid.shape)) for _ in grid.shape)


# Each boundary, centering, form and scheme, and the schemes of both forms on one grid.
FEW = {(0, False, "upwind"), (2, True, "upwind"), (5, False, "central"), (7, True, "central")}


@pytest.mark.parametrize(
    ("number", "conservative", "scheme"),
    few(
        lambda *case: case[0] == 8 or case in FEW,
        range(len(GRIDS)),
        [False, True],
        ["upwind", "central"],
    ),
)
def test_matrix_and_transpose(number, conservative, scheme):
    grid = GRIDS[number]
    operator = pde.advection(grid, velocity(grid), scheme, conservative=conservative)
    matrix = operator.to_scipy().toarray()
    np.testing.assert_allclose(dense(operator.matvec, grid), matrix, atol=1e-12)
    np.testing.assert_allclose(dense(operator.rmatvec, grid), matrix.T, atol=1e-12)
    assert operator.symmetric is None
    assert not operator.positive_definite
    constants = operator.matvec(jnp.ones(grid.shape))
    # Constants are not carried anywhere, where no side says otherwise.
    if not conservative and all(s in (N, P) for pair in grid.boundary for s in pair):
        np.testing.assert_allclose(constants, 0.0, atol=1e-12)
        assert operator.singular


@pytest.mark.parametrize("scheme", ["upwind", "central"])
@pytest.mark.parametrize("centering", ["vertex", "cell"])
@pytest.mark.parametrize("boundary", [P, N], ids=lambda b: type(b).__name__)
def test_conservative_form_conserves(scheme, centering, boundary):
    """Closed sides: nothing comes in, and nothing gets lost."""
    grid = pde.Grid((5, 4), 1.0, boundary, centering)
    generator = np.random.default_rng(0)
    faces = []
    for axis in range(2):
        v = generator.standard_normal(grid.face_shape(axis))
        if boundary == N:
            np.moveaxis(v, axis, 0)[[0, -1]] = 0.0
        faces.append(jnp.asarray(v))
    operator = pde.advection(grid, faces, scheme, conservative=True, at="faces")
    image = operator @ jnp.asarray(generator.standard_normal(grid.shape))
    weights = grid.weights()[0] * grid.weights()[1]
    assert float((weights * image).sum()) == pytest.approx(0.0, abs=1e-11)


@pytest.mark.parametrize("conservative", [False, True])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_constant_velocity_is_a_field_of_it(grid, conservative):
    numbers = (0.7, -0.4)
    fields = tuple(jnp.full(grid.shape, v) for v in numbers)
    for scheme in ("upwind", "central"):
        plain = pde.advection(grid, numbers, scheme, conservative=conservative)
        other = pde.advection(grid, fields, scheme, conservative=conservative)
        np.testing.assert_allclose(
            plain.to_scipy().toarray(), other.to_scipy().toarray(), atol=1e-12
        )


def test_upwind_reads_only_where_the_flow_comes_from():
    grid = pde.Grid((4, 4))
    assert set(pde.advection(grid, (1.0, -2.0)).offsets) == {(0, 0), (-1, 0), (0, 1)}
    matrix = pde.advection(grid, velocity(grid)).to_scipy().toarray()
    off = matrix - np.diag(np.diag(matrix))
    assert off.max() <= 0
    assert np.all(np.diag(matrix) >= -off.sum(axis=1) - 1e-12)


def test_central_differences_are_antisymmetric():
    matrix = pde.advection(pde.Grid((4, 5)), (1.0, -2.0), "central").to_scipy().toarray()
    np.testing.assert_array_equal(matrix, -matrix.T)


def test_derivatives_with_respect_to_velocity():
    grid = pde.Grid((4, 3), boundary=[(D, N), P], centering="cell")
    generator = np.random.default_rng(2)
    weight, field = (jnp.asarray(generator.standard_normal(grid.shape)) for _ in range(2))
    v = velocity(grid)
    for scheme in ("upwind", "central"):

        def value(v, scheme=scheme):
            return jnp.sum(weight * pde.advection(grid, v, scheme).matvec(field))

        got = jax.grad(value)(v)
        flat, unravel = jax.flatten_util.ravel_pytree(v)
        # Piecewise linear in the velocity, whose signs these steps leave.
        step = 1e-3
        assert float(jnp.abs(flat).min()) > step
        for i, derivative in enumerate(jax.flatten_util.ravel_pytree(got)[0]):
            change = value(unravel(flat.at[i].add(step))) - value(v)
            assert float(derivative) == pytest.approx(float(change) / step, abs=1e-8)


def test_one_dimension_takes_the_component_itself():
    grid = pde.Grid(4, boundary=P)
    field = jnp.arange(4.0)
    np.testing.assert_allclose(
        pde.advection(grid, -field) @ field, pde.advection(grid, (-field,)) @ field
    )


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"velocity": 1.0}, ValueError, "each of 2 axes"),
        ({"velocity": (1.0, jnp.ones(3))}, ValueError, "component 1"),
        ({"velocity": (1.0, 1j)}, TypeError, "real"),
        ({"velocity": (1.0, 1.0), "scheme": "eno"}, ValueError, "'upwind' or 'central'"),
        ({"velocity": (1.0, 1.0), "at": "faces"}, ValueError, "conservative"),
        (
            {"velocity": (jnp.ones((4, 3)), 1.0), "at": "faces", "conservative": True},
            ValueError,
            r"\(5, 3\)",
        ),
    ],
)
def test_what_is_no_advection(arguments, error, words):
    with pytest.raises(error, match=words):
        pde.advection(pde.Grid((4, 3)), **arguments)


@pytest.mark.parametrize("k", [0.5, 7.0, "field"])
def test_helmholtz(k):
    grid = pde.Grid((5, 4), boundary=[(D, N), P], centering="cell")
    k = 1.0 + grid.mesh()[0] if k == "field" else k
    operator = pde.helmholtz(grid, k)
    expected = pde.laplacian(grid).to_scipy().toarray() + np.diag(
        np.broadcast_to(np.asarray(k) ** 2, grid.shape).ravel()
    )
    np.testing.assert_allclose(operator.to_scipy().toarray(), expected, atol=1e-11)
    np.testing.assert_allclose(dense(operator.matvec, grid), expected, atol=1e-11)
    assert operator.symmetric
    assert not operator.positive_definite
    slope = jax.grad(lambda k: jnp.sum(pde.helmholtz(grid, k) @ jnp.ones(grid.shape)))(k)
    np.testing.assert_allclose(slope, 2 * np.asarray(k) * (20 if np.ndim(k) == 0 else 1))
