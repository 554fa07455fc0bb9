"""How the published Navier–Stokes training lost its adjoint, and what this library makes of it.

There one absolute tolerance, 1e-5 of the primal's right-hand side, served both solves.  The
adjoint's right-hand side is the derivative of a mean over a batch and all of its points, and was
smaller than that: its solve was done before it began, and the gradient exactly zero.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from jax.scipy.sparse.linalg import gmres

import bilevel as bl
import bilevel_pde as pde
from tests.core.compiling import jitted

# Its compilations take half a minute, whatever the grid.
pytestmark = pytest.mark.slow

CELLS, BATCH, RESTART, CYCLES, TOLERANCE = 12, 25, 8, 120, 1e-5


class Step(NamedTuple):
    """One linear solve of the flow, how far off it should be, and the primal's tolerance."""

    problem: bl.LinearSystem
    flow: pde.NavierStokes
    velocity: Any
    wanted: Any
    zero: Any
    absolute: float

    def outer_loss(self, x: Any, theta: Any) -> Any:
        """The share of one sample in the mean over a batch and its points."""
        del theta
        velocity, _ = x
        parts = zip(velocity, self.wanted, strict=True)
        return sum(jnp.mean((a - b) ** 2) for a, b in parts) / (2 * BATCH)

    def hypergradient(self, adjoint_budget: bl.Budget | None) -> bl.Hypergradient:
        return bl.hypergradient(
            self.outer_loss,
            self.problem,
            self.velocity,
            self.zero,
            solver=bl.GMRES(restart=RESTART),
            estimator=bl.Implicit(bl.GMRES(restart=RESTART)),
            budget=bl.Budget(CYCLES, rtol=TOLERANCE),
            adjoint_budget=adjoint_budget,
        )


@pytest.fixture(scope="module")
def step():
    box = pde.Staggered((CELLS, CELLS), boundary=pde.Periodic())
    flow = pde.NavierStokes(box, 1e-4, 0.1, outer_budget=1)
    x, y = box.cells.mesh()
    angles = 2 * np.pi * x, 2 * np.pi * y
    velocity = (jnp.sin(angles[1] + 0.3), jnp.cos(angles[0] - 0.2) + 0.5)
    wanted = tuple(0.95 * part for part in velocity)
    zero = tuple(jnp.zeros(part.shape) for part in velocity), jnp.zeros(x.shape)

    def source(u: Any) -> Any:
        return tuple(part / flow.dt for part in u), jnp.zeros(x.shape)

    return Step(
        bl.LinearSystem(flow.matrix, source),
        flow,
        velocity,
        wanted,
        zero,
        TOLERANCE * float(optax.tree.norm(source(velocity))),
    )


@pytest.fixture(scope="module")
def exact(step: Step):
    return flat(step.hypergradient(bl.Budget(CYCLES, rtol=1e-10)).gradient)


@pytest.fixture(scope="module")
def shared_tolerance(step: Step):
    return step.hypergradient(bl.Budget(CYCLES, atol=step.absolute))


def flat(gradient: Any) -> np.ndarray:
    return np.concatenate([np.ravel(part) for part in gradient])


@pytest.fixture(scope="module")
def by_hand(step: Step):
    """The gradient of the loss times a weight, with JAX's GMRES and the primal's tolerance."""

    def solve(matvec: Any, rhs: Any) -> Any:
        settings = {"tol": 0.0, "atol": step.absolute, "restart": RESTART, "maxiter": CYCLES}
        return gmres(matvec, rhs, **settings)[0]

    def loss(u: Any, weight: Any) -> Any:
        matrix = step.flow.matrix(u)
        rhs, unflatten = ravel_pytree(step.problem.rhs(u))

        def matvec(v: Any) -> Any:
            return ravel_pytree(matrix.matvec(unflatten(v)))[0]

        x = jax.lax.custom_linear_solve(matvec, rhs, solve, transpose_solve=solve)
        return weight * step.outer_loss(unflatten(x), u)

    gradient = jitted(jax.grad(loss))
    return lambda weight: flat(gradient(step.velocity, weight))


def test_the_published_gradient_is_zero_without_a_word(by_hand, exact):
    assert np.all(by_hand(1.0) == 0.0)
    # The same code with the loss in other units: it is the tolerance, and nothing else.
    np.testing.assert_allclose(by_hand(1e8) / 1e8, exact, atol=1e-2 * np.abs(exact).max())


def test_a_primal_tolerance_is_above_the_whole_right_hand_side(step, shared_tolerance):
    # A test whose adjoint would start above its tolerance would show nothing.
    adjoint = shared_tolerance.adjoint
    assert float(adjoint.tolerance) == pytest.approx(step.absolute)
    assert float(adjoint.scale) < 0.7 * step.absolute


def test_such_an_adjoint_still_makes_a_cycle_and_says_what_it_left(shared_tolerance, exact):
    adjoint = shared_tolerance.adjoint
    assert int(adjoint.iterations) == 1
    assert 0.01 < float(adjoint.relative_residual) < 1
    found = flat(shared_tolerance.gradient)
    true = np.linalg.norm(found - exact)
    assert 0 < true < np.linalg.norm(exact)
    # The estimate is of what is missing, whatever the tolerance calls it.
    assert float(shared_tolerance.error.adjoint) == pytest.approx(true, rel=0.5)


def test_the_diagnosis_says_that_the_tolerance_asks_for_nothing(step, shared_tolerance):
    assert "as large as the right-hand side" in shared_tolerance.adjoint.diagnosis
    assert "rtol" in shared_tolerance.adjoint.diagnosis
    assert "as large as" not in shared_tolerance.primal.diagnosis


def test_a_tolerance_relative_to_its_own_right_hand_side_is_met(step, exact):
    result = step.hypergradient(bl.Budget(CYCLES, rtol=TOLERANCE))
    assert int(result.adjoint.iterations) > 1
    assert float(result.adjoint.relative_residual) <= TOLERANCE
    np.testing.assert_allclose(flat(result.gradient), exact, atol=1e-3 * np.abs(exact).max())


class State(NamedTuple):
    level: Any
    rejected: Any


class FirstOneThenTheOther:
    """One fidelity before the first update, and another one from the next epoch on."""

    requires = frozenset()

    def __init__(self, *fidelities: bl.Fidelity):
        self.fidelities = fidelities

    def init(self) -> State:
        return State(jnp.int32(0), jnp.int32(0))

    def update(self, state: State, metric=None, *, gradient_norm=None, error=None) -> State:
        return State(state.level + 1, state.rejected)

    def fidelity(self, state: State) -> bl.Fidelity:
        def chosen(first: Any, second: Any) -> Any:
            return jnp.where(state.level == 0, jnp.asarray(first), jnp.asarray(second))

        return jax.tree.map(chosen, *self.fidelities)


def test_a_training_run_shows_the_adjoint_and_the_full_solve_solves_it(step):
    def loss(theta: Any, batch: None, fidelity: bl.Fidelity) -> Any:
        del batch
        solver = bl.GMRES(restart=RESTART)
        solution = bl.solve(
            step.problem,
            theta,
            step.zero,
            solver=solver,
            estimator=bl.Implicit(solver),
            fidelity=fidelity,
        )
        return step.outer_loss(solution.value, theta)

    # What the user gives for both solves: the absolute tolerance is for the primal alone.
    both = bl.Budget(CYCLES, rtol=TOLERANCE, atol=step.absolute)
    task = bl.Task(step.velocity, loss, optimizer=optax.sgd(1.0), full=both)
    shared = bl.Fidelity(bl.Budget(CYCLES, rtol=TOLERANCE), bl.Budget(CYCLES, atol=step.absolute))
    controller = FirstOneThenTheOther(shared, task.full_fidelity)
    run = bl.optimize(task, controller=controller, epochs=2, progress=False)
    first, second = (record for record in run.history if record.epoch > 0)
    assert first.primal_iterations > 5
    assert first.adjoint_iterations == 1
    assert first.adjoint_residual > 0.01
    assert second.adjoint_iterations > 5
    assert 0 < second.adjoint_residual <= TOLERANCE
