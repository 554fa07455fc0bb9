"""Incompressible flow: vortices that decay, a cavity, and what each derivative drops."""

import functools

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse as sp

import bilevel as bl
import bilevel_pde as pde
from bilevel.testing import taylor_test

P = pde.Periodic()

# Ghia, Ghia & Shin 1982, https://doi.org/10.1016/0021-9991(82)90058-4, tables I and II: u on
# the vertical and v on the horizontal line through the centre.
TABLE_U = """
    0.9766  0.84123  0.75837
    0.9688  0.78871  0.68439
    0.9609  0.73722  0.61756
    0.9531  0.68717  0.55892
    0.8516  0.23151  0.29093
    0.7344  0.00332  0.16256
    0.6172 -0.13641  0.02135
    0.5000 -0.20581 -0.11477
    0.4531 -0.21090 -0.17119
    0.2813 -0.15662 -0.32726
    0.1719 -0.10150 -0.24299
    0.1016 -0.06434 -0.14612
    0.0703 -0.04775 -0.10338
    0.0625 -0.04192 -0.09266
    0.0547 -0.03717 -0.08186
"""
# What is printed at 0.9063 for 400, -0.23827, does not lie on the curve of its neighbours.
TABLE_V = """
    0.9688 -0.05906 -0.12146
    0.9609 -0.07391 -0.15663
    0.9531 -0.08864 -0.19254
    0.9453 -0.10313 -0.22847
    0.9063 -0.16914  nan
    0.8594 -0.22445 -0.44993
    0.8047 -0.24533 -0.38598
    0.5000  0.05454  0.05186
    0.2344  0.17527  0.30174
    0.2266  0.17507  0.30203
    0.1563  0.16077  0.28124
    0.0938  0.12317  0.22965
    0.0781  0.10890  0.20920
    0.0703  0.10091  0.19713
    0.0625  0.09233  0.18360
"""
GHIA = [np.array(table.split(), float).reshape(-1, 3) for table in (TABLE_U, TABLE_V)]


def distance(x, y):
    pairs = zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True)
    return max(float(jnp.max(jnp.abs(a - b))) for a, b in pairs)


@functools.partial(jax.jit, static_argnames=("options",))
def march(u, viscosity, dt, steps, *, box, options=()):
    """So many steps, traced."""
    flow = pde.NavierStokes(box, viscosity, dt, **dict(options))
    return jax.lax.fori_loop(0, steps, lambda _, state: flow.step(state), u)


def decayed(waves, steps, options):
    """Differences to vortices of so many waves in 32² cells, at one scaled time.

    Two waves are one on half of the cells, in half of the time at half of the viscosity.
    """
    box = pde.Staggered((32, 32), boundary=P)
    viscosity, time = 0.05 / waves, 0.1 / waves
    start = pde.taylor_green(box, waves=waves)
    chosen = tuple(options.items())
    u, p = march(start, viscosity, time / steps, steps, box=box, options=chosen)
    expected, pressure = pde.taylor_green(box, viscosity, time, waves)
    return distance(u, expected), distance(p, pressure)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"differences": "central", "conservative": True, "outer_budget": 1},
        pytest.param({"differences": "central", "linearization": "newton"}, marks=pytest.mark.slow),
        pytest.param({"differences": "central", "linearization": "picard"}, marks=pytest.mark.slow),
    ],
)
def test_vortices_decay_with_second_order_in_space(options):
    """Steps go with the square of the spacing; velocity and pressure."""
    errors = [decayed(waves, steps, options) for waves, steps in ((2, 64), (1, 256))]
    orders = np.log2(np.divide(*errors))
    # Both rise towards 2 with the grid; that of the pressure starts lower.
    assert np.all(np.abs(orders - 2) < [0.1, 0.15]), (errors, orders)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"outer_budget": 1}, {"linearization": "newton"}])
def test_first_order_in_time(options):
    """Of steps halved twice on one grid; a second flow, as a vortex is not carried at all."""
    box = pde.Staggered((12, 12), boundary=P)
    start = (pde.random_velocity(jax.random.key(1), box, 0.02), jnp.zeros((12, 12)))
    chosen = tuple({"differences": "central", **options}.items())
    coarse, middle, fine = (
        march(start, 0.02, 0.1 / n, n, box=box, options=chosen)[0] for n in (16, 32, 64)
    )
    assert abs(np.log2(distance(coarse, middle) / distance(middle, fine)) - 1) < 0.1


@functools.partial(jax.jit, static_argnums=0)
def cavity(cells, viscosity, steps):
    """After so many steps from rest, and what the last of them changed."""
    flow = pde.lid_driven_cavity(
        cells, viscosity, dt=0.5, outer_budget=1, differences="central", conservative=True
    )
    rest = flow.state(tuple(jnp.zeros(part.shape) for part in flow.like[0]))

    def advance(_, states):
        return flow.step(states[0], budget=bl.Budget(50, rtol=1e-6)), states[0]

    return jax.lax.fori_loop(0, steps, advance, (rest, rest))


def deviation(cells, reynolds):
    """The largest difference to the tables, in speeds of the lid."""
    (velocity, pressure), (before, _) = cavity(cells, 1 / reynolds, 60 + reynolds // 10)
    assert distance(velocity, before) < 1e-4
    assert abs(float(jnp.mean(pressure))) < 1e-9
    box = pde.Staggered((cells, cells))
    assert float(jnp.max(jnp.abs(pde.Divergence(box) @ velocity))) < 1e-4
    worst = 0.0
    for component, table in enumerate(GHIA):
        places, speeds = table[:, 0], table[:, {100: 1, 400: 2}[reynolds]]
        # Faces of an even number of cells lie on the centre line.
        centre = velocity[component].take(cells // 2 - 1, axis=component)
        lid = 1.0 if component == 0 else 0.0
        x = box.components[component].coordinates()[1 - component]
        x, y = np.concatenate([[0.0], x, [1.0]]), np.concatenate([[0.0], centre, [lid]])
        worst = max(worst, float(np.nanmax(np.abs(np.interp(places, x, y) - speeds))))
    return worst


@pytest.mark.slow
@pytest.mark.parametrize("reynolds", [100, 400])
def test_cavity_against_the_table(reynolds):
    """On half of the cells of those who made it; the error is of second order."""
    assert deviation(64, reynolds) < 0.02


@pytest.mark.slow
@pytest.mark.parametrize("reynolds", [100, 400])
def test_cavity_of_as_many_cells_as_the_table(reynolds):
    assert deviation(128, reynolds) < 0.02


@pytest.mark.slow
def test_steady_flow_by_newton_from_rest():
    """With a step so long that no change in time is left."""
    flow = pde.lid_driven_cavity(
        24,
        0.01,
        dt=1e4,
        linearization="newton",
        outer_budget=bl.Budget(10, rtol=1e-8),
        differences="central",
        conservative=True,
    )
    rest = flow.state(tuple(jnp.zeros(part.shape) for part in flow.like[0]))
    state, solution = flow.step_with_solution(rest)
    assert int(solution.status) == 0
    assert int(solution.iterations) <= 6
    assert distance(state[0], cavity(24, 0.01, 100)[0][0]) < 1e-4


SETTINGS = {
    "periodic": pde.Staggered((5, 4), (1.0, 0.9), P),
    "cavity": pde.Staggered((4, 5), (1.0, 1.1)),
}


def setting(name):
    box = SETTINGS[name]
    key = jax.random.key(3)
    point = {
        "viscosity": jnp.asarray(0.05),
        "u": jax.jit(lambda key: pde.random_velocity(key, box, 0.02))(key),
        "forcing": tuple(jnp.cos(3 * grid.mesh()[0]) + i for i, grid in enumerate(box.components)),
    }
    if name == "cavity":
        point["lid"] = jnp.linspace(0.5, 1.0, 3)
    return box, point


def stepper_of(box, point, **options):
    walls = ({(1, 1): point["lid"]}, None) if "lid" in point else None
    return pde.NavierStokes(
        box, point["viscosity"], 0.2, forcing=point["forcing"], boundary_values=walls, **options
    )


def outer(state):
    """Of the pressure, too, its mean included."""
    (u, v), p = state
    return jnp.sum(u**3) + jnp.sum(jnp.sin(v)) + 0.1 * jnp.sum(p**2) + jnp.sum(p)


@functools.partial(jax.jit, static_argnames=("options",))
def loss(point, *, box, options):
    flow = stepper_of(box, point, **dict(options))
    return outer(flow.step(flow.state(point["u"])))


@functools.partial(jax.jit, static_argnames=("options",))
def value_and_gradient(point, *, box, options):
    """The loss, its gradient, and the state at which it was taken."""

    def with_state(point):
        flow = stepper_of(box, point, **dict(options))
        state = flow.step(flow.state(point["u"]))
        return outer(state), state

    (value, state), gradient = jax.value_and_grad(with_state, has_aux=True)(point)
    return value, gradient, state


def direct_gradient(box, point, state, options):
    """With a sparse factorisation of the transposed Jacobian at the solution."""
    solution, unflatten = jax.flatten_util.ravel_pytree(state)

    def residual(x, point):
        flow = stepper_of(box, point, **options)
        held = flow.problem().equation(x)
        found = held.residual(unflatten(x), (flow._data(), flow.state(point["u"])))
        return jax.flatten_util.ravel_pytree(found)[0]

    @jax.jit
    def pulled(x, point, adjoint):
        return jax.vjp(lambda point: residual(x, point), point)[1](-adjoint)[0]

    jacobian = sp.csc_array(jax.jit(jax.jacfwd(residual))(solution, point))
    wanted = jax.jit(jax.grad(lambda x: outer(unflatten(x))))(solution)
    adjoint = sp.linalg.splu(jacobian).solve(np.array(wanted), trans="T")
    return pulled(solution, point, jnp.asarray(adjoint))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        # The adjoint is preconditioned as always; the step needs no more of so few unknowns.
        ("cavity", {"derivative": "implicit", "solver": bl.GMRES(60)}),
        pytest.param("cavity", {"derivative": "implicit"}, marks=pytest.mark.slow),
        pytest.param(
            "periodic",
            {"derivative": "frozen", "differences": "central"},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "periodic",
            {"linearization": "newton", "differences": "central", "conservative": True},
            marks=pytest.mark.slow,
        ),
        pytest.param("periodic", {"derivative": "implicit"}, marks=pytest.mark.slow),
        pytest.param(
            "cavity",
            {"derivative": "frozen", "conservative": True},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_gradient_is_that_of_a_sparse_factorisation(name, options):
    """To the initial state, the forcing, the viscosity and how the lid moves.

    Frozen drops the advecting velocity in Taylor's test, and nothing else does.
    """
    box, point = setting(name)
    function = functools.partial(value_and_gradient, box=box, options=tuple(options.items()))
    _, gradient, state = function(point)
    expected = direct_gradient(box, point, state, options)
    for got, want in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-8 * float(jnp.max(jnp.abs(want))))
    if "solver" in options:
        return  # compared with what the others are already
    direction = jax.tree.map(lambda leaf: 0.3 * jnp.cos(leaf), point)
    slope = taylor_test(lambda p: function(p)[0], point, direction, derivative=gradient).slope
    assert (slope < 1.2) if options.get("derivative") == "frozen" else (slope >= 1.95)


@pytest.mark.slow
def test_unrolled_is_the_derivative_of_the_linearisations_done():
    """Two of them, against dense algebra."""
    box, point = setting("periodic")
    options = (("derivative", "unrolled"), ("outer_budget", 2))

    @jax.jit
    def dense(point):
        flow = stepper_of(box, point)
        state = flow.state(point["u"])
        x, unflatten = jax.flatten_util.ravel_pytree(state)
        for _ in range(2):
            at = unflatten(x)
            matrix, rhs = flow.problem().system(at, (flow, state))

            def column(v, matrix=matrix):
                return jax.flatten_util.ravel_pytree(matrix.matvec(unflatten(v)))[0]

            rows = jax.vmap(column)(jnp.eye(x.size))
            x = jnp.linalg.solve(rows.T, jax.flatten_util.ravel_pytree(rhs)[0])
        return outer(unflatten(x))

    value, gradient = jax.value_and_grad(loss)(point, box=box, options=options)
    expected, reference = jax.jit(jax.value_and_grad(dense))(point)
    np.testing.assert_allclose(value, expected, rtol=1e-8)
    for got, want in zip(jax.tree.leaves(gradient), jax.tree.leaves(reference), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-7 * float(jnp.max(jnp.abs(want))))


@pytest.mark.slow
def test_detached_steps_are_constants():
    box, point = setting("periodic")
    options = (("derivative", "detached"), ("outer_budget", 1))
    gradient = jax.grad(loss)(point, box=box, options=options)
    assert all(not jnp.any(leaf) for leaf in jax.tree.leaves(gradient))


@pytest.mark.slow
def test_trajectories_with_checkpoints_have_the_same_gradient():
    box, point = setting("cavity")

    @functools.partial(jax.jit, static_argnums=1)
    def through(point, checkpoint):
        flow = stepper_of(box, point, outer_budget=1)
        states = pde.rollout(flow, flow.state(point["u"]), 3, checkpoint=checkpoint)
        return outer(jax.tree.map(lambda leaf: leaf[-1], states))

    kept, again = (jax.grad(through)(point, flag) for flag in (False, True))
    assert distance(kept, again) < 1e-10
    direction = jax.tree.map(jnp.ones_like, point)
    flow = {"checkpoint": True}
    slope = taylor_test(
        lambda p: through(p, flow["checkpoint"]), point, direction, derivative=again
    )
    # One linearisation a step is not the step that `implicit` differentiates.
    assert slope.slope < 1.5


@pytest.mark.slow
def test_budgets_of_both_kinds_are_kept():
    """One cycle a linearisation, and as many linearisations as asked for, traced."""
    box, point = setting("periodic")
    state = (point["u"], jnp.zeros(box.cells.shape))

    @jax.jit
    def counts(outer_budget, budget):
        flow = pde.NavierStokes(box, 0.05, 0.2, outer_budget=outer_budget, solver=bl.GMRES(4))
        _, solution = flow.step_with_solution(state, budget=budget)
        return solution.iterations, solution.applications

    for many, cycles in ((1, 1), (3, 2)):
        iterations, applications = counts(jnp.int32(many), bl.Budget(iterations=cycles))
        assert int(iterations) == many
        # Each cycle: four products and a residual; each solve a first one; each Picard one.
        assert int(applications) <= 1 + many * (2 + 5 * cycles) + many
    assert counts._cache_size() == 1


def test_states():
    box = pde.Staggered((6, 5), (1.0, 0.7), P, dtype=jnp.float32)
    channel = pde.Staggered((6, 5))
    walls = ({(0, 0): 1.0, (0, 1): 1.0}, None)

    @jax.jit
    def divergences(key):
        divergence = pde.Divergence(box)
        random = divergence @ pde.random_velocity(key, box)
        vortices = divergence @ pde.taylor_green(box, waves=2)[0]
        u = pde.divergence_free(channel, [jnp.zeros((5, 5)), jnp.ones((6, 4))], walls)
        through = pde.Divergence(channel)
        return random, vortices, through @ u + through.boundary_term(walls)

    *single, double = divergences(jax.random.key(0))
    for divergence in single:
        assert divergence.dtype == jnp.float32
        np.testing.assert_allclose(divergence, 0.0, atol=2e-5)
    np.testing.assert_allclose(double, 0.0, atol=1e-12)


@pytest.mark.slow
def test_three_dimensions():
    """A flow that is the same along the third axis is that of two dimensions."""
    closed = pde.Staggered((4, 4, 4))
    velocity = pde.random_velocity(jax.random.key(0), closed)
    np.testing.assert_allclose(pde.Divergence(closed) @ velocity, 0.0, atol=1e-12)
    flat, solid = (pde.Staggered((6,) * n, boundary=P) for n in (2, 3))
    velocity = pde.random_velocity(jax.random.key(0), flat, 0.02)
    start = (velocity, jnp.zeros((6, 6)))
    u, p = pde.NavierStokes(flat, 0.02, 0.1).step(start)
    raised = jax.tree.map(lambda leaf: jnp.repeat(leaf[..., None], 6, axis=2), start)
    raised = ((*raised[0], jnp.zeros((6, 6, 6))), raised[1])
    (a, b, c), q = pde.NavierStokes(solid, 0.02, 0.1).step(raised)
    assert distance((a[..., 2], b[..., 3], q[..., 1]), (*u, p)) < 1e-8
    assert float(jnp.max(jnp.abs(c))) < 1e-9


@pytest.mark.slow
def test_no_flow_that_comes_from_nowhere():
    """Of traced wall values the status tells; others are looked at before the first step."""
    walls = pde.Staggered((4, 4))
    flow = pde.NavierStokes(walls, 0.1, 0.1, outer_budget=1, solver=bl.BiCGStab())
    rest = flow.state(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), walls.like))
    inflow = jnp.array([1.0, 1.0])

    @jax.jit
    def states(left, right):
        controls = {"boundary_values": ({(0, 0): left, (0, 1): right}, None)}
        return pde.rollout_with_solutions(flow, rest, 2, controls=controls, budget=bl.Budget(1))

    (velocity, _), solution = states(inflow, jnp.array([1.0, 0.5]))
    assert solution.status.tolist() == [bl.Status.BUDGET, bl.Status.INCONSISTENT]
    np.testing.assert_array_equal(np.isnan(velocity[0][:, 0, 0]), [False, True])
    with pytest.raises(ValueError, match="net outflow of -1"):
        pde.rollout(flow, rest, 2, controls={"boundary_values": ({(0, 0): inflow}, None)})
    with pytest.raises(ValueError, match="net outflow of -1"):
        flow.step(rest, theta={"boundary_values": ({(0, 0): 1.0}, None)})


def test_bad_input():
    box, walls = pde.Staggered((4, 4), boundary=P), pde.Staggered((4, 4))
    for options, message in (
        ({"linearization": "secant"}, "linearization should be"),
        ({"derivative": "none"}, "derivative should be"),
        ({"derivative": "unrolled", "adjoint_solver": bl.GMRES()}, "Leave out adjoint_solver"),
        ({"differences": "quick"}, "differences should be"),
        ({"forcing": (1.0,)}, "one part for each of 2 components, got 1"),
        ({"forcing": 1.0}, "one part for each of 2 components, got float"),
        ({"forcing": (jnp.ones(4), 0.0)}, "number or a field of shape"),
        ({"boundary_values": ({(1, 1): 1.0}, None)}, "values belong to sides"),
    ):
        with pytest.raises(ValueError, match=message):
            pde.NavierStokes(box, 0.1, 0.1, **options)
    with pytest.raises(TypeError, match="outer_budget should be a Budget or a whole number"):
        pde.NavierStokes(box, 0.1, 0.1, outer_budget=0.5)
    with pytest.raises(ValueError, match="viscosity should be positive"):
        pde.NavierStokes(box, -0.1, 0.1)
    with pytest.raises(ValueError, match="dt should be positive"):
        pde.NavierStokes(box, 0.1, 0.0)
    with pytest.raises(ValueError, match="viscosity should be a number"):
        pde.NavierStokes(box, jnp.ones((4, 4)), 0.1)
    with pytest.raises(ValueError, match="net outflow of 1"):
        pde.NavierStokes(walls, 0.1, 0.1, boundary_values=({(0, 1): 1.0}, None))
    with pytest.raises(TypeError, match="should be a Staggered grid"):
        pde.NavierStokes(pde.Grid((4, 4)), 0.1, 0.1)
    for shape in ((1, 4), (1, 1)):
        for boundary in (P, pde.Dirichlet()):
            with pytest.raises(ValueError, match="takes at least"):
                pde.Staggered(shape, boundary=boundary)
    with pytest.raises(ValueError, match="at least 3 cells along each axis"):
        pde.lid_driven_cavity(2, 0.1, 0.1)
    direct = pde.SparseDirect()
    assert pde.lid_driven_cavity(2, 0.1, 0.1, solver=direct, adjoint_solver=direct).grid.size == 4
    flow = pde.NavierStokes(box, 0.1, 0.1)
    field = jnp.ones((4, 4))
    for state in ((field, field), [field, field], field):
        with pytest.raises(ValueError, match=r"u should be a state \(velocity, pressure\)"):
            flow.step(state)
    with pytest.raises(ValueError, match="velocity should have the grid's shape"):
        flow.state((jnp.ones((3, 4)), field))
    with pytest.raises(ValueError, match="periodic along two axes"):
        pde.taylor_green(walls)
    with pytest.raises(ValueError, match="waves should be"):
        pde.taylor_green(box, waves=0)
    with pytest.raises(ValueError, match="smoothing should not be negative"):
        pde.random_velocity(jax.random.key(0), box, -1.0)
