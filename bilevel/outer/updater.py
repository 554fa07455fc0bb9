"""Updater: the compiled update of a run, whole or in two parts."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

from bilevel import vector
from bilevel.outer.checkpoint import is_array
from bilevel.outer.devices import Placement
from bilevel.outer.executable import Executable
from bilevel.outer.task import Task
from bilevel.outer.update import Gradient, Report, State, make_parts, make_update
from bilevel.refinement.fidelity import Fidelity


class WholeUpdate:
    """One program from a state to the next: what most runs need.

    - `count`, `seconds`: compilations so far, and the wall time waited for them.

    **Arguments:**

    - `optimizer_static`: the part of the optimizer's state that is not arrays.
    - `placement`: where everything lies.
    - `state`: to begin with.
    """

    def __init__(
        self,
        task: Task,
        optimizer: optax.GradientTransformation,
        optimizer_static: PyTree,
        placement: Placement,
        state: State,
    ):
        update = make_update(task, optimizer)

        def outer_update(state: State, batch: Any, fidelity: Fidelity) -> tuple[State, Report]:
            state, report = update(_whole(state, optimizer_static), batch, fidelity)
            return _arrays(state), report

        # The state stays where it is: else another layout would compile anew.
        out = placement.shardings(state), placement.everywhere
        self._update = Executable(outer_update, out=out)
        self._told = placement.fidelity

    @property
    def count(self) -> int:
        """Compilations so far."""
        return self._update.count

    @property
    def seconds(self) -> float:
        """Wall time that they took."""
        return self._update.seconds

    def __call__(self, state: State, batch: Any, fidelity: Fidelity) -> tuple[State, Report]:
        """The next state, and a report."""
        return self._update(state, batch, self._told(fidelity))

    def prepare(self, state: State, batch: Any, fidelity: Fidelity) -> None:
        """Compile beside whatever comes next."""
        self._update.prepare(state, batch, fidelity)


class PartedUpdate:
    """An update whose gradient is a program of its own, so that gradients can be compared.

    The same gradient program serves every level: a comparison compiles nothing of the task.

    **Arguments:** as [`WholeUpdate`][].
    """

    def __init__(
        self,
        task: Task,
        optimizer: optax.GradientTransformation,
        optimizer_static: PyTree,
        placement: Placement,
        state: State,
    ):
        differentiate, apply = make_parts(task, optimizer)

        def outer_gradient(trained: PyTree, memory: PyTree, batch: Any, fidelity: Fidelity) -> Any:
            return differentiate(trained, memory, batch, fidelity)

        def outer_application(state: State, batch: Any, fidelity: Fidelity, found: Gradient) -> Any:
            state, report = apply(_whole(state, optimizer_static), batch, fidelity, found)
            return _arrays(state), report

        stays, everywhere = placement.shardings(state), placement.everywhere
        trained, memory = (None, None) if stays is None else (stays.trained, stays.memory)
        gradient = Gradient(everywhere, trained, everywhere, memory)
        self._told = placement.fidelity
        self._gradient = Executable(outer_gradient, out=gradient)
        self._apply = Executable(outer_application, out=(stays, everywhere))
        self._distance = Executable(_distance, runs_briefly=True, out=everywhere)

    @property
    def count(self) -> int:
        """Compilations of the gradient so far, which is where the solves are."""
        return self._gradient.count

    @property
    def seconds(self) -> float:
        """Wall time that all compilations took."""
        return self._gradient.seconds + self._apply.seconds + self._distance.seconds

    def __call__(self, state: State, batch: Any, fidelity: Fidelity) -> tuple[State, Report]:
        """The next state, and a report."""
        return self.apply(state, batch, fidelity, self.found(state, batch, fidelity))

    def found(self, state: State, batch: Any, fidelity: Fidelity) -> Gradient:
        """A gradient, and what the solves did for it."""
        return self._gradient(state.trained, state.memory, batch, self._told(fidelity))

    def apply(
        self, state: State, batch: Any, fidelity: Fidelity, found: Gradient
    ) -> tuple[State, Report]:
        """The next state by a gradient, and a report."""
        return self._apply(state, batch, self._told(fidelity), found)

    def prepare(self, state: State, batch: Any, fidelity: Fidelity) -> None:
        """Compile beside whatever comes next."""
        found = self._gradient.prepare(state.trained, state.memory, batch, fidelity)
        self._apply.prepare(state, batch, fidelity, found)
        self._distance.prepare(found.gradient, found.gradient)

    def distance(self, first: PyTree, second: PyTree) -> Array:
        """Euclidean norm of the difference of two gradients."""
        return self._distance(first, second)


Updater = WholeUpdate | PartedUpdate


def report_of(found: Gradient) -> np.ndarray:
    """What was done for a gradient, as the report of an update that was made."""
    numbers = np.asarray(found.numbers)
    head = np.array([1.0, np.asarray(found.value), np.nan], numbers.dtype)
    return np.concatenate([head, numbers])


def norm_of(found: Gradient) -> np.floating[Any]:
    """Of a gradient; NaN where it or the loss is not finite."""
    norm = np.asarray(found.numbers)[0]
    return norm if np.isfinite(np.asarray(found.value)) else norm * np.nan


def _whole(state: State, optimizer_static: PyTree) -> State:
    return state._replace(optimizer=eqx.combine(state.optimizer, optimizer_static))


def _arrays(state: State) -> State:
    return state._replace(optimizer=eqx.filter(state.optimizer, is_array))


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
