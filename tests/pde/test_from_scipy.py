"""Sparse matrices of SciPy as operators: every format against SciPy itself."""

import warnings

import equinox as eqx
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from scipy.spatial import Delaunay

import bilevel as bl
import bilevel_pde as pde
from bilevel_pde import structure
from tests.pde.cases import few
from tests.pde.manufactured import normal

FORMATS = ("diagonals", "padded_columns", "segment_sum")


def random_matrix(rows=12, columns=12, density=0.25, seed=0):
    random = np.random.default_rng(seed)
    matrix = sp.random_array((rows, columns), density=density, rng=random)
    return sp.csr_array(matrix)


def same_structure(seed=0):
    """Symmetric in structure, not in values."""
    matrix = random_matrix(density=0.1, seed=seed)
    matrix = sp.csr_array(matrix + matrix.T + sp.eye_array(12))
    matrix.data = np.random.default_rng(seed).standard_normal(matrix.nnz)
    return matrix


def with_long_row():
    matrix = sp.lil_array(sp.diags_array([1.0, 4.0, 2.0], offsets=[-3, 0, 7], shape=(20, 20)))
    matrix[5, :] = np.arange(1.0, 21.0)
    return sp.csr_array(matrix)


MATRICES = {
    "square": random_matrix(),
    "wide": random_matrix(9, 13),
    "tall": random_matrix(13, 9),
    "same structure": same_structure(),
    "symmetric": sp.csr_array(same_structure() + same_structure().T),
    "long row": with_long_row(),
    "banded": sp.csr_array(sp.diags_array([1.0, 2.0, 3.0], offsets=[-3, 0, 1], shape=(8, 8))),
}


def rows_of(matrix):
    return np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))


def identical(a, b):
    """The same stored entries at the same places, to the bit."""
    parts = ("indptr", "indices", "data")
    return a.shape == b.shape and all(np.array_equal(getattr(a, p), getattr(b, p)) for p in parts)


def sorted_transpose(matrix):
    transposed = sp.csr_array(matrix.T)
    transposed.sort_indices()
    return transposed


@pytest.fixture(scope="module")
def renumbered():
    """Operators that renumber their unknowns, as large ones do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(structure, "REACH", 0)
        patch.setattr(structure, "BETTER", 0)
        return [
            pde.from_scipy(MATRICES[k], format="padded_columns") for k in ("square", "long row")
        ]


# Each layout, each matrix with what is particular to it.
PRODUCTS = {
    ("square", "diagonals"),
    ("symmetric", "diagonals"),
    ("same structure", "segment_sum"),
    ("tall", "padded_columns"),
    ("long row", "padded_columns"),
    ("wide", "segment_sum"),
    ("banded", "diagonals"),
}


@pytest.mark.parametrize(("name", "layout"), few(lambda *case: case in PRODUCTS, MATRICES, FORMATS))
def test_products_and_round_trip(name, layout):
    check_products(pde.from_scipy(MATRICES[name], format=layout), MATRICES[name], rtol=1e-12)


@pytest.mark.parametrize("layout", few(lambda layout: layout == "padded_columns", FORMATS))
def test_products_in_single_precision(layout):
    matrix = MATRICES["square"].astype(np.float32)
    check_products(pde.from_scipy(matrix, format=layout), matrix, rtol=2e-6)


def test_products_with_renumbered_unknowns(renumbered):
    for operator in renumbered:
        assert operator.layout.order is not None
        assert "renumbered" in operator.reason
        check_products(operator, operator.to_scipy(), rtol=1e-12)
    assert identical(renumbered[0].to_scipy(), MATRICES["square"])


def check_products(operator, matrix, rtol):
    rows, columns = matrix.shape
    v, w = normal(columns), normal(rows, 1)
    v, w = v.astype(matrix.dtype), w.astype(matrix.dtype)
    many = np.stack([v, 2 * v + 1, v**2], axis=1)
    scale = abs(matrix).sum()

    def close(got, expected):
        assert got.dtype == matrix.dtype
        np.testing.assert_allclose(got, expected, rtol=0, atol=rtol * scale)

    @jax.jit
    def products(operator, v, w, many):
        forward = operator.matvec(v), operator.T.rmatvec(v)
        backward = operator.rmatvec(w), operator.T.matvec(w)
        several = operator.matvec(many), jax.vmap(operator.matvec)(many.T).T
        return forward, backward, several, pde.transpose_defect(operator)

    forward, backward, several, defect = products(operator, v, w, many)
    assert defect <= rtol
    pairs = (forward, matrix @ v), (backward, matrix.T @ w), (several, matrix @ many)
    for got, expected in pairs:
        for result in got:
            close(result, expected)
    assert identical(operator.to_scipy(), matrix)
    assert identical(operator.T.to_scipy(), sorted_transpose(matrix))
    assert identical(operator.T.T.to_scipy(), matrix)
    np.testing.assert_array_equal(operator.values, matrix.data)
    if rows == columns:
        close(operator.diagonal(), matrix.diagonal())
    else:
        assert operator.diagonal() is None
    entry_rows, entry_columns, values = map(np.asarray, operator.entries())
    listed = sp.coo_array((values, (entry_rows, entry_columns)), shape=matrix.shape)
    np.testing.assert_array_equal(listed.toarray(), matrix.toarray())


DERIVATIVES = {
    ("wide", "padded_columns"),
    ("symmetric", "diagonals"),
    ("square", "segment_sum"),
}


@pytest.mark.parametrize(
    ("name", "layout"),
    few(lambda *case: case in DERIVATIVES, ["square", "wide", "symmetric"], FORMATS),
)
def test_derivatives_are_those_of_the_dense_product(name, layout):
    matrix = MATRICES[name]
    operator = pde.from_scipy(matrix, format=layout)
    rows, columns = rows_of(matrix), matrix.indices
    v = jnp.asarray(normal(matrix.shape[1]))
    w = jnp.asarray(normal(matrix.shape[0], 1))
    values = jnp.asarray(normal(matrix.nnz, 2))

    def sparse(values, v):
        return w @ jnp.sin(operator.with_values(values).matvec(v))

    def dense(values, v):
        return w @ jnp.sin(jnp.zeros(matrix.shape).at[rows, columns].add(values) @ v)

    for derivative in (lambda f: jax.grad(f, (0, 1)), lambda f: jax.hessian(f, (0, 1))):
        got = jax.jit(derivative(sparse))(values, v)
        expected = jax.jit(derivative(dense))(values, v)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)
    # A symmetric matrix with other values need not be symmetric.
    other = sp.csr_array((values, columns, matrix.indptr), matrix.shape)
    np.testing.assert_allclose(operator.with_values(values).rmatvec(w), other.T @ w, atol=1e-12)


@pytest.mark.parametrize("layout", few(lambda layout: layout == "padded_columns", FORMATS))
def test_gradient_with_respect_to_the_operator_leaves_padding_alone(layout):
    matrix = MATRICES["long row"]
    operator = pde.from_scipy(matrix, format=layout)
    v = jnp.asarray(normal(20))
    gradient = eqx.filter_grad(lambda o: jnp.sum(o.matvec(v) ** 2))(operator)
    moved = eqx.apply_updates(operator, gradient)
    product = matrix @ v
    expected = 2 * product[rows_of(matrix)] * np.asarray(v)[matrix.indices]
    np.testing.assert_allclose(eqx.combine(gradient, operator).values, expected, rtol=1e-12)
    if layout != "segment_sum":
        with pytest.raises(ValueError, match=r"equinox.combine\(gradient, operator\).values"):
            _ = gradient.values
    # Padding that moved would be an entry where there is none.
    changed = sp.csr_array((matrix.data + expected, matrix.indices, matrix.indptr), matrix.shape)
    np.testing.assert_allclose(moved.matvec(v), changed @ v, rtol=1e-10)
    # An entry costs its place in `stored`: nothing is n by n.
    assert operator.stored.size <= 20 * len(operator.to_scipy().data)
    assert gradient.stored.shape == operator.stored.shape


def test_symmetric_diagonals_are_read_once_and_differentiated_each():
    line = sp.diags_array([2.0, -1.0, 5.0, -1.0, 2.0], offsets=[-4, -1, 0, 1, 4], shape=(12, 12))
    matrix = sp.csr_array(line)
    symmetric = pde.from_scipy(matrix)
    general = symmetric.with_values(symmetric.values)
    v = jnp.asarray(normal((12, 2)))
    loss = eqx.filter_grad(lambda o, v: jnp.sum(jnp.sin(o.matvec(v))))
    for operator in (symmetric, general):
        np.testing.assert_allclose(operator.matvec(v), matrix @ v, rtol=1e-13)
    by_entry = [loss(operator, v).stored for operator in (symmetric, general)]
    np.testing.assert_allclose(*by_entry, rtol=1e-12)
    by_v = [jax.grad(lambda v, o=o: jnp.sum(jnp.sin(o.matvec(v))))(v) for o in (symmetric, general)]
    np.testing.assert_allclose(*by_v, rtol=1e-12)
    transposed = jax.linear_transpose(symmetric.matvec, v)(v)[0]
    np.testing.assert_allclose(transposed, matrix @ v, rtol=1e-13)
    # The lower diagonals come first in memory: what stands there is not looked at.
    unread = eqx.tree_at(lambda o: o.stored, symmetric, symmetric.stored.at[: 2 * 12].set(jnp.nan))
    np.testing.assert_allclose(unread.matvec(v), matrix @ v, rtol=1e-13)


@settings(max_examples=8)
@given(
    rows=st.integers(1, 8),
    columns=st.integers(1, 8),
    density=st.floats(0, 1),
    seed=st.integers(0, 2**16),
    layout=st.sampled_from([None, *FORMATS]),
)
def test_random_matrices(rows, columns, density, seed, layout):
    matrix = random_matrix(rows, columns, density, seed)
    operator = pde.from_scipy(matrix, format=layout)
    v, w = np.arange(1.0, columns + 1), np.arange(1.0, rows + 1)
    np.testing.assert_allclose(operator.matvec(v), matrix @ v, atol=1e-12)
    np.testing.assert_allclose(operator.rmatvec(w), matrix.T @ w, atol=1e-12)
    assert identical(operator.to_scipy(), matrix)
    assert identical(operator.T.to_scipy(), sorted_transpose(matrix))


@pytest.mark.parametrize("kind", ["coo", "csr", "csc", "dia", "bsr", "lil", "dok"])
@pytest.mark.parametrize("interface", [sp.csr_array, sp.csr_matrix])
def test_every_kind_of_scipy_matrix(kind, interface):
    matrix = interface(MATRICES["banded"]).asformat(kind)
    operator = pde.from_scipy(matrix)
    np.testing.assert_allclose(operator.to_scipy().toarray(), matrix.toarray())
    assert isinstance(operator.to_scipy(), sp.csr_array)


def test_the_structure_decides_and_the_operator_says_why():
    banded = pde.from_scipy(MATRICES["banded"])
    assert isinstance(banded, pde.Diagonals)
    assert "3 diagonals" in repr(banded)
    mesh = pde.from_scipy(with_long_row())
    assert isinstance(mesh, pde.PaddedColumns)
    assert mesh.layout.width == 3
    assert "3 columns hold all but 17" in mesh.reason
    few = pde.from_scipy(random_matrix(400, 400, 0.0001))
    assert isinstance(few, pde.SegmentSum)
    assert "one row in ten" in few.reason
    full = pde.from_scipy(random_matrix(100, 150, 0.9))
    assert isinstance(full, pde.SegmentSum)
    assert "too many" in full.reason
    with pytest.raises(ValueError, match="format must be"):
        pde.from_scipy(MATRICES["banded"], format="dense")


def test_a_mesh_in_random_order_is_renumbered():
    points = 300
    order = np.random.default_rng(0).permutation(points * points)
    line = sp.diags_array([1.0, 2.0, 1.0], offsets=[-1, 0, 1], shape=(points, points))
    matrix = sp.csr_array(sp.kron(line, line))[order][:, order]
    operator = pde.from_scipy(matrix)
    assert operator.layout.order is not None
    v = normal(points * points)
    np.testing.assert_allclose(operator.matvec(v), matrix @ v, rtol=1e-12, atol=1e-12)


def test_symmetry_is_looked_at_to_rounding():
    symmetric = MATRICES["symmetric"]
    assert pde.from_scipy(symmetric).symmetric is True
    noisy = symmetric.copy()
    noisy.data = noisy.data * (1 + 1e-16 * normal(noisy.nnz))
    assert pde.from_scipy(noisy).symmetric is True
    noisy.data[1] += 1e-9
    assert pde.from_scipy(noisy).symmetric is False
    # Small entries count by their own rows, not by the largest of the matrix.
    scaled = sp.block_diag([sp.csr_array([[1e20]]), sp.csr_array([[1.0, 2.0], [3.0, 1.0]])])
    assert pde.from_scipy(scaled).symmetric is False
    assert pde.from_scipy(random_matrix(3, 4)).symmetric is False


def closed_mesh(dtype=float):
    """Linear elements on a random mesh without conditions on its sides."""
    points = np.random.default_rng(0).random((40, 2))
    triangles = Delaunay(points).simplices
    sides = points[triangles] - points[np.roll(triangles, 1, axis=1)]
    areas = np.abs(np.linalg.det(sides[:, :2])) / 2
    local = np.einsum("eid,ejd,e->eij", sides, sides, 1 / (4 * areas))
    corners = np.roll(triangles, -1, axis=1)
    rows, columns = np.broadcast_arrays(corners[:, :, None], corners[:, None])
    places = rows.ravel(), columns.ravel()
    return sp.csr_array(sp.coo_array((local.ravel(), places))).astype(dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_closed_problems_are_seen(dtype):
    matrix = closed_mesh(dtype)
    assert pde.from_scipy(matrix).singular
    assert pde.from_scipy(matrix).T.singular
    assert not pde.from_scipy(matrix + 1e-4 * sp.eye_array(40, dtype=dtype)).singular
    assert not pde.from_scipy(matrix[:, :-1]).singular
    # The transpose of one that is not symmetric has another kernel.
    rotating = pde.from_scipy(sp.csr_array([[1.0, -1.0], [-2.0, 2.0]]))
    assert rotating.singular
    assert not rotating.T.singular
    assert not pde.from_scipy(sp.csr_array((0, 0))).singular
    # A small number beside large ones, on a grid as in test_stencil.py.
    grid = pde.Grid(300, boundary=pde.Neumann(), centering="cell", dtype="float32")
    lap = pde.laplacian(grid)
    assert pde.from_scipy(lap.to_scipy()).singular
    assert not pde.from_scipy((pde.identity(grid) - lap).to_scipy()).singular


def test_what_was_known_is_forgotten_with_the_values():
    operator = pde.from_scipy(sp.eye_array(4) * 2.0, positive_definite=True)
    assert operator.positive_definite is True
    changed = operator.with_values(jnp.ones(4))
    assert (changed.symmetric, changed.positive_definite) == (None, None)
    closed = pde.from_scipy(sp.csr_array([[1.0, -1.0], [-1.0, 1.0]]))
    assert not closed.with_values(jnp.ones(4)).singular
    assert not closed.lower().singular
    declared = operator.with_values(jnp.ones(4), positive_definite=True)
    assert (declared.symmetric, declared.positive_definite) == (True, True)
    with pytest.raises(ValueError, match="not symmetric"):
        pde.from_scipy(MATRICES["square"], positive_definite=True)
    with pytest.raises(ValueError, match="diagonal"):
        pde.from_scipy(-sp.eye_array(4), positive_definite=True)


def test_duplicate_unsorted_and_zero_entries():
    rows, columns = np.array([2, 0, 2, 0, 1]), np.array([1, 2, 1, 0, 1])
    coordinate = sp.coo_array((np.array([1.0, 2.0, 3.0, 4.0, 0.0]), (rows, columns)), shape=(3, 3))
    operator = pde.from_scipy(coordinate)
    np.testing.assert_array_equal(operator.to_scipy().toarray(), coordinate.toarray())
    # The explicit zero is part of the structure, and the duplicates are one entry.
    assert operator.values.tolist() == [4.0, 2.0, 0.0, 4.0]
    assert coordinate.nnz == 5
    unsorted = sp.csr_array((np.array([1.0, 2.0]), np.array([2, 0]), np.array([0, 2, 2, 2])))
    operator = pde.from_scipy(unsorted)
    assert operator.values.tolist() == [2.0, 1.0]
    assert unsorted.indices.tolist() == [2, 0]


@pytest.mark.parametrize("layout", [None, *FORMATS])
def test_small_and_empty_matrices(layout):
    for shape in ((0, 0), (0, 3), (3, 0), (4, 4)):
        operator = pde.from_scipy(sp.csr_array(shape), format=layout)
        assert operator.matvec(np.ones(shape[1])).tolist() == [0.0] * shape[0]
        assert operator.rmatvec(np.ones(shape[0])).tolist() == [0.0] * shape[1]
        assert operator.to_scipy().shape == shape
    one = pde.from_scipy(sp.csr_array([[3.0]]), format=layout)
    assert one.matvec(np.ones(1)).tolist() == [3.0]
    empty_rows = sp.csr_array(np.array([[0.0, 0.0], [5.0, 0.0]]))
    assert pde.from_scipy(empty_rows, format=layout).matvec(np.ones(2)).tolist() == [0.0, 5.0]


def out_of_range(kind):
    matrix = sp.coo_array(MATRICES["banded"], copy=True).asformat(kind)
    if kind == "coo":
        matrix.coords[1][3] = 99
    else:
        matrix.indices[3] = 99
    return matrix


def spoilt_lists(columns):
    matrix = sp.lil_array(np.eye(3))
    matrix.rows[0] = columns
    return matrix


def spoilt(kind, name, value):
    matrix = sp.csr_array(np.eye(3)).asformat(kind)
    setattr(matrix, name, value)
    return matrix


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: np.eye(3), TypeError, "scipy.sparse"),
        (lambda: sp.eye_array(3, dtype=int), TypeError, r"astype\(float\)"),
        (lambda: sp.eye_array(3, dtype=bool), TypeError, r"astype\(float\)"),
        (lambda: sp.eye_array(3, dtype=complex), TypeError, "real system"),
        (lambda: sp.coo_array(np.ones(3)), ValueError, "two dimensions"),
        (lambda: out_of_range("coo"), ValueError, "column indices are out of range"),
        (lambda: out_of_range("csr"), ValueError, "no valid matrix"),
        (lambda: out_of_range("csc"), ValueError, "no valid matrix"),
        (lambda: sp.csr_array([[1.0, np.nan], [np.inf, 1.0]]), ValueError, r"2 of 4 .* \(0, 1\)"),
        # SciPy's own conversions follow these out of their arrays and crash.
        (lambda: spoilt_lists([100_000]), ValueError, "100000 for 3 columns"),
        (lambda: spoilt_lists([-1]), ValueError, "column indices are out of range"),
        (lambda: spoilt_lists([0, 1]), ValueError, "row 0 has 2 columns and 1 entries"),
        (lambda: spoilt_lists([0.5]), ValueError, "indices must be integers"),
        (lambda: spoilt("dok", "_dict", {(7, 0): 2.0}), ValueError, "7 for 3 rows"),
        (lambda: spoilt("dia", "offsets", np.array([0, 1])), ValueError, "DIA arrays are no valid"),
        (lambda: spoilt("coo", "row", np.arange(2)), ValueError, "COO arrays are no valid"),
        (lambda: spoilt("csr", "indptr", np.arange(2)), ValueError, "CSR arrays are no valid"),
    ],
)
def test_bad_matrices_are_refused(make, error, match):
    with pytest.raises(error, match=match):
        pde.from_scipy(make())


@pytest.mark.parametrize("layout", FORMATS)
def test_wrong_shapes_are_refused_and_never_read_out_of_bounds(layout):
    operator = pde.from_scipy(MATRICES["wide"], format=layout)
    with pytest.raises(ValueError, match=r"matvec: v must have shape \(13,\)"):
        operator.matvec(np.ones(12))
    with pytest.raises(ValueError, match=r"rmatvec: v must have shape \(9,\)"):
        operator.rmatvec(np.ones(13))
    with pytest.raises(ValueError, match=r"values must have shape"):
        operator.with_values(jnp.ones(3))
    with pytest.raises(TypeError, match="real"):
        operator.with_values(jnp.ones(operator.count, complex))


def test_the_core_names_from_scipy():
    with pytest.raises(TypeError, match=r"bilevel_pde\.from_scipy"):
        bl.solve(bl.LinearSystem(MATRICES["square"], jnp.ones(12)), None, jnp.zeros(12))
    with pytest.raises(ValueError, match=r"LinearSystem: the \w+ must be square.*\(13, 9\)"):
        bl.LinearSystem(pde.from_scipy(MATRICES["tall"]), jnp.ones(13))


def test_default_precision_of_jax_is_kept():
    with jax.enable_x64(False), warnings.catch_warnings():
        warnings.simplefilter("error")
        operator = pde.from_scipy(MATRICES["square"])
        assert operator.matvec(np.ones(12, np.float32)).dtype == jnp.float32
        assert operator.to_scipy().dtype == np.float32
