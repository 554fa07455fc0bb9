"""What a user is told who got an argument wrong, and what results look like in print."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

import bilevel as bl

EYE, X0 = jnp.eye(3), jnp.zeros(3)
SYSTEM = bl.LinearSystem(EYE, jnp.ones(3))
QUARTIC = bl.Minimization(lambda x, theta: jnp.sum((x - theta) ** 4))


class Pair(bl.InnerSolver):
    def init(self, problem, x):
        return (x, x)

    def step(self, problem, state, residual):
        return state


OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"fidelity": bl.Budget(3)}, r"fidelity must be a Fidelity, got Budget\(.*Write budget="),
    ({"solver": bl.Implicit()}, r"solver must be an InnerSolver.*Write estimator=Implicit"),
    ({"solver": bl.GMRES}, r"Write solver=GMRES\(\.\.\.\)"),
    ({"estimator": bl.GMRES()}, r"estimator must be an Estimator.*Write solver=GMRES"),
    ({"budget": 10}, r"Write budget=Budget\(iterations=10\)"),
    ({"adjoint_budget": 1e-3}, r"Write adjoint_budget=Budget\(rtol=0.001\)"),
    ({"probe": bl.Probe}, r"Write probe=Probe\.zeros\(\)"),
]


@pytest.mark.parametrize(("options", "message"), OPTIONS)
def test_an_argument_of_another_kind(options, message):
    with pytest.raises(TypeError, match=message):
        bl.solve(SYSTEM, None, X0, **options)


@pytest.mark.parametrize("name", ["Unrolled", "OneStep"])
def test_a_guess_for_an_adjoint_that_is_not_solved(name):
    with pytest.raises(TypeError, match=rf"adjoint_guess: {name} solves no adjoint.*use Implicit"):
        bl.solve(SYSTEM, None, X0, estimator=getattr(bl, name)(), adjoint_guess=X0)


def test_more_last_steps_than_there_is_room_for():
    with pytest.raises(ValueError, match=r"Use Unrolled\(last=5000, max_iterations=5000\)"):
        bl.Unrolled(last=5000)


PROBLEMS: list[tuple[Any, Any, str]] = [
    (bl.LinearSystem(EYE, jnp.ones(4)), X0, r"the right-hand side at x has shape \(4,\)"),
    (bl.LinearSystem(EYE, jnp.ones(4)), jnp.zeros(4), r"a matrix of shape \(3, 3\) acts on one"),
    (bl.FixedPoint(lambda x, theta: jnp.ones(4)), X0, r"the mapping at x has shape \(4,\)"),
    (bl.RootFinding(lambda x, theta: (x, x)), X0, r"the residual must have the structure of x0"),
]


@pytest.mark.parametrize(("problem", "x0", "message"), PROBLEMS)
def test_what_does_not_fit_the_unknown(problem, x0, message):
    with pytest.raises(TypeError, match=message):
        bl.solve(problem, None, x0)


def test_an_error_in_a_user_s_function_says_where_it_came_up():
    problem = bl.LinearSystem(lambda theta: lambda v: v * jnp.ones(4), jnp.ones(3))
    with pytest.raises(TypeError, match="incompatible shapes") as caught:
        bl.solve(problem, None, X0)
    assert "LinearSystem: this came up in its residual" in "".join(caught.value.__notes__)


def test_a_state_without_an_iterate():
    with pytest.raises(TypeError, match=r"Pair: value\(state\) must be like x0.*Define Pair.value"):
        bl.solve(bl.FixedPoint(lambda x, theta: 0.5 * x), None, X0, solver=Pair())


def test_nothing_to_differentiate():
    with pytest.raises(TypeError, match=r"theta\['a'\] is int.*Write 3.0 for 3"):
        bl.hypergradient(lambda x, theta: jnp.sum(x), QUARTIC, {"a": 3}, X0)


def test_a_krylov_solver_for_what_is_not_linear():
    with pytest.raises(bl.IncompatibleError, match="Use LBFGS or Newton instead"):
        bl.solve(QUARTIC, 1.0, X0, solver=bl.ConjugateGradient())


def test_results_are_printed_with_their_numbers():
    result = bl.hypergradient(lambda x, theta: jnp.sum(x), SYSTEM, 1.0, X0)
    assert "status=CONVERGED, residual_norm=0, iterations=1" in repr(result)
    assert "error=TruncationError(primal=0, adjoint=0, total=0" in repr(result)
    batch = jax.vmap(lambda theta: bl.solve(QUARTIC, theta, X0))(jnp.arange(2.0))
    assert "status={CONVERGED: 2}" in repr(batch)
    printed = []
    jax.jit(lambda theta: printed.append(repr(bl.solve(QUARTIC, theta, X0))))(1.0)
    assert "status=i32[]" in printed[0]
    assert (
        repr(bl.Ladder.iterations(2).fidelity(0).budget) == "Budget(iterations=2, rtol=0, atol=0)"
    )
