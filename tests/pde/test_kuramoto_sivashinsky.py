"""Kuramoto-Sivashinsky: growth of linear modes, orders, derivatives, budgets, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel as bl
import bilevel_pde as pde
from bilevel.testing import taylor_test

LENGTH = 22.0
K = 2 * np.pi / LENGTH


def line(points):
    return pde.Grid(points, extent=LENGTH, boundary=pde.Periodic())


def waves(grid):
    x = grid.coordinates()[0]
    return jnp.cos(K * x) + 0.5 * jnp.sin(2 * K * x + 0.3)


def amplification(stepper, mode, steps):
    """Of a small cosine, per unit of time."""
    x = np.asarray(stepper.grid.coordinates()[0])
    u = 1e-7 * np.cos(mode * K * x)
    last = pde.rollout(stepper, jnp.asarray(u), steps)[-1]
    return np.log(float(last @ u) / float(u @ u)) / (steps * float(stepper.dt))


@pytest.mark.parametrize(
    ("scheme", "linearization"),
    [
        ("implicit_euler", "explicit"),
        pytest.param("crank_nicolson", "explicit", marks=pytest.mark.slow),
        ("crank_nicolson", "newton"),
        pytest.param("implicit_euler", "picard", marks=pytest.mark.slow),
    ],
)
def test_linear_modes_grow_by_their_rate(scheme, linearization):
    """k² − νk⁴: below, near and above the most unstable one, and one that decays."""
    points, dt, nu = 64, 0.05, 0.8
    stepper = pde.KuramotoSivashinsky(
        line(points), dt, hyperviscosity=nu, scheme=scheme, linearization=linearization
    )
    for mode in (1, 2, 3, 5):
        found, k = amplification(stepper, mode, 10), mode * K
        # Exactly that of the scheme, with the second difference's eigenvalue for k².
        h = LENGTH / points
        square = (2 / h * np.sin(k * h / 2)) ** 2
        rate = square - nu * square**2
        factor = 1 / (1 - dt * rate)
        if scheme == "crank_nicolson":
            factor = (1 + dt * rate / 2) / (1 - dt * rate / 2)
        np.testing.assert_allclose(found, np.log(factor) / dt, rtol=1e-5)
        # And that of the equation, to the scheme's error.
        exact = k**2 - nu * k**4
        allowed = dt * exact**2 if scheme == "implicit_euler" else dt**2 * abs(exact) ** 3
        assert abs(found - exact) < allowed + h**2 * (k**4 + nu * k**6)


@pytest.mark.parametrize(
    ("options", "order"),
    [
        ({}, 1),
        pytest.param(
            {"linearization": "newton", "scheme": "crank_nicolson"}, 2, marks=pytest.mark.slow
        ),
        pytest.param({"linearization": "newton"}, 1, marks=pytest.mark.slow),
        pytest.param({"linearization": "picard", "outer_budget": 1}, 1, marks=pytest.mark.slow),
    ],
)
def test_order_in_time(options, order):
    grid = line(24)
    u = waves(grid)

    def after(steps):
        stepper = pde.KuramotoSivashinsky(grid, 2.0 / steps, **options)
        return pde.rollout(stepper, u, steps)[-1]

    coarse, middle, fine = (after(n) for n in (32, 64, 128))
    ratio = np.linalg.norm(coarse - middle) / np.linalg.norm(middle - fine)
    assert abs(np.log2(ratio) - order) < 0.1


@pytest.mark.parametrize(
    "linearization", [pytest.param("explicit", marks=pytest.mark.slow), "picard"]
)
def test_mean_is_kept_and_pushed_by_the_forcing(linearization):
    grid = line(16)
    u = 0.3 + waves(grid)
    stepper = pde.KuramotoSivashinsky(grid, 0.1, linearization=linearization, forcing=0.2)
    last = pde.rollout(stepper, u, 4)[-1]
    np.testing.assert_allclose(jnp.mean(last), jnp.mean(u) + 0.4 * 0.2, atol=1e-9)


def dense_loss(grid, *, linearization, scheme, frozen):
    """Of two steps by dense algebra, through the linearisations."""
    stop = jax.lax.stop_gradient if frozen else (lambda w: w)
    share = 1.0 if scheme == "implicit_euler" else 0.5

    def loss(point):
        dt, eye, u = point["dt"], jnp.eye(grid.size), point["u"]
        second = jnp.asarray(pde.laplacian(grid).to_scipy().toarray())
        stiff = second + point["hyperviscosity"] * second @ second

        def carried(w):
            # Fluxes mean(w) mean(v) / 2 through faces, written out.
            h = grid.spacing[0]
            above = (w + jnp.roll(w, -1)) / 2
            below = (w + jnp.roll(w, 1)) / 2
            rolled = jnp.roll(eye, 1, axis=1), jnp.roll(eye, -1, axis=1)
            flux = above[:, None] * (eye + rolled[0]) - below[:, None] * (eye + rolled[1])
            return flux / (4 * h)

        for _ in range(2):
            rhs = u - (1 - share) * dt * stiff @ u + dt * point["forcing"]
            if linearization == "explicit":
                u = jnp.linalg.solve(eye + share * dt * stiff, rhs - dt * carried(stop(u)) @ u)
                continue
            rhs = rhs - (1 - share) * dt * carried(stop(u)) @ u
            w = u
            for _ in range(25):
                w = jnp.linalg.solve(eye + share * dt * (stiff + carried(stop(w))), rhs)
            u = w
        return jnp.sum(u**3)

    return loss


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"derivative": "frozen"}, marks=pytest.mark.slow),
        pytest.param(
            {"linearization": "newton", "scheme": "crank_nicolson"}, marks=pytest.mark.slow
        ),
        pytest.param(
            {"linearization": "picard", "derivative": "unrolled", "outer_budget": 25},
            marks=pytest.mark.slow,
        ),
        pytest.param({"linearization": "picard", "derivative": "frozen"}, marks=pytest.mark.slow),
    ],
)
def test_derivative_is_that_of_dense_algebra(options):
    """And frozen drops what it says: it fails Taylor's test, and nothing else does."""
    grid = line(12)
    point = {
        "dt": jnp.asarray(0.1),
        "hyperviscosity": jnp.asarray(0.9),
        "forcing": 0.2 * jnp.sin(K * grid.coordinates()[0]),
        "u": 0.4 + waves(grid),
    }

    def loss(point):
        parameters = {name: point[name] for name in ("dt", "hyperviscosity", "forcing")}
        stepper = pde.KuramotoSivashinsky(grid, **parameters, **options)
        return jnp.sum(pde.rollout(stepper, point["u"], 2)[-1] ** 3)

    loss, frozen = jax.jit(loss), options.get("derivative") == "frozen"
    value, gradient = jax.jit(jax.value_and_grad(loss))(point)
    expected = dense_loss(
        grid,
        linearization=options.get("linearization", "explicit"),
        scheme=options.get("scheme", "implicit_euler"),
        frozen=frozen,
    )
    dense, slopes = jax.jit(jax.value_and_grad(expected))(point)
    np.testing.assert_allclose(value, dense, rtol=1e-7)
    for got, want in zip(jax.tree.leaves(gradient), jax.tree.leaves(slopes), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-6 * float(jnp.max(jnp.abs(want))))
    if options and not frozen:
        return  # what is compared already is enough
    direction = jax.tree.map(lambda leaf: 0.3 * leaf, point)
    slope = taylor_test(loss, point, direction, derivative=gradient).slope
    assert (slope < 1.1) if frozen else (slope >= 1.95)


def test_detached_steps_are_constants():
    grid = line(12)

    def loss(u):
        return jnp.sum(pde.KuramotoSivashinsky(grid, 0.1, derivative="detached").step(u) ** 2)

    assert not jnp.any(jax.grad(loss)(waves(grid)))


@pytest.mark.slow
def test_budgets_are_kept_and_the_default_solver_needs_few_iterations():
    grid = line(16)
    u = waves(grid)
    _, solution = pde.KuramotoSivashinsky(grid, 0.1).step_with_solution(u)
    assert solution.status == bl.Status.CONVERGED
    assert int(solution.iterations) <= 2
    stepper = pde.KuramotoSivashinsky(grid, 0.1, linearization="picard", outer_budget=3)
    assert int(stepper.step_with_solution(u)[1].iterations) == 3
    # One Jacobi iteration by hand, and an adjoint with its own.
    jacobi = pde.KuramotoSivashinsky(grid, 0.01, solver=bl.Jacobi())
    problem = jacobi.problem().at((jacobi, u))
    expected = u + problem.residual(u) / problem.operator.diagonal
    np.testing.assert_allclose(jacobi.step(u, budget=bl.Budget(1)), expected, rtol=1e-12)

    def loss(u, probe):
        fidelity = bl.Fidelity(bl.Budget(3), bl.Budget(2), probe=probe)
        return jnp.sum(jacobi.step(u, fidelity=fidelity) ** 2)

    counts = jax.grad(loss, argnums=1)(u, bl.Probe.zeros())
    assert (int(counts.primal_iterations), int(counts.adjoint_iterations)) == (3, 2)


def test_parameters_are_replaced_step_by_step():
    grid = line(16)
    u = waves(grid)
    changed = pde.KuramotoSivashinsky(grid, 0.1).step(u, theta={"dt": 0.3, "hyperviscosity": 2.0})
    expected = pde.KuramotoSivashinsky(grid, 0.3, hyperviscosity=2.0).step(u)
    np.testing.assert_allclose(changed, expected, atol=1e-10)


def test_bad_input():
    grid = line(8)
    make = pde.KuramotoSivashinsky
    for options, message in (
        ({"linearization": "secant"}, "'explicit', 'picard' or 'newton', got 'secant'"),
        ({"derivative": "none"}, "derivative should be"),
        ({"scheme": "leapfrog"}, "scheme should be"),
        ({"outer_budget": 3}, "Leave out outer_budget"),
        ({"forcing": jnp.ones(3)}, "forcing should be"),
        ({"hyperviscosity": -1.0}, "hyperviscosity should be positive"),
        ({"hyperviscosity": jnp.ones(8)}, "hyperviscosity should be a number"),
    ):
        with pytest.raises(ValueError, match=message):
            make(grid, 0.1, **options)
    with pytest.raises(ValueError, match="periodic and of one dimension"):
        make(pde.Grid(8), 0.1)
    with pytest.raises(ValueError, match="periodic and of one dimension"):
        make(pde.Grid((8, 8), boundary=pde.Periodic()), 0.1)
    with pytest.raises(TypeError, match="grid should be a Grid"):
        make(8, 0.1)


@pytest.mark.parametrize("shape", [9, pytest.param((6, 7), marks=pytest.mark.slow)])
def test_biharmonic_is_the_square_of_the_laplacian_and_has_a_fast_inverse(shape):
    grid = pde.Grid(shape, boundary=pde.Periodic())
    second = pde.laplacian(grid).to_scipy().toarray()
    fourth = pde.biharmonic(grid)
    size = np.abs(second @ second).max()
    np.testing.assert_allclose(fourth.to_scipy().toarray(), second @ second, atol=1e-14 * size)
    assert fourth.symmetric
    operator = pde.identity(grid) + 1e-3 * fourth
    b = jnp.asarray(np.random.default_rng(0).standard_normal(grid.shape))
    inverse = pde.FastSolver().at(bl.LinearSystem(operator, b).at(None), b)
    expected = np.linalg.solve(operator.to_scipy().toarray(), np.ravel(b))
    np.testing.assert_allclose(np.ravel(jax.jit(inverse)(b)), expected, atol=1e-12)


def test_biharmonic_needs_a_periodic_grid():
    with pytest.raises(ValueError, match="two conditions"):
        pde.biharmonic(pde.Grid(9))
    with pytest.raises(ValueError, match="at least 5"):
        pde.biharmonic(pde.Grid(4, boundary=pde.Periodic()))
