"""HostFolds: the hypergradient in NumPy, for searches that are less work than a compilation."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import scipy.linalg
from numpy.typing import NDArray
from scipy.special import expit
from sklearn import linear_model

import bilevel as bl
from bilevel_solvers.search_estimators import Prepared
from bilevel_solvers.search_models import (
    ElasticNetModel,
    Fold,
    LogisticModel,
    MultinomialModel,
    RidgeModel,
    SquaredHingeModel,
    SquaredInsensitiveModel,
)
from bilevel_solvers.search_multinomial import HostMultinomial
from bilevel_solvers.search_result import host_result

MOST_WORK = 1e8
"""Samples times squared features, over all inner problems, that a compilation is worth."""
MOST_SCORES = 2e7
"""The same for the multinomial model: samples times features times classes, over all folds."""
MOST_STEPS = 100
MOST_SWEEPS = 10_000
SWEEP_TOLERANCES = (1e-4, 1e-7, 1e-10)
"""Of coordinate descent, the next where the last did not find the support."""
HALVINGS = 30
EXACT = 1e-10
"""Relative gradient norm of a fit."""

Array = NDArray[np.float64]

_DESCENT: Any = linear_model.enet_path
"""Coordinate descent; what scikit-learn's source lets a type checker see of it is wrong."""


class _Penalty(NamedTuple):
    """a and q of every column."""

    absolute: Array
    squared: Array


class _Fitted(NamedTuple):
    """One fold's solution, its adjoint, and the derivatives of the test loss in a and q."""

    x: Array
    adjoint: Array
    loss: float
    absolute: Array
    squared: Array
    iterations: int
    residual: float
    converged: bool


class _Loss(NamedTuple):
    """A training loss with two derivatives in f."""

    value: Callable[[Array, Array], Array]
    slope: Callable[[Array, Array], Array]
    curvature: Callable[[Array, Array], NDArray[Any]]


def known(prepared: Prepared) -> bool:
    """Whether a search is of a kind that is done in NumPy."""
    model = prepared.model
    if isinstance(model, MultinomialModel):
        return True
    dense = not model.squared or prepared.data.folds.gram.shape[-1] > 0
    return dense and not model.iterative


def suits(prepared: Prepared) -> bool:
    """Whether it is also little enough work."""
    samples, width = prepared.data.shared.features.shape
    size = float(len(prepared.data.folds.total)) * samples * width
    if isinstance(prepared.model, MultinomialModel):
        return size * prepared.outputs <= MOST_SCORES
    return known(prepared) and size * width <= MOST_WORK


def host_evaluation(prepared: Prepared) -> Callable[..., bl.Hypergradient]:
    """(theta, x0, fidelity) -> the hypergradient, in NumPy."""
    if isinstance(prepared.model, MultinomialModel):
        return HostMultinomial(prepared)
    return HostFolds(prepared)


class HostFolds:
    """`search_step.evaluate` without a compilation, in double precision.

    Ridge by a Cholesky factorisation; lasso and elastic net by scikit-learn's coordinate
    descent, with the implicit derivative on the support; the others by Newton's method,
    with its last matrix for the adjoint.  Every fit is exact, so budgets have no part in it.
    """

    def __init__(self, prepared: Prepared):
        self._model = prepared.model
        shared, folds = prepared.data.shared, prepared.data.folds
        self._features = shared.features.astype(np.float64)
        self._scale = shared.scale.astype(np.float64)
        self._folds = [
            Fold(*(np.asarray(part[k], np.float64) for part in folds))
            for k in range(len(folds.total))
        ]
        self._loss = _loss(self._model)
        self._rows: list[tuple[Array, Array]] = []
        if isinstance(self._model, ElasticNetModel):
            self._rows = [self._weighted(fold) for fold in self._folds]

    def __call__(
        self, theta: Mapping[str, Any], x0: Any, fidelity: bl.Fidelity | None = None
    ) -> bl.Hypergradient:
        """Mean test loss over the folds, and its gradient, from starts (folds, d)."""
        del fidelity
        hyper = {name: np.asarray(part, np.float64) for name, part in theta.items()}
        fitted: list[_Fitted] = []
        gradient = {name: np.zeros_like(part) for name, part in hyper.items()}
        count = len(self._folds)
        for number, (fold, start) in enumerate(zip(self._folds, np.asarray(x0), strict=True)):
            penalty = self._penalty(hyper, fold)
            if self._loss is not None:
                found = self._newton(fold, penalty, start.astype(np.float64), self._loss)
            elif isinstance(self._model, ElasticNetModel):
                found = self._coordinates(number, hyper, penalty, start.astype(np.float64))
            else:
                found = self._ridge(fold, penalty)
            fitted.append(found)
            for name, part in self._chained(hyper, penalty, found).items():
                gradient[name] += part / count
        value = float(np.mean([one.loss for one in fitted]))
        return host_result(
            value,
            gradient,
            np.stack([one.x for one in fitted]),
            np.stack([one.adjoint for one in fitted]),
            iterations=np.array([one.iterations for one in fitted], np.int32),
            adjoint_iterations=np.zeros(count, np.int32),
            residual=np.array([one.residual for one in fitted]),
            converged=np.array([one.converged for one in fitted]),
        )

    def _penalty(self, hyper: dict[str, Array], fold: Fold) -> _Penalty:
        scale = self._scale
        if isinstance(self._model, ElasticNetModel):
            alpha, ratio = np.exp(hyper["alpha"]), hyper.get("l1_ratio", np.array(1.0))
            return _Penalty(alpha * ratio / scale, alpha * (1.0 - ratio) / scale**2)
        none = np.zeros_like(scale)
        if isinstance(self._model, RidgeModel):
            return _Penalty(none, np.exp(hyper["alpha"]) / (fold.total * scale**2))
        log = hyper["C"]
        if len(log) > 1 and len(scale) > len(log):
            log = np.append(log, np.mean(log))
        return _Penalty(none, np.exp(-log) / (fold.total * scale**2))

    def _chained(
        self, hyper: dict[str, Array], penalty: _Penalty, found: _Fitted
    ) -> dict[str, Array]:
        """From derivatives in a and q to those in the hyperparameters."""
        each = found.absolute * penalty.absolute + found.squared * penalty.squared
        if self._model.inverse:
            each = -each
        size = len(hyper[self._model.strength])
        if size == 1:
            gradient = np.array([np.sum(each)])
        else:
            # An intercept with a penalty has the mean logarithm of the others.
            gradient = each[:size] + np.sum(each[size:]) / size
        chained = {self._model.strength: gradient}
        if "l1_ratio" in hyper:
            alpha = np.exp(hyper["alpha"])
            chained["l1_ratio"] = np.sum(
                found.absolute * alpha / self._scale - found.squared * alpha / self._scale**2
            )
        return chained

    def _ridge(self, fold: Fold, penalty: _Penalty) -> _Fitted:
        matrix = fold.gram + np.diag(penalty.squared)
        factors = scipy.linalg.cho_factor(matrix, lower=True)
        x: Array = scipy.linalg.cho_solve(factors, fold.moment)
        loss, slope = self._squared_test(fold, x)
        adjoint: Array = scipy.linalg.cho_solve(factors, slope)
        residual = float(np.linalg.norm(fold.moment - matrix @ x))
        return _Fitted(x, adjoint, loss, np.zeros_like(x), -adjoint * x, 1, residual, True)

    def _coordinates(
        self, number: int, hyper: dict[str, Array], penalty: _Penalty, start: Array
    ) -> _Fitted:
        fold, (rows, values) = self._folds[number], self._rows[number]
        # In these units all penalties are the same, as scikit-learn has them.
        common = float(np.exp(np.mean(hyper["alpha"])))
        unit = common / np.broadcast_to(np.exp(hyper["alpha"]), self._scale.shape) * self._scale
        total = len(rows)
        x, steps, residual, exact = start, 0, np.inf, False
        for tolerance in SWEEP_TOLERANCES:
            _, coefs, _, counts = _DESCENT(
                rows * unit,
                values,
                l1_ratio=float(hyper.get("l1_ratio", np.array(1.0))),
                alphas=[common],
                precompute=fold.gram * np.outer(unit, unit) * total,
                Xy=fold.moment * unit * total,
                coef_init=x / unit,
                tol=tolerance,
                max_iter=MOST_SWEEPS,
                return_n_iter=True,
            )
            x = coefs[:, 0] * unit
            steps += int(counts[0])
            x, residual, exact = _polished(fold, penalty, x)
            if exact:
                break
        support = np.flatnonzero(x)
        loss, slope = self._squared_test(fold, x)
        adjoint = np.zeros_like(x)
        if len(support):
            matrix = _on_support(fold, penalty, support)
            adjoint[support] = scipy.linalg.solve(matrix, slope[support], assume_a="pos")
        absolute, squared = -adjoint * np.sign(x), -adjoint * x
        return _Fitted(x, adjoint, loss, absolute, squared, steps, residual, exact)

    def _newton(self, fold: Fold, penalty: _Penalty, x: Array, loss: _Loss) -> _Fitted:
        features, target, weight = self._features, fold.target, fold.train
        q = penalty.squared
        used = weight > 0
        features, target, weight = features[used], target[used], weight[used]

        def objective(x: Array) -> float:
            return float(weight @ loss.value(target, features @ x) + 0.5 * q @ x**2)

        value = objective(x)
        converged = False
        steps = 0
        reference = float(np.linalg.norm((weight * loss.slope(target, 0.0 * target)) @ features))
        while True:
            scores = features @ x
            slope = (weight * loss.slope(target, scores)) @ features + q * x
            norm = float(np.linalg.norm(slope))
            curvature = weight * loss.curvature(target, scores)
            matrix = (features.T * curvature) @ features + np.diag(q)
            # A column without curvature or penalty, such as that of an intercept where all
            # samples are far on the right side, must not stop the factorisation.
            matrix[np.diag_indices_from(matrix)] += 1e-14 * np.trace(matrix) / len(matrix)
            factors = scipy.linalg.cho_factor(matrix, lower=True)
            converged = norm <= EXACT * reference
            if converged or steps == MOST_STEPS:
                break
            step: Array = scipy.linalg.cho_solve(factors, slope)
            length = _length(objective, x, step, value, float(slope @ step))
            if length == 0.0:  # nothing but rounding is left
                converged = norm <= EXACT**0.5 * reference
                break
            x = x - length * step
            value, steps = objective(x), steps + 1
        slope_of_test, test = self._test(fold, x)
        adjoint: Array = scipy.linalg.cho_solve(factors, slope_of_test)
        return _Fitted(x, adjoint, test, np.zeros_like(x), -adjoint * x, steps, norm, converged)

    def _test(self, fold: Fold, x: Array) -> tuple[Array, float]:
        """Derivative of the test loss in x, and the loss."""
        used = fold.test > 0
        features, target, weight = self._features[used], fold.target[used], fold.test[used]
        scores = features @ x
        if isinstance(self._model, SquaredInsensitiveModel):
            left = target - scores
            return (-2.0 * weight * left) @ features, float(weight @ left**2)
        assert self._loss is not None
        slope = (weight * self._loss.slope(target, scores)) @ features
        return slope, float(weight @ self._loss.value(target, scores))

    def _squared_test(self, fold: Fold, x: Array) -> tuple[float, Array]:
        left = fold.target - (self._features @ x + (fold.target_mean - fold.mean @ x))
        weighted = -2.0 * fold.test * left
        return float(fold.test @ left**2), weighted @ self._features - np.sum(weighted) * fold.mean

    def _weighted(self, fold: Fold) -> tuple[Array, Array]:
        """Rows whose plain squared error, over twice their number, is the training loss."""
        used = fold.train > 0
        root = np.sqrt(fold.train[used] * np.count_nonzero(used))
        rows = root[:, None] * (self._features[used] - fold.mean)
        return np.asfortranarray(rows), root * (fold.target[used] - fold.target_mean)


def _on_support(fold: Fold, penalty: _Penalty, support: NDArray[np.intp]) -> Array:
    """The Hessian there, with the least curvature that the models have."""
    floor = np.finfo(np.float64).eps ** (2 / 3)
    matrix: Array = fold.gram[np.ix_(support, support)]
    return matrix + np.diag(penalty.squared[support] + floor)


def _polished(fold: Fold, penalty: _Penalty, x: Array) -> tuple[Array, float, bool]:
    """The minimiser with the signs of x, what it leaves of its equation, and whether it is one.

    Coordinate descent finds the support long before the coefficients, which are then the
    solution of a linear system.
    """
    support = np.flatnonzero(x)
    signs = np.sign(x[support])
    moved = np.zeros_like(x)
    if len(support):
        rhs = fold.moment[support] - penalty.absolute[support] * signs
        matrix = _on_support(fold, penalty, support)
        moved[support] = scipy.linalg.solve(matrix, rhs, assume_a="pos")
    slope = fold.gram @ moved - fold.moment
    slack = EXACT * float(np.linalg.norm(fold.moment))
    outside = np.ones(len(x), bool)
    outside[support] = False
    excess = np.abs(slope[outside]) - penalty.absolute[outside]
    kept = bool((np.sign(moved[support]) == signs).all())
    residual = max(float(excess.max(initial=0.0)), 0.0)
    if kept and residual <= slack:
        return moved, residual, True
    return x, float(np.linalg.norm(moved - x)), False


def _length(
    objective: Callable[[Array], float], x: Array, step: Array, value: float, slope: float
) -> float:
    """Armijo's step length by halving; 0 where no decrease is left."""
    length = 1.0
    slack = 10 * np.finfo(np.float64).eps * abs(value)
    for _ in range(HALVINGS):
        if objective(x - length * step) <= value - 1e-4 * length * slope + slack:
            return length if np.linalg.norm(length * step) > 1e-15 * np.linalg.norm(x) else 0.0
        length *= 0.5
    return 0.0


def _loss(model: object) -> _Loss | None:
    """The losses that Newton's method is for."""
    if isinstance(model, LogisticModel):
        return _Loss(
            lambda y, f: np.logaddexp(0.0, f) - y * f,
            lambda y, f: expit(f) - y,
            lambda _, f: expit(f) * expit(-f),
        )
    if isinstance(model, SquaredHingeModel):
        return _Loss(
            lambda y, f: np.maximum(0.0, 1.0 - y * f) ** 2,
            lambda y, f: -2.0 * y * np.maximum(0.0, 1.0 - y * f),
            lambda y, f: 2.0 * (y * f < 1.0),
        )
    if isinstance(model, SquaredInsensitiveModel):
        width = model.epsilon
        return _Loss(
            lambda y, f: np.maximum(0.0, np.abs(y - f) - width) ** 2,
            lambda y, f: 2.0 * np.sign(f - y) * np.maximum(0.0, np.abs(y - f) - width),
            lambda y, f: 2.0 * (np.abs(y - f) > width),
        )
    return None
