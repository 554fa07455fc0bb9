"""Other libraries on the same problems, where they are installed."""

import importlib
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

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


def defaults(problem: Ridge | Logistic | PoissonControl) -> dict[str, Maker]:
    """Makers of hypergradients with each library's own choice of tolerance and adjoint."""
    makers: dict[str, Maker] = {}
    if available("jaxopt") is not None:
        makers["jaxopt LBFGS"] = partial(_jaxopt_default, problem)
    if available("optimistix") is not None and problem.start.size <= 1000:
        # Its adjoint forms a dense Jacobian: not for a grid.
        makers["optimistix BFGS"] = partial(_optimistix_default, problem)
    return makers


def _jaxopt_default(problem: Ridge | Logistic | PoissonControl) -> Hypergradient:
    jaxopt: Any = available("jaxopt")
    solver = jaxopt.LBFGS(_objective(problem))
    return _differentiated(
        lambda theta: problem.outer_loss(solver.run(problem.start, theta).params, theta)
    )


def _optimistix_default(problem: Ridge | Logistic | PoissonControl) -> Hypergradient:
    optimistix: Any = available("optimistix")
    objective = _objective(problem)
    method = optimistix.BFGS(rtol=1e-6, atol=1e-6)  # it has no default tolerance

    def loss(theta: Array) -> Array:
        found = optimistix.minimise(objective, method, problem.start, theta, throw=False)
        return problem.outer_loss(found.value, theta)

    return _differentiated(loss)


def _objective(problem: Ridge | Logistic | PoissonControl) -> Callable[[Array, Array], Array]:
    if not isinstance(problem, PoissonControl):
        return problem.objective
    matvec, rhs = linear_form(problem)
    return lambda u, theta: 0.5 * jnp.vdot(u, matvec(u, theta)) - jnp.vdot(rhs(theta), u)


def _differentiated(loss: Callable[[Array], Array]) -> Hypergradient:
    return jax.jit(jax.value_and_grad(loss))


def missing() -> list[str]:
    """A word about every library that is not installed."""
    names = ("jaxopt", "lineax", "optimistix")
    return [f"{name} is not installed: skipped." for name in names if available(name) is None]
