"""A task for several processes: a penalty learnt through a fixed point, sample by sample."""

import ctypes
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import bilevel as bl


def task(
    rows: int = 16,
    epochs: int = 4,
    seed: int = 0,
    pause: float = 0.0,
    fails_in: int = -1,
    frozen_in: int = -1,
    cut: bool = False,
) -> bl.Task:
    """Options make it slow, raise in one process, hold Python's lock there, or lie in parts."""

    def loss(theta, batch, fidelity):
        def of_one(row):
            problem = bl.FixedPoint(lambda x, theta: 0.5 * jnp.tanh(x) + theta["w"] * row)
            solution = bl.solve(problem, theta, jnp.zeros(8), fidelity=fidelity)
            return jnp.mean((solution.value + theta["b"] - row**2) ** 2)

        return jnp.mean(jax.vmap(of_one)(batch))

    def batches(epoch, key):
        for number, each in enumerate(jax.random.split(jax.random.fold_in(key, seed), 4)):
            if epoch == 2 and number == 1:
                if jax.process_index() == fails_in:
                    message = "this one has no data"
                    raise OSError(message)
                if jax.process_index() == frozen_in:
                    ctypes.PyDLL(None).usleep(8_000_000)  # holds Python's lock
            time.sleep(pause)
            yield jax.random.normal(each, (rows, 8))

    start = np.linspace(0.1, 1.0, 8)
    w = jnp.asarray(start)
    if cut:
        mesh = Mesh(np.array(jax.devices()), ("batch",))
        lies = NamedSharding(mesh, PartitionSpec("batch"))
        w = jax.make_array_from_callback((8,), lies, lambda part: start[part])
    return bl.Task(
        {"w": w, "b": jnp.zeros(())},
        loss,
        batches=batches,
        validate=lambda theta: jnp.sum(theta["w"] ** 2) + jnp.abs(theta["b"] - 0.3),
        optimizer=optax.adam(0.05),
        epochs=epochs,
        ladder=bl.Ladder.iterations(1, 1, 12),
        refinement={"error_window": 2, "ema_window": 1, "stepping_threshold": 0.7},
    )
