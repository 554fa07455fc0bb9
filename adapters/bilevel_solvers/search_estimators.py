"""Supported: which scikit-learn estimators `BilevelSearch` can tune, and how they are set up."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.base import clone, is_classifier
from sklearn.linear_model import ElasticNet, Lasso, LogisticRegression, Ridge
from sklearn.svm import LinearSVC, LinearSVR
from sklearn.utils.class_weight import compute_sample_weight

from bilevel_solvers.search_folds import FoldData, Intercept, Split
from bilevel_solvers.search_models import (
    ElasticNetModel,
    LinearModel,
    LogisticModel,
    MultinomialModel,
    RidgeModel,
    SquaredHingeModel,
    SquaredInsensitiveModel,
)

DENSE_SIZE = 256
"""Above so many unknowns Newton's systems are solved by conjugate gradients."""

NAMES: dict[type, tuple[str, ...]] = {
    Ridge: ("alpha",),
    Lasso: ("alpha",),
    ElasticNet: ("alpha", "l1_ratio"),
    LogisticRegression: ("C",),
    LinearSVC: ("C",),
    LinearSVR: ("C",),
}
"""The continuous hyperparameters of each estimator, the one of the penalty's strength first."""

Condition = tuple[str, Callable[[Any], bool], str]
"""A parameter, what its value has to satisfy, and what to write instead."""

_UNCONSTRAINED: Condition = ("positive", lambda value: not value, "positive=False")

CONDITIONS: dict[type, tuple[Condition, ...]] = {
    Ridge: (_UNCONSTRAINED,),
    Lasso: (_UNCONSTRAINED,),
    ElasticNet: (_UNCONSTRAINED,),
    LogisticRegression: (
        ("penalty", lambda value: value in {"l2", "deprecated"}, "the default, squared l2"),
        ("l1_ratio", lambda value: value in {None, 0}, "l1_ratio=0"),
        (
            "solver",
            lambda value: value != "liblinear",
            "solver='lbfgs' (liblinear penalises the intercept)",
        ),
    ),
    LinearSVC: (
        ("penalty", lambda value: value == "l2", "penalty='l2'"),
        ("loss", lambda value: value == "squared_hinge", "loss='squared_hinge'"),
        ("multi_class", lambda value: value == "ovr", "multi_class='ovr'"),
    ),
    LinearSVR: (
        (
            "loss",
            lambda value: value == "squared_epsilon_insensitive",
            "loss='squared_epsilon_insensitive' (the other has no derivative)",
        ),
    ),
}
"""What an estimator must be set to, for the inner problem here to be its own."""


def require_supported(estimator: object) -> None:
    """Refuse what cannot be searched.

    **Raises:** `TypeError` for another estimator, `ValueError` for settings of it under
    which it minimises something else than the models here.
    """
    kind = type(estimator)
    if kind not in NAMES:
        known = ", ".join(sorted(known.__name__ for known in NAMES))
        hint = ""
        if hasattr(estimator, "steps"):
            hint = " Put the search into the pipeline, as its last step, instead."
        msg = (
            f"BilevelSearch: estimator must be one of {known}, got {kind.__name__}, whose inner "
            f"problem is not known.{hint} Any other needs a search without derivatives, such as "
            "GridSearchCV."
        )
        raise TypeError(msg)
    given: Any = estimator
    for name, holds, instead in CONDITIONS[kind]:
        value = getattr(given, name, None)
        if not holds(value):
            msg = (
                f"BilevelSearch: {kind.__name__}({name}={value!r}) cannot be searched by "
                f"derivatives. Use {instead}."
            )
            raise ValueError(msg)
    if kind is LinearSVC or kind is LinearSVR:
        scaling = given.intercept_scaling
        if given.fit_intercept and not scaling > 0:
            msg = f"BilevelSearch: intercept_scaling must be positive, got {scaling!r}."
            raise ValueError(msg)


@dataclasses.dataclass(frozen=True)
class Prepared:
    """An estimator's inner problems on given data.

    - `model`, `data`: the problems, and the arrays in them.
    - `outputs`: classes of a multinomial model, else 0.
    """

    model: LinearModel
    data: FoldData
    outputs: int

    @property
    def start(self) -> NDArray[Any]:
        """Zeros for each inner problem."""
        width = self.data.shared.features.shape[1]
        shape = (len(self.data.folds.total), *self.model.shape(width, self.outputs))
        return np.zeros(shape, self.data.shared.features.dtype)


def prepare(
    estimator: Any,
    X: NDArray[Any],
    y: NDArray[Any],
    classes: NDArray[Any] | None,
    splits: Sequence[Split],
    sample_weight: NDArray[Any] | None,
    *,
    relative: bool,
) -> Prepared:
    """The inner problems of an estimator.

    **Arguments:**

    - `y`: targets, or numbers of the classes.
    - `classes`: labels of the classes, `None` for a regressor.
    - `relative`: whether the test loss of a regressor is over the variance of a fold's own
        targets, hence 1 - R², rather than that of all.

    **Raises:** `ValueError` for a fold whose training samples lack a class.
    """
    count = 0 if classes is None else len(classes)
    multinomial = isinstance(estimator, LogisticRegression) and count > 2
    width = X.shape[1] + int(estimator.fit_intercept)
    unknowns = width * (count - 1) if multinomial else width
    krylov = unknowns > DENSE_SIZE
    model: LinearModel
    match estimator:
        case Ridge():
            model = RidgeModel()
        case ElasticNet():  # and Lasso, which derives from it
            model = ElasticNetModel()
        case LogisticRegression():
            model = MultinomialModel(krylov) if multinomial else LogisticModel(krylov)
        case LinearSVC():
            model = SquaredHingeModel(krylov)
        case _:
            model = SquaredInsensitiveModel(krylov, float(estimator.epsilon))
    penalised = isinstance(estimator, LinearSVC | LinearSVR)
    kind = "none" if not estimator.fit_intercept else "penalised" if penalised else "free"
    intercept = Intercept(kind, float(estimator.intercept_scaling) if penalised else 1.0)
    if classes is not None:
        _require_classes(y, classes, splits)
    outputs = count if multinomial else 0
    data = FoldData.create(
        X,
        _targets(estimator, y, count).astype(X.dtype),
        splits,
        [_weights(estimator, y, classes, train, sample_weight) for train, _ in splits],
        model,
        intercept,
        outputs,
        [
            1.0 if classes is not None else _variance(y, test if relative else None)
            for _, test in splits
        ],
    )
    return Prepared(model, data, outputs)


def _variance(y: NDArray[Any], samples: NDArray[np.int64] | None) -> float:
    """Of some targets, or of all where those do not vary; 1 where none do."""
    for part in (y if samples is None else y[samples], y):
        variance = float(np.var(part))
        if variance > 0:
            return variance
    return 1.0


def _targets(estimator: Any, y: NDArray[Any], count: int) -> NDArray[Any]:
    """A column for each inner problem of a fold."""
    if not isinstance(estimator, LinearSVC):
        return y[:, None]
    positive = y[:, None] == (np.arange(count) if count > 2 else np.array([1]))
    return np.where(positive, 1.0, -1.0)


def _weights(
    estimator: Any,
    y: NDArray[Any],
    classes: NDArray[Any] | None,
    train: NDArray[np.int64],
    sample_weight: NDArray[Any] | None,
) -> NDArray[Any]:
    weight = np.ones(len(y)) if sample_weight is None else np.asarray(sample_weight, np.float64)
    given = getattr(estimator, "class_weight", None)
    if given is None or classes is None:
        return weight
    each = np.zeros(len(y))
    labels = classes[y]
    each[train] = compute_sample_weight(given, labels[train])
    return weight * each


def _require_classes(y: NDArray[Any], classes: NDArray[Any], splits: Sequence[Split]) -> None:
    for number, (train, _) in enumerate(splits):
        missing = np.setdiff1d(np.arange(len(classes)), y[train])
        if len(missing):
            msg = (
                f"BilevelSearch: the training samples of fold {number} have no sample of class "
                f"{classes[missing[0]]}, so its coefficients have no minimiser. Use stratified "
                "folds, fewer of them, or drop classes with so few samples."
            )
            raise ValueError(msg)


def copy_of(estimator: Any) -> Any:
    """A clone, of a type that is not known before."""
    return clone(estimator)


def fitted(
    estimator: Any,
    coef: NDArray[Any],
    intercept: NDArray[Any],
    classes: NDArray[Any] | None,
) -> Any:
    """A clone of an estimator with coefficients found elsewhere, ready to predict."""
    shell = copy_of(estimator)
    single = isinstance(estimator, Ridge | Lasso | ElasticNet)
    shell.coef_ = coef[0] if single else coef
    # scikit-learn's own intercepts: a number, or one for each output.
    shell.intercept_ = float(intercept[0]) if single else intercept
    if isinstance(estimator, LinearSVR):
        shell.coef_ = coef[0]
    shell.n_features_in_ = coef.shape[1]
    shell.n_iter_ = 0
    if is_classifier(estimator):
        shell.classes_ = classes
    return shell


def refit_scaled(
    estimator: Any,
    strength: str,
    values: NDArray[Any],
    X: NDArray[Any],
    y: NDArray[Any],
    sample_weight: NDArray[Any] | None,
) -> Any:
    """Fit an estimator with a penalty for each feature, by scaling the features.

    With one strength s for all and features x_j t_j the coefficients are w_j / t_j: an l2
    penalty α_j w_j² needs t_j = √(s / α_j), w_j² / C_j needs √(C_j / s), α_j |w_j| needs
    s / α_j.
    """
    common = float(np.exp(np.mean(np.log(values))))
    ratio = values / common if strength == "C" else common / values
    scale = ratio if isinstance(estimator, Lasso) else np.sqrt(ratio)
    chosen = copy_of(estimator).set_params(**{strength: common})
    weight = {} if sample_weight is None else {"sample_weight": sample_weight}
    chosen.fit(X * scale, y, **weight)
    chosen.coef_ = chosen.coef_ * scale
    return chosen
