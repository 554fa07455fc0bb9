"""Bad input: a clear error, a status that says so, or the right answer; never a plausible number.

What constructors refuse is with each of them; here is what meets a solver.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse as sp

import bilevel as bl
import bilevel_pde as pde
from tests.pde.cases import few
from tests.pde.manufactured import D, N, P, R, normal

CG, DIRECT = bl.ConjugateGradient(), pde.SparseDirect()


def solved(operator, b, solver, **budget):
    budget = bl.Budget(**({"iterations": 60, "rtol": 1e-9} | budget))
    problem = bl.LinearSystem(operator, b)
    return bl.solve(problem, None, jnp.zeros_like(b), solver=solver, budget=budget)


@pytest.mark.parametrize("layout", ["diagonals", "segment_sum"])
def test_rectangular_matrices_are_no_systems(layout):
    operator = pde.from_scipy(sp.csr_array(np.ones((3, 4))), format=layout)
    with pytest.raises(ValueError, match=r"LinearSystem: the \w+ must be square.*\(3, 4\)"):
        bl.LinearSystem(operator, jnp.ones(3))
    for refused in (pde.AlgebraicMultigrid, pde.colouring):
        with pytest.raises(ValueError, match="should be square"):
            refused(operator)


@pytest.mark.parametrize("solver", [DIRECT, bl.Jacobi(), CG], ids=lambda s: type(s).__name__)
def test_empty_rows_are_singular_and_said_to_be(solver):
    matrix = sp.csr_array(np.diag([2.0, 0.0, 3.0]))
    matrix.eliminate_zeros()
    operator = pde.from_scipy(matrix)
    if isinstance(solver, bl.Jacobi):
        with pytest.raises(ValueError, match="row 1"):
            solved(operator, jnp.ones(3), solver)
        return
    solution = solved(operator, jnp.ones(3), solver)
    assert int(solution.status) in {bl.Status.NONFINITE, bl.Status.BREAKDOWN}


@pytest.mark.parametrize(
    "solver",
    [
        bl.Jacobi(),
        bl.Richardson(1.0, preconditioner=pde.GaussSeidel(colours=np.array([0, 1, 0]))),
        bl.GMRES(preconditioner=bl.JacobiPreconditioner()),
        bl.Richardson(1.0, preconditioner=pde.WeightedJacobi()),
    ],
    ids=["Jacobi", "Gauss-Seidel", "preconditioner", "weighted Jacobi"],
)
def test_zero_diagonals_are_not_divided_by_unnoticed(solver):
    matrix = sp.csr_array(np.array([[0.0, 1.0, 0.0], [1.0, 2.0, 0.0], [0.0, 0.0, 1.0]]))
    operator = pde.from_scipy(matrix)
    with pytest.raises(ValueError, match=r"1 of 3 rows have a zero on the diagonal.*row 0"):
        solved(operator, jnp.ones(3), solver)
    if isinstance(solver, bl.Jacobi):
        # Traced numbers cannot be looked at.
        solution = jax.jit(lambda o: solved(o, jnp.ones(3), solver))(operator)
        assert solution.status == bl.Status.NONFINITE
        assert "the diagonal for zeros" in bl.Status(int(solution.status)).diagnosis
    with pytest.raises(ValueError, match=r"zeros on its diagonal.*SparseDirect"):
        pde.AlgebraicMultigrid(matrix)
    # Elimination with pivots needs no diagonal.
    np.testing.assert_allclose(
        solved(pde.from_scipy(matrix), jnp.ones(3), DIRECT).value, [-1.0, 1.0, 1.0], atol=1e-14
    )


def test_duplicate_and_unsorted_entries_are_one_matrix():
    rows, columns = [2, 0, 1, 0, 2, 1], [2, 0, 1, 1, 2, 0]
    given = sp.coo_array(([1.0, 2.0, 4.0, 1.0, 2.0, 1.0], (rows, columns)), shape=(3, 3))
    b = jnp.array([1.0, 2.0, 3.0])
    expected = np.linalg.solve(given.toarray(), b)
    for layout in ("diagonals", "padded_columns", "segment_sum"):
        found = solved(pde.from_scipy(given, format=layout), b, DIRECT).value
        np.testing.assert_allclose(found, expected, atol=1e-14)


@pytest.mark.parametrize(
    "make",
    [
        lambda grid, bad: pde.advection(grid, bad) + pde.identity(grid),
        lambda grid, bad: pde.Stencil(grid, {(0,): bad}),
        pde.helmholtz,
        lambda grid, bad: pde.from_scipy(sp.eye_array(grid.size)).with_values(bad),
    ],
    ids=["advection", "stencil", "helmholtz", "entries"],
)
def test_entries_that_are_not_finite_show(make):
    bad = np.ones(4)
    bad[2] = np.nan
    operator = make(pde.Grid(4), jnp.asarray(bad))
    assert solved(operator, jnp.ones(4), DIRECT).status == bl.Status.NONFINITE


def test_right_hand_sides_that_are_no_fields():
    operator = -pde.laplacian(pde.Grid(4))
    with pytest.raises(TypeError, match=r"astype\(float\)"):
        solved(operator, jnp.ones(4, int), CG)
    with pytest.raises(ValueError, match=r"shape \(4,\), got \(5,\)"):
        solved(operator, jnp.ones(5), CG)
    spoilt = jnp.ones(4).at[1].set(jnp.nan)
    assert solved(operator, spoilt, CG).status == bl.Status.NONFINITE
    with pytest.raises(TypeError, match="should be real"):
        operator.boundary_term({(0, 0): 1j})
    # A complex field is two real ones.
    both = solved(operator, jnp.ones(4) * (1 + 2j), CG).value
    np.testing.assert_allclose(both.imag, 2 * both.real, rtol=1e-9)


CLOSED = [(N, "cell"), pytest.param(P, "vertex", marks=pytest.mark.slow)]


@pytest.mark.parametrize(("boundary", "centering"), CLOSED, ids=["Neumann", "periodic"])
def test_closed_domains_with_a_source_that_adds_up_to_nothing(boundary, centering):
    """The solution without a mean; a direct solver refuses, and takes the mean as a constraint."""
    grid = pde.Grid((6, 5), boundary=boundary, centering=centering)
    operator = -pde.laplacian(grid)
    assert operator.singular
    assert operator.positive_definite is False
    b = normal(grid.shape)
    b = jnp.asarray(b - b.mean())
    pseudo = np.linalg.pinv(operator.to_scipy().toarray(), rcond=1e-10, hermitian=True)
    expected = (pseudo @ np.ravel(b)).reshape(grid.shape)
    for solver in (bl.MINRES(), bl.Richardson(1.0, preconditioner=pde.FastSolver())):
        solution = solved(operator, b, solver)
        assert solution.status == bl.Status.CONVERGED
        np.testing.assert_allclose(solution.value, expected, atol=1e-9)
    assert solved(operator, b, DIRECT).status == bl.Status.NONFINITE
    constrained = solved(operator + pde.Mean(grid), b, DIRECT)
    np.testing.assert_allclose(constrained.value, expected, atol=1e-12)


SOLVERS = {
    "MINRES": bl.MINRES(),
    "multigrid": bl.ConjugateGradient(preconditioner=pde.Multigrid()),
    "fast": bl.Richardson(1.0, preconditioner=pde.FastSolver()),
    "direct": DIRECT,
}


@pytest.mark.parametrize(
    ("kind", "name"),
    few(
        lambda kind, name: (kind == "stencil") == (name != "MINRES"), ["stencil", "fluxes"], SOLVERS
    ),
)
def test_closed_domains_with_a_source_that_does_not_have_no_solution(kind, name):
    grid = pde.Grid((6, 6), boundary=N, centering="cell")
    # Fluxes are zero for a constant to the last bit. A stencil's sums are not, and what is left
    # of them makes a solution of rounding errors, with a small residual.
    operator = pde.Diffusion(grid, 1.0) if kind == "fluxes" else -pde.laplacian(grid)
    solution = solved(operator, jnp.ones(grid.shape), SOLVERS[name])
    assert solution.status != bl.Status.CONVERGED
    assert bl.Status(int(solution.status)).failed or float(solution.residual_norm) > 0.1


@pytest.mark.parametrize(
    ("grid", "expected"),
    [
        (pde.Grid(1), 1 / 8),
        pytest.param(pde.Grid(1, centering="cell"), 1 / 8 * 2, marks=pytest.mark.slow),
        (pde.Grid(1, boundary=[(D, R)], centering="cell"), None),
        (pde.Grid((1, 3)), None),
        pytest.param(pde.Grid((1, 1, 1)), 1 / 24, marks=pytest.mark.slow),
    ],
    ids=["vertex", "cell", "Robin", "line", "cube"],
)
def test_grids_of_one_point(grid, expected):
    operator = -pde.laplacian(grid)
    b = jnp.ones(grid.shape)
    want = np.linalg.solve(operator.to_scipy().toarray(), np.ravel(b))
    if expected is not None:
        np.testing.assert_allclose(want, expected)
    for solver in (DIRECT, bl.ConjugateGradient(preconditioner=pde.Multigrid())):
        np.testing.assert_allclose(np.ravel(solved(operator, b, solver).value), want, atol=1e-13)


def test_one_point_without_a_neighbour():
    grid = pde.Grid(1, boundary=N, centering="cell")
    assert pde.laplacian(grid).to_scipy().toarray().tolist() == [[0.0]]
    assert solved(-pde.laplacian(grid), jnp.ones(1), DIRECT).status == bl.Status.INCONSISTENT
    for boundary, centering in ((N, "vertex"), (P, "vertex"), (P, "cell")):
        with pytest.raises(ValueError, match=r"takes at least \d points, got 1"):
            pde.Grid(1, boundary=boundary, centering=centering)
    moved = pde.Heat(pde.Grid(1), 1.0, 0.1).step(jnp.ones(1))
    np.testing.assert_allclose(moved, 1 / 1.8, rtol=1e-12)


LINE = pde.Grid(4)
LAPLACE = -pde.laplacian(LINE)
MATRIX = pde.from_scipy(LAPLACE.to_scipy())


@pytest.mark.parametrize(
    "operator", [LAPLACE, pde.Diffusion(LINE, 1.0), MATRIX], ids=lambda o: type(o).__name__
)
def test_factors_and_operands_that_are_none(operator):
    for factor in (np.nan, jnp.inf):
        with pytest.raises(ValueError, match="factor should be finite"):
            factor * operator
    with pytest.raises(TypeError, match="operators are real"):
        1j * operator
    with pytest.raises(ZeroDivisionError, match="divisor should not be zero"):
        operator / 0
    with pytest.raises(TypeError, match="unsupported operand"):
        operator / "a"
    with pytest.raises(TypeError, match=r"v should be a field.*got str"):
        operator @ "a"
    with pytest.raises(TypeError, match="from_scipy"):
        operator @ MATRIX.to_scipy()


@pytest.mark.parametrize(
    ("other", "match"),
    [
        (pde.identity(pde.Grid(4, centering="cell")), "'vertex'.*'cell'"),
        (2.0 * pde.Diffusion(pde.Grid(4, boundary=P), 1.0), "same points"),
        (pde.identity(pde.Grid(4, dtype="float32")), r"float64\[4\].*float32\[4\]"),
        (pde.identity(pde.Grid((2, 2))), r"float64\[4\].*float64\[2, 2\]"),
    ],
    ids=["centering", "sides", "precision", "shape"],
)
def test_sums_of_operators_on_different_fields(other, match):
    with pytest.raises(ValueError, match=match):
        LAPLACE + other
    # Cells stand where they stand, whatever holds on the sides.
    cells = [pde.identity(pde.Grid(4, boundary=kind, centering="cell")) for kind in (D, N)]
    np.testing.assert_array_equal((cells[0] + cells[1]) @ jnp.ones(4), 2 * np.ones(4))


def test_products_of_operators_on_different_points():
    cells = pde.identity(pde.Grid(4, centering="cell"))
    with pytest.raises(ValueError, match=r"Product: .* same points.*'vertex'.*'cell'"):
        LAPLACE @ cells
    with pytest.raises(ValueError, match="same points"):
        (LAPLACE @ LAPLACE) @ (2.0 * (cells @ cells))
    with pytest.raises(ValueError, match="same points"):
        LAPLACE @ pde.identity(pde.Grid(4, extent=2.0))
    held = pde.identity(pde.Grid(4, boundary=N, centering="cell"))
    np.testing.assert_array_equal((cells @ held) @ jnp.ones(4), np.ones(4))


def test_noise_on_grids_that_are_too_small():
    with pytest.raises(ValueError, match=r"smoothed_noise: grid .* at least 3 points"):
        pde.smoothed_noise(jax.random.key(0), pde.Grid((2, 5)))


def test_a_closed_problem_without_solution_says_why_forward_and_backward():
    grid = pde.Grid((6, 5), boundary=pde.Neumann(), centering="cell")
    weights = jnp.asarray(np.random.default_rng(0).standard_normal(grid.shape))
    problem = bl.LinearSystem(lambda _: pde.Diffusion(grid, 1.0), lambda f: f - jnp.mean(f))
    result = bl.hypergradient(
        lambda x, _: jnp.sum(weights * x),
        problem,
        weights,
        jnp.zeros(grid.shape),
        solver=bl.ConjugateGradient(),
    )
    # A loss that depends on the mean has no derivative: the mean is not determined.
    assert int(result.primal.status) == bl.Status.CONVERGED
    assert int(result.adjoint.status) == bl.Status.INCONSISTENT
    assert np.all(np.isnan(result.gradient))
    fluxes = pde.Diffusion(grid, 1.0)
    for operator, b in (
        (fluxes, weights),
        (pde.from_scipy(fluxes.to_scipy()), weights.reshape(-1)),
    ):
        closed = bl.LinearSystem(operator, b)
        solution = bl.solve(closed, None, jnp.zeros(b.shape), solver=bl.MINRES())
        assert int(solution.status) == bl.Status.INCONSISTENT
