"""First-order methods, against plain loops and what theory says of their iterates."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel as bl
from bilevel.solver import symmetry
from tests.core.compiling import jitted
from tests.marks import others_slow
from tests.solver.systems import SIZE, SYSTEM, solve, system

STEPS = 25
MATRIX, RHS, SOLUTION = system("definite")
LOW, HIGH = np.linalg.eigvalsh(MATRIX)[[0, -1]]


def quadratic(x, theta):
    return 0.5 * jnp.vdot(x, MATRIX @ x) - theta * jnp.vdot(RHS, x)


def convex(x, theta):
    return jnp.sum(jnp.cosh(x - theta)) + 0.5 * jnp.vdot(x, MATRIX @ x)


QUADRATIC, CONVEX = bl.Minimization(quadratic), bl.Minimization(convex)
SEARCHES = {"Armijo": bl.ArmijoGradientDescent(), "LBFGS": bl.LBFGS()}


def gradient(x):
    return MATRIX @ x - RHS


def minimise(problem, solver, theta=1.0, x0=None, dtype=jnp.float64, **budget):
    x0 = jnp.zeros(SIZE, dtype) if x0 is None else x0
    options = {"budget": bl.Budget(**budget)} if budget else {}
    return bl.solve(problem, jnp.asarray(theta, dtype), x0, solver=solver, **options)


# ------------------------------------------------------------------ the published sequences


def heavy_ball(step_size, momentum):
    before = x = np.zeros(SIZE)
    for _ in range(STEPS):
        before, x = x, x - step_size * gradient(x) + momentum * (x - before)
    return x


def nesterov(step_size, momentum):
    x = y = np.zeros(SIZE)
    for k in range(1, STEPS + 1):
        before, x = x, y - step_size * gradient(y)
        y = x + momentum(k) * (x - before)
    return x


def restarted(step_size):
    x = y = np.zeros(SIZE)
    k, restarts = 0, 0
    for _ in range(STEPS):
        k += 1
        before, slope = x, gradient(y)
        x = y - step_size * slope
        if slope @ (x - before) > 0:
            y, k, restarts = x, 0, restarts + 1
        else:
            y = x + (k - 1) / (k + 2) * (x - before)
    assert restarts >= 2, "the test shows nothing without a restart"
    return x


ROOT = np.sqrt(LOW / HIGH)
SEQUENCES = {
    "heavy ball": (bl.HeavyBall(0.15, 0.6), lambda: heavy_ball(0.15, 0.6)),
    "sequence": (bl.Nesterov(0.1), lambda: nesterov(0.1, lambda k: (k - 1) / (k + 2))),
    "constant": (bl.Nesterov(0.1, momentum=0.7), lambda: nesterov(0.1, lambda _: 0.7)),
    "strongly convex": (
        bl.Nesterov(1 / HIGH, strong_convexity=LOW),
        lambda: nesterov(1 / HIGH, lambda _: (1 - ROOT) / (1 + ROOT)),
    ),
    "restart": (bl.Nesterov(0.1, restart=True), lambda: restarted(0.1)),
}


@pytest.mark.parametrize("name", others_slow(SEQUENCES, "heavy ball", "strongly convex", "restart"))
def test_iterates_are_those_of_a_plain_loop(name):
    solver, loop = SEQUENCES[name]
    solution = minimise(QUADRATIC, solver, iterations=STEPS)
    np.testing.assert_allclose(solution.value, loop(), rtol=1e-12)
    true_norm = np.linalg.norm(gradient(np.asarray(solution.value)))
    # Of the iterate, not of the extrapolated point.
    np.testing.assert_allclose(solution.residual_norm, true_norm, rtol=1e-10)


def test_the_best_parameters_give_the_known_rate():
    root_low, root_high = np.sqrt(LOW), np.sqrt(HIGH)
    momentum = ((root_high - root_low) / (root_high + root_low)) ** 2
    solver = bl.HeavyBall(4 / (root_low + root_high) ** 2, momentum)
    solution = minimise(QUADRATIC, solver, iterations=40)
    # √β, slowed down by the double eigenvalue of the iteration matrix: k √β^k.
    assert np.sqrt(momentum) < solution.rate < np.sqrt(momentum) * 1.1


def test_parameters_are_traced_and_differentiable():
    def after_five(step_size, momentum):
        solution = bl.solve(
            QUADRATIC,
            1.0,
            jnp.zeros(SIZE),
            solver=bl.HeavyBall(step_size, momentum),
            estimator=bl.Unrolled(max_iterations=5),
            budget=bl.Budget(iterations=5),
        )
        return jnp.sum(solution.value)

    def plain(step_size, momentum):
        before = x = jnp.zeros(SIZE)
        for _ in range(5):
            before, x = x, x - step_size * (MATRIX @ x - RHS) + momentum * (x - before)
        return jnp.sum(x)

    got = jitted(jax.grad(after_five, argnums=(0, 1)))(0.05, 0.5)
    np.testing.assert_allclose(got, jax.grad(plain, argnums=(0, 1))(0.05, 0.5), rtol=1e-12)


def test_too_large_a_step_is_no_success():
    for solver in (bl.HeavyBall(1.0, 0.5), bl.Nesterov(1.0), bl.Optax(optax.sgd(1.0))):
        status = minimise(QUADRATIC, solver, iterations=200).status
        assert status == bl.Status.DIVERGED


# ------------------------------------------------------------------ Armijo


def armijo(x, steps):
    """The convex objective, from the step 0.4."""
    value = jax.jit(lambda x: convex(x, 1.0))
    slope = jax.jit(jax.grad(lambda x: convex(x, 1.0)))
    length, shortened = 0.4 / 1.5, 0
    for _ in range(steps):
        r, length = -slope(x), length * 1.5
        while value(x + length * r) > value(x) - 1e-4 * length * (r @ r):
            length, shortened = length / 2, shortened + 1
        x = x + length * r
    assert shortened >= 3, "the test shows nothing without backtracking"
    return x


def test_armijo_iterates_are_those_of_a_plain_loop():
    solver = bl.ArmijoGradientDescent(step_size=0.4)
    start = jnp.linspace(-2.0, 2.0, SIZE)
    solution = minimise(CONVEX, solver, x0=start, iterations=8)
    np.testing.assert_allclose(solution.value, armijo(start, 8), rtol=1e-12)


def test_the_first_step_is_exact_on_a_quadratic():
    solution = minimise(QUADRATIC, bl.ArmijoGradientDescent(), iterations=1)
    cauchy = (RHS @ RHS) / (RHS @ MATRIX @ RHS) * RHS
    np.testing.assert_allclose(solution.value, cauchy, rtol=1e-12)


@pytest.mark.parametrize("name", others_slow(SEARCHES, "Armijo"))
def test_a_decrease_that_drowns_in_rounding_does_not_stop_the_search(name):
    # Beside 1e4, decreases vanish once the gradient is 1e-6 of the first.
    offset = bl.Minimization(lambda x, theta: quadratic(x, theta) + 1e4)
    solution = minimise(offset, SEARCHES[name], iterations=500, rtol=1e-11)
    assert solution.status == bl.Status.CONVERGED
    np.testing.assert_allclose(solution.value, SOLUTION, atol=1e-9)


@pytest.mark.parametrize("name", others_slow(SEARCHES, "Armijo"))
def test_a_small_gradient_at_the_start_does_not_stop_the_search(name):
    # Beside a saddle, where it is 1e-7 of what it becomes; the first step tried is 1e7 long.
    weights = jnp.linspace(1.0, 10.0, SIZE)

    def double_wells(x, theta):
        y = x + theta
        return weights @ (0.25 * y**4 - 0.5 * y**2)

    problem = bl.Minimization(double_wells)
    solution = minimise(problem, SEARCHES[name], 1e-7, iterations=500, rtol=1e-6)
    assert solution.status == bl.Status.CONVERGED
    np.testing.assert_allclose(np.abs(solution.value + 1e-7), np.ones(SIZE), rtol=1e-12)


def kink(x, theta):
    return jnp.sum(jnp.abs(x - theta)) + 1.0


@jax.custom_jvp
def square_with_a_wrong_slope(x):
    return jnp.sum(x**2)


square_with_a_wrong_slope.defjvp(
    lambda primals, tangents: (square_with_a_wrong_slope(*primals), jnp.sum(tangents[0]))
)


@pytest.mark.parametrize("name", SEARCHES)
@pytest.mark.parametrize(
    "objective",
    [
        kink,
        pytest.param(lambda x, theta: square_with_a_wrong_slope(x) + theta, marks=pytest.mark.slow),
    ],
)
def test_a_search_that_fails_says_so(name, objective):
    x0 = jnp.linspace(0.1, 0.2, SIZE)
    solution = minimise(bl.Minimization(objective), SEARCHES[name], 0.3, x0, iterations=500)
    assert solution.status == bl.Status.LINE_SEARCH
    assert solution.iterations < 500


@pytest.mark.parametrize("name", others_slow(SEARCHES, "LBFGS"))
def test_a_start_where_there_is_next_to_no_curvature(name):
    # The natural first step is 10¹⁵ there, fifty halvings too long.
    problem = bl.Minimization(lambda x, theta: jnp.sum(jnp.sqrt(1.0 + (x - theta) ** 2)))
    solution = minimise(problem, SEARCHES[name], x0=jnp.full(SIZE, 1e5))
    assert solution.status == bl.Status.CONVERGED
    np.testing.assert_allclose(solution.value, 1.0, atol=1e-6)


@pytest.mark.parametrize("name", others_slow(SEARCHES, "LBFGS"))
def test_nothing_to_gain_at_the_solution_is_no_failure(name):
    solved = minimise(CONVEX, SEARCHES[name], iterations=500, rtol=1e-13)
    # Relative to a first residual that is rounding noise already: out of reach.
    again = minimise(CONVEX, SEARCHES[name], x0=solved.value, iterations=500, rtol=1e-13)
    assert not bl.Status(int(again.status)).failed
    np.testing.assert_allclose(again.value, solved.value, atol=1e-11)


def test_armijo_in_single_precision_and_per_sample():
    scales = jnp.array([1e-6, 1.0, 1e6], jnp.float32)
    problem = bl.Minimization(
        lambda x, theta: theta * (jnp.sum(jnp.cosh(x - 1)) + 0.5 * jnp.sum(x**2))
    )
    solver = bl.ArmijoGradientDescent()
    x0 = jnp.linspace(-2, 2, 5, dtype=jnp.float32)
    batch = jax.vmap(lambda scale: bl.solve(problem, scale, x0, solver=solver))(scales)
    assert batch.value.dtype == jnp.float32
    np.testing.assert_array_equal(batch.status, bl.Status.CONVERGED)
    slope = np.sinh(batch.value - 1) + batch.value
    np.testing.assert_allclose(slope, np.zeros((3, 5)), atol=1e-3)


# ------------------------------------------------------------------ optax


def test_optax_iterates_are_those_of_optax():
    adam = optax.adam(optax.exponential_decay(0.3, 10, 0.5))
    x, state = jnp.zeros(SIZE), adam.init(jnp.zeros(SIZE))

    @jax.jit  # as compiled: optax computes schedules in single precision
    def step(x, state):
        updates, state = adam.update(jax.grad(convex)(x, 1.0), state, x)
        return optax.apply_updates(x, updates), state

    for _ in range(STEPS):
        x, state = step(x, state)
    solution = minimise(CONVEX, bl.Optax(adam), iterations=STEPS)
    np.testing.assert_allclose(solution.value, x, rtol=1e-12)


@pytest.mark.parametrize("dtype", others_slow([jnp.float32, jnp.float64], jnp.float32))
def test_optax_line_searches_get_the_objective(dtype):
    # float32: the memory of optax.lbfgs is double precision where that is enabled.
    problem = bl.Minimization(lambda x, theta: jnp.sum(jnp.cosh(x - theta)))
    solution = minimise(problem, bl.Optax(optax.lbfgs()), dtype=dtype, iterations=50, rtol=1e-5)
    assert solution.status == bl.Status.CONVERGED
    assert solution.value.dtype == dtype
    np.testing.assert_allclose(solution.value, np.ones(SIZE), rtol=1e-4)


COMPLEX = {
    "HeavyBall": bl.HeavyBall(0.1, 0.3),
    "Nesterov": bl.Nesterov(0.1, momentum=0.3),
    "Armijo": bl.ArmijoGradientDescent(),
    "LBFGS": bl.LBFGS(),
    "sgd": bl.Optax(optax.sgd(0.1)),
    "backtracking": bl.Optax(
        optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(20))
    ),
}


@pytest.mark.parametrize("name", others_slow(COMPLEX, "Nesterov", "LBFGS", "sgd"))
def test_complex_unknowns_go_downhill(name):
    target = np.array([1.0 + 2.0j, -3.0j])
    problem = bl.Minimization(
        lambda x, theta: jnp.sum(jnp.abs(x - theta * target) ** 2) + jnp.sum(jnp.real(x) ** 4)
    )
    x0, budget = jnp.zeros(2, complex), bl.Budget(iterations=200, rtol=1e-8)
    solution = bl.solve(problem, 1.0, x0, solver=COMPLEX[name], budget=budget)
    assert solution.status == bl.Status.CONVERGED
    real = np.roots([4.0, 0.0, 2.0, -2.0])[-1].real  # 4x³ + 2 (x - 1) = 0
    np.testing.assert_allclose(solution.value, [real + 2j, -3j], atol=1e-7)


# ------------------------------------------------------------------ linear systems


def chebyshev_polynomial(steps, low, high, values):
    """The residual polynomial on eigenvalues: T_k of the mapped value over T_k of zero's."""
    polynomial = np.polynomial.chebyshev.Chebyshev.basis(steps)
    mapped = polynomial((high + low - 2 * values) / (high - low))
    return mapped / polynomial((high + low) / (high - low))


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_chebyshev_iterates_have_chebyshevs_error(steps):
    low, high = 0.8, 10.5
    values, vectors = np.linalg.eigh(MATRIX)
    solution = solve(MATRIX, RHS, bl.Chebyshev(low, high), iterations=steps)
    shrunk = chebyshev_polynomial(steps, low, high, values) * (vectors.T @ SOLUTION)
    np.testing.assert_allclose(solution.value, SOLUTION - vectors @ shrunk, rtol=1e-11)


@pytest.mark.parametrize(
    "solver",
    [
        pytest.param(bl.Chebyshev(), marks=pytest.mark.slow),
        bl.Chebyshev(lanczos_steps=4),
        pytest.param(bl.Chebyshev(lower=LOW), marks=pytest.mark.slow),
    ],
)
def test_chebyshev_estimates_an_interval_that_serves(solver):
    known = solve(MATRIX, RHS, bl.Chebyshev(LOW, HIGH), iterations=200, rtol=1e-10)
    for scale in (1.0,) if solver.lower is not None else (1e-8, 1.0, 1e8):
        got = solve(scale * MATRIX, RHS, solver, iterations=200, rtol=1e-10)
        assert got.status == bl.Status.CONVERGED
        assert got.iterations <= 2 * known.iterations
        np.testing.assert_allclose(scale * got.value, SOLUTION, rtol=1e-7)


def test_chebyshev_takes_one_step_on_a_multiple_of_the_identity():
    solution = solve(3 * np.eye(SIZE), RHS, bl.Chebyshev(3.0, 3.0), iterations=9, rtol=1e-12)
    assert solution.iterations == 1


def test_an_interval_too_short_diverges_and_says_so():
    solution = solve(MATRIX, RHS, bl.Chebyshev(1.0, 5.0), iterations=500)
    assert solution.status == bl.Status.DIVERGED


@pytest.mark.parametrize("solver", [bl.Chebyshev(), bl.SteepestDescent()], ids=["Ch", "SD"])
def test_an_indefinite_operator_is_a_failure(solver):
    matrix, rhs, _ = system("symmetric")
    solution = solve(matrix, rhs, solver, iterations=500, rtol=1e-10)
    assert bl.Status(int(solution.status)).failed


def test_steepest_descent_is_cauchys():
    x = np.zeros(SIZE)
    for _ in range(STEPS):
        r = RHS - MATRIX @ x
        x = x + (r @ r) / (r @ MATRIX @ r) * r
    solution = solve(MATRIX, RHS, bl.SteepestDescent(), iterations=STEPS)
    np.testing.assert_allclose(solution.value, x, rtol=1e-12)
    # One operator application an iteration; the first and the last residual take another, and
    # so does the look at a symmetry that nobody declared.
    assert solution.applications == STEPS + 2 + symmetry.APPLICATIONS


@pytest.mark.parametrize("complex_valued", others_slow([False, True], False))
@pytest.mark.parametrize("name", ["Chebyshev", "SteepestDescent"])
def test_preconditioning_pays(name, complex_valued):
    matrix, rhs, _ = system("definite", complex_valued=complex_valued)
    weights = np.geomspace(1.0, 1e3, SIZE)
    matrix = matrix * np.sqrt(weights[:, None] * weights[None, :])
    plain = getattr(bl, name)()
    helped = getattr(bl, name)(preconditioner=lambda v: v / weights)
    slow = solve(matrix, rhs, plain, iterations=3000, rtol=1e-8)
    fast = solve(matrix, rhs, helped, iterations=3000, rtol=1e-8)
    assert fast.status == bl.Status.CONVERGED
    assert fast.iterations < slow.iterations / 5
    np.testing.assert_allclose(fast.value, np.linalg.solve(matrix, rhs), rtol=1e-5)


# ------------------------------------------------------------------ what is refused

NONSYMMETRIC = bl.LinearSystem(system("general").matrix, RHS)
ROOT_FINDING = bl.RootFinding(lambda x, theta: x**3 - theta[1])
REFUSED = [
    (bl.HeavyBall(0.1, 0.5), ROOT_FINDING, "HeavyBall cannot solve this RootFinding.*Newton"),
    (bl.Nesterov(0.1), ROOT_FINDING, "it needs an objective"),
    (bl.ArmijoGradientDescent(), SYSTEM, "LinearSystem.*Direct, GMRES or BiCGStab"),
    (bl.Optax(optax.sgd(0.1)), bl.FixedPoint(lambda x, _: x / 2), "Anderson, FixedPointIter"),
    (bl.Chebyshev(), NONSYMMETRIC, "must be symmetric.*GMRES"),
    (bl.SteepestDescent(), NONSYMMETRIC, "must be symmetric.*GMRES"),
    (bl.SteepestDescent(), ROOT_FINDING, "it needs a linear system"),
]


@pytest.mark.parametrize(("solver", "problem", "message"), REFUSED)
def test_wrong_pairings_name_what_to_use(solver, problem, message):
    with pytest.raises(bl.IncompatibleError, match=message):
        bl.solve(problem, (MATRIX, RHS), jnp.zeros(SIZE), solver=solver)


BAD = [
    (lambda: bl.HeavyBall(-0.1, 0.5), "HeavyBall: step_size must be positive"),
    (lambda: bl.HeavyBall(0.1, 1.0), "momentum must be at least 0.0 and below 1.0, got 1.0"),
    (lambda: bl.Nesterov(0.1, momentum=-0.1), "Nesterov: momentum must be at least 0.0"),
    (lambda: bl.Nesterov(0.1, strong_convexity=0.0), "strong_convexity must be positive"),
    (lambda: bl.Nesterov(0.1, momentum=0.1, strong_convexity=1.0), "Give one of them"),
    (lambda: bl.Nesterov(0.1, momentum=0.1, restart=True), "Leave one of the two out"),
    (lambda: bl.ArmijoGradientDescent(step_size=float("nan")), "step_size must be positive"),
    (lambda: bl.ArmijoGradientDescent(decrease=0.5), "decrease must be at least 0.0 and below 0.5"),
    (lambda: bl.ArmijoGradientDescent(shrink=1.0), "shrink must be"),
    (lambda: bl.ArmijoGradientDescent(growth=0.9), "growth must be"),
    (lambda: bl.ArmijoGradientDescent(trials=0), "trials must be a whole number"),
    (lambda: bl.Chebyshev(0.0, 1.0), "Chebyshev: lower must be positive"),
    (lambda: bl.Chebyshev(2.0, 1.0), "lower must not exceed upper, got 2.0 and 1.0"),
    (lambda: bl.Chebyshev(lanczos_steps=0), "lanczos_steps must be a whole number"),
]


@pytest.mark.parametrize(("make", "message"), BAD)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("given", [optax.adam, "adam", None])
def test_what_is_no_transformation_is_refused(given):
    with pytest.raises(TypeError, match=r"Optax\(optax.adam\(1e-2\)\)"):
        bl.Optax(given)
