"""A small training run, in a process of its own or in the test's, to be disturbed."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel as bl

EPOCHS = 4
BATCHES = 5


def task() -> bl.Task:
    """Regression through a fixed point, with minibatches drawn by key and a memory."""

    def loss(theta: Any, batch: Any, fidelity: bl.Fidelity, memory: Any) -> Any:
        problem = bl.FixedPoint(lambda x, theta: 0.5 * jnp.tanh(x) + theta["w"] * batch)
        solution = bl.solve(problem, theta, memory, fidelity=fidelity)
        error = jnp.mean((solution.value + theta["b"] - batch**2) ** 2)
        return error, jax.lax.stop_gradient(solution.value)

    def validate(theta: Any) -> Any:
        return jnp.sum(theta["w"] ** 2) + jnp.abs(theta["b"] - 0.3)

    def batches(epoch: int, key: Any) -> Any:
        del epoch
        return list(jax.random.normal(key, (BATCHES, 16)))

    return bl.Task(
        {"w": jnp.linspace(0.1, 1.0, 16), "b": jnp.zeros(())},
        loss,
        batches=batches,
        validate=validate,
        memory=jnp.zeros(16),
        optimizer=optax.adam(0.05),
        ladder=bl.Ladder.iterations(1, 1, 12),
    )


def train(
    directory: Path | None,
    policy: str = "prdp",
    callbacks: Any = (),
    seconds: float = 0.0,
    **options: Any,
) -> bl.Run:
    """The run, with a checkpoint before every update unless said otherwise."""
    made = task()
    assert made.ladder is not None
    controller = (
        bl.AutomaticRefinement(made.ladder)
        if policy == "auto"
        else bl.ProgressiveRefinement(made.ladder, error_window=2, ema_window=2)
    )
    return bl.optimize(
        made,
        controller=controller,
        epochs=EPOCHS,
        directory=directory,
        checkpoints=bl.Checkpoints(seconds=seconds),
        callbacks=callbacks,
        progress=False,
        **options,
    )


def moments(directory: Path) -> list[str]:
    """Names of the checkpoints there, oldest first."""
    folder = directory / "checkpoints"
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(entry.name for entry in found if not entry.name.startswith("."))


def last_state(directory: Path) -> str:
    """SHA-256 of the whole state in the newest checkpoint."""
    manifest = directory / "checkpoints" / moments(directory)[-1] / "manifest.json"
    return json.loads(manifest.read_text())["files"]["state.safetensors"]["sha256"]


def live(directory: str, policy: str, tell: Any) -> None:
    """Train, or go on, in this process; tell of every write that is about to reach the disk."""
    fsync: Callable[[int], None] = os.fsync

    def announced(handle: int) -> None:
        tell.send("saving")
        time.sleep(0.001)
        fsync(handle)

    os.fsync = announced
    jax.config.update("jax_enable_x64", True)
    path = Path(directory)
    found = moments(path)
    tell.send(("begins", found[-1] if found else ""))
    train(path, policy, resume=bool(found), overwrite=not found)
    tell.send("done")


def same(first: bl.Run, second: bl.Run) -> None:
    """Assert that two runs ended the same to the last bit, but for times."""
    for one, other in zip(jax.tree.leaves(first.theta), jax.tree.leaves(second.theta), strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
    timed = ("seconds", "validation_seconds", "compile_seconds", "elapsed")
    for name, column in first.history.columns().items():
        if name not in timed:
            np.testing.assert_array_equal(column, second.history.column(name), err_msg=name)
