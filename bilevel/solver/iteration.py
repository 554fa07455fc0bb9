"""A solver on a problem: the functions the loop calls."""

import dataclasses
import math
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

_FINE = 1e-10
"""Epsilons below this leave room for any condition number that one solves with."""

_ROUNDINGS = 8.0
"""Of how many roundings of ‖A‖ ‖x‖ a residual may be: a Krylov recursion loses some digits."""


class Iteration(eqx.Module):
    """A solver on a problem at one θ and start, ready to be driven.

    - `update`: (state, residual) -> next state.
    - `residual`: state -> the residual the solver goes by.
    - `true_residual`: state -> the residual at the state's value, evaluated anew.
    - `restart`: state -> a fresh state at the same value.
    - `scale`: the residual norm that relative tolerances refer to.
    - `unit`: a power of two next to the scale, in which the loop measures residuals, so that
        their squares neither overflow nor vanish in single precision.
    - `noise`: a residual norm that may be due to rounding alone.
    - `rounding`: value -> the residual norm that a solution may have at this precision and
        size, by a backward stable solve; `None` where rounding is small or the problem is
        not linear.
    - `floor`: a residual norm that no solution goes below, for the right-hand side is not in
        the operator's range; `None` where nothing is known of that.
    - `flaw`: a failure known before the first step; `None` where nothing was looked at.
    - `compared`: whether the scale took a residual of its own.
    - `grain`: of a fixed point, the share of x below which its residual, a difference of two
        numbers like x, is rounding and nothing else; `None` for other problems.
    """

    solver: InnerSolver
    update: Callable[..., Any]
    residual: Callable[..., Any]
    true_residual: Callable[..., Any]
    restart: Callable[..., Any]
    scale: Float[Array, ""]
    unit: Float[Array, ""]
    noise: Float[Array, ""]
    rounding: Callable[..., Any] | None = None
    floor: Float[Array, ""] | None = None
    flaw: Int[Array, ""] | None = None
    compared: bool = eqx.field(static=True, default=False)
    grain: float | None = eqx.field(static=True, default=None)

    def failure(self, state: PyTree) -> Int[Array, ""]:
        """`Status.CONVERGED` while all is well, otherwise the status to stop with."""
        failure = self.solver.failure(state)
        if self.flaw is None:
            return failure
        return jnp.where(self.flaw == Status.CONVERGED, failure, self.flaw)

    def full(self, state: PyTree, residual: PyTree) -> tuple[PyTree, PyTree]:
        """One step, and the residual after it: nothing is evaluated twice."""
        state = _arrays(self.update(state, residual))
        return state, self.residual(state)

    def small(self, state: PyTree) -> PyTree:
        """One step that evaluates its residual itself: what a plain unrolled loop does."""
        return _arrays(self.update(state, self.residual(state)))

    @property
    def applications_before(self) -> int:
        """Applications before the first step, besides those the solver counts."""
        return (0 if self.flaw is None else APPLICATIONS) + int(self.compared)

    def confirms(self, state: PyTree) -> bool:
        """Whether the residual the solver goes by may differ from the true one."""
        return self.solver.recursive or self.extrapolates(state)

    def extrapolates(self, state: PyTree) -> bool:
        """Whether the residual is evaluated elsewhere than at the iterate."""
        return self.solver.point(state) is not self.solver.value(state)

    def measured(self, residual: PyTree) -> Float[Array, ""]:
        """The squared norm of a residual, in units."""
        scaled = vector.scale(1.0 / self.unit, residual)
        return vector.dot(scaled, scaled)

    def square(
        self, state: PyTree, residual: PyTree, tolerance: Float[Array, ""]
    ) -> Float[Array, ""]:
        """The squared residual norm that decides whether the iteration is done, in units.

        Where an extrapolated point meets the tolerance, the iterate has to meet it, too: a
        start anew from there would throw the momentum away, and there is none in an
        iteration that is differentiated.
        """
        square = self.measured(residual)
        if self.solver.recursive or not self.extrapolates(state):
            return square

        def of_iterate() -> Float[Array, ""]:
            return jnp.maximum(square, self.measured(self.true_residual(state)))

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
    norm = jax.lax.stop_gradient(vector.robust_norm(residual))
    scale = jax.lax.stop_gradient(_scale(problem, x0, residual, norm))
    if budget is not None:
        target = stopping_norm(budget, scale, vector.epsilon(residual))
        problem = dataclasses.replace(
            problem,
            target=jax.lax.stop_gradient(target),
            scale=scale,
            cap=jnp.asarray(budget.iterations, jnp.int32),
        )
    iteration = Iteration(
        solver=solver,
        update=lambda state, residual: solver.step(problem, state, residual),
        residual=lambda state: solver.residual(problem, state),
        true_residual=lambda state: problem.residual(solver.value(state)),
        restart=lambda state: solver.init(problem, solver.value(state)),
        scale=scale,
        unit=jax.lax.stop_gradient(vector.unit(jnp.maximum(norm, scale))),
        noise=jax.lax.stop_gradient(_noise(problem, norm, scale, x0)),
        rounding=_rounding(problem, x0),
        floor=_floor(problem),
        flaw=symmetry_flaw(problem, x0) if needs_look(problem, solver.requires) else None,
        compared=problem.rhs is None,
        grain=None if problem.mapping is None else vector.epsilon(x0),
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
        unit=iteration.unit,
        noise=iteration.noise,
        rounding=_closed(iteration.rounding, iteration.solver.value(state)),
        floor=iteration.floor,
        flaw=iteration.flaw,
        compared=iteration.compared,
        grain=iteration.grain,
    )


def _arrays(state: PyTree) -> PyTree:
    """The state with arrays for leaves: a closed function returns constants as numbers."""
    return jax.tree.map(jnp.asarray, state)


def _closed(function: Callable[..., Any] | None, *arguments: Any) -> Callable[..., Any] | None:
    return None if function is None else eqx.filter_closure_convert(function, *arguments)


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


def _scale(problem: BoundProblem, x0: PyTree, residual: PyTree, norm: Array) -> Array:
    """The norm that relative tolerances refer to.

    ‖b‖ for a linear system with b ≠ 0, so that a good start is not punished.  Otherwise what
    stands for it: the residual at zero of the problem linearised at the start, which for an
    affine one is ‖b‖, too; or the first residual where that is larger.  The residual at zero
    itself would be the same from every start, but may be huge where the problem is not meant
    to be evaluated (a pole, an exponential), and anything would then count as converged.
    Never an absolute constant: multiplying the problem by a number changes nothing.
    """
    if problem.rhs is not None:
        rhs_norm = vector.robust_norm(problem.rhs).astype(norm.dtype)
        return jnp.where(rhs_norm > 0, rhs_norm, norm)
    # A difference works where there is no derivative, and a digit of N x is enough.  A power
    # of two commutes with a change of scale.
    step = 2.0 ** round(math.log2(vector.epsilon(x0)) / 2)
    change = vector.subtract(problem.residual(vector.scale(1.0 + step, x0)), residual)
    at_zero = vector.robust_norm(vector.add_scaled(residual, -1.0 / step, change))
    return jnp.where(jnp.isfinite(at_zero), jnp.maximum(norm, at_zero), norm)


def _floor(problem: BoundProblem) -> Array | None:
    """‖projection of b on a known kernel‖ of a symmetric operator, less what is rounding."""
    if problem.rhs is None or problem.operator is None or problem.operator.kernel is None:
        return None
    kernel = problem.operator.kernel
    size = vector.norm(problem.rhs)
    part = jnp.abs(vector.dot(kernel, problem.rhs)) / vector.norm(kernel)
    rounding = 1e3 * vector.epsilon(problem.rhs) * size
    return jax.lax.stop_gradient(jnp.maximum(part - rounding, 0.0))


def _rounding(problem: BoundProblem, x0: PyTree) -> Callable[..., Any] | None:
    """ε ‖A‖ ‖x‖ and a little more: what is left of b − A x when x is rounded.

    In single precision an everyday condition number makes that a visible part of ‖b‖: 1e-3
    for a Poisson problem on 256² points.
    """
    operator = problem.operator
    epsilon = vector.epsilon(x0)
    if operator is None or epsilon < _FINE:
        return None

    def rounding(x: PyTree) -> Array:
        rough = vector.arbitrary(x, seed=1)
        size = vector.norm(operator.matvec(rough)) / vector.norm(rough)
        return jax.lax.stop_gradient(_ROUNDINGS * epsilon * size * vector.norm(x))

    return rounding


def _noise(problem: BoundProblem, norm: Array, scale: Array, x0: PyTree) -> Array:
    reference = jnp.maximum(norm, scale)
    if problem.mapping is not None:
        reference = jnp.maximum(reference, vector.norm(x0))
    elif problem.rhs is None:
        # The rounding level of a gradient is a guess: only clear growth counts.
        return jnp.maximum(4.0 * norm, 1e3 * vector.epsilon(x0) * scale)
    return 1e3 * vector.epsilon(x0) * reference
