"""A solver on a problem: the functions the loop calls."""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from bilevel import vector
from bilevel.bound import BoundProblem
from bilevel.budget import Budget
from bilevel.solver.base import InnerSolver
from bilevel.solver.symmetry import APPLICATIONS, needs_look, symmetry_flaw
from bilevel.status import Status


class Iteration(eqx.Module):
    """A solver on a problem at one θ and start, ready to be driven.

    - `update`: (state, residual) -> next state.
    - `residual`: state -> the residual the solver goes by.
    - `true_residual`: state -> the residual at the state's value, evaluated anew.
    - `restart`: state -> a fresh state at the same value.
    - `scale`: the residual norm that relative tolerances refer to.
    - `noise`: a residual norm that may be due to rounding alone.
    - `flaw`: a failure known before the first step; `None` where nothing was looked at.
    """

    solver: InnerSolver
    update: Callable[..., Any]
    residual: Callable[..., Any]
    true_residual: Callable[..., Any]
    restart: Callable[..., Any]
    scale: Float[Array, ""]
    noise: Float[Array, ""]
    flaw: Int[Array, ""] | None = None

    def failure(self, state: PyTree) -> Int[Array, ""]:
        """`Status.CONVERGED` while all is well, otherwise the status to stop with."""
        failure = self.solver.failure(state)
        if self.flaw is None:
            return failure
        return jnp.where(self.flaw == Status.CONVERGED, failure, self.flaw)

    def full(self, state: PyTree, residual: PyTree) -> tuple[PyTree, PyTree]:
        """One step, and the residual after it: nothing is evaluated twice."""
        state = self.update(state, residual)
        return state, self.residual(state)

    def small(self, state: PyTree) -> PyTree:
        """One step that evaluates its residual itself: what a plain unrolled loop does."""
        return self.update(state, self.residual(state))

    @property
    def applications_before(self) -> int:
        """Applications before the first step, besides those the solver counts."""
        return 0 if self.flaw is None else APPLICATIONS

    def confirms(self, state: PyTree) -> bool:
        """Whether the residual the solver goes by may differ from the true one."""
        return self.solver.recursive or self.extrapolates(state)

    def extrapolates(self, state: PyTree) -> bool:
        """Whether the residual is evaluated elsewhere than at the iterate."""
        return self.solver.point(state) is not self.solver.value(state)

    def square(
        self, state: PyTree, residual: PyTree, tolerance: Float[Array, ""]
    ) -> Float[Array, ""]:
        """The squared residual norm that decides whether the iteration is done.

        Where an extrapolated point meets the tolerance, the iterate has to meet it, too: a
        start anew from there would throw the momentum away, and there is none in an
        iteration that is differentiated.
        """
        square = vector.dot(residual, residual)
        if self.solver.recursive or not self.extrapolates(state):
            return square

        def of_iterate() -> Float[Array, ""]:
            residual = self.true_residual(state)
            return jnp.maximum(square, vector.dot(residual, residual))

        return jax.lax.cond(jnp.sqrt(square) <= tolerance, of_iterate, lambda: square)


def begin(
    problem: BoundProblem, solver: InnerSolver, x0: PyTree, budget: Budget | None = None
) -> tuple[Iteration, PyTree, PyTree]:
    """The iteration of a solver on a problem, with its first state and residual.

    **Arguments:**

    - `budget`: tells the solver at which residual norm the loop will stop; `None` where no
        loop follows.
    """
    state = solver.init(problem, x0)
    _check_value(solver, state, x0)
    residual = solver.residual(problem, state)
    # Without a derivative, which a norm has none of at zero: they say when to stop.
    norm = jax.lax.stop_gradient(vector.norm(residual))
    scale = jax.lax.stop_gradient(problem.reference(norm))
    if budget is not None:
        target = stopping_norm(budget, scale, vector.epsilon(residual))
        problem = dataclasses.replace(problem, target=jax.lax.stop_gradient(target))
    iteration = Iteration(
        solver=solver,
        update=lambda state, residual: solver.step(problem, state, residual),
        residual=lambda state: solver.residual(problem, state),
        true_residual=lambda state: problem.residual(solver.value(state)),
        restart=lambda state: solver.init(problem, solver.value(state)),
        scale=scale,
        noise=jax.lax.stop_gradient(_noise(problem, norm, scale, x0)),
        flaw=symmetry_flaw(problem, x0) if needs_look(problem, solver.requires) else None,
    )
    return iteration, state, residual


def stopping_norm(budget: Budget, scale: Array, epsilon: float) -> Array:
    """The residual norm at which an iteration is done.

    Nobody can ask for less than rounding leaves; an iteration pushed past it decays.
    """
    dtype = scale.dtype
    asked = jnp.maximum(jnp.asarray(budget.rtol, dtype) * scale, jnp.asarray(budget.atol, dtype))
    return jnp.maximum(asked, epsilon * scale)


def close_iteration(iteration: Iteration, state: PyTree, residual: PyTree) -> Iteration:
    """The same iteration with every array that its functions use among its leaves."""
    return Iteration(
        solver=iteration.solver,
        update=eqx.filter_closure_convert(iteration.update, state, residual),
        residual=eqx.filter_closure_convert(iteration.residual, state),
        true_residual=eqx.filter_closure_convert(iteration.true_residual, state),
        restart=_no_restart,
        scale=iteration.scale,
        noise=iteration.noise,
        flaw=iteration.flaw,
    )


def _check_value(solver: InnerSolver, state: PyTree, x0: PyTree) -> None:
    expected, got = (
        [(jnp.shape(leaf), jnp.result_type(leaf)) for leaf in jax.tree.leaves(tree)]
        for tree in (x0, solver.value(state))
    )
    if expected != got:
        name = type(solver).__name__
        msg = (
            f"{name}: value(state) must be like x0, {_kinds(expected)}, got {_kinds(got)}. Define "
            f"{name}.value(self, state) to return the iterate, or call that part of the state x."
        )
        raise TypeError(msg)


def _kinds(leaves: list[tuple[tuple[int, ...], Any]]) -> str:
    return ", ".join(f"{dtype}{list(shape)}" for shape, dtype in leaves)


def _no_restart(state: PyTree) -> PyTree:
    return state


def _noise(problem: BoundProblem, norm: Array, scale: Array, x0: PyTree) -> Array:
    reference = jnp.maximum(norm, scale)
    if problem.mapping is not None:
        reference = jnp.maximum(reference, vector.norm(x0))
    elif problem.rhs is None:
        # The rounding level of a gradient is unknown here: only clear growth counts.
        return 4.0 * norm
    return 1e3 * vector.epsilon(x0) * reference
