"""Proximal gradient method, plain and accelerated."""

from typing import ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from bilevel import vector
from bilevel.bound import BoundProblem
from bilevel.proximal import ProximalParts
from bilevel.solver.base import InnerSolver
from bilevel.solver.line_search import slack
from bilevel.solver.parameter import positive, whole
from bilevel.status import Status

ACCELERATIONS = ("none", "fista", "restart")


class ProximalGradientState(eqx.Module):
    """Iterate, and what the next step starts from.

    - `extrapolated`: where the next step starts; `None` without acceleration, when it is x.
    - `value`, `gradient`: of the smooth part, there.
    - `length`: step length; `natural`: that of the residual.
    - `momentum`: t of FISTA's sequence.
    - `evaluations`: of the smooth part or its gradient, and Hessian products.
    """

    x: PyTree
    extrapolated: PyTree | None
    value: Float[Array, ""]
    gradient: PyTree
    length: Float[Array, ""]
    natural: Float[Array, ""]
    momentum: Float[Array, ""]
    evaluations: Int[Array, ""]
    status: Int[Array, ""]


class ProximalGradient(InnerSolver):
    """Proximal gradient method for a composite objective: the default for such.

    x ← prox(y - α ∂ₓ objective(y), α, θ), with y extrapolated as by Beck and Teboulle 2009
    (FISTA), and the extrapolation started anew where it points uphill (O'Donoghue and
    Candès 2015, gradient scheme), which makes it linearly convergent on a strongly convex
    objective without knowing the constant.

    Multiplying the objective and the non-smooth term by a number changes nothing but the
    step lengths.  A step that has to be shrunk for ever ends the solve with
    `LINE_SEARCH`.  Unrolling takes step lengths and restarts as constants.

    **Arguments:**

    - `step_size`: α in (0, 1/L] ((0, 2/L) without acceleration), in units of x over units
        of the gradient, kept as it is. Traced. By default it starts at the problem's
        own step, 1/L at the start, and is halved until the quadratic model at the current
        point lies above the smooth part (backtracking of Beck and Teboulle).
    - `acceleration`: "restart", "fista" (without restarts), or "none".
    - `trials`: most step lengths tried in one iteration, static.

    **Raises:** `ValueError` for arguments out of range.

    >>> import jax.numpy as jnp, bilevel as bl
    >>> lasso = bl.CompositeMinimization(
    ...     lambda x, theta: 0.5 * jnp.sum((x - jnp.array([3.0, 0.5])) ** 2), bl.L1(1.0)
    ... )
    >>> solution = bl.solve(lasso, None, jnp.zeros(2), solver=bl.ProximalGradient())
    >>> [round(float(v), 4) for v in solution.value]
    [2.0, 0.0]
    """

    requires: ClassVar[frozenset[str]] = frozenset({"proximal"})
    conditioned: ClassVar[bool] = True

    step_size: Float[Array, ""] | float | None = None
    acceleration: str = eqx.field(static=True, default="restart")
    trials: int = eqx.field(static=True, default=50)

    def __check_init__(self) -> None:
        """Validate the arguments where they are concrete."""
        if self.step_size is not None:
            positive("ProximalGradient", "step_size", self.step_size)
        whole("ProximalGradient", "trials", self.trials)
        if self.acceleration not in ACCELERATIONS:
            msg = (
                f"ProximalGradient: acceleration must be one of {', '.join(ACCELERATIONS)}, got "
                f"{self.acceleration!r}."
            )
            raise ValueError(msg)

    def init(self, problem: BoundProblem, x: PyTree) -> ProximalGradientState:
        """Evaluate once."""
        assert problem.proximal is not None
        parts = problem.proximal(x)
        natural = jax.lax.stop_gradient(parts.step)
        length = natural
        if self.step_size is not None:
            length = jax.lax.stop_gradient(jnp.asarray(self.step_size, natural.dtype))
        return ProximalGradientState(
            x=x,
            extrapolated=None if self.acceleration == "none" else x,
            value=jax.lax.stop_gradient(parts.objective(x)),
            gradient=parts.gradient(x),
            length=length,
            natural=natural,
            momentum=jnp.ones_like(natural),
            evaluations=jnp.int32(1),
            status=jnp.int32(Status.CONVERGED),
        )

    def point(self, state: ProximalGradientState) -> PyTree:
        """The extrapolated point, or the iterate itself."""
        return state.x if state.extrapolated is None else state.extrapolated

    def residual(self, problem: BoundProblem, state: ProximalGradientState) -> PyTree:
        """The problem's residual at the point, from the gradient known there."""
        assert problem.proximal is not None
        point = self.point(state)
        parts = problem.proximal(point)
        return vector.subtract(_move(parts, point, state.gradient, state.natural), point)

    def step(
        self, problem: BoundProblem, state: ProximalGradientState, residual: PyTree
    ) -> ProximalGradientState:
        """A proximal gradient step from the point, and the next point."""
        del residual
        assert problem.proximal is not None
        point = self.point(state)
        parts = problem.proximal(point)
        trial = self._search(parts, state, point)
        length = jnp.where(trial.accepted, trial.length, 0.0)
        moved = _move(parts, point, state.gradient, jnp.where(trial.accepted, length, 1.0))
        x = vector.where(trial.accepted, moved, state.x)
        following, momentum = self._extrapolate(state, point, x)
        return ProximalGradientState(
            x=x,
            extrapolated=None if self.acceleration == "none" else following,
            value=jax.lax.stop_gradient(parts.objective(following)),
            gradient=parts.gradient(following),
            length=jnp.where(trial.accepted, trial.length, state.length),
            natural=state.natural,
            momentum=momentum,
            evaluations=state.evaluations + trial.number + 1,
            status=jnp.where(
                trial.accepted, jnp.int32(Status.CONVERGED), jnp.int32(Status.LINE_SEARCH)
            ),
        )

    def failure(self, state: ProximalGradientState) -> Int[Array, ""]:
        """`LINE_SEARCH` once no step length was short enough."""
        return state.status

    def applications(
        self, state: ProximalGradientState, iterations: Int[Array, ""]
    ) -> Int[Array, ""]:
        """Gradients, and objectives of the backtracking."""
        del iterations
        return state.evaluations

    def _search(
        self, parts: ProximalParts, state: ProximalGradientState, point: PyTree
    ) -> "_Trial":
        if self.step_size is not None:
            # Nothing is searched for, and nothing evaluated.
            return _Trial(state.length, jnp.int32(0), jnp.array(True))
        point, gradient, value = jax.lax.stop_gradient((point, state.gradient, state.value))

        def attempt(length: Array, number: Array) -> _Trial:
            x = _move(parts, point, gradient, length)
            change = vector.subtract(x, point)
            model = vector.dot(gradient, change) + vector.dot(change, change) / (2 * length)
            accepted = parts.objective(x) <= value + model.astype(value.dtype) + slack(value)
            return _Trial(length, number, accepted)

        trial = jax.lax.while_loop(
            lambda trial: ~trial.accepted & (trial.number < self.trials),
            lambda trial: attempt(0.5 * trial.length, trial.number + 1),
            attempt(state.length, jnp.int32(1)),
        )
        return jax.lax.stop_gradient(trial)

    def _extrapolate(
        self, state: ProximalGradientState, point: PyTree, x: PyTree
    ) -> tuple[PyTree, Float[Array, ""]]:
        """The next point, and the next t."""
        if self.acceleration == "none":
            return x, state.momentum
        displacement = vector.subtract(x, state.x)
        momentum = (1 + jnp.sqrt(1 + 4 * state.momentum**2)) / 2
        factor = (state.momentum - 1) / momentum
        if self.acceleration == "restart":
            uphill = vector.dot(vector.subtract(point, x), displacement) > 0
            factor = jnp.where(uphill, 0.0, factor)
            momentum = jnp.where(uphill, 1.0, momentum)
        return vector.add_scaled(x, factor, displacement), momentum


class _Trial(NamedTuple):
    """One try of the backtracking."""

    length: Float[Array, ""]
    number: Int[Array, ""]
    accepted: Bool[Array, ""]


def _move(parts: ProximalParts, point: PyTree, gradient: PyTree, length: Array) -> PyTree:
    """The proximal gradient step of a length."""
    return parts.proximal(vector.add_scaled(point, -length, gradient), length)
