"""What the conformance kit says to the commonest mistakes: which, where, and what helps."""

from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
import pytest

import bilevel as bl
from bilevel.testing import (
    ConformanceError,
    check_estimator,
    check_inner_problem,
    check_inner_solver,
)

THETA, X0, CAPTURED = jnp.array([0.4, 0.7]), jnp.array([0.5, 1.5]), jnp.ones(2)


class Good(bl.InnerSolver):
    """Richardson, to be broken in one place by each subclass."""

    factor: float = 0.5

    def init(self, problem: Any, x: Any) -> Any:
        return x

    def step(self, problem: Any, state: Any, residual: Any) -> Any:
        return state + self.factor * residual


class NoReturn(Good):
    def step(self, problem: Any, state: Any, residual: Any) -> Any:
        state + 0.5 * residual


class NoReturnOfInit(Good):
    def init(self, problem: Any, x: Any) -> Any:
        pass


class InADictionary(Good):
    def init(self, problem: Any, x: Any) -> Any:
        return {"x": x}

    def step(self, problem: Any, state: Any, residual: Any) -> Any:
        return {"x": state["x"] + 0.5 * residual}


class Undeclared(Good):
    def step(self, problem: Any, state: Any, residual: Any) -> Any:
        return state + 0.5 * residual * (problem.objective(state) < 9)


class Misspelt(Good):
    requires: ClassVar[frozenset[str]] = frozenset({"objectve"})


class AString(Good):
    requires: ClassVar[Any] = "objective"


class ProblemLast(Good):
    def init(self, x: Any, problem: Any) -> Any:
        return x


class StateLast(Good):
    def step(self, problem: Any, residual: Any, state: Any) -> Any:
        return state + 0.5 * residual


class Branches(Good):
    def step(self, problem: Any, state: Any, residual: Any) -> Any:
        if jnp.sum(residual**2) > 1:
            return state
        return state + 0.5 * residual


class OnTheHost(Good):
    def step(self, problem: Any, state: Any, residual: Any) -> Any:
        return state + 0.5 * jnp.asarray(np.clip(residual, -1, 1))


class Stalls(Good):
    def step(self, problem: Any, state: Any, residual: Any) -> Any:
        return state


class Drifts(Good):
    recursive: ClassVar[bool] = True

    def residual(self, problem: Any, state: Any) -> Any:
        return 1e-3 * problem.residual(state)


CURSORY = r"\(test_kit_messages\.py, line \d+\)"
SOLVERS: dict[Any, tuple[type[Exception], str]] = {
    NoReturn(): (ConformanceError, r"step to return something, got None\. Write return"),
    NoReturnOfInit(): (ConformanceError, r"init to return something, got None"),
    InADictionary(): (ConformanceError, r"Override value\(self, state\)"),
    Undeclared(): (
        ConformanceError,
        rf"in step {CURSORY}.*uses problem\.objective, which .* Declare requires.*'objective'",
    ),
    Misspelt(): (TypeError, r"'objectve', which is no trait.*Did you mean 'objective'\?"),
    AString(): (TypeError, r"requires must be a set of names\. Write frozenset"),
    ProblemLast(): (TypeError, r"takes \(x, problem\), but is called with \(problem, x\)"),
    StateLast(): (TypeError, r"Exchange them: def step\(self, problem, state, residual\)"),
    Branches(): (
        ConformanceError,
        rf"'same under jit'.*in step {CURSORY}\. A Python if.*where",
    ),
    OnTheHost(): (ConformanceError, rf"'same under jit'.*in step {CURSORY}.*use jax\.numpy"),
    Stalls(): (
        ConformanceError,
        r"'converges within the budget'.*and 2\.1e\+00 at the end\. The residual did not move",
    ),
    Good(0.02): (
        ConformanceError,
        r"'converges within the budget'.*at the start.*converges, but slowly\. Give budget=Budget",
    ),
    Drifts(): (ConformanceError, r"Let residual\(problem, state\) be what the recursion keeps"),
    Good: (TypeError, r"must be an instance, got the class Good\. Write Good\(\.\.\.\)"),
    bl.Budget(3): (
        TypeError,
        r"arguments are check_inner_solver\(solver, problem, theta, x0\)",
    ),
}


def name_of(thing: Any) -> str:
    return getattr(thing, "__name__", type(thing).__name__)


@pytest.mark.parametrize("solver", SOLVERS, ids=name_of)
def test_a_solver_that_is_wrong(solver: Any):
    kind, message = SOLVERS[solver]
    with pytest.raises(kind, match=message) as caught:
        check_inner_solver(solver)
    assert ".." not in str(caught.value).replace("...", "")
    if isinstance(solver, Drifts):
        assert "declare" not in str(caught.value)


def test_a_budget_as_large_as_the_advice_is_enough():
    with pytest.raises(ConformanceError) as caught:
        check_inner_solver(Good(0.02))
    needed = int(caught.value.advice.partition("iterations=")[2].partition(",")[0])
    assert needed < 5000
    budget = bl.Budget(needed, rtol=4e-11)
    assert "converges within the budget" in check_inner_solver(Good(0.02), budget=budget)


def test_a_problem_for_the_solver_without_theta_and_x0():
    with pytest.raises(TypeError, match=r"comes with theta and x0\. Write check_inner_solver"):
        check_inner_solver(Good(), bl.RootFinding(lambda x, theta: x - theta))
    with pytest.raises(TypeError, match="instance, got the class Implicit"):
        check_estimator(bl.Implicit, bl.RootFinding(lambda x, theta: x), 1.0, 1.0)


def branching(x: Any, theta: Any) -> Any:
    return x - theta if x[0] > 0 else x + theta


def nothing(x: Any, theta: Any) -> Any:
    pass


class OfTheta:
    def residual(self, theta: Any, x: Any) -> Any:
        return x - theta


PROBLEMS: dict[str, tuple[Any, type[Exception], str]] = {
    "branches": (
        branching,
        ConformanceError,
        rf"'same under jit'.*in branching {CURSORY}\. A Python if.*jnp\.where",
    ),
    "on the host": (
        lambda x, theta: np.sin(x) - theta,
        ConformanceError,
        rf"'same under jit'.*in <lambda> {CURSORY}.*use jax\.numpy",
    ),
    "no return": (nothing, ConformanceError, r"got this: None\. Write return"),
    "half precision": (
        lambda x, theta: (x - theta).astype(jnp.float16),
        ConformanceError,
        r"is float16, but x0 is float64\. Let it compute in the dtype of x",
    ),
    "theta first": (
        lambda theta, x: x - theta,
        TypeError,
        r"function takes \(theta, x\), but is called with \(x, theta\)",
    ),
    "another shape": (
        lambda x, theta: (x - theta)[:1],
        ConformanceError,
        r"has shape \(1,\), expected \(2,\) as x0 has\. Check",
    ),
    "an error": (
        lambda x, theta: x - jnp.ones(4),
        ConformanceError,
        rf"TypeError in <lambda> {CURSORY}: sub got incompatible shapes",
    ),
    "captured": (
        lambda x, _: x - CAPTURED,
        ConformanceError,
        "'depends on theta' does not hold.*not a variable outside",
    ),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_problem_that_is_wrong(name: str):
    function, kind, message = PROBLEMS[name]
    with pytest.raises(kind, match=message) as caught:
        check_inner_problem(bl.RootFinding(function), THETA, X0)
    assert ".." not in str(caught.value).replace("...", "")


def test_theta_and_the_start_in_each_other_s_place():
    problem = bl.RootFinding(lambda x, theta: x * jnp.sum(theta))
    with pytest.raises(ConformanceError, match="With theta and x0 exchanged it would be"):
        check_inner_problem(bl.RootFinding(lambda x, theta: x * theta), THETA, jnp.ones(()))
    assert "depends on theta" in check_inner_problem(problem, THETA, jnp.ones(()))
    with pytest.raises(TypeError, match=r"OfTheta\.residual takes \(theta, x\)"):
        check_inner_problem(OfTheta(), THETA, X0)


def test_a_problem_without_theta_need_not_depend_on_it():
    problem = bl.RootFinding(lambda x, _: x - CAPTURED)
    assert "depends on theta" not in check_inner_problem(problem, None, X0)
