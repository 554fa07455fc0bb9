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


class MeanError(eqx.Module):
    """Estimated truncation error of the gradient, averaged over the updates of an epoch.

    - `primal`, `adjoint`, `total`: absolute, like the norm of the gradient.
    """

    primal: Float[Array, ""]
    adjoint: Float[Array, ""]
    total: Float[Array, ""]


class Control:
    """Steps a controller and keeps the fidelity it asks for.

    - `state`: of the controller, a pytree of arrays.
    - `fidelity`: for the next epoch; its numbers are arrays of one dtype each, so that
        none of them compiles the update anew.

    **Arguments:**

    - `controller`: pure and traceable.
    - `measures_error`: whether the task estimates the error of its gradients.

    **Raises:** `TypeError` for a controller that needs what the task does not measure.
    """

    def __init__(self, controller: Any, *, measures_error: bool):
        requires: frozenset[str] = frozenset(getattr(controller, "requires", ()))
        if "error" in requires and not measures_error:
            msg = (
                f"optimize: {type(controller).__name__} needs the truncation error of the "
                "gradient, which a loss alone does not tell. Give the task hypergradient= (see "
                "bl.hypergradient) in place of loss=, or take another controller."
            )
            raise TypeError(msg)
        self._controller = controller
        # What the rule reads of a gradient is not known before the first one.
        self._starts_with_metric = requires.isdisjoint({"gradient_norm", "error"}) and (
            "metric" in requires or not hasattr(controller, "requires")
        )
        self._measures_error = measures_error
        self._start = Executable(self._traced_start)
        self._advance = Executable(self._traced_advance)
        self._traceable = True
        self.state: PyTree = None
        self.fidelity: Fidelity

    @property
    def rejected(self) -> int | None:
        """How many measurements the controller could not use; `None` if it does not count."""
        count = getattr(self.state, "rejected", None)
        return None if count is None else int(count)

    @property
    def compilations(self) -> int:
        """Of the controller, so far."""
        return self._start.count + self._advance.count

    @property
    def compile_seconds(self) -> float:
        """Wall time of these compilations."""
        return self._start.seconds + self._advance.seconds

    def start(self, metric: np.generic | float | None) -> None:
        """Begin, with the metric before training where there is one."""
        state = jax.eval_shape(self._controller.init)
        try:
            jax.eval_shape(self._controller.fidelity, state)
        except Exception:  # noqa: BLE001
            # A ladder whose static parts differ needs a concrete level. Whatever else this
            # was is raised again where the fidelity is asked for outside of a trace.
            self._traceable = False
        known = metric if self._starts_with_metric else None
        self._keep(self._start(_number(known)))

    def restore(self, state: PyTree) -> None:
        """Go on from a state that was kept."""
        self.start(None)
        self._keep((jax.tree.map(jnp.asarray, state), None))

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
        - `errors`: primal part, adjoint part and total; NaN where unknown.
        """
        error = None
        if self._measures_error:
            primal, adjoint, total = errors
            total_alone = math.isnan(primal) and math.isnan(adjoint) and not math.isnan(total)
            error = (
                _number(total)
                if total_alone
                else MeanError(_number(primal), _number(adjoint), _number(total))
            )
        measured = _number(metric), _number(gradient_norm), error
        self._keep(self._advance(self.state, *measured))

    def _keep(self, outcome: tuple[PyTree, Fidelity | None]) -> None:
        self.state, fidelity = outcome
        if fidelity is None:
            fidelity = uniform(self._controller.fidelity(self.state))
        self.fidelity = fidelity

    def _traced_start(self, metric: Any) -> tuple[PyTree, Fidelity | None]:
        state = self._controller.init()
        if metric is not None:
            state = self._controller.update(state, metric)
        return self._outcome(state)

    def _traced_advance(
        self, state: PyTree, metric: Any, gradient_norm: Any, error: Any
    ) -> tuple[PyTree, Fidelity | None]:
        return self._outcome(
            self._controller.update(state, metric, gradient_norm=gradient_norm, error=error)
        )

    def _outcome(self, state: PyTree) -> tuple[PyTree, Fidelity | None]:
        fidelity = uniform(self._controller.fidelity(state)) if self._traceable else None
        return jax.tree.map(_strong, state), fidelity


def uniform(fidelity: Fidelity) -> Fidelity:
    """The same fidelity with arrays for numbers: int32, and JAX's default float."""
    return jax.tree.map(_plain, fidelity)


def _plain(leaf: Any) -> Array:
    whole = jnp.issubdtype(jnp.result_type(leaf), jnp.integer)
    return jnp.asarray(leaf, jnp.int32 if whole else jnp.result_type(float))


def _strong(leaf: Any) -> Array:
    return jnp.asarray(leaf, jnp.result_type(leaf))


def _number(value: np.generic | float | None) -> Any:
    if value is None or isinstance(value, np.generic):
        return value
    return np.asarray(value, jnp.result_type(float))[()]
