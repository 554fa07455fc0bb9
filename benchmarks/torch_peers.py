"""PyTorch by hand and TorchOpt on the same problems, in a process of their own."""

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from benchmarks.handwritten import AnyProblem
from benchmarks.peers import available
from benchmarks.problems import PoissonControl, Ridge

Hypergradient = Callable[[], tuple[float, np.ndarray]]
"""() -> (outer loss, hypergradient), at the problem's θ."""


@dataclass(frozen=True)
class Formulas:
    """A problem in tensors: objective and outer loss (w, θ), the operator and right-hand side."""

    objective: Callable[[Any, Any], Any]
    outer_loss: Callable[[Any], Any]
    matvec: Callable[[Any, Any], Any]
    rhs: Callable[[Any], Any]
    start: Any
    theta: Any


def formulas(problem: AnyProblem) -> Formulas:
    """The problem's formulas in PyTorch."""
    torch: Any = available("torch")

    def tensor(array: Any) -> Any:
        return torch.tensor(np.asarray(array))

    theta = tensor(problem.theta)
    if isinstance(problem, PoissonControl):
        bumps, reference = tensor(problem.bumps), tensor(problem.reference)
        scale = (reference.shape[0] + 1.0) ** 2

        def matvec(u: Any, theta: Any) -> Any:
            del theta
            padded = torch.nn.functional.pad(u, (1, 1, 1, 1))
            around = padded[2:, 1:-1] + padded[:-2, 1:-1] + padded[1:-1, 2:] + padded[1:-1, :-2]
            return scale * (4.0 * u - around)

        def rhs(theta: Any) -> Any:
            return bumps.T @ theta @ bumps

        def energy(u: Any, theta: Any) -> Any:
            return 0.5 * torch.sum(u * matvec(u, theta)) - torch.sum(rhs(theta) * u)

        def distance(u: Any) -> Any:
            return 0.5 * torch.sum((u - reference) ** 2)

        return Formulas(energy, distance, matvec, rhs, torch.zeros_like(reference), theta)
    X, y = tensor(problem.design), tensor(problem.response)
    V, z = tensor(problem.validation_design), tensor(problem.validation_response)
    start = torch.zeros_like(theta)

    def penalty(w: Any, theta: Any) -> Any:
        return 0.5 * torch.sum(torch.exp(theta) * w**2)

    if isinstance(problem, Ridge):

        def normal(w: Any, theta: Any) -> Any:
            return (X @ w) @ X / len(X) + torch.exp(theta) * w

        def misfit(w: Any, X: Any, y: Any) -> Any:
            return 0.5 * torch.mean((X @ w - y) ** 2)

        return Formulas(
            lambda w, theta: misfit(w, X, y) + penalty(w, theta),
            lambda w: misfit(w, V, z),
            normal,
            lambda theta: y @ X / len(X),  # noqa: ARG005
            start,
            theta,
        )

    def logistic(w: Any, X: Any, y: Any) -> Any:
        scores = X @ w
        return torch.mean(torch.nn.functional.softplus(scores) - y * scores)

    return Formulas(
        lambda w, theta: logistic(w, X, y) + penalty(w, theta),
        lambda w: logistic(w, V, z),
        _nonlinear,
        _nonlinear,
        start,
        theta,
    )


def _nonlinear(*_: Any) -> Any:
    msg = "formulas: the inner problem is not linear; give a step size for descent."
    raise TypeError(msg)


def _conjugate_gradient(matvec: Callable[[Any], Any], rhs: Any, steps: int) -> Any:
    torch: Any = available("torch")

    x, residual = torch.zeros_like(rhs), rhs.clone()
    direction, squared = residual.clone(), torch.sum(residual * residual)
    for _ in range(steps):
        image = matvec(direction)
        length = squared / torch.sum(direction * image)
        x = x + length * direction
        residual = residual - length * image
        following = torch.sum(residual * residual)
        direction = residual + following / squared * direction
        squared = following
    return x


def by_hand(
    problem: AnyProblem, step_size: float | None, inner: int, adjoint: int
) -> Hypergradient:
    """CG or, with a step size, descent; CG for the adjoint, by double backward passes."""
    torch: Any = available("torch")

    given = formulas(problem)
    slope = torch.func.grad(given.objective)

    def hypergradient() -> tuple[float, np.ndarray]:
        theta = given.theta.clone().requires_grad_()
        with torch.no_grad():
            if step_size is None:
                w = _conjugate_gradient(lambda v: given.matvec(v, theta), given.rhs(theta), inner)
            else:
                w = given.start
                for _ in range(inner):
                    w = w - step_size * slope(w, theta)
        w = w.requires_grad_()
        loss = given.outer_loss(w)
        wanted = torch.autograd.grad(loss, w)[0]
        (down,) = torch.autograd.grad(given.objective(w, theta), w, create_graph=True)
        if step_size is None:
            with torch.no_grad():
                multiplier = _conjugate_gradient(lambda v: given.matvec(v, theta), wanted, adjoint)
        else:

            def product(v: Any) -> Any:
                return torch.autograd.grad(down, w, v, retain_graph=True)[0]

            multiplier = _conjugate_gradient(product, wanted, adjoint)
        gradient = torch.autograd.grad(down, theta, -multiplier)[0]
        return float(loss.detach()), gradient.numpy()

    return hypergradient


def by_torchopt(
    problem: AnyProblem, step_size: float | None, inner: int, adjoint: int
) -> Hypergradient:
    """The same iterations with `torchopt.diff.implicit.custom_root` and its CG."""
    torch: Any = available("torch")
    torchopt: Any = available("torchopt")

    given = formulas(problem)
    slope = torch.func.grad(given.objective)
    solve = partial(torchopt.linear_solve.solve_cg, rtol=0.0, atol=0.0)

    @torchopt.diff.implicit.custom_root(slope, argnums=1, solve=solve(maxiter=adjoint))
    def solution(w: Any, theta: Any) -> Any:
        if step_size is None:
            primal = solve(maxiter=inner)
            return primal(lambda v: given.matvec(v, theta), given.rhs(theta))
        with torch.no_grad():
            for _ in range(inner):
                w = w - step_size * slope(w, theta)
        return w

    def hypergradient() -> tuple[float, np.ndarray]:
        theta = given.theta.clone().requires_grad_()
        loss = given.outer_loss(solution(given.start, theta))
        return float(loss.detach()), torch.autograd.grad(loss, theta)[0].numpy()

    return hypergradient


def makers(
    problem: AnyProblem, step_size: float | None, inner: int, adjoint: int
) -> dict[str, Hypergradient]:
    """What is installed, by name; on one thread where one core is all there is."""
    torch: Any = available("torch")

    warnings.filterwarnings("ignore", module="torchopt")  # it calls what PyTorch has renamed

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    found = {"PyTorch by hand": by_hand(problem, step_size, inner, adjoint)}
    if available("torchopt") is not None:
        found["TorchOpt"] = by_torchopt(problem, step_size, inner, adjoint)
    return found
