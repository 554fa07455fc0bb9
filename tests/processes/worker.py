"""One of several processes that train by `bl.optimize`; prints what each run came to, as JSON."""

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import jax
import numpy as np

import bilevel as bl


def main(index: int, count: int, address: str) -> None:
    """Train by every kind of controller, and with what each process has of its own."""
    with bl.connected_processes(address, index, count, silence=10.0):
        assert jax.process_count() == count
        found = {}
        task = load().task()
        controllers = {
            "prdp": bl.ProgressiveRefinement(task.ladder, **task.refinement),
            "auto": bl.AutomaticRefinement(task.ladder),
            "error": bl.ErrorControlled(task.ladder),
        }
        for name, controller in controllers.items():
            found[name] = told(task, controller, time_solver=name == "auto")
        # A metric, and a reason to stop, that are different in each process.
        own = dataclasses.replace(
            task,
            validate=lambda theta: float(np.sum(np.asarray(theta["w"]) ** 2)) + 3 * index,
            jit_validate=False,
        )
        found["own metric"] = told(own, controllers["prdp"])
        stop = lambda event: event.stop("enough") if event.epoch == 2 and index == 0 else None  # noqa: E731
        found["own stop"] = told(task, controllers["prdp"], callbacks=[stop])
        failing = dataclasses.replace(task, optimizer=nonfinite())
        try:
            bl.optimize(failing, controller=controllers["prdp"], progress=False, max_nonfinite=3)
        except bl.NonFiniteError as error:
            found["nonfinite"] = [error.run.summary.nonfinite, error.run.summary.updates]
    sys.stdout.write(f"{json.dumps(found)}\n")


def nonfinite():
    import optax

    return optax.sgd(float("inf"))


def load():
    spec = importlib.util.spec_from_file_location("task", Path(__file__).with_name("task.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def told(task: bl.Task, controller, **options) -> dict:
    run = bl.optimize(task, controller=controller, progress=False, **options)
    return {
        "levels": [record.level for record in run.history],
        "metrics": [record.metric for record in run.history],
        "theta": [np.asarray(leaf).tolist() for leaf in jax.tree.leaves(run.theta)],
        "status": run.status,
        "compilations": run.summary.compilations,
        "devices": len(run.theta["w"].devices()),
        "timed": run.summary.solver_seconds is not None,
    }


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
