"""Updater: the compiled update of a run, whole or in two parts."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

from bilevel import vector
from bilevel.outer.checkpoint import is_array
from bilevel.outer.executable import Executable
from bilevel.outer.task import Task
from bilevel.outer.update import Report, make_parts, make_update
from bilevel.refinement.fidelity import Fidelity


class WholeUpdate:
    """One program from parameters to parameters: what most runs need.

    - `count`, `seconds`: compilations so far, and the wall time waited for them.

    **Arguments:**

    - `optimizer_static`: the part of the optimizer's state that is not arrays.
    """

    def __init__(
        self, task: Task, optimizer: optax.GradientTransformation, optimizer_static: PyTree
    ):
        update = make_update(task, optimizer)

        def outer_update(trained: PyTree, state: PyTree, batch: Any, fidelity: Fidelity) -> Any:
            whole = eqx.combine(state, optimizer_static)
            trained, whole, report = update(trained, whole, batch, fidelity)
            return trained, eqx.filter(whole, is_array), report

        self._update = Executable(outer_update)

    @property
    def count(self) -> int:
        """Compilations so far."""
        return self._update.count

    @property
    def seconds(self) -> float:
        """Wall time that they took."""
        return self._update.seconds

    def __call__(
        self, trained: PyTree, state: PyTree, batch: Any, fidelity: Fidelity
    ) -> tuple[PyTree, PyTree, Report]:
        """The next parameters and optimizer state, and a report."""
        return self._update(trained, state, batch, fidelity)

    def prepare(self, trained: PyTree, state: PyTree, batch: Any, fidelity: Fidelity) -> None:
        """Compile beside whatever comes next."""
        self._update.prepare(trained, state, batch, fidelity)


class Found(NamedTuple):
    """A gradient that was computed.

    - `value`: the loss.
    - `gradient`: like the parameters.
    - `numbers`: of the report, from the gradient's norm on.
    """

    value: Array
    gradient: PyTree
    numbers: Array

    @property
    def report(self) -> Report:
        """What was done for it, as the report of an update that was made."""
        head = jnp.stack([jnp.ones((), self.numbers.dtype), self.value.astype(self.numbers.dtype)])
        return jnp.concatenate([head, self.numbers])

    @property
    def norm(self) -> np.floating[Any]:
        """Of the gradient; NaN where it or the loss is not finite."""
        norm = np.asarray(self.numbers)[0]
        return norm if np.isfinite(np.asarray(self.value)) else norm * np.nan


class PartedUpdate:
    """An update whose gradient is a program of its own, so that gradients can be compared.

    The same gradient program serves every level: a comparison compiles nothing of the task.

    **Arguments:** as [`WholeUpdate`][].
    """

    def __init__(
        self, task: Task, optimizer: optax.GradientTransformation, optimizer_static: PyTree
    ):
        gradient, apply = make_parts(task, optimizer)

        def outer_gradient(trained: PyTree, batch: Any, fidelity: Fidelity) -> Any:
            return gradient(trained, batch, fidelity)

        def outer_application(trained: PyTree, state: PyTree, *rest: Any) -> Any:
            whole = eqx.combine(state, optimizer_static)
            trained, whole, report = apply(trained, whole, *rest)
            return trained, eqx.filter(whole, is_array), report

        self._gradient = Executable(outer_gradient)
        self._apply = Executable(outer_application)
        self._distance = Executable(_distance, runs_briefly=True)

    @property
    def count(self) -> int:
        """Compilations of the gradient so far, which is where the solves are."""
        return self._gradient.count

    @property
    def seconds(self) -> float:
        """Wall time that all compilations took."""
        return self._gradient.seconds + self._apply.seconds + self._distance.seconds

    def __call__(
        self, trained: PyTree, state: PyTree, batch: Any, fidelity: Fidelity
    ) -> tuple[PyTree, PyTree, Report]:
        """The next parameters and optimizer state, and a report."""
        return self.apply(trained, state, batch, fidelity, self.found(trained, batch, fidelity))

    def found(self, trained: PyTree, batch: Any, fidelity: Fidelity) -> "Found":
        """A gradient, and what the solves did for it."""
        return Found(*self._gradient(trained, batch, fidelity))

    def apply(
        self, trained: PyTree, state: PyTree, batch: Any, fidelity: Fidelity, found: "Found"
    ) -> tuple[PyTree, PyTree, Report]:
        """The next parameters and optimizer state by a gradient, and a report."""
        return self._apply(trained, state, batch, fidelity, *found)

    def prepare(self, trained: PyTree, state: PyTree, batch: Any, fidelity: Fidelity) -> None:
        """Compile beside whatever comes next."""
        found = self._gradient.prepare(trained, batch, fidelity)
        self._apply.prepare(trained, state, batch, fidelity, *found)
        self._distance.prepare(found[1], found[1])

    def distance(self, first: PyTree, second: PyTree) -> Array:
        """Euclidean norm of the difference of two gradients."""
        return self._distance(first, second)


Updater = WholeUpdate | PartedUpdate


def _distance(first: PyTree, second: PyTree) -> Array:
    return vector.norm(jax.tree.map(jnp.subtract, first, second))


def compares(controller: Any) -> bool:
    """Whether a controller asks for comparisons of gradients: it has `due` and `compared`."""
    return all(callable(getattr(controller, name, None)) for name in ("due", "compared"))


def measures(controller: Any, task: Task) -> bool:
    """Whether a controller needs an error that a task does not estimate, but can be measured."""
    requires: frozenset[str] = frozenset(getattr(controller, "requires", ()))
    return (
        "error" in requires
        and task.hypergradient is None
        and callable(getattr(controller, "finer", None))
    )
