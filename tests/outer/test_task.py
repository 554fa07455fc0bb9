"""Tasks: what they accept, convert and refuse."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bilevel.budget import Budget
from bilevel.outer.task import Task
from bilevel.refinement.ladder import Ladder


def loss(theta: Any, batch: Any, fidelity: Any) -> Any:
    return theta**2


class Dropout(eqx.Module):
    weight: np.ndarray
    rate: float


def test_numbers_become_arrays_outside_of_modules_only():
    task = Task({"a": 1.0, "b": np.ones(2, np.float32), "m": Dropout(np.ones(2), 0.5)}, loss)
    parameters = task.parameters
    assert isinstance(parameters["a"], jax.Array)
    assert not parameters["a"].weak_type
    assert parameters["b"].dtype == jnp.float32
    assert isinstance(parameters["m"].weight, jax.Array)
    assert parameters["m"].rate == 0.5
    assert len(jax.tree.leaves(task.trainable)) == 3


def test_the_full_fidelity_is_the_given_one_else_the_finest():
    ladder = Ladder.iterations(1, 1, 9)
    assert Task(1.0, loss).full_fidelity is None
    finest = Task(1.0, loss, ladder=ladder).full_fidelity
    assert finest is not None
    assert int(finest.budget.iterations) == 9
    given = Task(1.0, loss, ladder=ladder, full=Budget(50)).full_fidelity
    assert given is not None
    assert given.adjoint_budget is not None
    assert given.adjoint_budget.iterations == 50


def generator() -> Any:
    yield 1.0


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"theta0": 5}, ValueError, "write 5.0 rather than 5"),
        ({"theta0": "text"}, ValueError, "nothing to train"),
        ({"loss": None}, ValueError, "either loss or hypergradient, got neither"),
        ({"hypergradient": loss}, ValueError, "got both"),
        ({"loss": 3}, TypeError, "loss should be a function of .*, got 3 of type int"),
        ({"loss": lambda theta: theta}, TypeError, r"loss should take \(theta, batch, fidelity\)"),
        ({"validate": 1.0}, TypeError, "validate should be a function"),
        ({"validate": loss}, TypeError, r"validate should take \(theta\)"),
        ({"batches": np.ones((3, 2))}, TypeError, r"one array of shape \(3, 2\)"),
        ({"batches": generator()}, TypeError, "empty after one epoch"),
        ({"batches": "abc"}, TypeError, "batches should be None, a sequence"),
        ({"batches": []}, ValueError, "holds no batch"),
        (
            {"batches": lambda epoch: [epoch]},
            TypeError,
            r"batches should take \(epoch, key\), but it takes",
        ),
        ({"report": lambda: None}, TypeError, r"report should take \(runs, directory\)"),
        ({"name": ""}, ValueError, "name should have at least 1 character"),
        ({"epochs": 0}, ValueError, "epochs should be greater than or equal to 1, got 0"),
        ({"epochs": "9"}, ValueError, "epochs should be a valid integer"),
        ({"policies": ("full", "prpd")}, ValueError, "did you mean prdp"),
        ({"policies": "full"}, ValueError, "policies should be a valid tuple"),
        ({"ladder": [1, 2]}, TypeError, "ladder should be a Ladder"),
        ({"full": 100}, TypeError, "full should be a Fidelity or a Budget"),
        ({"optimizer": optax.adam}, TypeError, "optimizer should be an optax optimizer"),
        ({"controller": object()}, TypeError, "controller should be a controller"),
        ({"refinement": {"ema_window": 3}}, ValueError, "refinement needs a ladder"),
        (
            {"refinement": {"ema_widow": 3}, "ladder": Ladder.iterations(1, 1, 3)},
            TypeError,
            "no argument ema_widow",
        ),
        (
            {"refinement": {"stepping_threshold": 2.0}, "ladder": Ladder.iterations(1, 1, 3)},
            ValueError,
            "stepping_threshold",
        ),
    ],
)
def test_what_is_wrong_is_named_when_the_task_is_made(
    fields: dict[str, Any], error: type[Exception], message: str
):
    arguments: dict[str, Any] = {"theta0": 1.0, "loss": loss}
    with pytest.raises(error, match=message):
        Task(**(arguments | fields))
