"""Small tasks: the inner solves are plain loops, which feed the probe by hand."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from jax import lax

from bilevel.budget import Budget
from bilevel.outer.history import History, Record
from bilevel.outer.optimize import optimize
from bilevel.outer.run import COMPLETED, Run, summarize
from bilevel.outer.task import Task
from bilevel.refinement.fidelity import Fidelity
from bilevel.refinement.ladder import Ladder

RATE = 0.5


def inner(theta: Any, fidelity: Fidelity) -> Any:
    """theta (1 - RATE**K): K steps of gradient descent towards theta."""

    def step(_: Any, x: Any) -> Any:
        return x + RATE * (lax.stop_gradient(theta) - x)

    x = lax.fori_loop(0, fidelity.budget.iterations, step, jnp.zeros_like(theta))
    # The loop's trip count is traced, so its derivative is written down.
    gain = 1 - RATE ** jnp.asarray(fidelity.budget.iterations, theta.dtype)
    return lax.stop_gradient(x - gain * theta) + gain * theta


def counted(loss: Any, fidelity: Fidelity, adjoint: int = 2) -> Any:
    """The loss, with K primal and `adjoint` iterations put into the probe's cotangent."""
    probe = fidelity.probe
    if probe is None:
        return loss
    primal = jnp.asarray(fidelity.budget.iterations, float)
    return (
        loss + primal * probe.primal_iterations + adjoint * probe.adjoint_iterations + probe.solves
    )


@pytest.fixture
def make_task() -> Callable[..., Task]:
    """A task that finds 2 from 5; each field may be given otherwise."""

    def make(**fields: Any) -> Task:
        def loss(theta: Any, batch: Any, fidelity: Fidelity) -> Any:
            return counted(0.5 * (inner(theta, fidelity) - 2.0) ** 2, fidelity)

        default: dict[str, Any] = {
            "theta0": 5.0,
            "loss": loss,
            "validate": lambda theta: jnp.abs(theta - 2.0),
            "ladder": Ladder.iterations(1, 1, 12),
            "optimizer": optax.sgd(0.5),
            "epochs": 10,
            "name": "two",
        }
        return Task(**(default | fields))

    return make


@pytest.fixture
def train(make_task: Callable[..., Task]) -> Callable[..., Run]:
    """Train such a task silently; unknown arguments are the task's."""
    options = {"optimizer", "controller", "epochs", "directory", "seed", "callbacks"}
    options |= {"max_nonfinite", "overwrite", "resume", "label", "progress"}

    def run(**arguments: Any) -> Run:
        own = {name: value for name, value in arguments.items() if name not in options}
        rest: dict[str, Any] = {"progress": False}
        rest |= {name: value for name, value in arguments.items() if name in options}
        return optimize(make_task(**own), **rest)

    return run


@pytest.fixture
def made_run() -> Callable[..., Run]:
    """A run out of records that are written by hand: nothing is trained."""

    def make(*records: Record, status: str = COMPLETED, **fields: Any) -> Run:
        history = History(records)
        seconds = history[-1].elapsed if history else 0.0
        default: dict[str, Any] = {
            "task": "made",
            "policy": "made",
            "controller": "none",
            "seed": 0,
            "message": "",
            "metric_name": "error",
            "seconds": seconds,
            "compile_seconds": history.total("compile_seconds") or 0.0,
            "compilations": 1,
            "other_compilations": 0,
            "device": "none",
        }
        return Run(0.0, history, summarize(history, {}, status=status, **(default | fields)))

    return make


@pytest.fixture
def full() -> Fidelity:
    return Fidelity(Budget(40), Budget(40))


@pytest.fixture
def compilations(caplog: pytest.LogCaptureFixture) -> Callable[[Callable[[], Any]], list[str]]:
    """The names of the functions that XLA compiles during a call, from JAX's own log."""

    def watch(call: Callable[[], Any]) -> list[str]:
        caplog.clear()
        with jax.log_compiles(), caplog.at_level("WARNING"):
            call()
        messages = [record.getMessage() for record in caplog.records]
        return [
            message.split("(")[1].split(")")[0]
            for message in messages
            if message.startswith("Compiling jit(")
        ]

    return watch
