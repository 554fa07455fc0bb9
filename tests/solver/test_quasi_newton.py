"""L-BFGS, its line search and Anderson acceleration, against dense formulas."""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel as bl
from bilevel.solver.default import default_solver
from bilevel.solver.default_linear import DENSE_SIZE
from bilevel.solver.lbfgs import _direction
from bilevel.solver.line_search import wolfe
from bilevel.solver.recall import recall
from tests.core.compiling import jitted
from tests.marks import others_slow
from tests.solver.systems import SIZE, krylov_minimiser, solve, system

MATRIX, RHS, SOLUTION = system("definite")


def rosenbrock(x, theta):
    return jnp.sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (theta - x[:-1]) ** 2)


def wavy(x, theta):
    """Not convex: the curvature along a step is negative every so often."""
    return jnp.sum(jnp.cos(3 * x) + 0.1 * (x - theta) ** 2) + 0.1 * jnp.prod(x[:2])


ROSENBROCK, WAVY = bl.Minimization(rosenbrock), bl.Minimization(wavy)
START = jnp.array([-1.2, 1.0, -1.2, 1.0])


def stepped(problem, solver, x, steps):
    """The bound problem and the states of the first steps."""
    bound = problem.at(1.0)
    states = [solver.init(bound, x)]
    advance = jitted(lambda state: solver.step(bound, state, state.residual))
    for _ in range(steps):
        states.append(advance(states[-1]))
    return bound, states


# ------------------------------------------------------------------ L-BFGS


def dense_inverse_hessian(state, history):
    """BFGS updates of a multiple of the identity by the last pairs, oldest first."""
    inverse = float(state.scale) * np.eye(state.x.size)
    count = int(state.pairs)
    for index in range(max(0, count - history), count):
        s, y = (np.asarray(rows[index % history]) for rows in (state.steps, state.changes))
        left = np.eye(s.size) - np.outer(s, y) / (s @ y)
        inverse = left @ inverse @ left.T + np.outer(s, s) / (s @ y)
    return inverse


def test_the_direction_is_the_dense_formula():
    history = 3
    bound, states = stepped(ROSENBROCK, bl.LBFGS(history=history), START, 5)
    for state in states:  # none, fewer, and more pairs than there is room for
        expected = dense_inverse_hessian(state, history) @ np.asarray(bound.residual(state.x))
        np.testing.assert_allclose(_direction(state, state.residual), expected, rtol=1e-10)
    assert int(states[-1].pairs) == 5


@pytest.mark.parametrize("trials", [1, 30])
def test_pairs_without_positive_curvature_are_left_out(trials):
    start = jnp.array([0.1, -0.2, 1.9, 0.05])
    _, states = stepped(WAVY, bl.LBFGS(trials=trials), start, 12)
    for before, after in itertools.pairwise(states):
        rounding = 10 * np.finfo(float).eps * abs(float(before.value))
        assert after.value <= before.value + rounding
        assert np.all(after.inverses >= 0)
        product = (after.x - before.x) @ (before.residual - after.residual)
        taken = int(after.pairs) == int(before.pairs) + 1
        assert taken == bool(product > 0)
    # The Wolfe conditions leave none, but one trial need not fulfil the second of them.
    assert (int(states[-1].pairs) < 12) == (trials == 1)


def test_an_uphill_direction_falls_back_to_the_gradient():
    solver = bl.LBFGS()
    bound, states = stepped(ROSENBROCK, solver, START, 3)
    state = states[-1]
    # Without gradient changes, what is left of the inverse Hessian is Σ inverse · step stepᵀ.
    spoilt = eqx.tree_at(
        lambda s: (s.inverses, s.changes),
        state,
        (-1e6 * state.inverses, jnp.zeros_like(state.changes)),
    )
    assert state.residual @ _direction(spoilt, state.residual) < 0
    after = solver.step(bound, spoilt, state.residual)
    assert after.value < state.value
    along = (after.x - state.x) / state.residual
    np.testing.assert_allclose(along, along[0], rtol=1e-9)


def test_a_search_that_fails_drops_the_history_first():
    solver = bl.LBFGS(trials=1, curvature=1e-3 + 1e-4)
    bound, states = stepped(ROSENBROCK, bl.LBFGS(), START, 4)
    state = states[-1]
    too_long = eqx.tree_at(lambda s: s.scale, state, 1e6)
    after = solver.step(bound, too_long, state.residual)
    assert int(after.pairs) == 0
    assert int(after.status) == bl.Status.CONVERGED
    np.testing.assert_array_equal(after.x, state.x)
    again = solver.step(bound, eqx.tree_at(lambda s: s.scale, after, 1e6), after.residual)
    assert int(again.status) == bl.Status.LINE_SEARCH


def test_rosenbrocks_valley():
    x0 = jnp.tile(jnp.array([-1.2, 1.0]), 5)
    solution = bl.solve(ROSENBROCK, 1.0, x0, solver=bl.LBFGS())
    assert solution.status == bl.Status.CONVERGED
    np.testing.assert_allclose(solution.value, np.ones(10), atol=1e-8)
    # SciPy's L-BFGS-B takes 60 to 100 on such; each search evaluates once, mostly.
    assert solution.iterations <= 120
    assert solution.applications <= 1.3 * solution.iterations + 2


# Gradient norms run from 2⁸ to 2⁻⁸, and single precision holds their squares from 2⁻¹²⁶ to 2¹²⁷.
@pytest.mark.parametrize("exponent", [-50, 50])
def test_a_power_of_two_changes_nothing_at_all(exponent):
    problem = bl.Minimization(lambda x, theta: theta * rosenbrock(x, 1.0))
    x0 = START.astype(jnp.float32)

    def run(factor):
        return bl.solve(problem, jnp.float32(factor), x0, solver=bl.LBFGS())

    plain, scaled = run(1.0), run(2.0**exponent)
    assert plain.value.dtype == jnp.float32
    assert plain.status == scaled.status == bl.Status.CONVERGED
    assert plain.iterations == scaled.iterations
    np.testing.assert_array_equal(plain.value, scaled.value)


@pytest.mark.slow
def test_unrolled_history_against_the_implicit_gradient():
    problem = bl.Minimization(lambda x, theta: jnp.sum(jnp.cosh(MATRIX @ x - theta * RHS)))

    def loss(theta, estimator):
        solution = bl.solve(
            problem,
            theta,
            jnp.zeros(SIZE),
            # A shorter history has iterates that depend on θ by leaps.
            solver=bl.LBFGS(history=SIZE),
            estimator=estimator,
            budget=bl.Budget(iterations=120, rtol=1e-13),
        )
        return jnp.sum(solution.value**2)

    # x* = θ A⁻¹b, whatever the function of the residual.
    expected = 2 * 0.7 * SOLUTION @ SOLUTION
    for estimator in (bl.Implicit(), bl.Unrolled(max_iterations=128)):
        got = jitted(jax.grad(lambda theta, e=estimator: loss(theta, e)))(0.7)
        np.testing.assert_allclose(got, expected, rtol=1e-8)


# ------------------------------------------------------------------ its line search

SHAPES = {
    "parabola": lambda a: (a - 3.0) ** 2,
    "far": lambda a: (a - 700.0) ** 2,
    "near": lambda a: (a - 1e-3) ** 2,
    "flat": lambda a: jnp.sqrt(1 + (a - 5.0) ** 2),
    "steep": lambda a: jnp.exp(20 * a) - 25 * a,
    "wall": lambda a: -jnp.log(0.3 - a) - 5 * a,
    "waves": lambda a: 0.1 * a**2 - a + 0.3 * jnp.sin(5 * a),
}


@pytest.mark.parametrize("name", SHAPES)
def test_steps_fulfil_the_wolfe_conditions(name):
    shape = SHAPES[name]
    problem = bl.Minimization(lambda x, theta: theta * shape(x))

    def search(factor):
        bound = problem.at(factor)
        x = jnp.zeros(())
        residual = bound.residual(x)
        direction = jnp.sign(residual)
        found = wolfe(
            bound,
            x,
            direction,
            factor * shape(x),
            residual,
            decrease=1e-4,
            curvature=0.5,
            trials=30,
        )
        return found, residual

    compiled = jitted(search)
    found, residual = compiled(1.0)
    assert found.success
    start, slope = shape(jnp.zeros(())), -abs(float(residual))
    assert found.value <= start + 1e-4 * found.length * slope
    assert -found.residual * np.sign(residual) >= 0.5 * slope
    np.testing.assert_allclose(found.value, shape(found.length * np.sign(residual)), rtol=1e-12)
    assert found.evaluations <= 12
    for factor in (1e-8, 1e8):
        scaled, _ = compiled(factor)
        assert scaled.evaluations == found.evaluations
        np.testing.assert_allclose(scaled.length, found.length, rtol=1e-9)


def test_a_search_with_no_end_returns_the_best_step():
    problem = bl.Minimization(lambda x, theta: theta - x)
    bound = problem.at(0.0)
    found = wolfe(
        bound,
        jnp.zeros(()),
        jnp.ones(()),
        jnp.zeros(()),
        jnp.ones(()),
        decrease=1e-4,
        curvature=0.9,
        trials=5,
    )
    assert found.success
    assert found.evaluations == 5
    assert found.value == -found.length < -1


def test_a_known_value_is_not_evaluated_but_differentiated():
    def value(x, scale):
        def function(x):
            return scale * x**3  # captures what is differentiated

        return recall(function, x, jnp.asarray(100.0))

    assert value(2.0, 5.0) == 100.0
    assert jax.grad(value, argnums=(0, 1))(2.0, 5.0) == (60.0, 8.0)
    assert jax.grad(jax.grad(value))(2.0, 5.0) == 60.0
    batch = jax.vmap(jax.grad(value), in_axes=(0, None))(jnp.arange(3.0), 5.0)
    np.testing.assert_allclose(batch, [0.0, 15.0, 60.0])


# ------------------------------------------------------------------ Anderson

MAPPING, SHIFT = 0.9 * system("general").matrix / 4, RHS
LINEAR = bl.FixedPoint(lambda x, theta: theta * (MAPPING @ x) + SHIFT)


def accelerate(solver, problem=LINEAR, theta=1.0, x0=None, **budget):
    x0 = jnp.zeros(SIZE) if x0 is None else x0
    return bl.solve(problem, theta, x0, solver=solver, budget=bl.Budget(**budget))


def test_with_enough_memory_it_is_gmres_and_one_more_mapping():
    # Walker and Ni 2011, corollary 2.10.
    operator = np.eye(SIZE) - MAPPING
    for steps in (2, 4, 6):
        minimiser = krylov_minimiser(operator, SHIFT, steps - 1)
        expected = MAPPING @ minimiser + SHIFT
        got = accelerate(bl.Anderson(memory=6), iterations=steps)
        np.testing.assert_allclose(got.value, expected, rtol=1e-9)


def nonlinear(x, theta):
    return theta * jnp.cos(x + 0.3 * jnp.roll(x, 1))


COSINE = bl.FixedPoint(nonlinear)


def test_a_memory_of_one_is_the_secant_of_a_plain_loop():
    mixing = 0.7
    x = np.linspace(0.0, 1.0, 4)
    before = None
    for _ in range(7):
        r = np.asarray(nonlinear(x, 0.8)) - x
        step = mixing * r
        if before is not None:
            moved, changed = x - before[0], r - before[1]
            step = step - (changed @ r) / (changed @ changed) * (moved + mixing * changed)
        before, x = (x, r), x + step
    solver = bl.Anderson(memory=1, mixing=mixing, regularisation=0.0)
    start = jnp.linspace(0.0, 1.0, 4)
    solution = accelerate(solver, COSINE, 0.8, start, iterations=7)
    np.testing.assert_allclose(solution.value, x, rtol=1e-10)


def test_it_solves_what_the_plain_iteration_cannot():
    # The eigenvalues of the mapping reach -1.3.
    plain = accelerate(bl.FixedPointIteration(), theta=-2.0, iterations=200, rtol=1e-10)
    fast = accelerate(bl.Anderson(), theta=-2.0, iterations=200, rtol=1e-10)
    assert plain.status == bl.Status.DIVERGED
    assert fast.status == bl.Status.CONVERGED
    expected = np.linalg.solve(np.eye(SIZE) + 2.0 * MAPPING, SHIFT)
    np.testing.assert_allclose(fast.value, expected, rtol=1e-8)


def test_regularisation_tends_to_the_plain_iteration():
    budget = {"iterations": 6}
    plain = accelerate(bl.FixedPointIteration(), **budget)
    distances = [
        float(jnp.linalg.norm(accelerate(solver, **budget).value - plain.value))
        for solver in (bl.Anderson(regularisation=r) for r in (1e-12, 0.1, 0.99))
    ]
    assert distances[2] < distances[1] < distances[0]


@pytest.mark.parametrize("dtype", others_slow([jnp.float32, jnp.complex128], jnp.complex128))
def test_anderson_in_other_dtypes(dtype):
    x0 = jnp.ones(SIZE, dtype) * (1 + (1j if dtype == jnp.complex128 else 0))
    problem = bl.FixedPoint(
        lambda x, theta: theta * (jnp.asarray(MAPPING, dtype) @ x) + jnp.asarray(SHIFT, dtype) * x0
    )
    theta = jnp.asarray(0.9, jnp.finfo(dtype).dtype)
    solution = bl.solve(problem, theta, jnp.zeros_like(x0), solver=bl.Anderson())
    assert solution.status == bl.Status.CONVERGED
    assert solution.value.dtype == dtype
    expected = np.linalg.solve(np.eye(SIZE) - 0.9 * MAPPING, SHIFT * np.asarray(x0))
    tolerance = 1e-4 if dtype == jnp.float32 else 1e-8
    np.testing.assert_allclose(solution.value, expected, rtol=tolerance, atol=tolerance)


def test_as_a_richardson_iteration_it_solves_linear_systems():
    plain = solve(MATRIX, RHS, bl.Richardson(0.15), iterations=500, rtol=1e-10)
    fast = solve(MATRIX, RHS, bl.Anderson(mixing=0.15), iterations=500, rtol=1e-10)
    assert fast.status == bl.Status.CONVERGED
    assert fast.iterations < plain.iterations / 2
    np.testing.assert_allclose(fast.value, SOLUTION, rtol=1e-8)


# ------------------------------------------------------------------ defaults and refusals


def test_defaults_by_kind_and_size():
    large, small = jnp.zeros(DENSE_SIZE + 1), jnp.zeros(3)
    lasso = bl.CompositeMinimization(wavy, bl.L1(1.0))
    assert isinstance(default_solver(ROSENBROCK.at(1.0), large), bl.LBFGS)
    assert isinstance(default_solver(ROSENBROCK.at(1.0), small), bl.Newton)
    assert isinstance(default_solver(LINEAR.at(1.0), small), bl.Anderson)
    assert isinstance(default_solver(lasso.at(1.0), small), bl.ProximalGradient)


@pytest.mark.parametrize(
    ("solver", "problem", "message"),
    [
        (bl.LBFGS(), COSINE, "LBFGS cannot solve this FixedPoint: it needs an objective.*Anderson"),
        (bl.Anderson(), ROSENBROCK, "Anderson cannot solve this Minimization.*Use LBFGS"),
    ],
)
def test_wrong_pairings_name_what_to_use(solver, problem, message):
    with pytest.raises(bl.IncompatibleError, match=message):
        bl.solve(problem, 1.0, START, solver=solver)


BAD = [
    (lambda: bl.LBFGS(history=0), "LBFGS: history must be a whole number, at least 1, got 0"),
    (lambda: bl.LBFGS(trials=0), "LBFGS: trials"),
    (lambda: bl.LBFGS(decrease=0.6), "decrease must be at least 0.0 and below 0.5"),
    (lambda: bl.LBFGS(decrease=0.2, curvature=0.1), "decrease must be smaller than curvature"),
    (lambda: bl.Anderson(memory=0), "Anderson: memory must be a whole number"),
    (lambda: bl.Anderson(mixing=0.0), "Anderson: mixing must be positive"),
    (lambda: bl.Anderson(regularisation=-1.0), "regularisation must be at least 0.0"),
]


@pytest.mark.parametrize(("make", "message"), BAD)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
