"""Simultaneous: inner problem, adjoint and outer parameters moved together, a step each (SOBA)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from bilevel import vector
from bilevel.inner_solve import as_vector
from bilevel.outer.task import check_parts
from bilevel.refinement.fidelity import Fidelity
from bilevel.signature import brief, check_callable
from bilevel.solution import Solution
from bilevel.status import Status


class SimultaneousState(NamedTuple):
    """What is carried from update to update.

    - `x`, `adjoint`: the inner variable and the adjoint's λ, like the start.
    - `x_optimizer`, `adjoint_optimizer`: states of their optimizers.
    - `scale`: the largest norm of the inner gradient so far, which residuals refer to.
    """

    x: PyTree
    adjoint: PyTree
    x_optimizer: PyTree
    adjoint_optimizer: PyTree
    scale: Float[Array, ""]


class SimultaneousResult(NamedTuple):
    """A hypergradient at the inner variable and the adjoint as they are.

    - `value`: the outer loss. `gradient`: like θ.
    - `primal`, `adjoint`: where the two are after their steps; their residuals are those of the
        batch at the last step's start, so noise and all.
    - `error`: `None`; nothing tells a truncation error from a minibatch's noise here.
    """

    value: Float[Array, ""]
    gradient: PyTree
    primal: Solution
    adjoint: Solution
    error: None = None


class Simultaneous:
    """The hypergradient of a task whose inner problem, adjoint and θ take their steps together.

    Beside the nested way, which solves the inner problem anew for every θ: here the inner variable
    x and the adjoint λ go on from where the last update left them, by one step each along the
    gradient of a minibatch,

        x ← x − ρ ∂ₓg,  λ ← λ − ρ (∂²ₓₓg λ − ∂ₓf),

    while θ moves along ∂_θ f − ∂²_θₓg λ, all three evaluated at the same point. With plain steps
    this is SOBA (Dagréou, Ablin, Vaiter & Moreau 2022, Algorithm 1), which needs as many samples
    as single-level stochastic gradient descent does. A Hessian is only ever multiplied with λ.

    The budget of a fidelity is the number of steps of x and λ for one of θ, traced: 1 is SOBA, and
    controllers may give it more, each on the same minibatch. With a tolerance besides they end
    where both residuals on that minibatch are below it, relative to their scales.

    Give it to a task as `hypergradient=`, and what it begins with as `memory=`. A batch is a pair:
    the inner problem's and the outer loss's.

    **Arguments:**

    - `objective`: objective(x, theta, batch) -> real scalar, the inner problem's g, smooth and
        strongly convex in x.
    - `outer_loss`: outer_loss(x, theta, batch) -> real scalar, f.
    - `x0`: where x starts, any pytree of real arrays; λ starts at zero.
    - `optimizer`: of x and of λ, any optax transformation that needs no more than a gradient, so
        none with a line search; `optax.sgd(rho)` for SOBA's. A step
        size that falls like that of θ is what its theory asks for.
    - `adjoint_optimizer`: of λ, where it is another.

    **Raises:** `TypeError` for what is no function or optimizer, or a batch that is no pair.

    >>> import jax.numpy as jnp, bilevel as bl, optax
    >>> def objective(x, theta, batch):
    ...     return 0.5 * jnp.sum((x - theta - batch) ** 2)
    >>> def outer_loss(x, theta, batch):
    ...     return 0.5 * jnp.sum((x - 1.0) ** 2)
    >>> soba = Simultaneous(objective, outer_loss, jnp.zeros(2), optax.sgd(0.5))
    >>> noise = jnp.array([[0.1, 0.0], [-0.1, 0.0]])
    >>> task = bl.Task(
    ...     jnp.zeros(2),
    ...     hypergradient=soba,
    ...     memory=soba.memory,
    ...     batches=[(batch, None) for batch in noise],
    ...     full=bl.Budget(iterations=1),
    ... )
    >>> run = bl.optimize(task, optax.sgd(0.1), epochs=60, progress=False)
    >>> [round(float(entry), 1) for entry in run.theta]
    [1.0, 1.0]
    """

    def __init__(
        self,
        objective: Callable[[Any, Any, Any], Array],
        outer_loss: Callable[[Any, Any, Any], Array],
        x0: PyTree,
        optimizer: optax.GradientTransformation,
        adjoint_optimizer: optax.GradientTransformation | None = None,
    ):
        for name, function in (("objective", objective), ("outer_loss", outer_loss)):
            check_callable("Simultaneous", name, function, ("x", "theta", "batch"))
        adjoint_optimizer = optimizer if adjoint_optimizer is None else adjoint_optimizer
        for name, given in (("optimizer", optimizer), ("adjoint_optimizer", adjoint_optimizer)):
            check_parts("Simultaneous", name, given, ("init", "update"), "an optax optimizer")
            if given is None:
                msg = f"Simultaneous: {name} should be an optax optimizer such as optax.sgd(0.1)."
                raise TypeError(msg)
        self.objective = objective
        self.outer_loss = outer_loss
        self.x0 = as_vector("x0", x0)
        complex_leaves = [leaf for leaf in jax.tree.leaves(self.x0) if jnp.iscomplexobj(leaf)]
        if complex_leaves:
            msg = (
                f"Simultaneous: x0 should be real, got {complex_leaves[0].dtype}. Carry real and "
                "imaginary parts apart."
            )
            raise TypeError(msg)
        self.optimizer = optimizer
        self.adjoint_optimizer = adjoint_optimizer

    @property
    def memory(self) -> SimultaneousState:
        """The state to begin with."""
        nothing = vector.zeros_like(self.x0)
        return SimultaneousState(
            x=self.x0,
            adjoint=nothing,
            x_optimizer=self.optimizer.init(self.x0),
            adjoint_optimizer=self.adjoint_optimizer.init(nothing),
            scale=jnp.zeros((), vector.real_dtype(self.x0)),
        )

    def __call__(
        self, theta: PyTree, batch: Any, fidelity: Fidelity, memory: SimultaneousState
    ) -> tuple[SimultaneousResult, SimultaneousState]:
        """The hypergradient on one batch, and the state after the steps of x and λ."""
        if not (isinstance(batch, tuple | list) and len(batch) == 2):
            msg = (
                "Simultaneous: a batch should be a pair, the inner problem's and the outer loss's, "
                f"got {brief(batch)}."
            )
            raise TypeError(msg)
        inner, outer = batch
        if not isinstance(memory, SimultaneousState):
            msg = (
                "Simultaneous: memory should be what its own `memory` is, got "
                f"{brief(memory)}. Give the task memory=soba.memory."
            )
            raise TypeError(msg)
        most = jnp.maximum(jnp.asarray(fidelity.budget.iterations, jnp.int32), 1)
        first = memory, *self._stepped(theta, inner, outer, memory)

        def goes_on(carried: Any) -> Array:
            steps, (_, after, down, left, size) = carried
            far = vector.norm(down) > _tolerance(fidelity, after.scale)
            far |= vector.norm(left) > _tolerance(fidelity, size)
            return (steps < most) & far

        def once(carried: Any) -> Any:
            steps, (_, after, *_) = carried
            return steps + 1, (after, *self._stepped(theta, inner, outer, after))

        # What is not finite is not "far", so that it ends at once.
        steps, (before, after, down, left, size) = jax.lax.while_loop(
            goes_on, once, (jnp.int32(1), first)
        )

        def pulled(theta: PyTree) -> Array:
            value, slope = jax.jvp(
                lambda x: self.objective(x, theta, inner), (before.x,), (before.adjoint,)
            )
            del value
            return self.outer_loss(before.x, theta, outer) - slope

        gradient = eqx.filter_grad(pulled)(theta)
        return SimultaneousResult(
            value=self.outer_loss(before.x, theta, outer),
            gradient=gradient,
            primal=_solution(after.x, down, after.scale, steps, fidelity),
            adjoint=_solution(after.adjoint, left, size, steps, fidelity),
        ), after

    def _stepped(
        self, theta: PyTree, inner: Any, outer: Any, state: SimultaneousState
    ) -> tuple[SimultaneousState, PyTree, PyTree, Array]:
        """The state after one step of x and λ, their directions, and the norm of ∂ₓf."""
        slope = jax.grad(lambda x: _scalar("objective", self.objective(x, theta, inner)))
        down, curved = jax.jvp(slope, (state.x,), (state.adjoint,))
        wanted = jax.grad(lambda x: _scalar("outer_loss", self.outer_loss(x, theta, outer)))(
            state.x
        )
        left = vector.subtract(curved, wanted)
        x_step, x_optimizer = self.optimizer.update(down, state.x_optimizer, state.x)
        step, adjoint_optimizer = self.adjoint_optimizer.update(
            left, state.adjoint_optimizer, state.adjoint
        )
        after = SimultaneousState(
            x=optax.apply_updates(state.x, x_step),
            adjoint=optax.apply_updates(state.adjoint, step),
            x_optimizer=x_optimizer,
            adjoint_optimizer=adjoint_optimizer,
            scale=jnp.maximum(state.scale, vector.norm(down)),
        )
        return after, down, left, vector.norm(wanted)


def _tolerance(fidelity: Fidelity, scale: Array) -> Array:
    budget = fidelity.budget
    return jnp.maximum(budget.rtol * scale, budget.atol)


def _scalar(name: str, value: Array) -> Array:
    if jnp.shape(value) != ():
        msg = (
            f"Simultaneous: {name} should return one real number, got an array of shape "
            f"{jnp.shape(value)}. Reduce it, for example with jnp.mean."
        )
        raise TypeError(msg)
    return value


def _solution(
    value: PyTree, residual: PyTree, scale: Array, steps: Int[Array, ""], fidelity: Fidelity
) -> Solution:
    norm = vector.norm(residual)
    finite = jnp.isfinite(norm) & jnp.isfinite(vector.norm(value))
    tolerance = jnp.asarray(_tolerance(fidelity, scale), norm.dtype)
    small = (norm <= tolerance) & (tolerance > 0)
    ended = jnp.where(small, jnp.int32(Status.CONVERGED), jnp.int32(Status.BUDGET))
    return Solution(
        value=value,
        status=jnp.where(finite, ended, jnp.int32(Status.NONFINITE)),
        residual_norm=norm,
        iterations=steps,
        inner_iterations=steps,
        tolerance=tolerance,
        scale=scale,
        rate=jnp.full_like(norm, jnp.nan),
        applications=steps,
    )
