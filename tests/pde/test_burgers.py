"""Burgers' equation: Cole and Hopf's solution, conservation, and what each derivative drops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel as bl
import bilevel_pde as pde
from bilevel.testing import taylor_test

P = pde.Periodic()
K = 2 * np.pi
CONSERVATIVE_NEWTON = {"differences": "central", "conservative": True, "linearization": "newton"}


def cole_hopf(grid, time, viscosity):
    """u = -2ν∇φ/φ of φ = 2 + exp(-ν d k² t) cos kx cos ky, a solution of the heat equation."""
    points = grid.mesh()
    decay = jnp.exp(-viscosity * grid.ndim * K**2 * time)
    cosines = [jnp.cos(K * x) for x in points]
    phi = 2.0 + decay * jnp.prod(jnp.stack(cosines), axis=0)
    components = []
    for axis, x in enumerate(points):
        others = [c for d, c in enumerate(cosines) if d != axis]
        slope = -K * decay * jnp.sin(K * x) * (others[0] if others else 1.0)
        components.append(-2 * viscosity * slope / phi)
    return components[0] if grid.ndim == 1 else tuple(components)


def distance(u, v):
    pairs = zip(jax.tree.leaves(u), jax.tree.leaves(v), strict=True)
    return max(float(jnp.max(jnp.abs(a - b))) for a, b in pairs)


def last(trajectory):
    return jax.tree.map(lambda leaf: leaf[-1], trajectory)


@pytest.mark.parametrize(
    ("ndim", "options", "sizes", "order"),
    [
        (1, {"differences": "central", "outer_budget": 1}, (32, 64), 2),
        *(
            pytest.param(ndim, options, sizes, order, marks=pytest.mark.slow)
            for ndim, options, sizes, order in (
                (1, {"differences": "central"}, (32, 64), 2),
                (1, CONSERVATIVE_NEWTON, (32, 64), 2),
                (1, {"differences": "upwind", "outer_budget": 1}, (128, 256), 1),
                (2, {"differences": "central", "linearization": "newton"}, (16, 32), 2),
            )
        ),
    ],
)
def test_cole_hopf_solution_with_the_order_of_the_scheme(ndim, options, sizes, order):
    """Steps go with the square of the spacing, so both schemes in time are of second order in it.

    A factor of the equation that is wrong leaves an error that does not fall.
    """
    errors = []
    for n in sizes:
        grid = pde.Grid((n,) * ndim, boundary=P)
        steps = (n // 8) ** 2
        stepper = pde.Burgers(grid, 0.05, 0.1 / steps, **options)
        final = last(pde.rollout(stepper, cole_hopf(grid, 0.0, 0.05), steps))
        errors.append(distance(final, cole_hopf(grid, 0.1, 0.05)))
    assert abs(np.log2(errors[0] / errors[1]) - order) < 0.1, errors


@pytest.mark.slow
@pytest.mark.parametrize(("linearization", "outer_budget"), [("picard", 1), ("newton", None)])
def test_order_in_time(linearization, outer_budget):
    """Of steps halved twice on one grid: both forms are of first order."""
    grid = pde.Grid(16, boundary=P)
    u = cole_hopf(grid, 0.0, 0.05)

    def after(steps):
        stepper = pde.Burgers(
            grid,
            0.05,
            0.2 / steps,
            differences="central",
            linearization=linearization,
            outer_budget=outer_budget,
        )
        return pde.rollout(stepper, u, steps)[-1]

    coarse, middle, fine = (after(n) for n in (32, 64, 128))
    assert abs(np.log2(distance(coarse, middle) / distance(middle, fine)) - 1) < 0.1


@pytest.mark.slow
@pytest.mark.parametrize(("differences", "outer_budget"), [("upwind", 1), ("central", None)])
def test_conservative_form_conserves_momentum(differences, outer_budget):
    grid = pde.Grid(24, boundary=P)
    u = 1.0 + pde.boxes(jax.random.key(0), grid)

    def drift(conservative):
        stepper = pde.Burgers(
            grid,
            0.02,
            0.03,
            differences=differences,
            conservative=conservative,
            outer_budget=outer_budget,
        )
        return abs(float(jnp.sum(pde.rollout(stepper, u, 3)[-1]) - jnp.sum(u)))

    assert drift(True) < 1e-8
    assert differences == "central" or drift(False) > 1e-4


def setting():
    grid = pde.Grid(8, boundary=P)
    x = grid.coordinates()[0]
    point = {
        "viscosity": jnp.asarray(0.05),
        "forcing": jnp.cos(K * x),
        "u": 1.3 + jnp.sin(K * x),
    }
    return grid, point


def loss_of(grid, **options):
    def loss(point):
        stepper = pde.Burgers(grid, point["viscosity"], 0.05, forcing=point["forcing"], **options)
        return jnp.sum(pde.rollout(stepper, point["u"], 2)[-1] ** 3)

    return jax.jit(loss)


def dense_gradient(grid, point, *, iterations, frozen=False):
    """Of the same steps by dense algebra, through the linearisations done."""
    stop = jax.lax.stop_gradient if frozen else (lambda w: w)

    def loss(point):
        stepper = pde.Burgers(grid, point["viscosity"], 0.05)
        eye, u = jnp.eye(grid.size), point["u"]
        for _ in range(2):
            rhs = u + 0.05 * point["forcing"]

            def linearised(w, _, rhs=rhs):
                transport = stepper.transport((stop(w),))
                matrix = eye + 0.05 * jax.vmap(transport.matvec)(eye).T
                return jnp.linalg.solve(matrix, rhs), None

            w, _ = jax.lax.scan(linearised, u, length=iterations)
            u = w
        return jnp.sum(u**3)

    return jax.jit(jax.grad(loss))(point)


@pytest.mark.parametrize(
    ("options", "iterations", "frozen"),
    [
        ({"derivative": "unrolled", "outer_budget": 1}, 1, False),
        *(
            pytest.param(options, iterations, frozen, marks=pytest.mark.slow)
            for options, iterations, frozen in (
                ({"derivative": "implicit"}, 40, False),
                ({"derivative": "implicit", "linearization": "newton"}, 40, False),
                ({"derivative": "unrolled", "outer_budget": 3}, 3, False),
                ({"derivative": "frozen"}, 40, True),
            )
        ),
    ],
)
def test_derivative_is_that_of_dense_algebra(options, iterations, frozen):
    """Frozen drops the advecting velocity in Taylor's test, and nothing else does."""
    grid, point = setting()
    loss = loss_of(grid, **options)
    gradient = jax.grad(loss)(point)
    expected = dense_gradient(grid, point, iterations=iterations, frozen=frozen)
    for got, want in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-7 * float(jnp.max(jnp.abs(want))))
    if len(options) > 1:
        return  # what is compared already is enough
    direction = jax.tree.map(lambda leaf: 0.3 * leaf, point)
    slope = taylor_test(loss, point, direction, derivative=gradient).slope
    assert (slope < 1.1) if frozen else (slope >= 1.95)


@pytest.mark.parametrize("solver", [None, pytest.param(pde.SparseDirect(), marks=pytest.mark.slow)])
def test_unrolled_newton_is_the_derivative_of_the_iterations_done(solver):
    """Two of them, full steps, far from converged: the implicit derivative is 18 % off."""
    grid, point = setting()
    options = {"linearization": "newton", "outer_budget": 2, "solver": solver}

    def stepper_at(point, derivative):
        nu, forcing = 3 * point["viscosity"], point["forcing"]
        return pde.Burgers(grid, nu, 0.4, forcing=forcing, derivative=derivative, **options)

    def loss(point, derivative):
        return jnp.sum(stepper_at(point, derivative).step(point["u"]) ** 3)

    def dense(point):
        stepper, w = stepper_at(point, "unrolled"), point["u"]

        def residual(w):
            return stepper.problem().residual(w, (stepper, point["u"]))

        for _ in range(2):
            w = w - jnp.linalg.solve(jax.jacfwd(residual)(w), residual(w))
        return jnp.sum(w**3)

    expected = jax.jit(jax.grad(dense))(point)
    got, implicit = jax.jit(
        lambda point: [jax.grad(loss)(point, kind) for kind in ("unrolled", "implicit")]
    )(point)
    for name, want in expected.items():
        scale = float(jnp.max(jnp.abs(want)))
        np.testing.assert_allclose(got[name], want, rtol=0, atol=1e-8 * scale)
    assert abs(float(implicit["viscosity"] / expected["viscosity"]) - 1) > 0.01


@pytest.mark.slow
def test_detached_steps_are_constants():
    grid, point = setting()
    value, gradient = jax.value_and_grad(loss_of(grid, derivative="detached"))(point)
    np.testing.assert_allclose(value, loss_of(grid)(point), rtol=1e-9)
    assert all(not jnp.any(leaf) for leaf in jax.tree.leaves(gradient))


@pytest.mark.slow
def test_boundary_values_and_two_components():
    """Between walls that move along, a uniform flow stays as it is."""
    grid = pde.Grid((5, 4))
    sides = [(axis, side) for axis in (0, 1) for side in (0, 1)]
    values = tuple(dict.fromkeys(sides, speed) for speed in (0.7, -0.2))
    stepper = pde.Burgers(grid, 0.1, 0.1, boundary_values=values)
    u = (jnp.full((5, 4), 0.7), jnp.full((5, 4), -0.2))
    assert distance(stepper.step(u), u) < 1e-9
    pushed = stepper.step(u, theta={"forcing": (1.0, 0.0)})
    assert distance(pushed[0], u[0]) > 0.05
    assert distance(pushed[1], u[1]) < 1e-9


def test_budgets_of_both_kinds_are_kept():
    """K linear iterations a linearisation, and as many linearisations as asked for."""
    grid, point = setting()
    for outer, inner in ((1, 2), (3, 1)):
        stepper = pde.Burgers(grid, 0.05, 0.05, outer_budget=outer, solver=bl.Jacobi())
        _, solution = stepper.step_with_solution(point["u"], budget=bl.Budget(iterations=inner))
        assert int(solution.iterations) == outer
    # One linearisation with one Jacobi step, by hand.
    stepper = pde.Burgers(grid, 0.05, 0.05, outer_budget=1, solver=bl.Jacobi())
    u = point["u"]
    matrix = pde.identity(grid) + 0.05 * stepper.transport((u,))
    expected = u + (u - matrix.matvec(u)) / matrix.diagonal()
    np.testing.assert_allclose(stepper.step(u, budget=bl.Budget(1)), expected, rtol=1e-12)


def test_bad_input():
    grid = pde.Grid(8)
    for options, message in (
        ({"linearization": "secant"}, "linearization should be"),
        ({"derivative": "none"}, "derivative should be"),
        ({"derivative": "unrolled", "adjoint_solver": bl.GMRES()}, "Leave out adjoint_solver"),
        ({"differences": "quick"}, "differences should be"),
        ({"forcing": (1.0, 2.0)}, "one part for each of 1 components, got 2"),
    ):
        with pytest.raises(ValueError, match=message):
            pde.Burgers(grid, 0.1, 0.1, **options)
    with pytest.raises(ValueError, match="viscosity should be positive"):
        pde.Burgers(grid, 0.0, 0.1)
    with pytest.raises(TypeError, match="viscosity should be a number or an array"):
        pde.Burgers(grid, jnp.sin, 0.1)
    with pytest.raises(ValueError, match="one or two dimensions, got 3"):
        pde.Burgers(pde.Grid((3, 3, 3)), 0.1, 0.1)
    with pytest.raises(ValueError, match="conservative=True is for one dimension"):
        pde.Burgers(pde.Grid((3, 3)), 0.1, 0.1, conservative=True)
    with pytest.raises(ValueError, match=r"u should be a tuple \(u, v\).*got an array of shape"):
        pde.Burgers(pde.Grid((3, 3)), 0.1, 0.1).step(jnp.ones((3, 3)))
    with pytest.raises(bl.IncompatibleError, match="needs a Quasilinear problem"):
        bl.solve(bl.RootFinding(lambda x, t: x - t), 1.0, 0.0, solver=pde.Picard())
    with pytest.raises(bl.IncompatibleError, match="does not solve linear systems"):
        pde.Picard(linear=bl.LBFGS())
