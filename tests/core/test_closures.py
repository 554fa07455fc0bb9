"""What user functions capture differentiates right, wherever it is captured, and stays fresh."""

import collections
import functools
import timeit
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel as bl
from bilevel.captured import Captured
from tests.core.cases import MIXING, THETA, N, definite_matrix, loss, rhs
from tests.core.compiling import jitted
from tests.marks import others_slow

X0 = jnp.zeros(N)
STEPS = bl.Budget(iterations=60, rtol=1e-12)


def quadratic(x: Any, theta: Any) -> Any:
    return 0.5 * jnp.sum(jnp.exp(theta) * x**2) + 0.5 * jnp.sum((MIXING @ x) ** 2) - jnp.sum(x)


# Each solves one problem with θ passed, and the same one with θ captured: (theta) -> x.

Solve = Callable[[Any], Any]


def objective_passed(theta: Any, **options: Any) -> Any:
    return bl.solve(bl.Minimization(quadratic), theta, X0, **options).value


def objective_captured(theta: Any, **options: Any) -> Any:
    problem = bl.Minimization(lambda x, _: quadratic(x, theta))
    return bl.solve(problem, None, X0, **options).value


def partly_captured(theta: Any, **options: Any) -> Any:
    """Half of θ is passed, half captured."""
    problem = bl.Minimization(lambda x, half: quadratic(x, jnp.concatenate([half, theta[2:]])))
    return bl.solve(problem, theta[:2], X0, **options).value


def operator_passed(theta: Any, **options: Any) -> Any:
    problem = bl.LinearSystem(definite_matrix, rhs, symmetric=True, positive_definite=True)
    return bl.solve(problem, theta, X0, **options).value


def operator_captured(theta: Any, **options: Any) -> Any:
    problem = bl.LinearSystem(
        lambda _: definite_matrix(theta),
        lambda _: rhs(theta),
        symmetric=True,
        positive_definite=True,
    )
    return bl.solve(problem, None, X0, **options).value


def constants_captured(theta: Any, **options: Any) -> Any:
    """The matrix and the right-hand side themselves, made of θ."""
    problem = bl.LinearSystem(
        definite_matrix(theta), rhs(theta), symmetric=True, positive_definite=True
    )
    return bl.solve(problem, None, X0, **options).value


def matvec_captured(theta: Any, **options: Any) -> Any:
    matrix = definite_matrix(theta)
    problem = bl.LinearSystem(
        lambda _: lambda v: matrix @ v, rhs(theta), symmetric=True, positive_definite=True
    )
    return bl.solve(problem, None, X0, **options).value


def operator_object_captured(theta: Any, **options: Any) -> Any:
    matrix = definite_matrix(theta)
    operator = bl.LinearOperator(lambda v: matrix @ v, diagonal=jnp.diagonal(matrix))
    problem = bl.LinearSystem(operator, rhs(theta), symmetric=True, positive_definite=True)
    return bl.solve(problem, None, X0, **options).value


def preconditioner_captured(theta: Any, **options: Any) -> Any:
    inverse = 1.0 / jnp.diagonal(definite_matrix(theta))
    options["solver"] = bl.ConjugateGradient(preconditioner=lambda v: inverse * v)
    return operator_captured(theta, **options)


def mapping_captured(theta: Any, **options: Any) -> Any:
    problem = bl.FixedPoint(lambda x, _: 0.2 * MIXING @ jnp.cos(x) + theta)
    return bl.solve(problem, None, X0, **options).value


def mapping_passed(theta: Any, **options: Any) -> Any:
    problem = bl.FixedPoint(lambda x, theta: 0.2 * MIXING @ jnp.cos(x) + theta)
    return bl.solve(problem, theta, X0, **options).value


def residual_captured(theta: Any, **options: Any) -> Any:
    problem = bl.RootFinding(lambda x, _: x - 0.2 * MIXING @ jnp.cos(x) - theta)
    return bl.solve(problem, None, X0, **options).value


class Shifted:
    """A problem of nobody's class that holds θ."""

    def __init__(self, theta: Any):
        self.theta = theta

    def residual(self, x: Any, theta: Any) -> Any:
        del theta
        return x - 0.2 * MIXING @ jnp.cos(x) - self.theta


def object_captured(theta: Any, **options: Any) -> Any:
    return bl.solve(Shifted(theta), None, X0, **options).value


def bound_method_captured(theta: Any, **options: Any) -> Any:
    return bl.solve(bl.RootFinding(Shifted(theta).residual), None, X0, **options).value


def partial_captured(theta: Any, **options: Any) -> Any:
    def residual(captured: Any, x: Any, theta: Any) -> Any:
        del theta
        return x - 0.2 * MIXING @ jnp.cos(x) - captured

    return bl.solve(bl.RootFinding(functools.partial(residual, theta)), None, X0, **options).value


GRADIENT = {"solver": bl.GradientDescent(0.3)}
KRYLOV = {"solver": bl.ConjugateGradient()}
PAIRS: dict[str, tuple[Solve, Solve, dict[str, Any]]] = {
    "objective": (objective_captured, objective_passed, GRADIENT),
    "objective, in part": (partly_captured, objective_passed, GRADIENT),
    "operator": (operator_captured, operator_passed, KRYLOV),
    "matrix and right-hand side": (constants_captured, operator_passed, KRYLOV),
    "matvec": (matvec_captured, operator_passed, KRYLOV),
    "operator object": (operator_object_captured, operator_passed, {"solver": bl.Jacobi()}),
    "preconditioner": (preconditioner_captured, operator_passed, KRYLOV),
    "mapping": (mapping_captured, mapping_passed, {"solver": bl.FixedPointIteration()}),
    "residual": (residual_captured, mapping_passed, {}),
    "object": (object_captured, mapping_passed, {}),
    "bound method": (bound_method_captured, mapping_passed, {}),
    "partial": (partial_captured, mapping_passed, {}),
}
UNROLLED_BY_DEFAULT = {"objective", "operator object", "preconditioner", "mapping"}


@pytest.mark.parametrize(
    ("position", "estimator"),
    [
        pytest.param(
            position,
            estimator,
            marks=[]
            if estimator == "Implicit" or position in UNROLLED_BY_DEFAULT
            else pytest.mark.slow,
        )
        for position in PAIRS
        for estimator in ("Implicit", "Unrolled")
    ],
)
def test_captured_theta_differentiates_as_passed_theta(position: str, estimator: str):
    captured, passed, options = PAIRS[position]
    options = {**options, "estimator": getattr(bl, estimator)(), "budget": STEPS}

    def both(theta: Any) -> Any:
        return [
            jax.grad(lambda theta, f=function: loss(f(theta, **options), theta))(theta)
            for function in (captured, passed)
        ]

    got, expected = jitted(both)(jnp.asarray(THETA))
    np.testing.assert_allclose(got, expected, rtol=1e-8)
    assert float(jnp.linalg.norm(expected)) > 0.1


@pytest.mark.parametrize("name", ["Neumann", "OneStep", "Nystrom"])
def test_other_estimators_see_what_is_captured(name: str):
    options: dict[str, Any] = {**GRADIENT, "budget": bl.Budget(9), "adjoint_budget": bl.Budget(9)}

    def both(theta: Any) -> Any:
        options["estimator"] = getattr(bl, name)()
        return [
            jax.grad(lambda theta, f=function: loss(f(theta, **options), theta))(theta)
            for function in (objective_captured, objective_passed)
        ]

    got, expected = jitted(both)(jnp.asarray(THETA))
    np.testing.assert_allclose(got, expected, rtol=1e-10)


def test_captured_learning_rate_of_an_optax_schedule_differentiates():
    """The derivative of an unrolled iteration with respect to its decay rate."""
    steps, objective = 5, functools.partial(quadratic, theta=jnp.asarray(THETA))

    def unrolled(decay: Any) -> Any:
        transformation = optax.sgd(lambda count: 0.3 * decay**count)
        solution = bl.solve(
            bl.Minimization(lambda x, _: objective(x)),
            None,
            X0,
            solver=bl.Optax(transformation),
            estimator=bl.Unrolled(),
            budget=bl.Budget(iterations=steps),
        )
        return loss(solution.value, jnp.asarray(THETA))

    def by_hand(decay: Any) -> Any:
        x = X0
        for count in range(steps):
            x = x - 0.3 * decay**count * jax.grad(objective)(x)
        return loss(x, jnp.asarray(THETA))

    np.testing.assert_allclose(jitted(jax.grad(unrolled))(0.8), jax.grad(by_hand)(0.8), rtol=1e-12)


@pytest.mark.parametrize("estimator", others_slow(["Implicit", "Unrolled"], "Implicit"))
def test_captured_theta_in_every_order_of_transformations(estimator: str):
    options = {**GRADIENT, "estimator": getattr(bl, estimator)(), "budget": bl.Budget(9)}

    def value(theta: Any) -> Any:
        return loss(objective_captured(theta, **options), theta)

    thetas = jnp.asarray(THETA) + jnp.linspace(-0.2, 0.2, 2)[:, None]
    expected = jitted(
        jax.vmap(jax.grad(lambda theta: loss(objective_passed(theta, **options), theta)))
    )(thetas)
    combinations = {
        "grad": lambda batch: jnp.stack([jax.grad(value)(theta) for theta in batch]),
        "jit of vmap of grad": jitted(jax.vmap(jax.grad(value))),
        "grad of sum of vmap": jitted(jax.grad(lambda batch: jnp.sum(jax.vmap(value)(batch)))),
    }
    for name, combination in combinations.items():
        np.testing.assert_allclose(combination(thetas), expected, rtol=1e-10, err_msg=name)


def test_captured_theta_in_forward_mode():
    def value(theta: Any) -> Any:
        return loss(operator_captured(theta), theta)

    got = jitted(jax.jacfwd(value))(jnp.asarray(THETA))
    expected = jitted(jax.grad(lambda theta: loss(operator_passed(theta), theta)))(
        jnp.asarray(THETA)
    )
    np.testing.assert_allclose(got, expected, rtol=1e-9)


def test_captured_theta_in_hypergradient():
    """`bl.hypergradient` differentiates in its argument alone; an outer grad sees the rest."""

    def value(captured: Any) -> Any:
        problem = bl.Minimization(lambda x, theta: quadratic(x, theta + captured))
        zero = jnp.zeros(N)
        return bl.hypergradient(loss, problem, zero, X0, error=False, **GRADIENT).value

    got = jitted(jax.grad(value))(jnp.asarray(THETA))

    def expected_value(theta: Any) -> Any:
        return loss(objective_passed(theta, **GRADIENT), jnp.zeros(N))

    np.testing.assert_allclose(got, jitted(jax.grad(expected_value))(jnp.asarray(THETA)), rtol=1e-9)


# ---------------------------------------------------------------- outside jit nothing is stale


def solved(problem: Any) -> float:
    """Of (w + 1) x = 2 w: 1 for w = 1, 1.5 for w = 3."""
    return float(bl.solve(problem, 2.0, 0.0).value)


class Weighted:
    def __init__(self, weight: Any):
        self.weight = weight

    def residual(self, x: Any, theta: Any) -> Any:
        return self.weight * (x - theta) + x


def test_a_closure_variable_bound_anew_counts():
    weight = 1.0
    problem = bl.RootFinding(lambda x, theta: weight * (x - theta) + x)
    assert solved(problem) == pytest.approx(1.0)
    weight = 3.0
    assert solved(problem) == pytest.approx(1.5)


def test_a_closure_array_bound_anew_counts():
    weight = jnp.ones(())
    problem = bl.RootFinding(lambda x, theta: weight * (x - theta) + x)
    assert solved(problem) == pytest.approx(1.0)
    weight = 3 * weight
    assert solved(problem) == pytest.approx(1.5)


SOURCE = """
weight = 1.0
def helper(x, theta):
    return weight * (x - theta)
def residual(x, theta):
    return helper(x, theta) + x
class Problem:
    def residual(self, x, theta):
        return residual(x, theta)
"""


@pytest.mark.parametrize("name", ["residual", "Problem"])
def test_a_global_bound_anew_counts_as_in_a_notebook(name: str):
    notebook = types.ModuleType("notebook")
    exec(SOURCE, vars(notebook))  # noqa: S102
    problem = bl.RootFinding(notebook.residual) if name == "residual" else notebook.Problem()
    assert solved(problem) == pytest.approx(1.0)
    vars(notebook)["weight"] = 3.0
    assert solved(problem) == pytest.approx(1.5)


def test_an_entry_of_a_captured_dictionary_counts():
    settings = {"weight": 1.0}
    problem = bl.RootFinding(lambda x, theta: settings["weight"] * (x - theta) + x)
    assert solved(problem) == pytest.approx(1.0)
    settings["weight"] = 3.0
    assert solved(problem) == pytest.approx(1.5)


@pytest.mark.parametrize("wrap", [lambda p: p, lambda p: bl.RootFinding(p.residual)])
def test_an_attribute_of_the_user_s_object_counts(wrap: Any):
    own = Weighted(1)
    problem = wrap(own)
    assert solved(problem) == pytest.approx(1.0)
    own.weight = 3
    assert solved(problem) == pytest.approx(1.5)


def test_a_numpy_array_changed_in_place_counts():
    weight = np.ones(1)
    problem = bl.RootFinding(lambda x, theta: weight[0] * (x - theta) + x)
    assert solved(problem) == pytest.approx(1.0)
    weight[0] = 3.0
    assert solved(problem) == pytest.approx(1.5)


def test_what_did_not_change_is_not_compiled_again():
    traces: list[str] = []

    class Counted(Weighted):
        def residual(self, x: Any, theta: Any) -> Any:
            traces.append("trace")
            return super().residual(x, theta)

    own = Counted(1.0)
    counts: list[int] = []
    for start in (0.0, 1.0, 2.0):
        bl.solve(bl.RootFinding(own.residual), 2.0, start)  # a new method object every time
        counts.append(len(traces))
    assert len(set(counts)) == 1


class Slotted:
    __slots__ = ("weight",)

    def __init__(self, weight: Any):
        self.weight = weight


class Constants:
    weight: Any = 1


class Below(Constants):
    pass


def nested(weight: Any, depth: int) -> Any:
    for _ in range(depth):
        weight = {"inner": [weight]}
    return weight


def at(thing: Any, depth: int) -> Any:
    for _ in range(depth):
        thing = thing["inner"][0]
    return thing


def _list_of_ints() -> Any:
    held = [1, 5]
    return (lambda: held[0]), (lambda: held.__setitem__(0, 3))


def _deque() -> Any:
    held = collections.deque([1])
    return (lambda: held[0]), (lambda: held.__setitem__(0, 3))


def _class_attribute() -> Any:
    kind = type("Kind", (), {"weight": 1})
    return (lambda: kind.weight), (lambda: setattr(kind, "weight", 3))


def _attribute_of_the_object_s_class() -> Any:
    kind = type("Kind", (Below,), {})
    own = kind()
    return (lambda: own.weight), (lambda: setattr(kind, "weight", 3))


def _slots() -> Any:
    held = Slotted(1)
    return (lambda: held.weight), (lambda: setattr(held, "weight", 3))


def _deep() -> Any:
    inmost = Slotted(1.0)
    held = nested(inmost, 9)
    return (lambda: at(held, 9).weight), (lambda: setattr(inmost, "weight", 3.0))


def _namespace() -> Any:
    held = types.SimpleNamespace(inner=types.SimpleNamespace(weight=1))
    return (lambda: held.inner.weight), (lambda: setattr(held.inner, "weight", 3))


def _attribute_of_a_function() -> Any:
    def weight() -> Any:
        return weight.number

    weight.number = 1
    return weight, lambda: setattr(weight, "number", 3)


def _behind_jit() -> Any:
    held = [1]
    weight = jax.jit(lambda: held[0])
    return weight, lambda: (held.__setitem__(0, 3), weight.clear_cache())


def _many() -> Any:
    held = [Slotted(1) for _ in range(5000)]
    return (lambda: held[-1].weight), (lambda: setattr(held[-1], "weight", 3))


@pytest.mark.parametrize(
    "hold",
    others_slow(
        [
            _list_of_ints,
            _deque,
            _class_attribute,
            _attribute_of_the_object_s_class,
            _slots,
            _deep,
            _namespace,
            _attribute_of_a_function,
            _behind_jit,
            _many,
        ],
        _class_attribute,
        _slots,
        _deep,
        _namespace,
        _behind_jit,
    ),
)
def test_what_is_held_in_any_way_counts(hold: Any):
    weight, change = hold()
    problem = bl.RootFinding(lambda x, theta: weight() * (x - theta) + x)
    assert solved(problem) == pytest.approx(1.0)
    change()
    assert solved(problem) == pytest.approx(1.5)


def test_an_attribute_of_the_problem_s_class_counts():
    class Problem(bl.InnerProblem):
        weight = 1

        def residual(self, x: Any, theta: Any) -> Any:
            return self.weight * (x - theta) + x

    assert solved(Problem()) == pytest.approx(1.0)
    Problem.weight = 3
    assert solved(Problem()) == pytest.approx(1.5)


def test_an_attribute_of_the_user_s_module_counts():
    settings = types.ModuleType("settings")
    settings.weight = 1  # pyright: ignore[reportAttributeAccessIssue]
    notebook = types.ModuleType("notebook")
    vars(notebook)["settings"] = settings
    exec("def residual(x, theta):\n    return settings.weight * (x - theta) + x", vars(notebook))  # noqa: S102
    problem = bl.RootFinding(notebook.residual)
    assert solved(problem) == pytest.approx(1.0)
    settings.weight = 3  # pyright: ignore[reportAttributeAccessIssue]
    assert solved(problem) == pytest.approx(1.5)


@pytest.mark.parametrize("make", [lambda: [0, 0], lambda: {"a": 0, "b": [0]}, lambda: Slotted([0])])
def test_a_function_s_own_tally_does_not_compile_it_again(make: Any):
    tally, traces = make(), 0

    def residual(x: Any, theta: Any) -> Any:
        nonlocal traces
        traces += 1
        kept = tally.weight if isinstance(tally, Slotted) else tally
        kept[next(iter(kept)) if isinstance(kept, dict) else 0] += 1
        return 2 * x - theta

    problem = bl.RootFinding(residual)
    counts: list[int] = []
    for start in (0.0, 1.0, 2.0):
        bl.solve(problem, 2.0, start)
        counts.append(traces)
    assert len(set(counts)) == 1


def test_looking_at_what_is_held_is_cheap():
    data, rate, options = jnp.ones((50, 3)), 0.1, {"power": 2, "names": ["a", "b"]}

    def objective(x: Any, theta: Any) -> Any:
        return rate * jnp.sum((data @ x) ** options["power"]) + jnp.sum(theta * x**2)

    seconds = min(timeit.repeat(lambda: Captured(objective), number=200, repeat=5)) / 200
    assert seconds < 100e-6  # a generous bound on a shared machine; about 10 measured


@pytest.mark.parametrize(
    "name",
    others_slow(["Implicit", "Unrolled", "Neumann", "OneStep", "Nystrom"], "Implicit", "Unrolled"),
)
def test_outside_jit_what_is_captured_counts_as_well(name: str):
    """There JAX hands a captured number over as Python's, which is easily taken for a constant."""
    options: dict[str, Any] = {**GRADIENT, "budget": bl.Budget(9), "adjoint_budget": bl.Budget(9)}
    options["estimator"] = getattr(bl, name)()

    def captured(theta: Any, other: Any) -> Any:
        problem = bl.Minimization(lambda x, t: jnp.sum((x - theta * t) ** 2 + 0.1 * theta * x))
        return jnp.sum(bl.solve(problem, other, X0, **options).value)

    def passed(theta: Any, other: Any) -> Any:
        problem = bl.Minimization(lambda x, t: jnp.sum((x - t[0] * t[1]) ** 2 + 0.1 * t[0] * x))
        return jnp.sum(bl.solve(problem, (theta, other), X0, **options).value)

    got = jax.grad(captured, argnums=(0, 1))(2.0, 3.0)
    expected = jax.grad(passed, argnums=(0, 1))(2.0, 3.0)
    np.testing.assert_allclose(got, expected, rtol=1e-12)
    assert min(np.abs(expected)) > 0.1


def test_the_gradient_of_a_hypergradient_sees_what_its_outer_loss_captured():
    problem = bl.Minimization(lambda x, theta: jnp.sum(jnp.exp(theta) * x**2 - x))

    def total(target: Any) -> Any:
        result = bl.hypergradient(
            lambda x, theta: jnp.sum((x - target) ** 2), problem, jnp.zeros(N), X0, error=False
        )
        return result.value + jnp.sum(result.gradient)

    # x = 1/2 e^-θ: value Σ (x - t)², gradient Σ -2 (x - t) x.
    expected = N * (-2 * (0.5 - 0.3) + 2 * 0.5)
    np.testing.assert_allclose(jax.grad(total)(0.3), expected, rtol=1e-8)


FORWARD = {
    "jvp": lambda f, t: jax.jvp(f, (t,), (t,)),
    "jvp in jit": lambda f, t: jax.jit(lambda t: jax.jvp(f, (t,), (t,)))(t),
    "jvp of jit": lambda f, t: jax.jvp(jax.jit(f), (t,), (t,)),
    "jacfwd": lambda f, t: jax.jacfwd(f)(t),
    "linearize": lambda f, t: jax.linearize(f, t)[1](t),
    "grad of jvp": lambda f, t: jax.grad(lambda s: jax.jvp(f, (s,), (t,))[1])(t),
    "vmap of jvp": lambda f, t: jax.vmap(lambda s: jax.jvp(f, (s,), (t,))[1])(jnp.stack([t, t])),
}


@pytest.mark.parametrize("name", FORWARD)
def test_forward_mode_where_only_reverse_mode_works_says_so(name: str):
    def value(theta: Any) -> Any:
        solution = objective_passed(theta, estimator=bl.Unrolled(), **GRADIENT)
        return loss(solution, theta)

    with pytest.raises(TypeError, match=r"Use Unrolled\(mode='forward'\)"):
        FORWARD[name](value, jnp.asarray(THETA))


def test_reverse_mode_where_only_forward_mode_works_says_so():
    def value(theta: Any, estimator: bl.Estimator) -> Any:
        return loss(objective_passed(theta, estimator=estimator, **GRADIENT), theta)

    theta = jnp.asarray(THETA)
    with pytest.raises(TypeError, match=r"mode='forward'\) is for jax.jvp"):
        jax.grad(value)(theta, bl.Unrolled(mode="forward"))
    with pytest.raises(TypeError, match="needs forward mode over reverse mode"):
        jax.jacrev(jax.grad(value))(theta, bl.Unrolled())
