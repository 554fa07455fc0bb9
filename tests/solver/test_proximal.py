"""Composite minimisation: proximal operators, the proximal gradient method, derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from hypothesis import given
from hypothesis import strategies as st

import bilevel as bl
from bilevel.solver.dense import dense_matrix
from tests.core.compiling import jitted
from tests.marks import others_slow

DRAW = np.random.default_rng(3)
SAMPLES, SIZE = 40, 12
X = DRAW.standard_normal((SAMPLES, SIZE))
Y = X[:, :4] @ np.array([2.0, -1.5, 1.0, -0.5]) + 0.2 * DRAW.standard_normal(SAMPLES)
TARGET = DRAW.standard_normal(SIZE)
HESSIAN = X.T @ X / SAMPLES
EXACT = bl.Budget(iterations=5000, rtol=1e-13)


def least_squares(x, theta):
    """θ = (weight, factor of the data, factor of everything)."""
    return theta[2] * 0.5 * jnp.mean((X @ x - theta[1] * Y) ** 2)


def weight(theta):
    return theta[2] * theta[0]


LASSO = bl.CompositeMinimization(least_squares, bl.L1(weight))
THETA = jnp.array([0.15, 1.1, 1.0])


def outer(x):
    return 0.5 * jnp.sum((x - TARGET) ** 2)


def outer_loss(x, theta):
    del theta
    return outer(x)


def value(problem, theta, **options):
    options.setdefault("budget", EXACT)
    return outer(bl.solve(problem, theta, jnp.zeros(SIZE), **options).value)


def hypergradient(theta, **budget):
    return bl.hypergradient(
        outer_loss,
        LASSO,
        theta,
        jnp.zeros(SIZE),
        estimator=bl.Implicit(solver=bl.ConjugateGradient()),
        budget=bl.Budget(**budget),
    )


def natural_matrix(problem, x):
    """The dense linear system that the derivative at x solves."""

    def matrix(x):
        equation = problem.anchored(THETA, x).equation(x)
        return dense_matrix(equation.at(THETA).linearize(x), x)

    return jitted(matrix)(x)


def differences(function, theta, step=1e-6):
    units = np.eye(theta.size)
    return np.stack(
        [(function(theta + step * e) - function(theta - step * e)) / (2 * step) for e in units]
    )


# ------------------------------------------------------------------ proximal operators

# XLA takes subnormal numbers for zero.
NUMBERS = st.floats(-5, 5, allow_subnormal=False)
POSITIVE = st.floats(0, 3, allow_subnormal=False)


@given(st.lists(NUMBERS, min_size=4, max_size=4), POSITIVE, POSITIVE, POSITIVE)
def test_proximal_operators_fulfil_their_inclusion(entries, step, w, q):
    z = jnp.array(entries)
    for operator, quadratic in ((bl.L1(w), 0.0), (bl.ElasticNet(w, q), q)):
        p = operator(z, step, None)
        slope = np.asarray(z - p - step * quadratic * p)  # in step · w · ∂|p|
        np.testing.assert_allclose(slope[p != 0], (step * w * np.sign(p))[p != 0], atol=1e-12)
        assert np.all(np.abs(slope[p == 0]) <= step * w + 1e-12)
    np.testing.assert_array_equal(bl.NonNegative()(z, step, None), np.maximum(z, 0))
    np.testing.assert_array_equal(bl.Box(-w, q)(z, step, None), np.clip(z, -w, q))


def test_complex_entries_shrink_in_modulus():
    z = jnp.array([3 + 4j, 0.1j, 0.0])
    np.testing.assert_allclose(bl.L1(1.0)(z, 1.0, None), [0.8 * (3 + 4j), 0, 0])
    slope = jax.grad(lambda t: jnp.sum(jnp.abs(bl.L1(t)(z, 1.0, None))))(1.0)
    np.testing.assert_allclose(slope, -1.0)


def test_weights_come_in_many_forms():
    z = {"a": jnp.ones(2, jnp.float32), "b": 2 * jnp.ones((2, 2))}
    forms = [
        (0.5, None),
        (jnp.array(0.5), None),
        (lambda theta: theta, 0.5),
        ({"a": jnp.array([0.5, 0.5]), "b": 0.5}, None),
        (lambda theta: {"a": theta["w"], "b": theta["w"] * jnp.ones(2)}, {"w": 0.5}),
    ]
    for given_weight, theta in forms:
        p = bl.L1(given_weight)(z, 1.0, theta)
        assert (p["a"].dtype, p["b"].dtype) == (jnp.float32, jnp.float64)
        np.testing.assert_allclose(p["a"], 0.5)
        np.testing.assert_allclose(p["b"], 1.5)


NAN = jnp.array(jnp.nan)


@pytest.mark.parametrize(
    ("operator", "z"),
    [
        (bl.L1(0.1), NAN),
        (bl.L1(NAN), 0.3),
        (bl.ElasticNet(0.1, 0.1), NAN),
        (bl.ElasticNet(NAN, 0.1), 0.3),
        (bl.ElasticNet(0.1, NAN), 0.3),
        (bl.NonNegative(), NAN),
        (bl.Box(-1.0, 1.0), NAN),
        (bl.Box(NAN, 1.0), 0.3),
        (bl.Box(-1.0, NAN), 0.3),
    ],
)
def test_not_a_number_is_not_lost(operator, z):
    assert np.isnan(operator(jnp.asarray(z), 1.0, None))


# ------------------------------------------------------------------ solutions


def test_lasso_fulfils_its_optimality_conditions():
    solution = bl.solve(LASSO, THETA, jnp.zeros(SIZE))
    assert solution.status == bl.Status.CONVERGED
    x = np.asarray(solution.value)
    slope = HESSIAN @ x - 1.1 * X.T @ Y / SAMPLES
    support = x != 0
    assert 2 <= support.sum() < SIZE
    np.testing.assert_allclose(slope[support], -0.15 * np.sign(x[support]), atol=1e-9)
    assert np.all(np.abs(slope[~support]) < 0.15)


def test_non_negative_least_squares_is_scipys():
    problem = bl.CompositeMinimization(least_squares, bl.NonNegative())
    solution = bl.solve(problem, THETA, jnp.zeros(SIZE))
    expected, _ = scipy.optimize.nnls(X, 1.1 * Y)
    np.testing.assert_allclose(solution.value, expected, atol=1e-8)


METHODS = {
    "restart": (bl.ProximalGradient(), 100),
    "fista": (bl.ProximalGradient(acceleration="fista"), 300),
    "none": (bl.ProximalGradient(acceleration="none"), 200),
    "fixed": (bl.ProximalGradient(step_size=0.2, acceleration="none"), 400),
    "Anderson": (bl.Anderson(), 60),
    "FixedPointIteration": (bl.FixedPointIteration(), 200),
    "Newton": (bl.Newton(), 12),
}


@pytest.mark.parametrize("name", others_slow(METHODS, "fista", "fixed", "Newton"))
def test_every_method_finds_the_same_solution(name):
    solver, most = METHODS[name]
    budget = bl.Budget(iterations=1000, rtol=1e-11)
    solution = bl.solve(LASSO, THETA, jnp.zeros(SIZE), solver=solver, budget=budget)
    assert solution.status == bl.Status.CONVERGED
    assert solution.iterations <= most
    expected = bl.solve(LASSO, THETA, jnp.zeros(SIZE), budget=EXACT).value
    np.testing.assert_allclose(solution.value, expected, atol=1e-9)


def proximal_gradient_loop(step_size, steps, *, accelerated, restart):
    x = y = np.zeros(SIZE)
    t, restarts = 1.0, 0
    for _ in range(steps):
        z = y - step_size * (HESSIAN @ y - 1.1 * X.T @ Y / SAMPLES)
        before, x = x, np.sign(z) * np.maximum(np.abs(z) - step_size * 0.15, 0)
        following = (1 + np.sqrt(1 + 4 * t**2)) / 2
        factor = (t - 1) / following if accelerated else 0.0
        t = following
        if restart and (y - x) @ (x - before) > 0:
            t, factor, restarts = 1.0, 0.0, restarts + 1
        y = x + factor * (x - before)
    assert restarts >= 1 or not restart, "the test shows nothing without a restart"
    return x


@pytest.mark.parametrize(
    "acceleration", others_slow(["none", "fista", "restart"], "none", "restart")
)
def test_iterates_are_those_of_a_plain_loop(acceleration):
    solver = bl.ProximalGradient(step_size=0.3, acceleration=acceleration)
    budget = bl.Budget(iterations=30)
    solution = bl.solve(LASSO, THETA, jnp.zeros(SIZE), solver=solver, budget=budget)
    expected = proximal_gradient_loop(
        0.3, 30, accelerated=acceleration != "none", restart=acceleration == "restart"
    )
    np.testing.assert_allclose(solution.value, expected, rtol=1e-12, atol=1e-15)
    # One gradient an iteration, at the start, for the scale of tolerances and at an iterate
    # that was extrapolated from; nothing is searched for.
    assert solution.applications <= 30 + 2 + (acceleration != "none")


def test_backtracking_follows_growing_curvature():
    # The Hessian is 1 at the start and cosh 6 = 200 at the solution.
    problem = bl.CompositeMinimization(
        lambda x, theta: jnp.sum(jnp.cosh(x) - jnp.sinh(theta) * x), bl.NonNegative()
    )
    theta = jnp.array([6.0, 1.0, -1.0])
    solution = bl.solve(problem, theta, jnp.zeros(3))
    assert solution.status == bl.Status.CONVERGED
    np.testing.assert_allclose(solution.value, [6.0, 1.0, 0.0], atol=1e-8)
    fixed = bl.ProximalGradient(step_size=1.0)
    status = bl.solve(problem, theta, jnp.zeros(3), solver=fixed).status
    assert bl.Status(int(status)).failed


def test_a_smooth_part_that_is_not_smooth_is_a_failed_search():
    problem = bl.CompositeMinimization(
        lambda x, theta: 1.0 + jnp.sum(jnp.sqrt(jnp.abs(x - theta))), bl.Box(-1.0, 1.0), step=1.0
    )
    solution = bl.solve(problem, 0.3, jnp.array([0.8]), solver=bl.ProximalGradient())
    assert solution.status == bl.Status.LINE_SEARCH


@pytest.mark.parametrize("factor", [1e-8, 1e8])
def test_the_scale_changes_nothing(factor):
    plain, scaled = (
        hypergradient(theta, iterations=500, rtol=1e-10)
        for theta in (THETA, THETA.at[2].set(factor))
    )
    np.testing.assert_allclose(plain.gradient[:2], scaled.gradient[:2], rtol=1e-8)
    assert plain.primal.iterations == scaled.primal.iterations
    assert plain.adjoint.iterations == scaled.adjoint.iterations


@pytest.mark.slow
def test_single_precision_and_per_sample():
    weights = jnp.array([0.02, 0.3, 5.0], jnp.float32)
    features, targets = jnp.asarray(X, jnp.float32), jnp.asarray(Y, jnp.float32)
    problem = bl.CompositeMinimization(
        lambda x, _: 0.5 * jnp.mean((features @ x - targets) ** 2), bl.L1(lambda theta: theta)
    )
    x0 = jnp.zeros(SIZE, jnp.float32)
    batch = jax.vmap(lambda theta: bl.solve(problem, theta, x0))(weights)
    assert batch.value.dtype == jnp.float32
    np.testing.assert_array_equal(batch.status, bl.Status.CONVERGED)
    sizes = np.count_nonzero(batch.value, axis=1)
    assert sizes[0] > sizes[1] > sizes[2] == 0
    # Zero is the solution for the largest weight: no step is taken there.
    assert batch.iterations[2] == 0 < batch.iterations[1]


# ------------------------------------------------------------------ derivatives


def on_the_support(theta, solution):
    """The lasso's closed form, given which entries are not zero, and their signs."""
    support = np.flatnonzero(solution)
    signs = np.sign(solution[support])
    matrix = X[:, support]
    forcing = theta[1] * matrix.T @ Y / SAMPLES - theta[0] * signs
    entries = jnp.linalg.solve(matrix.T @ matrix / SAMPLES, forcing)
    return jnp.zeros(SIZE).at[support].set(entries)


@pytest.mark.parametrize(
    "estimator",
    [
        bl.Implicit(),
        pytest.param(bl.Implicit(solver=bl.ConjugateGradient()), marks=pytest.mark.slow),
        bl.Unrolled(),
        pytest.param(bl.Neumann(), marks=pytest.mark.slow),
    ],
    ids=["Implicit", "CG", "Unrolled", "Neumann"],
)
def test_lasso_hypergradient_is_the_closed_form_on_the_support(estimator):
    solution = np.asarray(bl.solve(LASSO, THETA, jnp.zeros(SIZE), budget=EXACT).value)
    expected = jax.grad(lambda theta: outer(on_the_support(theta, solution)))(THETA)
    options = {"estimator": estimator, "adjoint_budget": bl.Budget(5000, 1e-13)}
    got = jitted(jax.grad(lambda theta: value(LASSO, theta, **options)))(THETA)
    np.testing.assert_allclose(got, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.slow
def test_lasso_derivatives_are_finite_differences():
    compiled = jitted(lambda theta: value(LASSO, theta))
    gradient = jitted(jax.grad(lambda theta: value(LASSO, theta)))
    np.testing.assert_allclose(gradient(THETA), differences(compiled, THETA), atol=1e-7)
    hessian = jitted(jax.hessian(lambda theta: value(LASSO, theta)))(THETA)
    np.testing.assert_allclose(hessian, differences(gradient, THETA), atol=1e-6)
    np.testing.assert_allclose(hessian, hessian.T, atol=1e-9)


def test_the_adjoint_is_symmetric_and_costs_what_the_support_does():
    result = hypergradient(THETA, iterations=5000, rtol=1e-13)
    size = np.count_nonzero(result.primal.value)
    assert size < SIZE / 2
    # Conjugate gradients end after as many steps as there are distinct eigenvalues; those
    # off the support share one.
    assert result.adjoint.iterations <= size + 1
    assert result.adjoint.status == bl.Status.CONVERGED
    x = result.primal.value
    matrix = natural_matrix(LASSO, x)
    np.testing.assert_allclose(matrix, matrix.T, atol=1e-12)
    support = np.flatnonzero(x)
    np.testing.assert_allclose(matrix[np.ix_(support, support)], HESSIAN[np.ix_(support, support)])
    assert np.linalg.eigvalsh(matrix)[0] > 0


def test_the_error_estimate_knows_the_truncation():
    exact = jitted(jax.grad(lambda theta: value(LASSO, theta)))(THETA)
    for steps in (8, 16):
        result = hypergradient(THETA, iterations=steps)
        true = float(jnp.linalg.norm(result.gradient - exact))
        assert true / 3 <= float(result.error.total) <= 3 * true


def logistic(x, theta):
    margins = jnp.sign(Y) * (X @ x)
    return jnp.mean(jnp.logaddexp(0.0, -margins)) + 0.01 * theta[1] * jnp.sum(x**2)


def group_shrink(z, step, theta):
    groups = z.reshape(-1, 3)
    lengths = jnp.linalg.norm(groups, axis=1, keepdims=True)
    threshold = step * 0.3 * theta[0]
    kept = lengths > threshold
    shrunk = groups * (1 - threshold / jnp.where(kept, lengths, 1.0))
    return jnp.where(kept, shrunk, 0.0).reshape(-1)


TERMS = {
    "elastic net": (
        least_squares,
        bl.ElasticNet(lambda t: t[0], lambda t: 0.3 * t[1] * jnp.arange(SIZE)),
    ),
    "logistic": (logistic, bl.L1(lambda t: 0.2 * t[0] * jnp.ones(SIZE))),
    "moving box": (least_squares, bl.Box(lambda t: -t[0], lambda t: 0.5 * t[1] * jnp.ones(SIZE))),
    "fixed box": (least_squares, bl.Box(-0.2, 0.5)),
    "group lasso": (least_squares, group_shrink),
}


@pytest.mark.parametrize("name", others_slow(TERMS, "moving box", "group lasso"))
def test_other_terms_against_finite_differences(name):
    problem = bl.CompositeMinimization(*TERMS[name])
    expected = differences(jitted(lambda theta: value(problem, theta)), THETA)
    assert np.linalg.norm(expected[:2]) > 1e-3
    for estimator in (bl.Implicit(), bl.Unrolled()):
        compiled = jitted(jax.grad(lambda t, e=estimator: value(problem, t, estimator=e)))
        np.testing.assert_allclose(compiled(THETA), expected, atol=1e-7)


@pytest.mark.slow
def test_an_elastic_net_solves_the_hessian_of_its_smooth_part():
    quadratic = 0.4
    problem = bl.CompositeMinimization(least_squares, bl.ElasticNet(weight, quadratic))
    x = bl.solve(problem, THETA, jnp.zeros(SIZE), budget=EXACT).value
    matrix = natural_matrix(problem, x)
    support = np.flatnonzero(x)
    expected = HESSIAN[np.ix_(support, support)] + quadratic * np.eye(support.size)
    np.testing.assert_allclose(matrix[np.ix_(support, support)], expected, rtol=1e-10)


@pytest.mark.slow
def test_captured_bounds_are_differentiated():
    def captured(theta):
        problem = bl.CompositeMinimization(
            lambda x, _: least_squares(x, theta), bl.Box(-theta[0], 0.5 * theta[1] * jnp.ones(SIZE))
        )
        return value(problem, None)

    explicit = bl.CompositeMinimization(*TERMS["moving box"])
    expected = jitted(jax.grad(lambda theta: value(explicit, theta)))(THETA)
    np.testing.assert_allclose(jitted(jax.grad(captured))(THETA), expected, rtol=1e-9, atol=1e-12)


def test_complex_lasso_against_finite_differences():
    matrix = DRAW.standard_normal((20, 4)) + 1j * DRAW.standard_normal((20, 4))
    data = matrix @ np.array([2.0, 1j, 0.0, 0.0]) + 0.1
    problem = bl.CompositeMinimization(
        lambda x, _: 0.5 * jnp.mean(jnp.abs(matrix @ x - data) ** 2), bl.L1(lambda theta: theta)
    )

    def loss(theta):
        solution = bl.solve(problem, theta, jnp.zeros(4, complex), budget=EXACT)
        return jnp.sum(jnp.abs(solution.value - 1) ** 2), solution.value

    compiled = jitted(jax.value_and_grad(loss, has_aux=True))
    (_, x), slope = compiled(0.5)
    assert np.count_nonzero(x) == 2
    above, below = compiled(0.5 + 1e-6)[0][0], compiled(0.5 - 1e-6)[0][0]
    np.testing.assert_allclose(slope, (above - below) / 2e-6, rtol=1e-7)


# ------------------------------------------------------------------ what is refused


def test_wrong_pairings_name_what_to_use():
    for solver in (bl.GradientDescent(0.1), bl.HeavyBall(0.1, 0.5), bl.LBFGS()):
        with pytest.raises(bl.IncompatibleError, match=r"CompositeMinimization.*objective"):
            bl.solve(LASSO, THETA, jnp.zeros(SIZE), solver=solver)
    with pytest.raises(bl.IncompatibleError, match="Use ProximalGradient or Anderson"):
        bl.solve(LASSO, THETA, jnp.zeros(SIZE), solver=bl.LBFGS())
    smooth = bl.Minimization(least_squares)
    with pytest.raises(bl.IncompatibleError, match=r"needs a CompositeMinimization.*LBFGS"):
        bl.solve(smooth, THETA, jnp.zeros(SIZE), solver=bl.ProximalGradient())


BAD = [
    (lambda: bl.L1(-1.0), ValueError, "L1: weight must not be negative, got -1.0"),
    (lambda: bl.L1(jnp.array([1.0, -2.0])), ValueError, "got -2.0"),
    (lambda: bl.ElasticNet(1.0, -1.0), ValueError, "ElasticNet: quadratic"),
    (lambda: bl.Box(1.0, 0.0), ValueError, "lower must not exceed upper"),
    (lambda: bl.L1(jnp.ones(3))(jnp.zeros(2), 1.0, None), ValueError, "does not broadcast"),
    (lambda: bl.L1({"a": 1.0})(jnp.zeros(2), 1.0, None), TypeError, "one number or array"),
    (lambda: bl.CompositeMinimization(least_squares, bl.L1), TypeError, "got L1"),
    (lambda: bl.CompositeMinimization(least_squares, 0.1), TypeError, "such as L1"),
    (lambda: bl.ProximalGradient(step_size=0.0), ValueError, "step_size must be positive"),
    (lambda: bl.ProximalGradient(acceleration="yes"), ValueError, "one of none, fista, restart"),
    (lambda: bl.ProximalGradient(trials=0), ValueError, "trials must be a whole number"),
    (
        lambda: bl.solve(
            bl.CompositeMinimization(lambda x, _: jnp.sum(jnp.abs(x) ** 2), bl.NonNegative()),
            None,
            jnp.zeros(2, complex),
        ),
        TypeError,
        "NonNegative: bounds need real unknowns",
    ),
    (
        lambda: bl.solve(bl.CompositeMinimization(lambda x, _: x, bl.L1(1.0)), None, jnp.zeros(2)),
        TypeError,
        "must return a real scalar",
    ),
]


@pytest.mark.parametrize(("make", "error", "message"), BAD)
def test_bad_arguments_are_named(make, error, message):
    with pytest.raises(error, match=message):
        make()
