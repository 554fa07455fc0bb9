"""Warm-up: what a process pays once, paid before the first run of a comparison is timed."""

import contextlib
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from bilevel.outer.control import uniform
from bilevel.outer.task import Task
from bilevel.outer.update import State, make_update


def warm_up(task: Task, optimizer: optax.GradientTransformation | None, controller: Any) -> None:
    """Trace a task's update and lower it, and have XLA compile something small.

    A process starts its backend, loads modules when they are first used, and traces the
    functions of JAX that a task is made of, once; without this the first policy of a
    comparison would pay for all of them, about a second. Nothing of it is kept.

    **Arguments:**

    - `task`: as the first run has it.
    - `optimizer`: `None` takes the task's.
    - `controller`: of the first run.
    """
    if jax.config.jax_disable_jit:  # pyright: ignore[reportAttributeAccessIssue]
        return
    jax.jit(lambda x: jnp.sum(x @ x)).lower(jnp.ones((2, 2))).compile()
    optimizer = task.optimizer if optimizer is None else optimizer
    # What is wrong with a task the run itself says, with its own words about where.
    with contextlib.suppress(Exception):
        assert optimizer is not None
        trained = eqx.filter(task.parameters, eqx.is_inexact_array)
        state = State(trained, optimizer.init(trained), task.first_memory)
        batch = next(task.epoch_batches(1, jax.random.key))
        fidelity = uniform(controller.fidelity(controller.init()))
        update: Any = eqx.filter_jit(make_update(task, optimizer))
        update.lower(state, batch, fidelity)
        if task.jit_validate and task.validate is not None:
            validate: Any = eqx.filter_jit(task.validate)
            validate.lower(task.parameters)
