"""Krylov methods with short recurrences: conjugate gradients and BiCGStab."""

import math
from typing import NamedTuple

from jaxtyping import PyTree

from bilevel.bound import BoundProblem
from bilevel.solver.bicgstab import NEGLIGIBLE as NEGLIGIBLE_COSINE
from bilevel.solver.conjugate_gradient import NEGLIGIBLE as NEGLIGIBLE_CURVATURE
from bilevel.status import Status
from bilevel_arrays.space import quotient, root
from bilevel_arrays.stepping import Stepping


class _Recursive(Stepping):
    """The residual comes out of the recursion."""

    def residual(self, problem: BoundProblem, state: "CGState | BiCGStabState") -> PyTree:
        """The recursive residual."""
        del problem
        return state.residual

    def failure(self, state: "CGState | BiCGStabState") -> int:
        """`BREAKDOWN` once there was no way on."""
        return state.status


class CGState(NamedTuple):
    """As `bilevel.solver.conjugate_gradient.ConjugateGradientState`."""

    x: PyTree
    residual: PyTree
    direction: PyTree
    energy: float
    square: float
    largest: float
    status: int


class ConjugateGradientSteps(_Recursive):
    """Hestenes and Stiefel."""

    def init(self, problem: BoundProblem, x: PyTree) -> CGState:
        """Start along the preconditioned residual."""
        residual = problem.residual(x)
        direction = self.precondition(problem, residual)
        energy = self.space.dot(residual, direction)
        return CGState(x, residual, direction, energy, energy, 0.0, Status.CONVERGED)

    def step(self, problem: BoundProblem, state: CGState, residual: PyTree) -> CGState:
        """Minimise the energy along the direction, and conjugate the next one."""
        assert problem.operator is not None
        space = self.space
        image = problem.operator.matvec(state.direction)
        curvature = space.dot(state.direction, image)
        negligible = NEGLIGIBLE_CURVATURE * space.epsilon * state.largest * state.square
        broken = curvature <= negligible or state.energy <= 0
        length = 0.0 if broken else quotient(state.energy, curvature)
        x = space.add_scaled(state.x, length, state.direction)
        residual = space.add_scaled(residual, -length, image)
        preconditioned = self.precondition(problem, residual)
        energy = space.dot(residual, preconditioned)
        ratio = energy if broken else quotient(energy, state.energy)
        stretch = curvature if broken else quotient(curvature, state.square)
        return CGState(
            x=x,
            residual=residual,
            direction=space.add_scaled(preconditioned, ratio, state.direction),
            energy=energy,
            square=energy + ratio**2 * state.square,
            largest=max(state.largest, stretch),
            status=Status.BREAKDOWN if broken else Status.CONVERGED,
        )


class BiCGStabState(NamedTuple):
    """As `bilevel.solver.bicgstab.BiCGStabState`."""

    x: PyTree
    residual: PyTree
    direction: PyTree
    shadow: PyTree
    rho: float
    norm: float
    shadow_norm: float
    scale: float
    fresh: bool
    status: int


class BiCGStabSteps(_Recursive):
    """Van der Vorst, started anew where it is stuck."""

    def init(self, problem: BoundProblem, x: PyTree) -> BiCGStabState:
        """Shadow and direction start as the residual."""
        residual = problem.residual(x)
        rho = self.space.dot(residual, residual)
        norm = root(rho)
        return BiCGStabState(
            x, residual, residual, residual, rho, norm, norm, 0.0, True, Status.CONVERGED
        )

    def step(self, problem: BoundProblem, state: BiCGStabState, residual: PyTree) -> BiCGStabState:
        """A step along the direction, and one that makes the residual smallest."""
        assert problem.operator is not None
        space, matvec = self.space, problem.operator.matvec
        level = NEGLIGIBLE_COSINE * space.epsilon
        preconditioned = self.precondition(problem, state.direction)
        image = matvec(preconditioned)
        image_norm = space.norm(image)
        stretch = _ratio(image_norm, space.norm(preconditioned))
        sigma = space.dot(state.shadow, image)
        singular = stretch <= level * state.scale
        stuck = singular or abs(sigma) <= level * state.shadow_norm * image_norm
        alpha = 0.0 if stuck else quotient(state.rho, sigma)
        x = space.add_scaled(state.x, alpha, preconditioned)
        half = space.add_scaled(residual, -alpha, image)

        preconditioned = self.precondition(problem, half)
        second = matvec(preconditioned)
        square, product = space.dot(second, second), space.dot(second, half)
        omega = _ratio(product, square)
        x = space.add_scaled(x, omega, preconditioned)
        after = space.add_scaled(half, -omega, second)
        after_square = space.dot(after, after)
        norm = root(after_square)
        # Pythagoras: ‖half‖² is what is left of it and what the step took off.
        taken = abs(product) * _ratio(1.0, root(square))
        half_norm = math.hypot(norm, taken)
        skew = taken <= level * half_norm

        rho = space.dot(state.shadow, after)
        restarts = stuck or skew or abs(rho) <= level * state.shadow_norm * norm
        beta = 0.0 if restarts else quotient(rho, state.rho) * quotient(alpha, omega)
        direction = space.add_scaled(state.direction, -omega, image)
        broken = singular or (stuck and state.fresh) or (skew and half_norm > level * state.norm)
        return BiCGStabState(
            x=x,
            residual=after,
            direction=space.add_scaled(after, beta, direction),
            shadow=after if restarts else state.shadow,
            rho=after_square if restarts else rho,
            norm=norm,
            shadow_norm=norm if restarts else state.shadow_norm,
            scale=max(state.scale, stretch),
            fresh=restarts,
            status=Status.BREAKDOWN if broken else Status.CONVERGED,
        )

    def applications(self, state: BiCGStabState, iterations: int) -> int:
        """Two an iteration, and the first residual."""
        del state
        return 2 * iterations + 1


def _ratio(number: float, divisor: float) -> float:
    """The quotient, or zero if the divisor is."""
    return 0.0 if divisor == 0 else number / divisor
