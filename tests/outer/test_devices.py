"""Batches over several devices: the numbers of one, and refusals that name what does not fit."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

import bilevel as bl
from bilevel.outer.devices import DevicesError, mesh_of

PROGRAM = """
import dataclasses, json
import jax, jax.numpy as jnp, numpy as np, optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import bilevel as bl
from tests.processes.task import task as make

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_enable_x64", True)
task, found = make(), {}

def train(task, devices, **options):
    controller = bl.ProgressiveRefinement(task.ladder, **task.refinement)
    return bl.optimize(task, controller=controller, progress=False, devices=devices, **options)

def compared(name, task, devices):
    one, many = train(task, None), train(task, devices)
    found[name] = {
        "apart": max(float(np.max(np.abs(np.asarray(a) - np.asarray(b))))
                     for a, b in zip(jax.tree.leaves(one.theta), jax.tree.leaves(many.theta))),
        "levels": [r.level for r in one.history] == [r.level for r in many.history],
        "different": len({r.level for r in one.history}),
        "compilations": many.summary.compilations,
        "devices": many.summary.device.split(" ")[0],
        "whole": many.theta["b"].sharding.is_fully_replicated,
        "lies": str(many.theta["w"].sharding.spec),
    }

compared("number", task, 4)
square = Mesh(np.array(jax.devices()).reshape(2, 2), ("data", "model"))
w = jax.device_put(task.theta0["w"], NamedSharding(square, P("model")))
mine = dataclasses.replace(task, theta0={**task.theta0, "w": w})
many = train(mine, square)
one = train(task, None)
found["mesh"] = {
    "apart": float(np.max(np.abs(np.asarray(one.theta["w"]) - np.asarray(many.theta["w"])))),
    "lies": str(many.theta["w"].sharding.spec),
    "compilations": many.summary.compilations,
}
listed = [jax.random.normal(jax.random.key(size), (size, 8)) for size in (8, 6)]
for name, given, devices in (
    ("made", make(rows=18), 4),
    ("listed", dataclasses.replace(task, batches=listed), 4),
    ("other devices", mine, 2),
    ("too many", task, 9),
):
    try:
        train(given, devices)
    except ValueError as error:
        found[name] = str(error)
print(json.dumps(found))
"""


def test_devices_share_batches_and_find_what_one_finds():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    number = found["number"]
    assert number["apart"] < 1e-12
    assert number["levels"]
    assert number["different"] > 2  # of the controller's decisions
    assert number["compilations"] == 1
    assert number["devices"] == "4"
    assert number["whole"]
    assert found["mesh"]["apart"] < 1e-12
    assert "model" in found["mesh"]["lies"]  # where it was put
    assert found["mesh"]["compilations"] == 1
    assert "a batch of 18 cannot be split evenly over 4 devices" in found["made"]
    assert "such as 20" in found["made"]
    assert "a batch of 6 cannot be split evenly over 4 devices" in found["listed"]
    assert "lies on other devices (4) than the batches shall (2)" in found["other devices"]
    assert "devices=9, and there are 4 (CPU)" in found["too many"]


def test_devices_that_are_no_devices_are_refused_by_name():
    task = bl.Task(1.0, lambda theta, batch, fidelity: theta**2, full=bl.Budget(1))
    for wrong, error in (("four", TypeError), (True, TypeError), (0, ValueError), (1.5, TypeError)):
        with pytest.raises(error, match="devices should be"):
            bl.optimize(task, optax.sgd(0.1), epochs=1, progress=False, devices=wrong)
    with pytest.raises(DevicesError, match=f"devices=4000, and there are {len(jax.devices())} "):
        mesh_of(4000, batches=True)


def test_without_batches_there_is_nothing_to_split():
    assert mesh_of(1, batches=False) is None
    assert mesh_of(None, batches=True) is None
    one = Mesh(np.array(jax.devices()[:1]), ("data",))
    assert mesh_of(one, batches=True) is None
    task = bl.Task(jnp.ones(3), lambda theta, batch, fidelity: jnp.sum(theta**2), full=bl.Budget(1))
    run = bl.optimize(task, optax.sgd(0.1), epochs=1, progress=False, devices=1)
    np.testing.assert_allclose(run.theta, 0.8 * np.ones(3), rtol=1e-15)
