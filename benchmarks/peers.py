"""Other libraries on the same problems, where they are installed."""

import importlib
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from benchmarks import handwritten
from benchmarks.handwritten import Hypergradient
from benchmarks.problems import Logistic, PoissonControl, Ridge

Maker = Callable[[], Hypergradient]
"""Makes a jitted hypergradient anew, as a first call needs."""


def available(name: str) -> Any | None:
    """The module, or `None` where it is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # jaxopt warns that it is no longer maintained
            return importlib.import_module(name)
    except ImportError:
        return None


def linear_form(problem: Ridge | PoissonControl) -> tuple[Callable[..., Array], Callable[..., Any]]:
    """The inner problem as a matvec (v, theta) -> A v and a right-hand side theta -> b."""
    if isinstance(problem, PoissonControl):
        return lambda v, theta: problem.operator(theta).matvec(v), problem.rhs
    design, response = problem.design, problem.response

    def matvec(v: Array, theta: Array) -> Array:
        return (design @ v) @ design / design.shape[0] + jnp.exp(theta) * v

    def rhs(theta: Array) -> Array:
        del theta
        return response @ design / design.shape[0]

    return matvec, rhs


def conjugate_gradients(
    problem: Ridge | PoissonControl, inner: int, adjoint: int
) -> dict[str, Maker]:
    """Makers of hypergradients by `inner` + `adjoint` iterations of CG, by library."""
    makers: dict[str, Maker] = {}
    if available("jaxopt") is not None:
        makers["jaxopt"] = partial(_jaxopt_cg, problem, inner, adjoint)
    if available("lineax") is not None:
        makers["lineax"] = partial(_lineax_cg, problem, inner, adjoint)
    return makers


def descent_with_conjugate_gradients(
    problem: Ridge | Logistic, step_size: float, inner: int, adjoint: int
) -> dict[str, Maker]:
    """Makers of hypergradients by `inner` steps of descent and `adjoint` of CG, by library."""
    makers: dict[str, Maker] = {}
    given = problem, step_size, inner, adjoint
    if available("jaxopt") is not None:
        makers["jaxopt"] = partial(_jaxopt_descent, *given)
    if available("optimistix") is not None and available("lineax") is not None:
        makers["optimistix"] = partial(_optimistix_descent, *given)
    return makers


def _jaxopt_descent(
    problem: Ridge | Logistic, step_size: float, inner: int, adjoint: int
) -> Hypergradient:
    jaxopt: Any = available("jaxopt")
    solver = jaxopt.GradientDescent(
        problem.objective,
        maxiter=inner,
        tol=0.0,
        stepsize=step_size,
        acceleration=False,
        implicit_diff_solve=partial(jaxopt.linear_solve.solve_cg, maxiter=adjoint, tol=0.0),
    )
    return _differentiated(
        lambda theta: problem.outer_loss(solver.run(problem.start, theta).params, theta)
    )


def _optimistix_descent(
    problem: Ridge | Logistic, step_size: float, inner: int, adjoint: int
) -> Hypergradient:
    """Its adjoint raises at its cap, so CG gets as many steps as its tolerance needs."""
    lineax: Any = available("lineax")
    optimistix: Any = available("optimistix")
    method = optimistix.GradientDescent(learning_rate=step_size, rtol=1e-30, atol=1e-30)
    reached = _reached(problem, step_size, inner, adjoint)
    linear = lineax.CG(rtol=reached, atol=0.0, max_steps=None)
    tags = frozenset({lineax.positive_semidefinite_tag})

    def loss(theta: Array) -> Array:
        found = optimistix.minimise(
            problem.objective,
            method,
            problem.start,
            theta,
            adjoint=optimistix.ImplicitAdjoint(linear),
            max_steps=inner,
            throw=False,
            tags=tags,
        )
        return problem.outer_loss(found.value, theta)

    return _differentiated(loss)


def _reached(problem: Ridge | Logistic, step_size: float, inner: int, adjoint: int) -> float:
    """Relative residual of the adjoint, in the largest entry, after so many iterations of CG."""
    theta, slope = problem.theta, jax.grad(problem.objective)
    w = handwritten.descended(problem, step_size, inner, theta)
    wanted = jax.grad(problem.outer_loss)(w, theta)
    _, hessian = jax.linearize(lambda w: slope(w, theta), w)
    left = wanted - hessian(handwritten.conjugate_gradient(hessian, wanted, adjoint))
    return float(jnp.max(jnp.abs(left)) / jnp.max(jnp.abs(wanted)))


def _jaxopt_cg(problem: Ridge | PoissonControl, inner: int, adjoint: int) -> Hypergradient:
    jaxopt: Any = available("jaxopt")
    matvec, rhs = linear_form(problem)
    linear_solve, implicit_diff = jaxopt.linear_solve, jaxopt.implicit_diff

    def solve_adjoint(operator: Any, vector: Any, **options: Any) -> Any:
        options |= {"maxiter": adjoint, "tol": 0.0}
        return linear_solve.solve_cg(operator, vector, **options)

    @implicit_diff.custom_root(lambda x, theta: matvec(x, theta) - rhs(theta), solve=solve_adjoint)
    def solution(start: Array, theta: Array) -> Array:
        del start
        return linear_solve.solve_cg(lambda v: matvec(v, theta), rhs(theta), maxiter=inner, tol=0.0)

    return _differentiated(lambda theta: problem.outer_loss(solution(problem.start, theta), theta))


def _lineax_cg(problem: Ridge | PoissonControl, inner: int, adjoint: int) -> Hypergradient:
    """Both solves by lineax, put together by hand: its own adjoint raises at its cap."""
    lineax: Any = available("lineax")
    matvec, rhs = linear_form(problem)

    @jax.jit
    def hypergradient(theta: Array) -> tuple[Array, Array]:
        operator = lineax.FunctionLinearOperator(
            lambda v: matvec(v, theta),
            jax.eval_shape(lambda: problem.start),
            lineax.positive_semidefinite_tag,
        )

        def solve(vector: Array, steps: int) -> Array:
            solver = lineax.CG(rtol=1e-30, atol=1e-30, max_steps=steps)
            return lineax.linear_solve(operator, vector, solver, throw=False).value

        x = solve(rhs(theta), inner)
        loss, outer_gradient = jax.value_and_grad(problem.outer_loss)(x, theta)
        multiplier = solve(outer_gradient, adjoint)
        _, transposed = jax.vjp(lambda theta: rhs(theta) - matvec(x, theta), theta)
        return loss, transposed(multiplier)[0]

    return hypergradient


def defaults(
    problem: Ridge | Logistic | PoissonControl, tolerance: float | None = None
) -> dict[str, Maker]:
    """Makers of hypergradients by each library's own methods.

    - `tolerance`: of the primal and the adjoint solve; `None` for each library's own.
    """
    makers: dict[str, Maker] = {}
    if available("jaxopt") is not None:
        makers["jaxopt LBFGS"] = partial(_jaxopt_default, problem, tolerance)
    if available("optimistix") is not None and problem.start.size <= 1000:
        # Its adjoint forms a dense Jacobian: not for a grid.
        makers["optimistix BFGS"] = partial(_optimistix_default, problem, tolerance)
    return makers


def _jaxopt_default(
    problem: Ridge | Logistic | PoissonControl, tolerance: float | None
) -> Hypergradient:
    jaxopt: Any = available("jaxopt")
    options: dict[str, Any] = {}
    if tolerance is not None:
        normal = partial(jaxopt.linear_solve.solve_normal_cg, tol=tolerance, maxiter=20_000)
        options = {"tol": tolerance, "maxiter": 20_000, "implicit_diff_solve": normal}
    solver = jaxopt.LBFGS(problem.objective, **options)
    return _differentiated(
        lambda theta: problem.outer_loss(solver.run(problem.start, theta).params, theta)
    )


def _optimistix_default(
    problem: Ridge | Logistic | PoissonControl, tolerance: float | None
) -> Hypergradient:
    optimistix: Any = available("optimistix")
    tolerance = 1e-6 if tolerance is None else tolerance  # it has none by default
    method = optimistix.BFGS(rtol=tolerance, atol=tolerance)

    def loss(theta: Array) -> Array:
        found = optimistix.minimise(
            problem.objective, method, problem.start, theta, max_steps=20_000, throw=False
        )
        return problem.outer_loss(found.value, theta)

    return _differentiated(loss)


def unrolled(
    step: Callable[[Any, Any], Any],
    outer_loss: Callable[[Any, Any], Array],
    start: Array,
    steps: int,
) -> dict[str, Callable[[], Any]]:
    """Makers of derivatives through `steps` of x ← step(x, θ), by library."""
    makers: dict[str, Callable[[], Any]] = {}
    if available("jaxopt") is not None:
        jaxopt: Any = available("jaxopt")

        def by_jaxopt(theta: Any) -> Array:
            solver = jaxopt.FixedPointIteration(
                step, maxiter=steps, tol=0.0, implicit_diff=False, unroll=True, jit=True
            )
            return outer_loss(solver.run(start, theta).params, theta)

        makers["jaxopt"] = partial(_differentiated, by_jaxopt)
    if available("optimistix") is not None:
        optimistix: Any = available("optimistix")

        def by_optimistix(theta: Any) -> Array:
            found = optimistix.fixed_point(
                step,
                optimistix.FixedPointIteration(rtol=0.0, atol=1e-300),
                start,
                theta,
                max_steps=steps,
                adjoint=optimistix.RecursiveCheckpointAdjoint(),
                throw=False,
            )
            return outer_loss(found.value, theta)

        makers["optimistix"] = partial(_differentiated, by_optimistix)
    return makers


def _differentiated(loss: Callable[[Any], Array]) -> Hypergradient:
    return jax.jit(jax.value_and_grad(loss))


def missing() -> list[str]:
    """A word about every library that is not installed."""
    names = ("jaxopt", "lineax", "optimistix", "torch", "torchopt")
    return [f"{name} is not installed: skipped." for name in names if available(name) is None]
