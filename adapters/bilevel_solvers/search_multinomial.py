"""HostMultinomial: the multinomial model's folds in NumPy, all of them in one matrix product."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp

import bilevel as bl
from bilevel_solvers.search_estimators import Prepared
from bilevel_solvers.search_result import host_result

MOST_STEPS = 100
HALVINGS = 30
MOST_PRODUCTS = 2_000
"""Of conjugate gradients, for one linear system."""
EXACT = 1e-10

Array = NDArray[np.float64]
"""Unknowns are (d, folds, classes), so that one product of matrices serves all folds."""


class HostMultinomial:
    """`search_step.evaluate` of a multinomial model without a compilation, in double precision.

    Newton's method by conjugate gradients with the Hessian's diagonal as preconditioner, as
    accurate in each step as the gradient has come to need (Dembo, Eisenstat and Steihaug
    1982).  All classes have coefficients here: along what the data do not see, a constant
    added to all intercepts, neither the loss nor its gradient has a part.
    """

    def __init__(self, prepared: Prepared):
        shared, folds = prepared.data.shared, prepared.data.folds
        self._features = shared.features.astype(np.float64)
        self._transposed = np.ascontiguousarray(self._features.T)
        self._squares = self._transposed**2
        self._scale = shared.scale.astype(np.float64)
        self._basis = shared.outputs.astype(np.float64)
        self._train, self._test = (
            np.asarray(weight, np.float64).T[:, :, None] for weight in (folds.train, folds.test)
        )
        self._total = np.asarray(folds.total, np.float64)
        self._target = folds.target[0].astype(int)
        self._right = np.eye(len(self._basis))[self._target][:, None, :]

    def __call__(
        self, theta: Mapping[str, Any], x0: Any, fidelity: bl.Fidelity | None = None
    ) -> bl.Hypergradient:
        """Mean test loss over the folds, and its gradient, from starts (folds, d, classes - 1).

        A tolerance in the fidelity counts; an adjoint budget of one iteration means that
        nobody reads the gradient, which is then zero.
        """
        rtol, adjoint_rtol = EXACT, EXACT
        wanted = True
        if fidelity is not None and fidelity.adjoint_budget is not None:
            rtol = float(fidelity.budget.rtol)
            adjoint_rtol = float(fidelity.adjoint_budget.rtol)
            wanted = int(fidelity.adjoint_budget.iterations) > 1
        log = np.asarray(theta["C"], np.float64)
        each = log if len(log) == len(self._scale) else np.append(log, np.mean(log))
        each = each if len(log) > 1 else np.broadcast_to(log, self._scale.shape)
        penalty = (np.exp(-each) / self._scale**2)[:, None, None] / self._total[None, :, None]
        start = np.einsum("kdm,cm->dkc", np.asarray(x0, np.float64), self._basis)
        x, probability, products, norm, converged = self._newton(start, penalty, rtol)
        loss = np.einsum("nkz,nk->k", self._test, self._losses(self._scores(x)))
        adjoint, adjoint_products = np.zeros_like(x), np.zeros_like(products)
        if wanted:
            slope = self._pull(self._test * (probability - self._right))
            adjoint, adjoint_products = self._conjugate_gradients(
                slope, probability, penalty, np.full(len(self._total), adjoint_rtol)
            )
        derivative = np.einsum("dkc,dkc,dkz->d", adjoint, x, penalty) / len(self._total)
        if len(log) > 1:
            extra = np.sum(derivative[len(log) :]) / len(log)
            gradient = derivative[: len(log)] + extra
        else:
            gradient = np.array([np.sum(derivative)])
        return host_result(
            float(np.mean(loss)),
            {"C": gradient},
            *(np.einsum("dkc,cm->kdm", part, self._basis) for part in (x, adjoint)),
            iterations=products,
            adjoint_iterations=adjoint_products,
            residual=norm,
            converged=converged,
        )

    def _scores(self, x: Array) -> Array:
        scores: Array = self._features @ x.reshape(len(x), -1)
        return scores.reshape(-1, *x.shape[1:])

    def _pull(self, scores: Array) -> Array:
        back = self._transposed @ scores.reshape(len(scores), -1)
        return back.reshape(-1, *scores.shape[1:])

    def _losses(self, scores: Array) -> Array:
        right = np.take_along_axis(scores, self._target[:, None, None], axis=2)[:, :, 0]
        return logsumexp(scores, axis=2) - right

    def _objective(self, x: Array, penalty: Array) -> Array:
        losses = self._losses(self._scores(x))
        return np.einsum("nkz,nk->k", self._train, losses) + 0.5 * _dot(penalty * x, x)

    def _newton(
        self, x: Array, penalty: Array, rtol: float
    ) -> tuple[Array, Array, NDArray[np.int32], Array, NDArray[np.bool_]]:
        """Solution, probabilities there, products, norm of the gradient, and whether small."""
        even = 1.0 / len(self._basis)
        reference = np.sqrt(_square(self._pull(self._train * (even - self._right))))
        products = np.zeros(len(self._total), np.int32)
        value = self._objective(x, penalty)
        steps = 0
        while True:
            scores = self._scores(x)
            probability = np.exp(scores - logsumexp(scores, axis=2, keepdims=True))
            slope = self._pull(self._train * (probability - self._right)) + penalty * x
            norm = np.sqrt(_square(slope))
            open_ = norm > rtol * reference
            if not open_.any() or steps == MOST_STEPS:
                break
            steps += 1
            # No more digits than the next gradient will have.
            forcing = np.minimum(0.1, np.sqrt(norm / reference))
            forcing = np.maximum(forcing, 0.3 * rtol * reference / np.where(open_, norm, 1.0))
            slope = np.where(open_[None, :, None], slope, 0.0)
            correction, taken = self._conjugate_gradients(slope, probability, penalty, forcing)
            products += taken
            length, value = _lengths(
                lambda x: self._objective(x, penalty), x, correction, value, _dot(slope, correction)
            )
            if not (length[open_] > 0).any():
                break
            x = x - length[None, :, None] * correction
        return x, probability, products, norm, norm <= np.maximum(rtol, 1e-7) * reference

    def _conjugate_gradients(
        self, rhs: Array, probability: Array, penalty: Array, rtol: Array
    ) -> tuple[Array, NDArray[np.int32]]:
        """Solve H v = rhs for every fold; a fold that is done stays as it is."""
        weight = self._train * probability
        curvature = self._squares @ (weight * (1.0 - probability)).reshape(len(weight), -1)
        diagonal = curvature.reshape(rhs.shape) + penalty
        diagonal = np.where(diagonal > 0, diagonal, 1.0)

        def product(v: Array) -> Array:
            scores = self._scores(v)
            mean = np.einsum("nkc,nkc->nk", probability, scores)[:, :, None]
            return self._pull(weight * (scores - mean)) + penalty * v

        v, residual = np.zeros_like(rhs), rhs.copy()
        direction = residual / diagonal
        energy = _dot(residual, direction)
        limit = rtol * np.sqrt(_square(rhs))
        taken = np.zeros(len(limit), np.int32)
        for _ in range(MOST_PRODUCTS):
            open_ = np.sqrt(_square(residual)) > limit
            if not open_.any():
                break
            image = product(direction)
            curved = _dot(direction, image)
            going = open_ & (curved > 0)
            length = np.where(going, energy / np.where(curved > 0, curved, 1.0), 0.0)
            v += length[None, :, None] * direction
            residual -= length[None, :, None] * image
            scaled = residual / diagonal
            following = _dot(residual, scaled)
            ratio = np.where(going, following / np.where(energy > 0, energy, 1.0), 0.0)
            direction = scaled + ratio[None, :, None] * direction
            energy = following
            taken += open_
            if not going.any():
                break
        return v, taken


def _dot(a: Array, b: Array) -> Array:
    return np.einsum("dkc,dkc->k", a, b)


def _square(a: Array) -> Array:
    return np.einsum("dkc,dkc->k", a, a)


def _lengths(
    objective: Callable[[Array], Array], x: Array, step: Array, value: Array, slope: Array
) -> tuple[Array, Array]:
    """Armijo's step length for every fold, by halving, 0 where nothing is left to gain."""
    length = np.where(slope > 0, 1.0, 0.0)
    slack = 10 * np.finfo(np.float64).eps * np.abs(value)
    halvings = 0
    while True:
        reached = objective(x - length[None, :, None] * step)
        enough = (reached <= value - 1e-4 * length * slope + slack) | (length == 0)
        if enough.all():
            return length, reached
        if halvings == HALVINGS:
            return np.where(enough, length, 0.0), np.where(enough, reached, value)
        length = np.where(enough, length, 0.5 * length)
        halvings += 1
