"""Nothing goes to the host inside a step, but in solvers that are declared to do so."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel as bl
import bilevel_pde as pde
from bilevel.outer.control import uniform
from bilevel.outer.update import State, make_update
from tests.core.cases import FAMILIES, SOLVERS, by_name
from tests.device.tracing import callbacks
from tests.libraries.cases import PROBLEMS, rows
from tests.marks import others_slow

ESTIMATORS = [
    bl.Implicit(),
    bl.Unrolled(),
    bl.Neumann(step_size=0.3),
    bl.OneStep(),
    bl.Nystrom(rank=2),
]


def gradient_through(problem, x0, solver, estimator):
    """The gradient of a loss through a solve, with budgets that are traced."""

    def value(theta, primal, adjoint):
        solution = bl.solve(
            problem,
            theta,
            x0,
            solver=solver,
            estimator=estimator,
            budget=bl.Budget(primal, rtol=1e-6),
            adjoint_budget=bl.Budget(adjoint, rtol=1e-6),
        )
        return jnp.sum(jnp.sin(solution.value))

    return jax.value_and_grad(value)


@pytest.mark.parametrize("case", others_slow(SOLVERS, *FAMILIES), ids=by_name)
def test_no_solver_of_the_core_leaves_the_device_with_any_estimator(case):
    example, traced = case.example, 0
    for estimator in ESTIMATORS:
        function = gradient_through(example.problem, example.x0, case.make(), estimator)
        try:
            assert not callbacks(function, example.theta, 3, 4)
        except bl.IncompatibleError:
            continue
        traced += 1
    assert traced >= 2
    assert not case.make().on_host


@pytest.mark.parametrize("row", rows())
def test_wrapped_solvers_leave_it_exactly_where_they_say_so(row):
    problem, theta, x0 = PROBLEMS[row.kind]
    found = callbacks(gradient_through(problem, x0, row.solver, None), theta, 3, 4)
    assert bool(found) == row.solver.on_host


GRID = pde.Grid((8, 8), 1.0, pde.Dirichlet(), "cell")
FIELD = jnp.ones(GRID.shape)


def poisson(solver):
    problem = bl.LinearSystem(
        lambda theta: -pde.Diffusion(GRID, theta),
        lambda theta: theta,
        symmetric=True,
        positive_definite=True,
    )
    return gradient_through(problem, jnp.zeros(GRID.shape), solver, bl.Implicit(solver))


def test_operators_and_preconditioners_of_grids_stay_on_the_device():
    preconditioned = bl.ConjugateGradient(preconditioner=pde.Multigrid())
    for solver in (bl.ConjugateGradient(), preconditioned):
        assert not callbacks(poisson(solver), FIELD, 3, 4)
    assert callbacks(poisson(pde.SparseDirect()), FIELD, 3, 4) == {"pure_callback"}
    assert pde.SparseDirect.on_host


def task():
    def loss_of(theta, batch, fidelity):
        problem = bl.Minimization(lambda x, t: jnp.sum((x - t) ** 2 + 0.1 * x**4))
        given = {"solver": bl.GradientDescent(0.2), "fidelity": fidelity}
        return jnp.sum((bl.solve(problem, theta, jnp.zeros(3), **given).value - batch) ** 2)

    batches = [jnp.full(3, 0.5), jnp.full(3, 0.7)]
    return bl.Task(jnp.ones(3), loss_of, batches=batches, ladder=bl.Ladder.iterations(1, 1, 9))


def test_an_update_of_the_outer_loop_moves_nothing():
    """Traced there is no callback in it, and run there is no transfer, not of a number."""
    trained, optimizer = task(), optax.adam(0.1)
    state = State(trained.parameters, optimizer.init(trained.parameters), trained.first_memory)
    controller = bl.ProgressiveRefinement(trained.ladder)
    fidelity = uniform(controller.fidelity(controller.init()))
    update = make_update(trained, optimizer)
    batch = next(trained.epoch_batches(1, lambda epoch: jax.random.key(0)))
    arguments = jax.device_put(eqx.filter((state, batch, fidelity), eqx.is_array))
    static = eqx.filter((state, batch, fidelity), eqx.is_array, inverse=True)

    def whole(arguments):
        return eqx.filter(update(*eqx.combine(arguments, static)), eqx.is_array)

    assert not callbacks(whole, arguments)
    compiled = jax.jit(whole).lower(arguments).compile()
    jax.block_until_ready(compiled(arguments))
    with jax.transfer_guard("disallow"):
        jax.block_until_ready(compiled(arguments))


def test_the_trace_sees_callbacks_wherever_they_are():
    """Or all of the above would pass."""

    def called(x):
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return jax.pure_callback(np.asarray, shape, x, vmap_method="sequential")

    places = {
        "plain": called,
        "jit": jax.jit(called),
        "loop": lambda x: jax.lax.fori_loop(0, 3, lambda _, y: called(y), x),
        "branch": lambda x: jax.lax.cond(x[0] > 0, called, lambda y: y, x),
        "scan": lambda x: jax.lax.scan(lambda y, _: (called(y), None), x, length=2)[0],
        "vmap": jax.vmap(called),
        "print": lambda x: (jax.debug.print("{}", x), x)[1],
    }
    for name, function in places.items():
        assert callbacks(function, jnp.ones(2)), name
