"""Stochastic bilevel methods on benchmark_bilevel's problems: samples and time to an accuracy.

The quadratic is `simulated` of benchmark_bilevel (Dagréou et al. 2022, github.com/benchopt):
n = 1024 terms, 100 inner and 100 outer dimensions, inner curvature from 0.1 to 1, crossed terms
up to 0.1. Its classification problems are those of its `ijcnn1` and `mnist` settings on generated
data of the same shapes, smaller with `--quick`.

Every method takes minibatches of 64, and the step sizes that do best on a small grid of its own.
"""

import itertools
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PRNGKeyArray

import bilevel as bl
from benchmarks.harness import Report
from benchmarks.stochastic_problems import Problem, cleaning, penalties, quadratic

BATCH = 64
INNER = 10
"""Inner and adjoint steps for one outer step, of the methods that have more than one."""

RATES = (0.05, 0.2, 0.8)
"""Inner step sizes, in units of the inverse curvature."""

RATIOS = (0.01, 0.1, 1.0, 10.0)
"""Outer step sizes, in units that each problem gives."""


class State(NamedTuple):
    """θ, x and λ."""

    theta: Array
    x: Array
    adjoint: Array


class Draw(NamedTuple):
    """Minibatches by their number, of the inner and of the outer terms."""

    problem: Problem
    key: PRNGKeyArray

    def inner(self, number: int) -> Any:
        """Some terms of the inner objective."""
        key = jax.random.fold_in(self.key, number)
        return self.problem.inner_batch(
            jax.random.randint(key, (BATCH,), 0, self.problem.inner_terms)
        )

    def outer(self) -> Any:
        """Some terms of the outer loss."""
        key = jax.random.fold_in(self.key, 1000)
        return self.problem.outer_batch(
            jax.random.randint(key, (BATCH,), 0, self.problem.outer_terms)
        )


Method = Callable[[Problem, State, Draw, Any], tuple[Array, State]]
"""Gradient in θ, and the state with x and λ moved; the last argument is the inner step size."""


def _slope(problem: Problem, state: State, batch: Any) -> Array:
    return jax.grad(problem.objective)(state.x, state.theta, batch)


def _curved(problem: Problem, state: State, v: Array, batch: Any) -> Array:
    slope = partial(jax.grad(problem.objective), theta=state.theta, batch=batch)
    return jax.jvp(slope, (state.x,), (v,))[1]


def _pulled(problem: Problem, state: State, inner: Any, outer: Any) -> Array:
    def lagrangian(theta: Array) -> Array:
        def along(x: Array) -> Array:
            return problem.objective(x, theta, inner)

        slope = jax.jvp(along, (state.x,), (state.adjoint,))[1]
        return problem.outer_loss(state.x, theta, outer) - slope

    return jax.grad(lagrangian)(state.theta)


def simultaneous(problem: Problem, state: State, draw: Draw, rho: Any) -> tuple[Array, State]:
    """SOBA, by the library."""
    soba = bl.Simultaneous(problem.objective, problem.outer_loss, state.x, optax.sgd(rho))
    memory = soba.memory._replace(x=state.x, adjoint=state.adjoint)
    batch = draw.inner(0), draw.outer()
    result, memory = soba(state.theta, batch, bl.Fidelity(bl.Budget(1)), memory)
    return result.gradient, State(state.theta, memory.x, memory.adjoint)


def amigo(problem: Problem, state: State, draw: Draw, rho: Any) -> tuple[Array, State]:
    """AmIGO (Arbel & Mairal 2022): warm-started inner steps, then warm-started adjoint steps."""
    for number in range(INNER):
        state = state._replace(x=state.x - rho * _slope(problem, state, draw.inner(number)))
    outer = draw.outer()
    wanted = jax.grad(problem.outer_loss)(state.x, state.theta, outer)
    adjoint = state.adjoint
    for number in range(INNER, 2 * INNER):
        left = _curved(problem, state, adjoint, draw.inner(number)) - wanted
        adjoint = adjoint - rho * left
    state = state._replace(adjoint=adjoint)
    return _pulled(problem, state, draw.inner(2 * INNER), outer), state


def stocbio(problem: Problem, state: State, draw: Draw, rho: Any) -> tuple[Array, State]:
    """stocBiO (Ji, Yang & Liang 2021): warm-started inner steps, then a Neumann series."""
    for number in range(INNER):
        state = state._replace(x=state.x - rho * _slope(problem, state, draw.inner(number)))
    outer = draw.outer()
    term = jax.grad(problem.outer_loss)(state.x, state.theta, outer)
    total = term
    for number in range(INNER, 2 * INNER):
        term = term - rho * _curved(problem, state, term, draw.inner(number))
        total = total + term
    state = state._replace(adjoint=rho * total)
    return _pulled(problem, state, draw.inner(2 * INNER), outer), state


METHODS: dict[str, tuple[Method, int]] = {
    # Passes through a minibatch an update: gradients, products with Hessians, crossed ones.
    "SOBA (bl.Simultaneous)": (simultaneous, 5),
    "AmIGO": (amigo, 2 * INNER + 3),
    "stocBiO": (stocbio, 2 * INNER + 3),
}


class Course(NamedTuple):
    """How far a method was after how many samples and seconds."""

    samples: np.ndarray
    seconds: np.ndarray
    value: np.ndarray

    def reached(self, target: float) -> tuple[float | None, float | None]:
        """Samples and seconds at the first look below a value; `None` where it never was."""
        below = np.flatnonzero(self.value <= target)
        if not len(below):
            return None, None
        return float(self.samples[below[0]]), float(self.seconds[below[0]])


class Runner:
    """Runs of one method on one problem with any step sizes, by one compilation."""

    def __init__(self, problem: Problem, method: Method, passes: int):
        self.problem, self.passes = problem, passes
        self.updates = problem.samples // (passes * BATCH)

        @jax.jit
        def advance(state: State, first: Array, count: Array, rho: Array, gamma: Array) -> State:
            def once(number: Array, state: State) -> State:
                decay = (1.0 + number / (0.1 * self.updates)) ** -0.5
                draw = Draw(problem, jax.random.fold_in(jax.random.key(0), number))
                gradient, moved = method(problem, state, draw, rho * decay / problem.curvature)
                theta = state.theta - gamma * decay * problem.outer_step * gradient
                return moved._replace(theta=theta)

            return jax.lax.fori_loop(first, first + count, once, state)

        self.advance = advance

    def course(self, rates: tuple[float, float], looks: int) -> Course:
        """One run, looked at from time to time; looking is not timed."""
        problem, chunk = self.problem, max(self.updates // looks, 1)
        state = State(problem.theta0, problem.x0, jnp.zeros_like(problem.x0))
        jax.block_until_ready(self.advance(state, 0, 0, *rates))
        samples, seconds, value = [0.0], [0.0], [float(problem.value(state.theta))]
        for look in range(looks):
            began = time.perf_counter()
            state = jax.block_until_ready(self.advance(state, look * chunk, chunk, *rates))
            seconds.append(seconds[-1] + time.perf_counter() - began)
            samples.append(samples[-1] + chunk * self.passes * BATCH)
            value.append(float(problem.value(state.theta)))
        return Course(np.array(samples), np.array(seconds), np.array(value))

    def best(self, looks: int) -> tuple[Course, tuple[float, float]]:
        """The run of the step sizes with the lowest last value; the others are looked at once."""

        def last(rates: tuple[float, float]) -> float:
            value = self.course(rates, 1).value[-1]
            return float(value) if np.isfinite(value) else np.inf

        rates = min(itertools.product(RATES, RATIOS), key=last)
        return self.course(rates, looks), rates


def nested(problem: Problem, policy: str) -> Course:
    """The library's nested way on all samples at once, under a policy."""
    task = problem.nested()
    assert task.ladder is not None
    controller = (
        bl.AutomaticRefinement(task.ladder)
        if policy == "auto"
        else bl.FixedFidelity(task.ladder.finest)
    )
    run = bl.optimize(task, controller=controller, progress=False)
    work = np.cumsum([0 if record.work is None else record.work for record in run.history])
    compiled = np.cumsum([record.compile_seconds for record in run.history])
    return Course(
        samples=work * float(problem.inner_terms),
        seconds=np.array([record.elapsed for record in run.history]) - compiled,
        value=np.array([record.metric for record in run.history], float),
    )


def compared(report: Report, problem: Problem, looks: int) -> None:
    """All methods on one problem."""
    start, goal = float(problem.value(problem.theta0)), problem.best
    targets = {part: goal + part * (start - goal) for part in (0.1, 0.01)}
    table = report.table(
        f"{problem.name}: {problem.what}, from {start:.4g}, best {goal:.4g}",
        "method",
        "last",
        *(f"{what} to {part:.0%}" for part in targets for what in ("10³ samples", "s")),
        "steps",
    )
    for name, (method, passes) in METHODS.items():
        report.say(f"{problem.name}: {name}")
        run, rates = Runner(problem, method, passes).best(looks)
        _row(table, name, run, targets, f"ρ {rates[0]:g}, γ {rates[1]:g}")
    for policy in ("full", "auto"):
        report.say(f"{problem.name}: nested, {policy}")
        run = nested(problem, policy)
        _row(table, f"nested, {policy}, all samples", run, targets, "")


def _row(table: Any, name: str, run: Course, targets: dict[float, float], words: str) -> None:
    cells: list[Any] = []
    for target in targets.values():
        samples, seconds = run.reached(target)
        cells += ["–", "–"] if samples is None else [samples / 1e3, seconds]
    table.add(name, float(run.value[-1]), *cells, words)


def benchmark(quick: bool) -> Report:
    """The quadratic and two classification problems."""
    report = Report("bilevel_suite")
    for make in (quadratic, penalties, cleaning):
        compared(report, make(quick), looks=10 if quick else 20)
    return report
