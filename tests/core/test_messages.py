"""What a user is told who got an argument wrong, and what results look like in print."""

import copy
import inspect
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import sparse

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
    ({"solver": "lbfgs"}, r"got 'lbfgs' of type str\. Write solver=bl\.LBFGS\(\)"),
    ({"solver": "gradient descent"}, r"Write solver=bl\.GradientDescent\(step_size=\.\.\.\)"),
    ({"estimator": "implicit"}, r"Write estimator=bl\.Implicit\(\)"),
    ({"solver": optax.adam(0.1)}, r"solver=bl\.Optax\(optax\.adam\(0\.1\)\)"),
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
    (bl.LinearSystem(lambda theta: lambda v: v, jnp.ones(4)), X0, r"the right-hand side at x has"),
    (
        bl.LinearSystem(lambda theta: lambda v: v[1:], jnp.ones(3)),
        X0,
        r"operator\.matvec\(x\) at x",
    ),
    (SYSTEM, [0.0, 0.0, 0.0], r"x0 is a list.*write jnp\.asarray\(x0\)"),
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
    note = "While evaluating operator.matvec(x) of LinearSystem with x f64[3], theta None."
    assert note in caught.value.__notes__


def test_a_state_without_an_iterate():
    with pytest.raises(TypeError, match=r"Pair: value\(state\) must be like x0.*Define Pair.value"):
        bl.solve(bl.FixedPoint(lambda x, theta: 0.5 * x), None, X0, solver=Pair())


def test_nothing_to_differentiate():
    with pytest.raises(TypeError, match=r"theta\['a'\] is int.*Write 3.0 for 3"):
        bl.hypergradient(lambda x, theta: jnp.sum(x), QUARTIC, {"a": 3}, X0)


def test_a_krylov_solver_for_what_is_not_linear():
    with pytest.raises(
        bl.IncompatibleError,
        match=r"Use LBFGS, Newton or ArmijoGradientDescent, or Newton\(linear=Conj",
    ):
        bl.solve(QUARTIC, 1.0, X0, solver=bl.ConjugateGradient())


def test_results_are_printed_with_their_numbers():
    result = bl.hypergradient(lambda x, theta: theta * jnp.sum(x), SYSTEM, 1.0, X0)
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


def test_nothing_reads_theta():
    captured = jnp.ones(3)
    problem = bl.Minimization(lambda x, _: jnp.sum((x - captured) ** 2))
    with pytest.raises(ValueError, match=r"nothing reads theta.*captured\? Pass it as an argument"):
        bl.hypergradient(lambda x, _: jnp.sum(x), problem, captured, X0)
    with pytest.raises(ValueError, match="nothing reads theta"):  # a tracer is captured, too
        jax.jit(
            lambda theta: bl.hypergradient(
                lambda x, _: jnp.sum(x), bl.RootFinding(lambda x, _: x - theta), theta, X0
            )
        )(captured)
    assert bl.solve(problem, captured, X0).status == bl.Status.CONVERGED


def test_theta_is_read_by_the_outer_loss_alone_or_by_one_leaf_of_it():
    result = bl.hypergradient(lambda x, theta: theta @ x, SYSTEM, jnp.arange(3.0), X0)
    assert result.gradient.tolist() == [1, 1, 1]
    system = bl.LinearSystem(EYE, lambda theta: theta["b"])
    theta = {"b": jnp.ones(3), "unused": 2.0}
    gradient = bl.hypergradient(lambda x, _: jnp.sum(x), system, theta, X0).gradient
    assert float(gradient["unused"]) == 0
    assert bl.hypergradient(lambda x, _: jnp.sum(x), SYSTEM, None, X0).gradient is None


CONTEXTS: list[tuple[Any, Any, Any, str]] = [
    (
        QUARTIC,
        jnp.ones(4),
        X0,
        r"objective\(x, theta\) of Minimization with x f64\[3\], theta f64\[4\]",
    ),
    (QUARTIC, 1.0, [0.0, 0.0], r"x0 is a list.*write jnp\.asarray\(x0\)"),
    (
        bl.LinearSystem(lambda theta: EYE @ theta, jnp.ones(3)),
        jnp.ones(4),
        X0,
        r"operator\(theta\), rhs\(theta\) with theta f64\[4\]",
    ),
    (
        bl.RootFinding(lambda x, theta: x if x[0] > 0 else -x),
        None,
        X0,
        r"in <lambda> \(test_messages\.py, line \d+\)\. A Python if.*jnp\.where",
    ),
    (
        bl.LinearSystem(lambda theta: lambda v: np.eye(3) @ np.asarray(v), jnp.ones(3)),
        None,
        X0,
        r"NumPy and SciPy.*bilevel_pde\.from_scipy\(matrix\)",
    ),
]


@pytest.mark.parametrize(("problem", "theta", "x0", "message"), CONTEXTS)
def test_an_error_of_jax_gets_a_sentence_of_context(problem, theta, x0, message):
    with pytest.raises(TypeError) as caught:
        bl.solve(problem, theta, x0)
    assert re.search(message, "\n".join(caught.value.__notes__))


def test_an_error_in_the_outer_loss_gets_one_too():
    with pytest.raises(TypeError, match=r"outer_loss should take \(x, theta\), but it takes \(x\)"):
        bl.hypergradient(lambda x: x[0], QUARTIC, 1.0, X0)
    with pytest.raises(TypeError) as caught:
        bl.hypergradient(lambda x, theta: jnp.sum(x - jnp.ones(4)), QUARTIC, 1.0, X0)
    assert "While evaluating outer_loss(x, theta) with x f64[3]" in "".join(caught.value.__notes__)


@pytest.mark.parametrize("kind", ["BCOO", "BCSR"])
def test_a_sparse_matrix_of_jax_is_an_operator(kind: str):
    dense = jnp.array([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0], [0.0, 0.5, 4.0]])
    matrix = getattr(sparse, kind).fromdense(dense)
    problem = bl.LinearSystem(matrix, lambda theta: theta * jnp.ones(3))

    def loss(theta):
        return jnp.sum(bl.solve(problem, theta, X0).value)

    expected = jnp.sum(jnp.linalg.solve(dense, jnp.ones(3)))
    np.testing.assert_allclose(jax.grad(loss)(2.0), expected, rtol=1e-8)
    np.testing.assert_allclose(jax.jvp(loss, (2.0,), (1.0,))[1], expected, rtol=1e-8)
    with pytest.raises(ValueError, match=f"the {kind} must be square"):
        bl.LinearSystem(getattr(sparse, kind).fromdense(dense[:2]), jnp.ones(3))


def test_an_argument_of_a_solver_that_there_is_not():
    with pytest.raises(TypeError, match=r"no argument stepsize; did you mean step_size\?"):
        bl.GradientDescent(stepsize=0.1)
    with pytest.raises(TypeError, match=r"missing.*step_size"):
        bl.GradientDescent()
    assert copy.deepcopy(bl.GradientDescent(0.1)).step_size == 0.1


def test_a_trait_that_there_is_not():
    class Minimizer(Pair):
        requires = frozenset({"objectve"})

    with pytest.raises(TypeError, match=r"'objectve', which is no trait.*mean 'objective'"):
        bl.solve(QUARTIC, 1.0, X0, solver=Minimizer())


LADDER = bl.Ladder.iterations(3, 2, 9)


@pytest.mark.parametrize(
    "controller",
    [
        bl.ProgressiveRefinement(LADDER),
        bl.ScheduledFidelity(LADDER),
        bl.ErrorControlled(LADDER.with_adjoint(LADDER)),
    ],
    ids=lambda controller: type(controller).__name__,
)
def test_a_controller_without_its_state(controller):
    with pytest.raises(
        TypeError, match=r"fidelity: state .* 0\.5 of type float.*fidelity\(state\)"
    ):
        controller.fidelity(0.5)
    with pytest.raises(TypeError, match=r"update: state .*state = controller\.update\(state, "):
        controller.update(0.5)


def test_a_keyword_given_by_position():
    with pytest.raises(TypeError, match=r"is keyword-only: write stepping_threshold=0.9"):
        bl.ProgressiveRefinement(LADDER, 0.9)
    with pytest.raises(TypeError, match=r"did you mean stepping_threshold\?"):
        bl.ProgressiveRefinement(LADDER, stepping_treshold=0.9)
    with pytest.raises(TypeError, match="too many arguments, got 4"):
        bl.Ladder.iterations(1, 2, 3, 4)


@pytest.mark.parametrize(
    "function",
    [
        bl.ProgressiveRefinement,
        bl.ErrorControlled,
        bl.ScheduledFidelity,
        bl.HoagTolerances,
        bl.Ladder.iterations,
        bl.Ladder.tolerances,
    ],
)
def test_signatures_are_for_readers(function):
    signature = str(inspect.signature(function))
    assert "Annotated" not in signature
    assert "FieldInfo" not in signature
    if function is bl.ProgressiveRefinement:
        assert "stepping_threshold: float = 0.98, stopping_threshold: float = 0.9" in signature


SHORT: list[tuple[int, int, str]] = [
    (
        2,
        60,
        r"^The primal solve is short: the primal's part of the error is \d+ % of .* Raise budget=",
    ),
    (200, 1, r"^The adjoint solve is short: .* the adjoint's [\d.]+ %\. Raise adjoint_budget="),
    (2, 1, r"^Both solves are short: .* Raise budget= and adjoint_budget="),
    (200, 60, r"^Neither solve is short: .* Primal: .* Adjoint: "),
]


def judged(primal: int, adjoint: int, theta: Any = 1.0, **options: Any) -> bl.Hypergradient:
    matrix = jnp.diag(jnp.array([1.0, 2.0, 5.0]))
    problem = bl.Minimization(lambda x, theta: 0.5 * x @ matrix @ x - theta * jnp.sum(x))
    return bl.hypergradient(
        lambda x, theta: jnp.sum(x**2),
        problem,
        theta,
        X0,
        solver=bl.GradientDescent(0.2),
        estimator=bl.Implicit(bl.Richardson(0.2)),
        budget=bl.Budget(primal),
        adjoint_budget=bl.Budget(adjoint),
        **options,
    )


@pytest.mark.parametrize(("primal", "adjoint", "message"), SHORT)
def test_a_hypergradient_says_which_budget_is_short(primal, adjoint, message):
    assert re.search(message, judged(primal, adjoint).diagnosis)


def test_the_diagnosis_of_other_hypergradients():
    assert judged(9, 9, error=False).diagnosis.startswith("What stopping early cost was not")
    assert judged(9, 9, jnp.nan).diagnosis.startswith("The gradient must not be used: both solves")
    batch = jax.vmap(lambda theta: judged(2, 60, theta))(jnp.array([1.0, 2.0]))
    assert "samples number" in batch.diagnosis
    said = []
    jax.jit(lambda theta: said.append(judged(2, 60, theta).diagnosis))(1.0)
    assert said == ["The numbers are traced: look at them outside jit, grad and vmap."]
