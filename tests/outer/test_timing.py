"""Solver time: told from outside, by running one program with few and with many iterations."""

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

from bilevel.budget import Budget
from bilevel.outer import timing
from bilevel.outer.history import History, Record
from bilevel.outer.optimize import optimize
from bilevel.outer.task import Task
from bilevel.outer.timing import solver_seconds
from bilevel.outer.update import REPORT
from bilevel.refinement.fidelity import Fidelity
from bilevel.refinement.fixed import FixedFidelity

HISTORY = History(
    [Record(epoch=1, updates=10, primal_iterations=300, adjoint_iterations=70, seconds=9.0)]
)


class Machine:
    """An update that takes what it is said to take, on a clock of its own."""

    def __init__(self, primal: float, adjoint: float, other: float = 0.05):
        self.costs = primal, adjoint
        self.other = other
        self.now = 0.0
        self.seen: list[tuple[int, int]] = []
        self.dtypes: set[Any] = set()

    def perf_counter(self) -> float:
        return self.now

    def counts(self, fidelity: Fidelity) -> tuple[int, int]:
        adjoint = fidelity.adjoint_budget
        assert adjoint is not None
        self.dtypes |= {np.asarray(each.iterations).dtype for each in (fidelity.budget, adjoint)}
        return int(fidelity.budget.iterations), int(adjoint.iterations)

    def __call__(self, fidelity: Fidelity) -> Any:
        counts = self.counts(fidelity)
        self.seen.append(counts)
        self.now += self.other + sum(map(float.__mul__, self.costs, map(float, counts)))
        report = np.zeros(len(REPORT))
        report[[REPORT.index("primal_iterations"), REPORT.index("adjoint_iterations")]] = counts
        return jnp.asarray(report)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[Machine], Machine]:
    def put(machine: Machine) -> Machine:
        stand_in = SimpleNamespace(perf_counter=machine.perf_counter)
        monkeypatch.setattr(timing, "time", stand_in)
        return machine

    return put


FIDELITY = Fidelity(Budget(jnp.int32(30)), Budget(jnp.int32(7)))


def test_primal_and_adjoint_iterations_are_timed_apart(clock: Callable[[Machine], Machine]):
    machine = clock(Machine(primal=2e-3, adjoint=5e-3))
    seconds = solver_seconds(machine, FIDELITY, HISTORY, limit=100.0)
    assert seconds == pytest.approx(300 * 2e-3 + 70 * 5e-3)
    # Neither a longer step nor a shorter one has anything to do with the solves.
    other = clock(Machine(primal=2e-3, adjoint=5e-3, other=0.5))
    assert solver_seconds(other, FIDELITY, HISTORY, limit=100.0) == pytest.approx(seconds)
    assert machine.dtypes == {np.dtype("int32")}


def test_it_is_no_more_than_the_updates_took(clock: Callable[[Machine], Machine]):
    machine = clock(Machine(primal=1.0, adjoint=1.0))
    assert solver_seconds(machine, FIDELITY, HISTORY, limit=1e6) == 9.0


def test_it_keeps_to_its_limit(clock: Callable[[Machine], Machine]):
    for limit in (6.0, 8.0, 20.0, 1e6):
        machine = clock(Machine(primal=1e-2, adjoint=1e-2, other=0.5))
        assert solver_seconds(machine, FIDELITY, HISTORY, limit) is not None
        # Three updates find out what is counted, the others are timed.
        assert machine.now <= limit + 3 * 0.9
        assert len(machine.seen) <= 3 + 30
    machine = clock(Machine(primal=1e-2, adjoint=1e-2))
    assert solver_seconds(machine, FIDELITY, HISTORY, limit=5.0) is None
    assert machine.seen == []


def test_iterations_that_cost_little_are_told_by_many_of_them(clock: Callable[[Machine], Machine]):
    """Ten milliseconds of noise hide 30 iterations of 0.1 ms, and not 512 of them."""

    class Noisy(Machine):
        def __call__(self, fidelity: Fidelity) -> Any:
            self.now += 1e-2 * (0.5 + 0.5 * np.sin(len(self.seen)))
            return super().__call__(fidelity)

    machine = clock(Noisy(primal=1e-4, adjoint=1e-4))
    seconds = solver_seconds(machine, FIDELITY, HISTORY, limit=1e6)
    assert seconds == pytest.approx(370 * 1e-4, rel=0.2)
    assert max(primal for primal, _ in machine.seen) == 512


def test_iterations_below_the_noise_are_not_told(clock: Callable[[Machine], Machine]):
    class Noisy(Machine):
        def __call__(self, fidelity: Fidelity) -> Any:
            self.now += 1e-2 * (0.5 + 0.5 * np.sin(len(self.seen)))
            return super().__call__(fidelity)

    machine = clock(Noisy(primal=1e-9, adjoint=1e-9))
    assert solver_seconds(machine, FIDELITY, HISTORY, limit=1e6) is None


def test_where_no_solve_reports_it_cannot_be_told(clock: Callable[[Machine], Machine]):
    machine = clock(Machine(1e-2, 1e-2))
    silent = History([Record(epoch=1, updates=10, seconds=1.0)])
    assert solver_seconds(machine, FIDELITY, silent, limit=100.0) is None
    assert machine.seen == []


def test_budgets_that_move_nothing_tell_nothing(clock: Callable[[Machine], Machine]):
    class Deaf(Machine):
        def counts(self, fidelity: Fidelity) -> tuple[int, int]:
            return 12, 3

    assert solver_seconds(clock(Deaf(1e-2, 1e-2)), FIDELITY, HISTORY, limit=100.0) is None


def test_an_adjoint_that_no_budget_moves_is_as_fast_as_the_primal(
    clock: Callable[[Machine], Machine],
):
    class Half(Machine):
        def counts(self, fidelity: Fidelity) -> tuple[int, int]:
            return super().counts(fidelity)[0], 2

    machine = clock(Half(primal=2e-3, adjoint=9.0))
    seconds = solver_seconds(machine, FIDELITY, HISTORY, limit=1e6)
    assert seconds == pytest.approx((300 + 70) * 2e-3)


def slow_task(size: int, report: bool) -> Task:
    matrix = jnp.asarray(np.random.default_rng(0).normal(size=(size, size)) / size**0.5)

    def loss(theta: Any, batch: Any, fidelity: Fidelity) -> Any:
        steps = fidelity.budget.iterations
        x = repeated(matrix, lax.stop_gradient(theta), steps)
        probe = fidelity.probe
        value = (theta - 2.0) ** 2 + 0.0 * jnp.sum(x)
        if probe is None or not report:
            return value
        return value + jnp.asarray(steps, float) * probe.primal_iterations + probe.solves

    return Task(1.0, loss, optimizer=optax.sgd(0.1), full=Budget(300), epochs=30)


def repeated(matrix: Any, start: Any, steps: Any) -> Any:
    """The inner solve: products with a matrix, which hardly anything else in a step equals."""

    def step(_: Any, x: Any) -> Any:
        return jnp.tanh(matrix @ x)

    return lax.fori_loop(0, steps, step, jnp.full(len(matrix), start))


def test_a_solve_takes_what_it_takes_by_itself():
    task = slow_task(160, report=True)
    run = optimize(task, controller=FixedFidelity(Budget(300)), progress=False, time_solver=True)
    alone = jax.jit(repeated)
    matrix = jnp.asarray(np.random.default_rng(0).normal(size=(160, 160)) / 160**0.5)
    alone(matrix, 1.0, 300).block_until_ready()
    times: list[float] = []
    for _ in range(10):
        start = time.perf_counter()
        alone(matrix, 1.0, 300).block_until_ready()
        times.append(time.perf_counter() - start)
    assert run.summary.primal_iterations == 30 * 300
    assert run.summary.solver_seconds is not None
    # Timed on a machine that does other things too: what is off by iterations is off by 300.
    assert 0.4 < run.summary.solver_seconds / (30 * min(times)) < 2.5


def test_nobody_is_told_what_nobody_asked_for():
    task = slow_task(20, report=True)
    fixed = FixedFidelity(Budget(5))
    assert optimize(task, controller=fixed, epochs=2, progress=False).summary.solver_seconds is None
    silent = optimize(
        slow_task(20, report=False), controller=fixed, epochs=2, progress=False, time_solver=True
    )
    assert silent.summary.solver_seconds is None


def test_timing_compiles_nothing(compilations: Callable[[Callable[[], Any]], list[str]]):
    task, fixed = slow_task(160, report=True), FixedFidelity(Budget(300))
    runs: list[Any] = []

    def train() -> None:
        runs.append(optimize(task, controller=fixed, progress=False, time_solver=True))

    assert compilations(train).count("outer_update") == 1
    # On a machine with other work it may not stand out.
    assert runs[0].summary.solver_seconds is None or runs[0].summary.solver_seconds > 0
