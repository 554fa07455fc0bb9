"""`bl.hypergradient`: a hypergradient together with what it is worth."""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from bilevel import vector
from bilevel.affine import as_linear
from bilevel.budget import Budget
from bilevel.compilation import compiled
from bilevel.description import described
from bilevel.diagnosis import diagnosis
from bilevel.error.base import ErrorEstimator, Situation, TruncationError
from bilevel.error.correction import ResidualCorrection
from bilevel.estimator.base import Estimator, Record, Setting, no_adjoint
from bilevel.estimator.implicit import Implicit
from bilevel.inner_solve import arrange, complete
from bilevel.probe import AdjointProbe
from bilevel.problem import InnerProblem, as_inner_problem
from bilevel.refinement.fidelity import Fidelity
from bilevel.signature import check_callable
from bilevel.solution import Solution
from bilevel.solver.base import InnerSolver
from bilevel.solver.symmetry import adjoint_flaw
from bilevel.status import Status
from bilevel.theta import outer_value, require_differentiable, require_read


class Cost(eqx.Module):
    """What a hypergradient took, all int32.

    - `primal_iterations`, `adjoint_iterations`: iterations of the two solves, those of the
        linear solver where the primal one has one inside (Newton): the same unit for both.
    - `operator_applications`: evaluations of the residual, or applications of the
        operator, in the primal solve.
    - `transposed_applications`: the same of the transpose, in the adjoint solve.
    - `error_applications`: either, for the error estimate.
    """

    primal_iterations: Int[Array, ""]
    adjoint_iterations: Int[Array, ""]
    operator_applications: Int[Array, ""]
    transposed_applications: Int[Array, ""]
    error_applications: Int[Array, ""]

    def __repr__(self) -> str:
        """The numbers in a line."""
        return described(self)


class Hypergradient(eqx.Module):
    """A hypergradient and what it is worth.

    - `value`: the outer loss f(x, θ) at the truncated x.
    - `gradient`: like θ, NaN where a solve failed; `None` at leaves of θ that are not
        float or complex.
    - `primal`, `adjoint`: the two solves. An estimator that solves no adjoint says
        `NOT_RUN` there.
    - `error`: estimated truncation error of the gradient against the exact one, infinite
        where a solve failed; `None` where none was asked for.
    - `cost`: iterations and operator applications.
    - `diagnosis`: which budget is short, in words, and how both solves ended; outside of
        traced code.

    >>> import jax.numpy as jnp, bilevel as bl
    >>> problem = bl.LinearSystem(2 * jnp.eye(1), lambda theta: theta * jnp.ones(1))
    >>> result = bl.hypergradient(lambda x, theta: jnp.sum(x), problem, 1.0, jnp.zeros(1))
    >>> float(result.value), float(result.gradient), int(result.cost.adjoint_iterations)
    (0.5, 0.5, 1)
    >>> result.diagnosis.split(":")[0]
    'Neither solve is short'
    """

    value: Float[Array, ""]
    gradient: PyTree
    primal: Solution
    adjoint: Solution
    error: TruncationError | None
    cost: Cost

    def __repr__(self) -> str:
        """The numbers in a line."""
        return described(self)

    @property
    def diagnosis(self) -> str:
        """Which of the two budgets is short, in words (outside traced code only)."""
        return diagnosis(self.gradient, self.primal, self.adjoint, self.error)


def hypergradient(
    outer_loss: Callable[[Any, Any], Array],
    problem: object,
    theta: PyTree,
    x0: PyTree,
    *,
    solver: InnerSolver | None = None,
    estimator: Estimator | None = None,
    budget: Budget | None = None,
    adjoint_budget: Budget | None = None,
    adjoint_guess: PyTree | None = None,
    fidelity: Fidelity | None = None,
    error: ErrorEstimator | bool = True,
    history: int = 0,
) -> Hypergradient:
    """The hypergradient dL/dθ of L(θ) = outer_loss(x(θ), θ), and what stopping early cost it.

    The same derivative as `jax.grad` through `bl.solve`, with both solves, the
    estimated truncation error and the cost beside it.

    **Arguments:**

    - `outer_loss`: outer_loss(x, theta) -> real scalar.
    - `error`: how the truncation error is estimated; [`ResidualCorrection`][] by default,
        `False` for not at all. With an estimate, a declared `rmatvec` or `symmetric=True` is
        looked at, too: where it does not hold, the adjoint's status is `NOT_ADJOINT` and the
        gradient NaN. `jax.grad` through `bl.solve` trusts it.
    - the others: see [`solve`][].

    **Returns:** a [`Hypergradient`][].

    **Raises:** as [`solve`][]; `ValueError` where neither the problem nor `outer_loss` reads
    any float of theta, as where they captured the same array from outside.

    >>> import jax.numpy as jnp, bilevel as bl
    >>> problem = bl.Minimization(lambda x, theta: jnp.sum((x - theta) ** 2))
    >>> result = bl.hypergradient(
    ...     lambda x, theta: jnp.sum(x**2),
    ...     problem,
    ...     3.0,
    ...     jnp.zeros(1),
    ...     solver=bl.GradientDescent(step_size=0.25),
    ...     budget=bl.Budget(iterations=4),
    ... )
    >>> round(float(result.gradient), 3), round(float(result.error.total), 3)  # exact: 6
    (5.625, 0.394)
    """
    setting, estimator, _ = arrange(
        problem,
        theta,
        x0,
        solver=solver,
        estimator=estimator,
        budget=budget,
        adjoint_budget=adjoint_budget,
        adjoint_guess=adjoint_guess,
        fidelity=fidelity,
        probe=None,
        history=history,
    )
    require_differentiable(setting.theta)
    if not isinstance(error, ErrorEstimator | bool):
        msg = f"error must be an error estimator, True or False, got {error!r}."
        raise TypeError(msg)
    check_callable("hypergradient", "outer_loss", outer_loss, ("x", "theta"))
    judge = ResidualCorrection() if error is True else (error or None)
    return _evaluate(
        outer_loss,
        setting.problem,
        setting.theta,
        setting.x0,
        setting.solver,
        estimator,
        setting.budget,
        setting.adjoint_budget,
        setting.adjoint_guess,
        judge,
        setting.history,
    )


@compiled
def _evaluate(
    outer_loss: Callable[[Any, Any], Array],
    problem: Any,
    theta: PyTree,
    x0: PyTree,
    solver: Any,
    estimator: Estimator,
    budget: Any,
    adjoint_budget: Any,
    adjoint_guess: Any,
    judge: ErrorEstimator | None,
    history: int,
) -> Hypergradient:
    setting = complete(
        Setting(problem, theta, x0, solver, budget, adjoint_budget, adjoint_guess, history)
    )
    moving, fixed = eqx.partition(theta, eqx.is_inexact_array)

    def with_theta(moving: PyTree) -> PyTree:
        return eqx.combine(moving, fixed)

    require_read(outer_loss, setting.problem, moving, with_theta, setting.x0)

    def outer(moving: PyTree, record: Record) -> tuple[Array, Solution]:
        full = with_theta(moving)
        at = Setting(
            setting.problem,
            full,
            setting.x0,
            setting.solver,
            setting.budget,
            adjoint_budget,
            adjoint_guess,
            history,
        )
        solution = estimator.solve(at, record)
        return outer_value(outer_loss, solution.value, full), solution

    if estimator.forward_only:
        value, primal, gradient = _forward_gradient(outer, moving)
        adjoint, detail = no_adjoint(x0, jnp.int32(0), idle=primal.iterations == 0), None
    else:
        record = Record(detail=AdjointProbe.zeros(x0))
        (value, primal), (gradient, report) = jax.value_and_grad(
            outer, argnums=(0, 1), has_aux=True
        )(moving, record)
        detail = report.detail
        adjoint = detail.solution()
    left = detail.residual if detail is not None and estimator.solves_adjoint else None
    equation = setting.problem.equation(x0)
    situation = Situation(
        outer_loss=outer_loss,
        problem=equation,
        theta=moving,
        with_theta=with_theta,
        x=jax.lax.stop_gradient(primal.value),
        gradient=gradient,
        primal=primal,
        adjoint=adjoint,
        adjoint_value=adjoint.value if estimator.solves_adjoint else None,
        adjoint_residual=left,
        linear_solver=estimator.correction_solver(equation.at(theta), x0),
    )
    if judge is not None and estimator.solves_adjoint:
        situation = _looked_at(situation)
        adjoint, gradient = situation.adjoint, situation.gradient
    error = None if judge is None else _judged(judge, situation)
    none = jnp.int32(0)
    cost = Cost(
        primal.inner_iterations,
        adjoint.inner_iterations,
        primal.applications,
        adjoint.applications,
        none if error is None else error.applications,
    )
    return Hypergradient(value, gradient, primal, adjoint, error, cost)


def truncation_error(
    outer_loss: Callable[[Any, Any], Array],
    problem: object,
    theta: PyTree,
    solution: Solution,
    gradient: PyTree,
    report: AdjointProbe,
    *,
    estimator: Estimator | None = None,
    error: ErrorEstimator | None = None,
) -> TruncationError:
    """What stopping early cost a hypergradient that came out of `jax.grad`.

    The numbers of `bl.hypergradient`, for those who differentiate through `bl.solve` in
    code of their own.

    **Arguments:**

    - `outer_loss`, `problem`, `theta`: as for [`hypergradient`][].
    - `solution`: what `bl.solve` returned.
    - `gradient`: the gradient with respect to all of theta.
    - `report`: the gradient with respect to an `AdjointProbe` passed to `bl.solve`.
    - `estimator`: the one given to `bl.solve`; its linear solver serves the estimate, too.
    - `error`: how it is estimated; [`ResidualCorrection`][] by default.

    >>> import jax, jax.numpy as jnp, bilevel as bl
    >>> problem = bl.Minimization(lambda x, theta: jnp.sum((x - theta) ** 2))
    >>> def outer_loss(x, theta):
    ...     return jnp.sum(x**2)
    >>> def loss(theta, probe):
    ...     solution = bl.solve(
    ...         problem,
    ...         theta,
    ...         jnp.zeros(1),
    ...         probe=probe,
    ...         solver=bl.GradientDescent(step_size=0.25),
    ...         budget=bl.Budget(iterations=4),
    ...     )
    ...     return outer_loss(solution.value, theta), solution
    >>> probe = bl.AdjointProbe.zeros(jnp.zeros(1))
    >>> (gradient, report), solution = jax.grad(loss, argnums=(0, 1), has_aux=True)(3.0, probe)
    >>> error = bl.truncation_error(outer_loss, problem, 3.0, solution, gradient, report)
    >>> round(float(error.total), 3)
    0.394
    """
    check_callable("truncation_error", "outer_loss", outer_loss, ("x", "theta"))
    judge = ResidualCorrection() if error is None else error
    estimator = Implicit() if estimator is None else estimator
    theta = jax.tree.map(lambda leaf: jnp.asarray(leaf) if eqx.is_array_like(leaf) else leaf, theta)
    problem = as_inner_problem(problem)
    return _estimate(judge, estimator, outer_loss, problem, theta, solution, gradient, report)


@compiled
def _estimate(
    judge: ErrorEstimator,
    estimator: Estimator,
    outer_loss: Callable[[Any, Any], Array],
    problem: InnerProblem,
    theta: PyTree,
    solution: Solution,
    gradient: PyTree,
    report: AdjointProbe,
) -> TruncationError:
    moving, fixed = eqx.partition(theta, eqx.is_inexact_array)
    x = solution.value
    problem = as_linear(problem, theta, x, None).anchored(theta, x).equation(x)
    adjoint = report.solution()
    situation = Situation(
        outer_loss=outer_loss,
        problem=problem,
        theta=moving,
        with_theta=lambda moving: eqx.combine(moving, fixed),
        x=x,
        gradient=eqx.filter(gradient, eqx.is_inexact_array),
        primal=solution,
        adjoint=adjoint,
        adjoint_value=None,
        adjoint_residual=None,
        linear_solver=estimator.correction_solver(problem.at(theta), x),
    )
    solved = dataclasses.replace(
        situation, adjoint_value=report.value, adjoint_residual=report.residual
    )
    return jax.lax.cond(
        adjoint.status == Status.NOT_RUN,
        lambda: _judged(judge, situation),
        lambda: _judged(judge, solved),
    )


def _looked_at(situation: Situation) -> Situation:
    """The situation, with a failed adjoint where the transpose was declared and is none.

    An adjoint equation that is solved as it should be, with another matrix than the
    problem's, converges to a wrong gradient, and its residual does not tell.
    """
    bound = situation.problem.at(situation.with_theta(situation.theta))
    flaw = adjoint_flaw(bound, situation.x)
    if flaw is None:
        return situation
    # Whatever else went wrong may be a consequence.
    flawed = flaw != Status.CONVERGED
    status = jnp.where(flawed, flaw, situation.adjoint.status)
    poison = jnp.where(flawed, jnp.nan, 1.0)
    return dataclasses.replace(
        situation,
        adjoint=dataclasses.replace(situation.adjoint, status=status),
        gradient=vector.scale(poison, situation.gradient),
    )


def _judged(judge: ErrorEstimator, situation: Situation) -> TruncationError:
    error = judge.estimate(situation)
    failed = (situation.primal.status >= Status.DIVERGED) | (
        situation.adjoint.status >= Status.DIVERGED
    )
    lost = failed | ~jnp.isfinite(vector.norm(situation.gradient))
    return eqx.tree_at(
        lambda e: (e.primal, e.adjoint, e.total),
        error,
        tuple(
            jnp.where(lost | jnp.isnan(part), jnp.inf, part)
            for part in (error.primal, error.adjoint, error.total)
        ),
    )


def _forward_gradient(outer: Any, moving: PyTree) -> tuple[Array, Solution, PyTree]:
    """One tangent for every real number in θ, all in one pass over the iteration."""
    leaves, treedef = jax.tree.flatten(moving)
    # A real function of a complex entry has two derivatives, along its parts.
    parts = [(leaf.real, leaf.imag) if jnp.iscomplexobj(leaf) else (leaf,) for leaf in leaves]

    def loss(parts: list[tuple[Array, ...]]) -> tuple[Array, tuple[Array, Solution]]:
        joined = [jax.lax.complex(*part) if len(part) == 2 else part[0] for part in parts]
        value, solution = outer(jax.tree.unflatten(treedef, joined), Record())
        return value, (value, solution)

    along, (value, solution) = jax.jacfwd(loss, has_aux=True)(parts)
    # JAX's gradient is conjugate to the direction of steepest ascent.
    joined = [jax.lax.complex(g[0], -g[1]) if len(g) == 2 else g[0] for g in along]
    return value, solution, jax.tree.unflatten(treedef, joined)
