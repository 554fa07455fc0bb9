"""The conformance kit: every solver and estimator passes it, and what is broken does not."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel as bl
from bilevel import vector
from bilevel.testing import (
    ConformanceError,
    TaylorResult,
    check_estimator,
    check_inner_problem,
    check_inner_solver,
    taylor_test,
)
from tests.core.cases import EXAMPLES, FAMILIES, SOLVERS, Case, N, by_name
from tests.marks import others_slow

SOLVER_PROPERTIES = {
    "state",
    "start",
    "same under jit",
    "converges within the budget",
    "converged means within tolerance",
    "budget respected",
    "residual reported is true",
    "one compile for all budgets",
    "warm start",
    "NaN in theta",
    "same under vmap",
}


@pytest.mark.parametrize("case", others_slow(SOLVERS, *FAMILIES), ids=by_name)
def test_every_solver_conforms(case: Case):
    example = case.example
    checked = check_inner_solver(
        case.make(),
        example.problem,
        example.theta,
        example.x0,
        solution=example.solution(example.theta),
        budget=bl.Budget(case.iterations, rtol=1e-11),
    )
    assert set(checked) >= SOLVER_PROPERTIES


ESTIMATORS: dict[str, Any] = {
    "Implicit": (bl.Implicit, {}),
    "Implicit, CG": (lambda: bl.Implicit(solver=bl.ConjugateGradient()), {}),
    "Unrolled": (bl.Unrolled, {}),
    "Unrolled, all": (lambda: bl.Unrolled(store="all"), {}),
    "Unrolled, forward": (lambda: bl.Unrolled(mode="forward"), {}),
    # Gradient descent contracts here by 0.74 a step: the last 40 leave 1e-5 of the derivative.
    "Unrolled, last": (lambda: bl.Unrolled(last=40), {"exact": False, "tolerance": 1e-3}),
    "Neumann": (lambda: bl.Neumann(step_size=0.3), {}),
    # One step of Newton's method has the whole derivative.
    "OneStep": (bl.OneStep, {"solver": bl.Newton()}),
    "Nystrom": (lambda: bl.Nystrom(rank=N, damping=1e-7), {"exact": False, "tolerance": 1e-4}),
}


# The example of `check_estimator` runs with `Implicit`.
@pytest.mark.parametrize("name", others_slow(ESTIMATORS, "Unrolled"))
def test_every_estimator_conforms(name: str):
    make, given = ESTIMATORS[name]
    options = {"solver": bl.GradientDescent(0.3), **given}
    example = EXAMPLES["ridge"]
    checked = check_estimator(
        make(),
        example.problem,
        example.theta,
        example.x0,
        budget=bl.Budget(400, rtol=1e-12),
        adjoint_budget=bl.Budget(400, rtol=1e-12),
        outer_loss=lambda x, theta: jnp.sum(jnp.sin(x - 0.3)) + 0.5 * jnp.sum(theta * x),
        gradient=example.hypergradient,
        **options,
    )
    assert "gradient right" in checked
    assert name == "Unrolled, forward" or {"report", "captured theta", "NaN in theta"} <= set(
        checked
    )


# ----------------------------------------------------------------------- Taylor's test itself


def test_taylor_tells_right_from_wrong_derivatives():
    def function(x: Any) -> Any:
        return jnp.sum(jnp.sin(x["a"]) * jnp.exp(x["b"]))

    point = {"a": jnp.array([0.3, 1.2]), "b": jnp.array(0.5)}
    assert taylor_test(function, point).slope == pytest.approx(2.0, abs=0.05)
    right = jax.grad(function)(point)
    assert taylor_test(function, point, derivative=right).slope >= 1.95
    wrong = {**right, "b": right["b"] * 1.001}
    assert taylor_test(function, point, derivative=wrong).slope < 1.5
    forward = taylor_test(
        function, point, derivative=lambda v: jax.jvp(function, (point,), (v,))[1]
    )
    assert forward.slope >= 1.95


def test_taylor_in_complex_numbers_and_vector_values():
    def function(z: Any) -> Any:
        return jnp.stack([z[0] * jnp.conj(z[1]), jnp.exp(z[1])])

    point = jnp.array([1.0 + 0.5j, -0.3 + 1j])
    assert taylor_test(function, point).slope >= 1.95

    def real(z: Any) -> Any:
        return jnp.sum(jnp.abs(function(z)) ** 2)

    gradient = jax.grad(real)(point)
    assert taylor_test(real, point, derivative=gradient).slope >= 1.95
    assert taylor_test(real, point, derivative=jnp.conj(gradient)).slope < 1.5


def test_taylor_is_robust_to_the_rounding_floor():
    linear = taylor_test(lambda x: 3.0 * x, 2.0)
    assert linear.slope == float("inf")
    assert linear.remainders == pytest.approx((0.0,) * len(linear.steps), abs=1e-12)
    single = taylor_test(jnp.exp, jnp.float32(1.0))
    assert single.slope == pytest.approx(2.0, abs=0.1)
    noisy = taylor_test(lambda x: jnp.exp(x) + 1e-9 * jnp.sin(1e12 * x), 1.0, derivative=np.e)
    assert noisy.slope == pytest.approx(2.0, abs=0.1)
    nothing_but_noise = taylor_test(
        lambda x: jnp.sin(1e12 * x), 1.0, derivative=0.0, steps=[1e-3, 1e-4, 1e-5, 1e-6]
    )
    assert not nothing_but_noise.slope >= 1.95
    assert not taylor_test(lambda x: jnp.exp(x) * jnp.nan, 1.0).slope >= 1.95


def test_taylor_takes_steps_and_direction_as_given():
    result = taylor_test(
        lambda x: jnp.sum(x**2), jnp.ones(2), jnp.array([1.0, 0.0]), steps=[1, 0.1]
    )
    assert result == TaylorResult(pytest.approx(2.0), pytest.approx((1.0, 0.01)), (1.0, 0.1))


def test_taylor_refuses_a_gradient_of_something_that_is_no_scalar():
    with pytest.raises(TypeError, match="one real scalar"):
        taylor_test(jnp.sin, jnp.ones(2), derivative=jnp.ones(2))


# --------------------------------------------------------------------- broken solvers are found


class Good(bl.InnerSolver):
    """Richardson, to be broken in one place by each subclass."""

    def init(self, problem: Any, x: Any) -> Any:
        return x

    def step(self, problem: Any, state: Any, residual: Any) -> Any:
        return vector.add_scaled(state, 0.5, residual)


class Pair(eqx.Module):
    x: Any
    extra: Any


class CountsInInit(Good):
    """Starts with one step done already."""

    def init(self, problem: Any, x: Any) -> Any:
        return vector.add_scaled(x, 0.5, problem.residual(x))


class Widens(Good):
    """A state that changes its dtype."""

    def init(self, problem: Any, x: Any) -> Any:
        return Pair(x, jnp.int32(0))

    def step(self, problem: Any, state: Any, residual: Any) -> Any:
        return Pair(vector.add_scaled(state.x, 0.5, residual), state.extra + 1.0)


class Lies(Good):
    """Claims a residual of its own that shrinks whatever happens."""

    def residual(self, problem: Any, state: Any) -> Any:
        return vector.scale(1e-3, problem.residual(state))


class HidesNaN(Good):
    """Takes NaN for zero."""

    def residual(self, problem: Any, state: Any) -> Any:
        return jax.tree.map(jnp.nan_to_num, problem.residual(state))


class Stalls(Good):
    """Never gets there."""

    def step(self, problem: Any, state: Any, residual: Any) -> Any:
        return state


class Double(Good):
    """Computes in double precision, whatever it is given."""

    def init(self, problem: Any, x: Any) -> Any:
        return Pair(x, jnp.zeros((), jnp.float64))

    def step(self, problem: Any, state: Any, residual: Any) -> Any:
        x = vector.add_scaled(state.x, 0.5, residual)
        return Pair(x + state.extra.astype(jnp.float64), state.extra)


class Forgetful(Good):
    """Compiles anew for every call: no two of it are equal."""

    def __eq__(self, other: object) -> bool:
        return False

    __hash__ = bl.InnerSolver.__hash__


class Mixes(Good):
    """Looks at the whole batch: the host's value, not a sample's."""

    def step(self, problem: Any, state: Any, residual: Any) -> Any:
        biggest = jax.pure_callback(
            lambda r: np.asarray(0.5 if np.abs(r).max() > 1e-3 else 0.25, r.dtype),
            jax.ShapeDtypeStruct((), state.dtype),
            residual,
            vmap_method="sequential",
        )
        return vector.add_scaled(state, biggest, residual)


BROKEN = {
    CountsInInit: "start",
    Widens: "state",
    Lies: "converges within the budget",
    HidesNaN: "NaN in theta",
    Stalls: "converges within the budget",
    Double: "state|float32 stays float32",
}


def test_the_solver_that_is_to_be_broken_conforms():
    checked = check_inner_solver(Good())
    assert SOLVER_PROPERTIES | {"float32 stays float32"} == set(checked)


@pytest.mark.parametrize("solver", BROKEN, ids=lambda solver: solver.__name__)
def test_broken_solvers_are_found_and_the_message_helps(solver: Any):
    with pytest.raises((ConformanceError, TypeError)) as caught:
        check_inner_solver(solver())
    error = caught.value
    if isinstance(error, ConformanceError):
        assert error.broken in BROKEN[solver].split("|")
        assert error.subject == solver.__name__
        assert error.expected
        assert error.got
        assert error.advice.endswith(".")


class Uphill(Good):
    """The sign of the step is wrong."""

    def step(self, problem: Any, state: Any, residual: Any) -> Any:
        return vector.add_scaled(state, -0.5, residual)


def test_a_step_of_the_wrong_sign_is_named_as_such():
    with pytest.raises(ConformanceError) as caught:
        check_inner_solver(Uphill())
    assert "residual norm grew" in caught.value.advice
    assert "wrong sign" in caught.value.advice
    assert "downhill" in caught.value.advice


def test_a_solver_that_stalls_is_not_told_about_signs():
    with pytest.raises(ConformanceError) as caught:
        check_inner_solver(Stalls())
    assert "sign" not in caught.value.advice


# -------------------------------------------------------------------- broken problems are found


def residual(x: Any, theta: Any) -> Any:
    return x**3 + x - theta


@jax.custom_jvp
def cube(x: Any) -> Any:
    return x**3


@cube.defjvp
def _cube_jvp(primals: Any, tangents: Any) -> Any:
    (x,), (v,) = primals, tangents
    return cube(x), 2 * x**2 * v  # it should be 3


class Wavering:
    """Another value at every call."""

    def __init__(self) -> None:
        self.calls = 0

    def residual(self, x: Any, theta: Any) -> Any:
        self.calls += 1
        return x - theta + 1e-3 * self.calls


PROBLEMS: dict[str, tuple[Any, str]] = {
    "another shape": (bl.RootFinding(lambda x, theta: residual(x, theta)[:1]), "residual like x"),
    "not finite": (bl.RootFinding(lambda x, theta: jnp.log(x - 5) - theta), "residual finite"),
    "wavering": (Wavering(), "same under jit"),
    "hides NaN": (
        bl.RootFinding(lambda x, theta: jnp.nan_to_num(residual(x, theta))),
        "NaN shows",
    ),
    "wrong rule": (bl.RootFinding(lambda x, theta: cube(x) - theta), "derivative in x"),
    "stopped": (
        bl.RootFinding(lambda x, theta: x - jax.lax.stop_gradient(theta)),
        "derivative in theta",
    ),
    "not symmetric": (
        bl.RootFinding(lambda x, theta: x + jnp.array([x[1], 0.0]) - theta, symmetric=True),
        "symmetric",
    ),
    "not definite": (
        bl.RootFinding(lambda x, theta: x * jnp.array([1.0, -1.0]) - theta, positive_definite=True),
        "positive definite",
    ),
    "wrong adjoint": (
        bl.LinearSystem(
            (lambda v: jnp.array([v[0] + v[1], v[1]]), lambda v: v), lambda theta: theta
        ),
        "adjoint",
    ),
    "wrong diagonal": (
        bl.LinearSystem(
            bl.LinearOperator(lambda v: 2 * v, diagonal=jnp.ones(2)), lambda theta: theta
        ),
        "diagonal",
    ),
    "affine operator": (
        bl.LinearSystem(lambda theta: lambda v: 2 * v + 1, lambda theta: theta),
        "operator linear",
    ),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_broken_problems_are_found(name: str):
    problem, broken = PROBLEMS[name]
    with pytest.raises(ConformanceError) as caught:
        check_inner_problem(problem, jnp.array([0.4, 0.7]), jnp.array([0.5, 1.5]))
    assert caught.value.broken == broken
    assert f"{broken!r} does not hold. Expected " in str(caught.value)


def test_a_minimum_that_is_none_is_found_where_the_solution_is_given():
    problem = bl.Minimization(lambda x, theta: -jnp.sum((x - theta) ** 2))
    theta = jnp.array([0.4, 0.7])
    assert "positive definite" not in check_inner_problem(problem, theta, jnp.zeros(2))
    with pytest.raises(ConformanceError, match="positive definite"):
        check_inner_problem(problem, theta, jnp.zeros(2), solution=theta)


# ------------------------------------------------------------------ broken estimators are found


class Detached(bl.Estimator):
    """No derivative at all."""

    def solve(self, setting: Any, record: Any) -> Any:
        return jax.lax.stop_gradient(bl.Implicit().solve(setting, record))


class Halved(bl.Estimator):
    """Half the derivative."""

    def solve(self, setting: Any, record: Any) -> Any:
        solution = bl.Implicit().solve(setting, record)
        value = 0.5 * (solution.value + jax.lax.stop_gradient(solution.value))
        return eqx.tree_at(lambda s: s.value, solution, value)


class Unreported(bl.Estimator):
    """Says nothing of what it did."""

    def solve(self, setting: Any, record: Any) -> Any:
        return bl.Implicit().solve(setting, type(record)())


@pytest.mark.parametrize(
    ("estimator", "broken"),
    [
        pytest.param(Detached(), "derivative of the loss", marks=pytest.mark.slow),
        (Halved(), "derivative of the loss"),
        (Unreported(), "report"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_broken_estimators_are_found(estimator: Any, broken: str):
    example = EXAMPLES["convex"]
    with pytest.raises(ConformanceError) as caught:
        check_estimator(estimator, example.problem, example.theta, example.x0)
    assert caught.value.broken == broken
