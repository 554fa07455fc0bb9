"""Krylov solvers, against SciPy's iterates, dense algebra, and plain differentiated loops."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse.linalg
from hypothesis import given, settings
from hypothesis import strategies as st

import bilevel as bl
from bilevel import vector
from tests.marks import others_slow
from tests.solver.systems import SIZE, SYSTEM, krylov_minimiser, solve, system

SOLVERS = {
    "definite": bl.ConjugateGradient(),
    "symmetric": bl.MINRES(),
    "general": bl.BiCGStab(),
}
GMRES = bl.GMRES(restart=5)
ALL = [*SOLVERS.items(), ("general", GMRES)]
NAMES = ["CG", "MINRES", "BiCGStab", "GMRES(5)"]


def cases(*fast):
    """`ALL`, of which all but those named run with `-m slow` alone."""
    named = zip(NAMES, ALL, strict=True)
    return [
        pytest.param(case, id=name, marks=[] if name in fast else pytest.mark.slow)
        for name, case in named
    ]


# ------------------------------------------------------------------ the same as others

SCIPY = {
    "CG": scipy.sparse.linalg.cg,
    "MINRES": scipy.sparse.linalg.minres,
    "BiCGStab": scipy.sparse.linalg.bicgstab,
    "GMRES(5)": lambda *args, **options: scipy.sparse.linalg.gmres(*args, restart=5, **options),
}


@pytest.mark.parametrize(
    ("name", "case", "complex_valued"),
    [
        pytest.param(
            name,
            case,
            complex_valued,
            id=f"{complex_valued}-{name}",
            # SciPy's MINRES has no complex form.
            marks=[] if complex_valued != (name == "MINRES") else pytest.mark.slow,
        )
        for complex_valued in (False, True)
        for name, case in zip(NAMES, ALL, strict=True)
    ],
)
def test_iterates_are_scipys(name, case, complex_valued):
    if complex_valued and name == "MINRES":
        pytest.skip("SciPy's MINRES has no complex form")
    kind, solver = case
    matrix, rhs, _ = system(kind, complex_valued=complex_valued)
    for steps in (1, 2, 4):
        ours = solve(matrix, rhs, solver, iterations=steps)
        theirs, _ = SCIPY[name](matrix, rhs, rtol=1e-300, maxiter=steps)
        np.testing.assert_allclose(ours.value, theirs, rtol=1e-12, atol=1e-13)
        true_norm = np.linalg.norm(rhs - matrix @ theirs)
        np.testing.assert_allclose(ours.residual_norm, true_norm, rtol=1e-9, atol=1e-12)
        assert ours.iterations == steps


@pytest.mark.parametrize("name", ["CG", "BiCGStab"])
def test_counts_are_scipys(name):
    kind, solver = dict(zip(NAMES, ALL, strict=True))[name]
    for seed, rtol in ((1, 1e-3), (2, 1e-6), (3, 1e-10)):
        matrix, rhs, _ = system(kind, seed=seed)
        counted = []
        SCIPY[name](matrix, rhs, rtol=rtol, callback=counted.append)
        count = int(solve(matrix, rhs, solver, iterations=100, rtol=rtol).iterations)
        # SciPy's BiCGStab may end on the first half of an iteration, and does not count it.
        assert count - len(counted) in ({0, 1} if name == "BiCGStab" else {0})


@pytest.mark.parametrize("complex_valued", [False, True])
def test_minres_and_gmres_minimise_the_residual_over_the_krylov_space(complex_valued):
    matrix, rhs, _ = system("symmetric", complex_valued=complex_valued)
    for steps in (2, 5):
        best = krylov_minimiser(matrix, rhs, steps)
        ours = solve(matrix, rhs, bl.MINRES(), iterations=steps).value
        np.testing.assert_allclose(ours, best, rtol=1e-10, atol=1e-11)
    cycle = solve(matrix, rhs, GMRES, iterations=1).value
    np.testing.assert_allclose(cycle, best, rtol=1e-10, atol=1e-11)


@settings(max_examples=10)
@given(seed=st.integers(0, 2**32 - 1), scale=st.floats(-8.0, 8.0))
def test_random_systems_are_solved(seed, scale):
    for kind, solver in ALL:
        matrix, rhs, solution = system(kind, seed=seed)
        rhs, solution = rhs * 10.0**scale, solution * 10.0**scale
        ours = solve(matrix, rhs, solver, iterations=500, rtol=1e-9)
        if ours.status == bl.Status.CONVERGED:
            assert ours.residual_norm <= 1e-9 * np.linalg.norm(rhs)
            error = np.linalg.norm(ours.value - solution)
            assert error <= 1e-9 * np.linalg.norm(rhs) * np.linalg.norm(np.linalg.inv(matrix), 2)
        # The others stop for reasons of their own only on a general system.
        else:
            assert kind == "general"
        true_norm = np.linalg.norm(rhs - matrix @ np.asarray(ours.value))
        np.testing.assert_allclose(
            ours.residual_norm, true_norm, rtol=1e-6, atol=1e-12 * np.linalg.norm(rhs)
        )


# ---------------------------------------------------------------------- what goes wrong

BREAKDOWN, ROUNDING = bl.Status.BREAKDOWN, bl.Status.ROUNDING
NOT_SYMMETRIC, INCONSISTENT = bl.Status.NOT_SYMMETRIC, bl.Status.INCONSISTENT
CONVERGED, BUDGET = bl.Status.CONVERGED, bl.Status.BUDGET
WRONG = {
    # kind: statuses of CG, MINRES, BiCGStab, GMRES(5)
    "singular, inconsistent": (BREAKDOWN, INCONSISTENT, BREAKDOWN, BREAKDOWN),
    "singular, consistent": (CONVERGED, CONVERGED, CONVERGED, CONVERGED),
    "zero": (BREAKDOWN, INCONSISTENT, BREAKDOWN, BREAKDOWN),
    "indefinite": (BREAKDOWN, CONVERGED, CONVERGED, None),
    "negative": (BREAKDOWN, CONVERGED, CONVERGED, CONVERGED),
    "skew": (NOT_SYMMETRIC, NOT_SYMMETRIC, BREAKDOWN, None),
    "cyclic shift": (NOT_SYMMETRIC, NOT_SYMMETRIC, BREAKDOWN, BREAKDOWN),
    "rank one": (NOT_SYMMETRIC, NOT_SYMMETRIC, BREAKDOWN, BREAKDOWN),
}


def wrong(kind):
    matrix, rhs, _ = system("definite")
    values, vectors = np.linalg.eigh(matrix)
    singular = (vectors * np.r_[0.0, values[1:]]) @ vectors.T
    noise = system("general").matrix
    return {
        "singular, inconsistent": (singular, rhs),
        "singular, consistent": (singular, singular @ rhs),
        "zero": (0.0 * matrix, rhs),
        "indefinite": (system("symmetric").matrix, rhs),
        "negative": (-matrix, rhs),
        "skew": (noise - noise.T, rhs),
        "cyclic shift": (np.roll(np.eye(SIZE), 1, axis=0), np.eye(SIZE)[0]),
        "rank one": (np.outer(rhs, matrix[0]), matrix[1]),
    }[kind]


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_operators_end_in_an_honest_status(kind):
    # `None` where rounding decides between two honest ends, or slow progress is made.
    matrix, rhs = wrong(kind)
    for name, (_, solver), status in zip(NAMES, ALL, WRONG[kind], strict=True):
        solution = solve(matrix, rhs, solver)
        value = np.asarray(solution.value)
        true_norm = np.linalg.norm(rhs - matrix @ value)
        noise = 1e-14 * np.linalg.norm(matrix) * np.linalg.norm(value)
        np.testing.assert_allclose(
            solution.residual_norm, true_norm, rtol=1e-9, atol=1e-11 + noise, err_msg=name
        )
        assert (solution.status == CONVERGED) == (solution.residual_norm <= solution.tolerance)
        if status is not None:
            assert solution.status == status, (name, solution.diagnosis)


@pytest.mark.parametrize("case", ALL, ids=NAMES)
def test_zero_right_hand_side_costs_nothing(case):
    kind, solver = case
    solution = solve(system(kind).matrix, np.zeros(SIZE), solver)
    assert solution.status == CONVERGED
    assert solution.iterations == 0
    assert not np.any(solution.value)


@pytest.mark.parametrize("case", cases("CG"))
def test_non_finite_numbers_are_reported(case):
    kind, solver = case
    matrix, rhs, _ = system(kind)
    poisoned, infinite = matrix.copy(), rhs.copy()
    poisoned[3, 4], infinite[2] = np.nan, np.inf
    for a, b in ((poisoned, rhs), (matrix, infinite)):
        assert solve(a, b, solver).status == bl.Status.NONFINITE
    # NaN that comes up on the way only: M⁻¹ of a zero diagonal.
    broken = type(solver)(preconditioner=lambda v: v / jnp.zeros(()))
    assert solve(matrix, rhs, broken).status == bl.Status.NONFINITE


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_minres_without_a_solution_gives_no_gradient(dtype):
    """The smallest residual is reached and is not zero: to go on would blow the iterate up."""
    draw = np.random.default_rng(0)
    factor = draw.normal(size=(SIZE, SIZE))
    matrix = factor @ factor.T / SIZE + np.eye(SIZE)
    matrix[0], matrix[:, 0] = 0.0, 0.0
    matrix, rhs = jnp.asarray(matrix, dtype), jnp.asarray(draw.normal(size=SIZE), dtype)
    problem = bl.LinearSystem(lambda theta: theta * matrix, rhs, symmetric=True)
    result = bl.hypergradient(
        lambda x, theta: x @ jnp.arange(SIZE, dtype=dtype),
        problem,
        dtype(1.0),
        jnp.zeros(SIZE, dtype),
        solver=bl.MINRES(),
        error=False,
    )
    assert result.primal.status == INCONSISTENT
    assert int(result.primal.iterations) <= 2 * SIZE
    assert np.isnan(result.gradient)
    least_squares = np.linalg.lstsq(np.asarray(matrix, float), np.asarray(rhs, float))[0]
    smallest = np.linalg.norm(rhs - matrix @ least_squares)
    np.testing.assert_allclose(result.primal.residual_norm, smallest, rtol=1e-3)


@pytest.mark.parametrize(("dtype", "condition"), [(np.float64, 1e6), (np.float32, 1e3)])
def test_minres_takes_no_slow_progress_for_a_system_without_solution(dtype, condition):
    draw = np.random.default_rng(1)
    vectors = np.linalg.qr(draw.normal(size=(SIZE, SIZE)))[0]
    rhs = draw.normal(size=SIZE).astype(dtype)
    tolerance = np.finfo(dtype).eps ** 0.5
    for signs in (1, (-1) ** np.arange(SIZE)):
        values = signs * np.logspace(0, -np.log10(condition), SIZE)
        matrix = ((vectors * values) @ vectors.T).astype(dtype)
        # Stopped on the way, and let go on to the end.
        part, whole = (
            solve(matrix, rhs, bl.MINRES(), iterations=k, rtol=tolerance) for k in (SIZE, 100)
        )
        assert part.status == BUDGET
        assert whole.status == CONVERGED


def test_gmres_that_stagnates_stops_and_says_why():
    matrix, rhs = wrong("cyclic shift")
    stagnant = solve(matrix, rhs, GMRES)
    assert (stagnant.status, stagnant.iterations) == (BREAKDOWN, 1)
    whole = solve(matrix, rhs, bl.GMRES())
    assert (whole.status, whole.iterations) == (CONVERGED, 1)


def test_gmres_stops_at_rounding_level():
    values = np.logspace(-7, 0, SIZE)
    vectors = np.linalg.eigh(system("definite").matrix)[1]
    matrix = (vectors * values) @ vectors.T
    solution = solve(matrix, system("definite").rhs, bl.GMRES(), iterations=1000, rtol=1e-14)
    assert solution.status == ROUNDING
    assert solution.iterations < 20


# ------------------------------------------------------------------------ scale and dtype


@pytest.mark.parametrize("case", cases("CG"))
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_scale_changes_no_count(case, dtype):
    kind, solver = case
    matrix, rhs, solution = system(kind, seed=3)
    rtol = 1e-9 if dtype is np.float64 else 1e-4
    counts = set()
    small, large = 2.0**-27, 2.0**27
    for of_matrix, of_rhs in ((1, 1), (small, 1), (large, 1), (1, small), (1, large)):
        ours = solve(
            dtype(of_matrix * matrix), dtype(of_rhs * rhs), solver, iterations=200, rtol=rtol
        )
        counts.add((int(ours.iterations), int(ours.applications), int(ours.status)))
        assert ours.value.dtype == dtype
        scaled = np.asarray(ours.value, np.float64) * (of_matrix / of_rhs)
        np.testing.assert_allclose(scaled, solution, rtol=0, atol=20 * rtol)
    assert len(counts) == 1, counts
    assert counts.pop()[2] == CONVERGED


@pytest.mark.parametrize("case", cases("MINRES"))
def test_complex64_stays(case):
    kind, solver = case
    matrix, rhs, solution = system(kind, complex_valued=True)
    ours = solve(np.complex64(matrix), np.complex64(rhs), solver, iterations=100, rtol=1e-5)
    assert (ours.value.dtype, ours.residual_norm.dtype) == (np.complex64, np.float32)
    assert ours.status == CONVERGED
    np.testing.assert_allclose(ours.value, solution, atol=1e-3)


# ---------------------------------------------------------- pytrees, real-linear operators


@pytest.mark.parametrize("case", cases("BiCGStab"))
def test_pytrees_with_real_and_complex_leaves(case):
    kind, solver = case
    matrix, rhs, _ = system(kind)

    def flatten(v):
        parts = [v["a"].reshape(-1), v["b"].real, v["b"].imag, v["c"].reshape(1)]
        return jnp.concatenate(parts)

    def unflatten(flat):
        b = jax.lax.complex(flat[6:8], flat[8:10])
        return {"a": flat[:6].reshape(2, 3), "b": b, "c": flat[10]}

    # Eleven real unknowns: the last row and column of the matrix are left out.
    part = jnp.asarray(matrix[:11, :11])
    problem = bl.LinearSystem(
        lambda _: lambda v: unflatten(part @ flatten(v)), unflatten(jnp.asarray(rhs[:11]))
    )
    start = vector.zeros_like(unflatten(jnp.asarray(rhs)))
    ours = bl.solve(problem, None, start, solver=solver, budget=bl.Budget(200, rtol=1e-10))
    assert ours.status == CONVERGED
    expected = np.linalg.solve(matrix[:11, :11], rhs[:11])
    np.testing.assert_allclose(flatten(ours.value), expected, atol=1e-8)


@pytest.mark.parametrize(
    "solver",
    [
        pytest.param(bl.MINRES(), marks=pytest.mark.slow),
        bl.BiCGStab(),
        pytest.param(GMRES, marks=pytest.mark.slow),
    ],
    ids=NAMES[1:],
)
def test_hessians_of_complex_unknowns_are_linear_over_the_reals(solver):
    matrix, rhs, _ = system("definite", complex_valued=True, size=4)

    def objective(x, theta):
        # The square without a conjugate makes the Hessian linear over the reals only.
        quadratic = 0.5 * jnp.vdot(x, matrix @ x).real + 0.2 * jnp.sum(x**2).real
        return quadratic - jnp.vdot(theta * rhs, x).real

    problem = bl.Minimization(objective)

    def loss(theta):
        x = bl.solve(
            problem,
            theta,
            jnp.zeros(4, complex),
            solver=bl.Newton(linear=solver, linear_budget=bl.Budget(100, rtol=1e-12)),
            estimator=bl.Implicit(solver=solver),
            adjoint_budget=bl.Budget(100, rtol=1e-12),
        ).value
        return jnp.sum(jnp.abs(x) ** 2)

    # The minimiser is linear in a real θ, so the loss is θ² times a constant.
    value, slope = jax.value_and_grad(loss)(1.5)
    real = np.block([[matrix.real, -matrix.imag], [matrix.imag, matrix.real]])
    real = real + np.diag(np.r_[np.full(4, 0.4), np.full(4, -0.4)])
    x = np.linalg.solve(real, np.r_[rhs.real, rhs.imag])
    np.testing.assert_allclose(value, 1.5**2 * x @ x, rtol=1e-9)
    np.testing.assert_allclose(slope, 2 * 1.5 * x @ x, rtol=1e-9)


# -------------------------------------------------------------------------- preconditioning


def badly_scaled(kind, *, complex_valued=False):
    matrix, rhs, _ = system(kind, complex_valued=complex_valued)
    scales = np.logspace(0, 2, SIZE)
    matrix = scales[:, None] * (matrix + 12 * np.eye(SIZE)) * scales
    return matrix, rhs


@pytest.mark.parametrize("case", cases("CG"))
def test_jacobi_preconditioner_undoes_bad_scaling(case):
    kind, solver = case
    matrix, rhs = badly_scaled(kind)
    options = {"restart": 5} if isinstance(solver, bl.GMRES) else {}
    preconditioned = type(solver)(preconditioner=bl.JacobiPreconditioner(), **options)
    plain = solve(matrix, rhs, solver, iterations=300, rtol=1e-8)
    better = solve(matrix, rhs, preconditioned, iterations=300, rtol=1e-8)
    assert better.status == CONVERGED
    assert better.applications < plain.applications
    np.testing.assert_allclose(matrix @ np.asarray(better.value), rhs, atol=1e-7)


def test_preconditioned_minres_minimises_in_the_norm_of_the_inverse():
    matrix, rhs, _ = system("symmetric")
    weights = np.linspace(1.0, 5.0, SIZE)
    solver = bl.MINRES(preconditioner=lambda v: v / weights)
    # In the unknowns M^½x of the system M^-½ A M^-½ it is plain MINRES.
    root = np.sqrt(weights)
    inner = krylov_minimiser(matrix / np.outer(root, root), rhs / root, 4)
    ours = solve(matrix, rhs, solver, iterations=4)
    np.testing.assert_allclose(ours.value, inner / root, rtol=1e-10, atol=1e-11)
    # The recursion of the residual is that of the system as given, in the Euclidean norm.
    true_norm = np.linalg.norm(rhs - matrix @ np.asarray(ours.value))
    np.testing.assert_allclose(ours.residual_norm, true_norm, rtol=1e-9)


@pytest.mark.parametrize("flexible", others_slow([False, True], True))
def test_preconditioned_gmres_minimises_the_true_residual(flexible):
    matrix, rhs, _ = system("general")
    inverse = np.linalg.inv(np.triu(matrix))
    solver = bl.GMRES(restart=4, preconditioner=lambda v: inverse @ v, flexible=flexible)
    best = krylov_minimiser(matrix, rhs, 4, inverse)
    ours = solve(matrix, rhs, solver, iterations=1).value
    np.testing.assert_allclose(ours, best, rtol=1e-10, atol=1e-11)


def test_flexible_gmres_takes_an_iteration_for_a_preconditioner():
    matrix, rhs, _ = system("symmetric", seed=4)

    def few_steps(v):
        # Two steps of minimal residuals: depends on v nonlinearly.
        z, r = jnp.zeros_like(v), v
        for _ in range(2):
            image = matrix @ r
            step = jnp.vdot(image, r) / jnp.vdot(image, image)
            z, r = z + step * r, r - step * image
        return z

    flexible = bl.GMRES(restart=8, preconditioner=few_steps, flexible=True)
    rigid = bl.GMRES(restart=8, preconditioner=few_steps)
    ours = solve(matrix, rhs, flexible, iterations=20, rtol=1e-10)
    assert ours.status == CONVERGED
    # The rigid form applies M⁻¹ to a sum as if it were linear, and gains nothing.
    assert solve(matrix, rhs, rigid, iterations=20, rtol=1e-10).status == BREAKDOWN


@pytest.mark.parametrize(
    "solver", [bl.ConjugateGradient, pytest.param(bl.MINRES, marks=pytest.mark.slow)]
)
def test_an_indefinite_preconditioner_breaks_down(solver):
    matrix, rhs, _ = system("definite")
    signs = np.where(np.arange(SIZE) < 6, 1.0, -1.0)
    solution = solve(matrix, rhs, solver(preconditioner=lambda v: signs * v))
    assert solution.status == BREAKDOWN


class OneWay(eqx.Module):
    """A preconditioner that says it is not symmetric, and asks for other numbers."""

    symmetric: bool = False

    def at(self, problem, x):
        return lambda v: v

    def examine(self, operator):
        if operator[0, 0] == 3.0:
            msg = "OneWay: not with a three."
            raise ValueError(msg)


def test_what_a_preconditioner_says_of_itself_is_heard():
    problem = bl.LinearSystem(2.0 * jnp.eye(2), jnp.ones(2))
    for kind in (bl.ConjugateGradient, bl.MINRES):
        with pytest.raises(bl.IncompatibleError, match=r"Use OneWay\(symmetric=True\), or"):
            bl.solve(problem, None, jnp.zeros(2), solver=kind(preconditioner=OneWay()))
    solver = bl.GMRES(preconditioner=OneWay())
    assert bl.solve(problem, None, jnp.zeros(2), solver=solver).status == 0
    three = bl.LinearSystem(3.0 * jnp.eye(2), jnp.ones(2))
    with pytest.raises(ValueError, match="not with a three"):
        bl.solve(three, None, jnp.zeros(2), solver=solver)


def test_zeros_on_the_diagonal_are_refused_where_they_are_seen():
    matrix = jnp.array([[1.0, 2.0, 0.0], [2.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    for solver in (bl.Jacobi(), bl.GMRES(preconditioner=bl.JacobiPreconditioner())):
        for operator in (matrix, bl.LinearOperator(lambda v: v, diagonal=jnp.diagonal(matrix))):
            problem = bl.LinearSystem(operator, jnp.ones(3))
            with pytest.raises(ValueError, match=r"2 of 3 rows have a zero.*first is row 1"):
                bl.solve(problem, None, jnp.zeros(3), solver=solver)


def test_preconditioners_that_do_not_fit_are_refused():
    matrix, rhs, _ = system("definite")
    unknown = bl.LinearSystem(lambda _: lambda v: matrix @ v, rhs)

    def attempt(problem, preconditioner):
        solver = bl.ConjugateGradient(preconditioner=preconditioner)
        return bl.solve(problem, None, jnp.zeros(SIZE), solver=solver)

    with pytest.raises(bl.IncompatibleError, match=r"no diagonal\. Give the operator as a matrix"):
        attempt(unknown, bl.JacobiPreconditioner())
    with pytest.raises(TypeError, match=r"Write preconditioner=JacobiPreconditioner\(\)"):
        attempt(unknown, bl.JacobiPreconditioner)
    with pytest.raises(TypeError, match="v -> M⁻¹v or an object"):
        attempt(unknown, 3.0)
    with pytest.raises(TypeError, match="must return a vector like its argument"):
        attempt(unknown, lambda v: v[:2])
    with pytest.raises(ValueError, match="flexible=True stores what a preconditioner returns"):
        bl.GMRES(flexible=True)
    with pytest.raises(ValueError, match="restart must be a whole number"):
        bl.GMRES(restart=0)
    general = bl.LinearSystem(system("general").matrix, rhs)
    with pytest.raises(bl.IncompatibleError, match=r"symmetric.*Use (Direct, )?GMRES or BiCGStab"):
        bl.solve(general, None, jnp.zeros(SIZE), solver=bl.MINRES())


# ------------------------------------------------------------------------ counts, per sample


@pytest.mark.parametrize("case", cases("BiCGStab", "GMRES(5)"))
def test_applications_are_counted_truthfully(case):
    kind, solver = case
    matrix, rhs, _ = system(kind, seed=5)
    calls = []

    def matvec(v):
        jax.debug.callback(lambda: calls.append(1))
        return jnp.asarray(matrix) @ v

    problem = bl.LinearSystem(lambda _: matvec, jnp.asarray(rhs))
    for rtol in (1e-2, 1e-9):
        budget = bl.Budget(iterations=100, rtol=rtol)
        calls.clear()
        solution = bl.solve(problem, None, jnp.zeros(SIZE), solver=solver, budget=budget)
        jax.effects_barrier()
        assert len(calls) == solution.applications


def test_a_cycle_ends_where_the_budget_is_met():
    matrix, rhs, _ = system("general", seed=5)
    applications = []
    for rtol in (1e-1, 1e-3, 1e-6):
        solution = solve(matrix, rhs, bl.GMRES(), iterations=5, rtol=rtol)
        assert (solution.status, solution.iterations) == (CONVERGED, 1)
        applications.append(int(solution.applications))
        # One step less would not do.
        shorter = krylov_minimiser(matrix, rhs, int(solution.applications) - 3)
        assert np.linalg.norm(rhs - matrix @ shorter) > rtol * np.linalg.norm(rhs)
    assert applications == sorted(set(applications))


@pytest.mark.parametrize("case", cases("CG"))
def test_each_sample_of_a_batch_has_its_own_count(case):
    kind, solver = case
    systems = [system(kind, seed=seed) for seed in (6, 7)]
    matrices = [systems[0].matrix, systems[1].matrix, np.eye(SIZE), systems[1].matrix * np.nan]
    rhs = [systems[0].rhs, systems[1].rhs, systems[0].rhs, systems[1].rhs]
    one = [
        solve(a, b, solver, iterations=200, rtol=1e-8) for a, b in zip(matrices, rhs, strict=True)
    ]
    batch = jax.vmap(
        lambda a, b: bl.solve(
            SYSTEM,
            (a, b),
            jnp.zeros(SIZE),
            solver=solver,
            budget=bl.Budget(iterations=200, rtol=1e-8),
        )
    )(jnp.stack(matrices), jnp.stack(rhs))
    assert list(batch.iterations) == [s.iterations for s in one]
    assert list(batch.applications) == [s.applications for s in one]
    assert list(batch.status) == [CONVERGED, CONVERGED, CONVERGED, bl.Status.NONFINITE]
    np.testing.assert_allclose(batch.value, np.stack([s.value for s in one]), rtol=1e-8, atol=1e-10)


# -------------------------------------------------------------------------------- derivatives


def plain_gmres(matrix, rhs, restart, cycles, precondition):
    """GMRES by modified Gram–Schmidt and normal equations, as JAX differentiates it."""
    x = jnp.zeros_like(rhs)
    for _ in range(cycles):
        residual = rhs - matrix @ x
        norm = jnp.linalg.norm(residual)
        basis, images, columns = [residual / norm], [], []
        for _ in range(restart):
            images.append(precondition(basis[-1]))
            w, column = matrix @ images[-1], []
            for q in basis:
                column.append(jnp.vdot(q, w))
                w = w - column[-1] * q
            column.append(jnp.linalg.norm(w))
            basis.append(w / column[-1])
            columns.append(jnp.stack(column + [jnp.zeros(())] * (restart + 1 - len(column))))
        h = jnp.stack(columns, 1)
        target = jnp.zeros(restart + 1, h.dtype).at[0].set(norm)
        weights = jnp.linalg.solve(h.conj().T @ h, h.conj().T @ target)
        x = x + sum(weights[i] * images[i] for i in range(restart))
    return x


@pytest.mark.parametrize(
    "flexible",
    others_slow([False, True], True),
    ids=["forward, rigid", "reverse, flexible, complex"],
)
def test_unrolled_gmres_is_the_plain_loop(flexible):
    size, restart = 8, 3
    matrix, rhs, _ = system("general", complex_valued=flexible, seed=8, size=size)
    weights = jnp.linspace(1.0, 3.0, size)

    def preconditioner(theta):
        if not flexible:
            return lambda v: v / (weights + theta[0] ** 2)
        # Not linear, as an inner iteration would be.
        return lambda v: v / weights * (1 + 0.3 * jnp.abs(v[0] + theta[1] * v[1]) ** 2)

    def outer(x):
        return jnp.sum(weights * jnp.abs(x) ** 2) + jnp.sum(x.real)

    def unrolled(theta, mode="reverse"):
        solution = bl.solve(
            bl.LinearSystem(lambda theta: matrix + jnp.diag(theta), lambda theta: theta[2] * rhs),
            theta,
            jnp.zeros(size, rhs.dtype),
            solver=bl.GMRES(restart, preconditioner=preconditioner(theta), flexible=flexible),
            estimator=bl.Unrolled(max_iterations=4, mode=mode),
            budget=bl.Budget(iterations=2),
        )
        return outer(solution.value)

    def plain(theta):
        operator, right = matrix + jnp.diag(theta), theta[2] * rhs
        return outer(plain_gmres(operator, right, restart, 2, preconditioner(theta)))

    theta = 0.3 + 0.1 * weights
    expected = jax.jit(jax.grad(plain))(theta)
    if flexible:
        ours = jax.jit(jax.grad(unrolled))(theta)
        np.testing.assert_allclose(ours, expected, rtol=1e-11)
    else:
        ours = jax.jvp(lambda t: unrolled(t, "forward"), (theta,), (weights,))[1]
        np.testing.assert_allclose(ours, expected @ weights, rtol=1e-11)


def gradients(kind, solver, estimator, **options):
    """The gradient of a loss in θ, of A(θ)x = b(θ), and the exact one."""
    matrix, rhs, _ = system(kind, seed=9)
    symmetric = kind != "general"
    weights = jnp.linspace(1.0, 2.0, SIZE)

    def loss(theta):
        problem = bl.LinearSystem(
            lambda theta: matrix + jnp.diag(theta),
            lambda theta: theta[0] * rhs,
            symmetric=symmetric,
        )
        start = jnp.zeros(SIZE)
        x = bl.solve(problem, theta, start, solver=solver, estimator=estimator, **options).value
        return jnp.sum(weights * x**2)

    def exact(theta):
        x = jnp.linalg.solve(matrix + jnp.diag(theta), theta[0] * rhs)
        return jnp.sum(weights * x**2)

    theta = 0.5 + 0.1 * weights
    return jax.grad(loss)(theta), jax.grad(exact)(theta)


@pytest.mark.parametrize(
    "case",
    [
        *cases("BiCGStab")[:3],
        pytest.param(("general", bl.GMRES()), id="GMRES, exhausted space", marks=pytest.mark.slow),
    ],
)
def test_unrolled_to_convergence_is_the_exact_gradient(case):
    kind, solver = case
    ours, exact = gradients(
        kind, solver, bl.Unrolled(max_iterations=100), budget=bl.Budget(100, rtol=1e-13)
    )
    np.testing.assert_allclose(ours, exact, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("case", cases("BiCGStab"))
def test_adjoint_solves_give_the_exact_gradient(case):
    kind, solver = case
    budget = bl.Budget(iterations=200, rtol=1e-12)
    ours, exact = gradients(
        kind, solver, bl.Implicit(solver=solver), budget=budget, adjoint_budget=budget
    )
    np.testing.assert_allclose(ours, exact, rtol=1e-9, atol=1e-10)


@pytest.mark.slow
def test_a_failed_adjoint_gives_no_gradient():
    ours, _ = gradients("symmetric", bl.MINRES(), bl.Implicit(solver=bl.ConjugateGradient()))
    assert np.isnan(ours).all()


@pytest.mark.slow
def test_a_preconditioner_may_be_made_of_theta():
    matrix, rhs, _ = system("definite")

    def loss(theta, preconditioned):
        options = {}
        if preconditioned:
            options["preconditioner"] = lambda v: v / (jnp.diagonal(matrix) + theta)
        solver = bl.ConjugateGradient(**options)
        problem = bl.LinearSystem(lambda theta: matrix + jnp.diag(theta), rhs, symmetric=True)
        solution = bl.solve(
            problem, theta, jnp.zeros(SIZE), solver=solver, estimator=bl.Implicit(solver=solver)
        )
        return jnp.sum(solution.value**2)

    theta = jnp.linspace(0.1, 0.5, SIZE)
    plain = jax.grad(loss)(theta, False)
    batch = jax.vmap(lambda t: jax.grad(loss)(t, True))(theta[None])
    np.testing.assert_allclose(batch, plain[None], rtol=1e-7)


# ---------------------------------------------------------------------------------- operators


@pytest.mark.parametrize("complex_valued", [False, True])
def test_transposes_and_adjoints(complex_valued):
    matrix, u, v = system("general", complex_valued=complex_valued)
    hermitian = system("symmetric", complex_valued=complex_valued).matrix

    class Object:
        def matvec(self, v):
            return matrix @ v

        def rmatvec(self, v):
            return matrix.conj().T @ v

    forms = [
        (matrix, matrix, None),
        (lambda v: matrix @ v, matrix, None),
        ((lambda v: matrix @ v, lambda v: matrix.conj().T @ v), matrix, None),
        (Object(), matrix, None),
        (hermitian, hermitian, True),
        (lambda v: hermitian @ v, hermitian, True),
    ]
    for form, dense, symmetric in forms:
        problem = bl.LinearSystem(lambda _, form=form: form, u, symmetric=symmetric)
        operator = problem.at(None).operator
        assert operator is not None
        transposed = operator.transposed(jnp.asarray(u))
        # Without a conjugate: ⟨A u, v⟩ = ⟨u, Aᵀ v⟩ for the bilinear form.
        np.testing.assert_allclose(
            jnp.dot(operator.matvec(u), v), jnp.dot(u, transposed.matvec(v)), rtol=1e-12
        )
        np.testing.assert_allclose(transposed.matvec(v), dense.T @ v, rtol=1e-12)
        again = transposed.transposed(jnp.asarray(u))
        np.testing.assert_allclose(again.matvec(v), dense @ v, rtol=1e-12)
        adjoint = operator.adjoint_matvec(jnp.asarray(u))
        np.testing.assert_allclose(
            jnp.vdot(operator.matvec(u), v), jnp.vdot(u, adjoint(v)), rtol=1e-12
        )
        adjoint = transposed.adjoint_matvec(jnp.asarray(u))
        np.testing.assert_allclose(adjoint(v), dense.conj() @ v, rtol=1e-12)


def test_transpose_of_an_operator_that_is_linear_over_the_reals():
    _, u, v = system("general", complex_valued=True)
    first, second = system("general", complex_valued=True, seed=1)[:2]
    problem = bl.RootFinding(lambda x, _: first @ x + second * x.conj())
    operator = problem.at(None).linearize(jnp.asarray(u))
    assert operator.real_linear
    adjoint = operator.adjoint_matvec(jnp.asarray(u))
    transposed = operator.transposed(jnp.asarray(u))
    assert transposed.real_linear
    left = vector.dot(operator.matvec(jnp.asarray(u)), jnp.asarray(v))
    np.testing.assert_allclose(left, vector.dot(jnp.asarray(u), adjoint(v)), rtol=1e-12)
    np.testing.assert_allclose(
        jnp.dot(operator.matvec(u), v).real, jnp.dot(u, transposed.matvec(v)).real, rtol=1e-12
    )
