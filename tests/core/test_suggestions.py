"""What a refusal names in place of the solver accepts the problem."""

import re
from typing import Any

import jax.numpy as jnp
import optax
import pytest

import bilevel as bl
from bilevel.affine import as_linear

X0, EYE = jnp.ones(3), jnp.eye(3)
GENERAL = jnp.array([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0], [0.0, 0.5, 4.0]])


class Cubic(bl.InnerProblem):
    """A residual and nothing else."""

    def residual(self, x: Any, theta: Any) -> Any:
        return x**3 + x - theta


PROBLEMS: dict[str, Any] = {
    "Minimization": bl.Minimization(lambda x, theta: jnp.sum((x - theta) ** 4)),
    "quadratic Minimization": bl.Minimization(lambda x, theta: jnp.sum((x - theta) ** 2)),
    "RootFinding": bl.RootFinding(lambda x, theta: x**3 + x - theta),
    "FixedPoint": bl.FixedPoint(lambda x, theta: 0.1 * jnp.cos(x) + theta),
    "definite": bl.LinearSystem(EYE, X0, positive_definite=True),
    "symmetric": bl.LinearSystem(EYE, X0, positive_definite=False),
    "general": bl.LinearSystem(GENERAL, X0),
    "matrix-free": bl.LinearSystem(lambda theta: lambda v: GENERAL @ v, X0, symmetric=False),
    "residual only": Cubic(),
    "Composite": bl.CompositeMinimization(lambda x, theta: jnp.sum((x - theta) ** 4), bl.L1(0.1)),
}

MADE: dict[str, Any] = {
    "GradientDescent": lambda: bl.GradientDescent(0.1),
    "HeavyBall": lambda: bl.HeavyBall(0.1, 0.5),
    "Nesterov": lambda: bl.Nesterov(0.1),
    "Optax": lambda: bl.Optax(optax.adam(0.1)),
    "Richardson": lambda: bl.Richardson(0.1),
    "NystromInverse": lambda: bl.NystromInverse(rank=2),
}
NAMES = [
    name
    for name in bl.__all__
    if isinstance(thing := getattr(bl, name), type)
    and issubclass(thing, bl.InnerSolver)
    and thing is not bl.InnerSolver
]


def refusal(name: str, problem: Any) -> str:
    """What a solver says that refuses the problem; nothing where it accepts."""
    solver = MADE.get(name, getattr(bl, name))()
    try:
        bl.solve(problem, 0.5, X0, solver=solver, budget=bl.Budget(1))
    except bl.IncompatibleError as error:
        return str(error)
    return ""


def accepts(name: str, problem: Any) -> bool:
    solver = MADE.get(name, getattr(bl, name))()
    try:
        solver.check(as_linear(problem, 0.5, X0, solver).at(0.5))
    except bl.IncompatibleError:
        return False
    return True


@pytest.mark.parametrize("kind", PROBLEMS)
def test_what_is_named_instead_accepts_the_problem(kind: str):
    problem, refused = PROBLEMS[kind], 0
    for name in NAMES:
        if accepts(name, problem):
            continue
        message, refused = refusal(name, problem), refused + 1
        instead = message.rpartition(". Use ")[2]
        outside = re.sub(r"\(linear=.*?\)\)", "", instead)  # Newton takes linear solvers inside
        named = [word for word in re.findall(r"\w+", outside) if word in NAMES]
        assert named, message
        for other in named:
            assert accepts(other, problem), message
    assert refused >= 1


def test_a_solver_of_one_s_own_may_name_what_it_likes():
    class Own(bl.GradientDescent):
        instead = "OtherSolver"

    with pytest.raises(bl.IncompatibleError, match="Use OtherSolver instead"):
        bl.solve(Cubic(), 0.5, X0, solver=Own(0.1))
