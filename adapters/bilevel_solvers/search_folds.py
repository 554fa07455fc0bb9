"""FoldData: training samples as arrays for the models, and their coefficients as scikit-learn's."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.linalg
from jaxtyping import Float
from numpy.typing import NDArray

from bilevel_solvers.search_models import Fold, LinearModel, MultinomialModel, Shared

GRAM_SIZE = 1500
"""Above so many features no Gram matrix is made."""

Split = tuple[NDArray[np.int64], NDArray[np.int64]]
"""Training and test samples, by number; a number that comes twice counts twice."""


@dataclasses.dataclass(frozen=True)
class Intercept:
    """What becomes of an intercept.

    - `kind`: "none", "free" (without a penalty) or "penalised" (as liblinear does).
    - `scaling`: the value of the feature whose coefficient a penalised one is.
    """

    kind: str
    scaling: float = 1.0


@dataclasses.dataclass(frozen=True)
class FoldData:
    """Everything that an inner solve needs, in NumPy, and the way back.

    - `shared`, `folds`: what the models take; the folds along the first axis, a fold's
        classes next to each other where a model has one problem a class.
    - `centre`: what was subtracted from each feature.
    - `intercept`: which kind.
    - `splits`: how many folds.
    """

    shared: Shared
    folds: Fold
    centre: Float[NDArray[Any], " d"]
    intercept: Intercept
    splits: int

    @classmethod
    def create(
        cls,
        X: NDArray[Any],
        targets: NDArray[Any],
        splits: Sequence[Split],
        train_weight: Sequence[NDArray[Any]],
        model: LinearModel,
        intercept: Intercept,
        outputs: int,
        units: Sequence[float],
    ) -> "FoldData":
        """Standardise, split and weigh.

        **Arguments:**

        - `X`: (n, p) features, of a floating dtype, which becomes that of everything.
        - `targets`: (n, problems), a column for each inner problem of a fold.
        - `splits`: the folds.
        - `train_weight`: a weight (n,) for each fold, read at its training samples.
        - `outputs`: classes of the multinomial model.
        - `units`: what each fold's test loss is divided by.
        """
        dtype = X.dtype
        centred = intercept.kind == "free"
        centre, scale = _standardisation(X, centred=centred, level=model.iterative)
        features = (X - centre) / scale
        if intercept.kind != "none" and not model.squared:
            free = intercept.kind == "free"
            column = np.full((len(X), 1), 1.0 if free else intercept.scaling, dtype)
            features = np.hstack([features, column])
            scale = np.append(scale, np.inf if free else 1.0)
        basis = np.zeros((outputs, max(outputs - 1, 0)), dtype)
        if isinstance(model, MultinomialModel):
            basis = scipy.linalg.helmert(outputs).T
        shared = Shared(features, scale.astype(dtype), basis.astype(dtype))
        folds = [
            _fold(features, target, split, weight, model, intercept, unit)
            for split, weight, unit in zip(splits, train_weight, units, strict=True)
            for target in targets.T
        ]
        stacked = Fold(*(np.stack(part).astype(dtype) for part in zip(*folds, strict=True)))
        return cls(shared, stacked, centre, intercept, len(splits))

    def coefficients(self, x: NDArray[Any], model: LinearModel) -> list[tuple[Any, Any]]:
        """Coefficients (outputs, p) and intercepts (outputs,) of each fold, in X's own units."""
        features = len(self.centre)
        x = np.asarray(x, np.float64)
        if isinstance(model, MultinomialModel):
            every = np.einsum("sdk,ck->scd", x, self.shared.outputs)
        else:
            every = x.reshape(self.splits, -1, x.shape[1])
        coef = every[:, :, :features] / self.shared.scale[:features]
        shift = coef @ self.centre
        if model.squared:
            means = self.folds.target_mean.reshape(self.splits, -1)
            inner = np.einsum("scd,sd->sc", every, self.folds.mean[:: coef.shape[1]])
            constant = means - inner
        elif self.intercept.kind == "none":
            constant = np.zeros(coef.shape[:2])
        else:
            constant = every[:, :, features]
            if self.intercept.kind == "penalised":
                constant = constant * self.intercept.scaling
        return list(zip(coef, constant - shift, strict=True))


def _standardisation(
    X: NDArray[Any], *, centred: bool, level: bool
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Centre and scale of each feature; the scale of one that does not vary is 1.

    **Arguments:**

    - `level`: whether features that vary less than most keep a part of that. Their penalty
        would rule their part of the Hessian, and a Krylov method's iterations with it.
    """
    centre = X.mean(0) if centred else np.zeros(X.shape[1], X.dtype)
    spread = np.sqrt(np.mean((X - centre) ** 2, axis=0))
    # A column of one number keeps what rounding left of it.
    rounding = 10 * np.finfo(X.dtype).eps * np.abs(X).max(axis=0, initial=0.0)
    varies = spread > rounding
    scale = np.where(varies, spread, 1.0)
    if level and varies.any():
        scale = np.where(varies, np.hypot(spread, np.median(spread[varies])), 1.0)
    return centre, scale.astype(X.dtype)


def _fold(
    features: NDArray[Any],
    target: NDArray[Any],
    split: Split,
    weight: NDArray[Any],
    model: LinearModel,
    intercept: Intercept,
    unit: float,
) -> Fold:
    samples, width = features.shape
    train = np.bincount(split[0], minlength=samples) * weight
    test = np.bincount(split[1], minlength=samples).astype(np.float64)
    total = train.sum()
    train = train / total
    test = test / (test.sum() * unit)
    mean, target_mean = np.zeros(width), 0.0
    gram, moment, largest = np.zeros((0, 0)), np.zeros(0), 1.0
    if model.squared:
        if intercept.kind == "free":
            mean, target_mean = train @ features, train @ target
        rows = np.sqrt(train)[:, None] * (features - mean)
        moment = (np.sqrt(train) * (target - target_mean)) @ rows
        small = rows @ rows.T if width > samples else rows.T @ rows
        largest = float(np.linalg.eigvalsh(small)[-1])
        # Rounding must not make the step of a proximal gradient method too long.
        largest = 1.001 * largest if largest > 0 else 1.0
        if width <= GRAM_SIZE:
            gram = rows.T @ rows
    return Fold(
        *map(
            np.asarray,
            (train, test, target, total, mean, target_mean, gram, moment, largest),
        )
    )
