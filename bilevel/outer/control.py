"""Control: a controller beside the training loop, compiled once."""

import math
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from bilevel.outer.executable import Executable
from bilevel.refinement.fidelity import Fidelity
from bilevel.refinement.namespace import on_host


class MeanError(eqx.Module):
    """Estimated truncation error of the gradient, averaged over the updates of an epoch.

    - `primal`, `adjoint`, `total`: absolute, like the norm of the gradient.
    - `noise`: of minibatches, likewise; NaN where it is not known.
    """

    primal: Float[Array, ""]
    adjoint: Float[Array, ""]
    total: Float[Array, ""]
    noise: Float[Array, ""]


class Control:
    """Steps a controller and keeps the fidelity it asks for.

    - `state`: of the controller, a pytree of arrays.
    - `fidelity`: for the next epoch; its numbers are arrays of one dtype each, so that
        none of them compiles the update anew.

    **Arguments:**

    - `controller`: pure and traceable.
    - `measures_metric`: whether there is a metric before training.
    - `measures_error`: whether the task estimates the error of its gradients.

    **Raises:** `TypeError` for a controller that needs what the task does not measure.
    """

    def __init__(self, controller: Any, *, measures_metric: bool, measures_error: bool):
        requires: frozenset[str] = frozenset(getattr(controller, "requires", {"metric"}))
        if "error" in requires and not measures_error:
            msg = (
                f"optimize: {type(controller).__name__} needs the truncation error of the "
                "gradient, which a loss alone does not tell. Give the task hypergradient= (see "
                "bl.hypergradient) in place of loss=, or the controller a method finer(state) "
                "(see bl.ErrorControlled), or take another controller."
            )
            raise TypeError(msg)
        # Bound once: a method of an equinox module costs tens of microseconds to look up.
        self._begin, self._decide = controller.init, controller.update
        self._look_up = controller.fidelity
        self._object = getattr(controller, "objection", None)
        self._name = type(controller).__name__
        self._without = getattr(controller, "without_measurement", "holds its level")
        self._measures_error = measures_error
        # A rule that reads the metric gets the one before training; one that reads the
        # gradient has nothing to read yet, and one that counts has nothing to count.
        self._takes_first = measures_metric and requires == frozenset({"metric"})
        self._template = jax.eval_shape(controller.init)
        self._traceable = _is_traceable(controller, self._template)
        # Our own controllers decide in NumPy what NumPy tells them: nothing to compile.
        self._on_host = on_host(controller.init())
        self._step = Executable(self._controller_step, runs_briefly=True)
        self.state: PyTree = None
        self.fidelity: Fidelity

    @property
    def compilations(self) -> int:
        """Of the controller, so far."""
        return self._step.count

    @property
    def compile_seconds(self) -> float:
        """Wall time of these compilations."""
        return self._step.seconds

    @property
    def rejected(self) -> int | None:
        """How many measurements the controller could not use; `None` if it does not count."""
        count = getattr(self.state, "rejected", None)
        return None if count is None else int(count)

    def objection(self, metric: np.generic | float | None) -> str | None:
        """What the controller has against the measurements it has been given; `None` if nothing."""
        if self._object is not None and metric is not None:
            words = self._object(float(metric))
            if words is not None:
                return f"{self._name}: {words}"
        if self.rejected:
            return (
                f"{self._name} could not use what was measured (NaN, infinite or of the wrong "
                f"sign) and {self._without}."
            )
        return None

    def prepare(self, metric: Any) -> Fidelity | None:
        """Compile before the first metric is there.

        **Arguments:**

        - `metric`: its shape and dtype, or NaN.

        **Returns:** shapes and dtypes of the fidelity; `None` if it depends on the level.
        """
        if self._on_host:
            if not self._traceable:
                return None
            return uniform(self._look_up(self._begin()))
        arguments = self._arguments(metric, math.nan, _UNKNOWN, first=True)
        return self._step.prepare(self.blank, *arguments)[1]

    def start(self, metric: np.generic | float | None) -> None:
        """Begin, with the metric before training where there is one."""
        self.state = self.blank
        self._move(metric, math.nan, _UNKNOWN, first=True)

    def restore(self, state: PyTree) -> None:
        """Go on from a state that was kept."""
        self.state = state
        self.fidelity = uniform(self._look_up(state))

    def take(self, gradient_norm: Any, differences: Any = None) -> None:
        """Take in one update, for a controller that is told of each.

        **Arguments:**

        - `gradient_norm`: NaN where it was not usable.
        - `differences`: where gradients were compared.
        """
        number = _number(gradient_norm, jnp.result_type(float))
        before = self.state
        self.state = self._decide(before, gradient_norm=number, error=differences)
        if _levels(self.state) != _levels(before):
            self.fidelity = uniform(self._look_up(self.state))

    def advance(
        self,
        metric: np.generic | float | None,
        gradient_norm: float,
        errors: Sequence[float],
    ) -> None:
        """Take in what an epoch measured.

        **Arguments:**

        - `metric`: in the dtype it was computed in, for a rule decides in that; `None`
            where nothing is measured.
        - `gradient_norm`: NaN where no gradient was usable.
        - `errors`: primal part, adjoint part and total, and the noise of minibatches; NaN where
            unknown.
        """
        self._move(metric, gradient_norm, errors, first=False)

    @property
    def blank(self) -> PyTree:
        """A state of the right structure and no meaning."""
        return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), self._template)

    def _move(
        self,
        metric: np.generic | float | None,
        gradient_norm: float,
        errors: Sequence[float],
        *,
        first: bool,
    ) -> None:
        metric = math.nan if metric is None else metric
        arguments = self._arguments(metric, gradient_norm, errors, first=first)
        step = self._host_step if self._on_host else self._step
        self.state, fidelity = step(self.state, *arguments)
        if fidelity is None:
            fidelity = uniform(self._look_up(self.state))
        self.fidelity = fidelity

    def _arguments(
        self, metric: Any, gradient_norm: float, errors: Sequence[float], *, first: bool
    ) -> tuple[Any, ...]:
        real = jnp.result_type(float)
        error = None
        if self._measures_error:
            primal, adjoint, total, noise = (_number(part, real) for part in errors)
            total_alone = np.isnan(primal) and np.isnan(adjoint) and not np.isnan(total)
            error = total if total_alone else MeanError(primal, adjoint, total, noise)
        return np.bool_(first), _number(metric, real), _number(gradient_norm, real), error

    def _host_step(
        self, state: PyTree, first: Any, metric: Any, gradient_norm: Any, error: Any
    ) -> tuple[PyTree, None]:
        if first:
            state = self._begin()
        if self._takes_first or not first:
            state = self._decide(state, metric, gradient_norm=gradient_norm, error=error)
        return state, None

    def _controller_step(
        self, state: PyTree, first: Any, metric: Any, gradient_norm: Any, error: Any
    ) -> tuple[PyTree, Fidelity | None]:
        # One function for the first step and all others compiles once instead of twice, and
        # a controller takes longer to compile than a small problem to train.
        begun = self._begin()
        if self._takes_first:
            state = _where(first, begun, state)
        after = self._decide(state, metric, gradient_norm=gradient_norm, error=error)
        if not self._takes_first:
            after = _where(first, begun, after)
        after = jax.tree.map(strong, after)
        return after, uniform(self._look_up(after)) if self._traceable else None


def _levels(state: Any) -> tuple[int, int]:
    """Of the primal and of the adjoint; the same where they move together."""
    return int(state.level), int(getattr(state, "adjoint_level", state.level))


_UNKNOWN = (math.nan, math.nan, math.nan, math.nan)


def _is_traceable(controller: Any, state: PyTree) -> bool:
    """Whether the fidelity can be looked up at a traced level.

    It cannot on a ladder whose static parts differ. Whatever else went wrong is raised
    again where the fidelity is asked for outside of a trace.
    """
    try:
        jax.eval_shape(controller.fidelity, state)
    except Exception:  # noqa: BLE001
        return False
    return True


def _where(condition: Any, x: PyTree, y: PyTree) -> PyTree:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), x, y)


def uniform(fidelity: Fidelity) -> Fidelity:
    """The same fidelity with arrays for numbers: int32, and JAX's default float."""
    kinds = (np.int32, jnp.result_type(float))
    if all(isinstance(x, np.ndarray) and x.dtype in kinds for x in jax.tree.leaves(fidelity)):
        return fidelity
    return jax.tree.map(_plain, fidelity)


def _plain(leaf: Any) -> Any:
    whole = jnp.issubdtype(jnp.result_type(leaf), jnp.integer)
    xp = jnp if isinstance(leaf, jax.Array) else np
    return xp.asarray(leaf, np.int32 if whole else jnp.result_type(float))


def strong(leaf: Any) -> Array:
    """The same array without a weak type, which would compile anew."""
    return jnp.asarray(leaf, leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf))


def _number(value: Any, real: Any) -> Any:
    if isinstance(value, np.generic | jax.ShapeDtypeStruct):
        return value
    return real.type(value)
