"""BilevelSearch: continuous hyperparameters of linear models, by hypergradients."""

import numbers
import time
from collections.abc import Callable
from typing import Any, Self

import jax
import numpy as np
from numpy.typing import ArrayLike, NDArray

try:
    from sklearn import config_context
    from sklearn.base import BaseEstimator, MetaEstimatorMixin, is_classifier
    from sklearn.linear_model import ElasticNet
    from sklearn.metrics import check_scoring
    from sklearn.model_selection import check_cv
    from sklearn.preprocessing import LabelEncoder
    from sklearn.utils import Tags, get_tags
    from sklearn.utils.metaestimators import available_if
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import (
        _check_sample_weight,  # pyright: ignore[reportPrivateUsage]
        check_is_fitted,
        validate_data,
    )
except ImportError as error:
    _MISSING = "BilevelSearch needs scikit-learn 1.6 or newer: pip install 'scikit-learn>=1.6'"
    raise ImportError(_MISSING) from error

from bilevel.outer.task import check_parts
from bilevel_solvers.search_estimators import (
    NAMES,
    Prepared,
    copy_of,
    fitted,
    prepare,
    refit_scaled,
    require_supported,
)
from bilevel_solvers.search_host import known, suits
from bilevel_solvers.search_path import SearchPath, Step
from bilevel_solvers.search_space import SearchSpace, search_space

# What a type checker makes of scikit-learn's sources is wrong in these.
_VALIDATE: Any = validate_data
_CHECK_CV: Any = check_cv
_CHECK_SCORING: Any = check_scoring

SMOOTH = {"r2", "neg_mean_squared_error", "neg_log_loss"}
"""Scores that are the loss itself, or as good as."""


def _refitted(name: str) -> Callable[[Any], bool]:
    """Whether the estimator that was searched has such a method."""

    def check(search: Any) -> bool:
        getattr(getattr(search, "best_estimator_", search.estimator), name)
        return True

    return check


class BilevelSearch(MetaEstimatorMixin, BaseEstimator):
    """Cross-validated search of alpha, l1_ratio or C, one a model or one a feature.

    In the place of `GridSearchCV`, for linear models: the loss of the cross-validation is
    a function of the hyperparameters with a derivative, the hypergradient through the
    fits of all folds. The strength of the penalty is scanned from much to little, then
    SciPy's L-BFGS-B goes down from the best one.  All folds are solved at once, each fit
    starts at the one before, and one program, compiled once, serves every step and every
    further search of data of the same shape.

    **Which loss.**  The derivative is that of a smooth one: the logarithmic loss for
    logistic regression, the squared hinge for `LinearSVC`, the squared error for
    regression (over the variance of each fold where scoring is r2, the default, so that
    it is 1 - r2).  The scorer that was asked for judges every step, and the step that it
    finds best is the one that is kept, not the last.

    **Arguments:**

    - `estimator`: `Ridge`, `Lasso`, `ElasticNet`, `LogisticRegression` with a squared
        penalty, two classes or more, `LinearSVC` (squared hinge), or `LinearSVR` with the
        squared loss. What it is set to is one of the steps, too.
    - `hyperparameters`: names out of alpha, l1_ratio, C, or a mapping from names to (low,
        high) or `None`; all that the estimator has by default, in bounds found from the
        scale of the data.
    - `cv`: folds, as for `GridSearchCV`.
    - `scoring`: one scorer, by name or a callable; the estimator's own by default.
    - `per_feature`: whether each feature has a penalty of its own. `best_params_` then
        holds an array, and `best_estimator_` was fitted on scaled features, and its
        coefficients scaled back: an estimator of scikit-learn takes one number alone. Not
        for `ElasticNet`, whose two penalties scale differently.
    - `scan`: how many strengths are tried before the descent.
    - `max_iter`: most evaluations of the descent.
    - `polish`: most steps that go after the score itself, with a common factor to the
        strength, where the score is not the smooth loss: an accuracy has no derivative.
    - `tol`: the descent ends where a step lowers the loss by less than this part, or the gradient
        is a thousandth of the first. In single precision not below 6e-6.
    - `controller`: of progressive refinement, to move the budgets of the inner solves
        during the descent, such as `bl.ErrorControlled(bl.Ladder.tolerances())`.
    - `engine`: "jax" solves the inner problems by the solvers of `bilevel`, in one program
        for all folds; "numpy" by factorisations, and for l1 penalties scikit-learn's
        coordinate descent, to the same equations, exactly. "auto" takes the latter where
        all of the search is less work than compiling a program.
    - `refit`: whether `best_estimator_` is fitted on all samples.

    **After `fit`:**

    - `best_params_`, `best_score_`, `best_index_`, `best_estimator_`, `refit_time_`,
        `scorer_`, `n_splits_`, `n_features_in_`, `feature_names_in_`, `classes_`: as of
        `GridSearchCV`.
    - `cv_results_`: a row a step: params, param_*, split*_test_score, mean_test_score,
        std_test_score, rank_test_score as of `GridSearchCV`, and loss, gradient_norm,
        gradient_error, inner_iterations, seconds, stage.
    - `bounds_`: where it searched. `engine_`: which one did. `n_iter_`: steps. `message_`:
        why the descent stopped.

    **Raises:** on `fit`, `TypeError` for another estimator and for sparse X (`toarray()`
    it), `ValueError` for settings under which an estimator minimises something else, and
    for a fold whose training samples lack a class.

    Precision is that of JAX: without `jax_enable_x64`, X of float64 is searched in float32.

    **Source:** Pedregosa, Hyperparameter optimization with approximate gradient, ICML 2016;
    for l1 penalties Bertrand et al., Implicit differentiation for fast hyperparameter
    selection in non-smooth convex learning, JMLR 2022.

    >>> import numpy as np
    >>> from sklearn.linear_model import Ridge
    >>> random = np.random.default_rng(0)
    >>> X = random.normal(size=(40, 5))
    >>> y = X @ [1.0, -1.0, 0.5, 0.0, 0.0] + 0.1 * random.normal(size=40)
    >>> search = BilevelSearch(Ridge(), scan=4).fit(X, y)
    >>> sorted(search.best_params_), bool(search.best_score_ > 0.9)
    (['alpha'], True)
    """

    def __init__(
        self,
        estimator: Any,
        *,
        hyperparameters: Any = None,
        cv: Any = None,
        scoring: Any = None,
        per_feature: bool = False,
        scan: int = 8,
        max_iter: int = 30,
        polish: int = 12,
        tol: float = 1e-8,
        controller: Any = None,
        engine: str = "auto",
        refit: bool = True,
    ):
        self.estimator = estimator
        self.hyperparameters = hyperparameters
        self.cv = cv
        self.scoring = scoring
        self.per_feature = per_feature
        self.scan = scan
        self.max_iter = max_iter
        self.polish = polish
        self.tol = tol
        self.controller = controller
        self.engine = engine
        self.refit = refit

    def fit(
        self,
        X: ArrayLike,
        y: ArrayLike,
        *,
        sample_weight: ArrayLike | None = None,
        groups: ArrayLike | None = None,
    ) -> Self:
        """Search, and fit the best.

        **Arguments:**

        - `X`: (n, p) features, dense; `y`: (n,) targets or labels.
        - `sample_weight`: (n,) weights of the samples in the fits; the test samples of a fold
            all count the same, as for `GridSearchCV`.
        - `groups`: (n,) for folds that keep groups together.

        **Raises:** see the class.
        """
        self._require_settings()
        require_supported(self.estimator)
        features, targets, labels, weight = self._validated(X, y, sample_weight)
        folds = _CHECK_CV(self.cv, targets, classifier=is_classifier(self.estimator))
        splits = [
            (_numbers(train), _numbers(test))
            for train, test in folds.split(features, targets, groups)
        ]
        self.scorer_: Any = _CHECK_SCORING(self.estimator, scoring=self.scoring)
        prepared = prepare(
            self.estimator,
            features,
            targets if labels is None else labels,
            None if labels is None else self.classes_,
            splits,
            weight,
            relative=self.scoring is None or self.scoring == "r2",
        )
        space = search_space(
            self.estimator,
            NAMES[type(self.estimator)],
            self.hyperparameters,
            prepared.model,
            prepared.data,
            per_feature=self.per_feature,
        )

        def score(x: NDArray[Any]) -> NDArray[np.float64]:
            models = self._models(prepared, x)
            # The samples were looked at once.
            with config_context(assume_finite=True, skip_parameter_validation=True):
                return np.array(
                    [
                        self.scorer_(model, features[test], targets[test])
                        for model, (_, test) in zip(models, splits, strict=True)
                    ],
                    np.float64,
                )

        self.engine_ = self._engine(prepared)
        path = SearchPath(prepared, space, score, self.controller, host=self.engine_ == "numpy")
        smooth = self.scoring in SMOOTH or (self.scoring is None and labels is None)
        tolerance = self._tolerance(features.dtype)
        path.run(self.scan, self.max_iter, tolerance, 0 if smooth else self.polish)
        self.n_splits_ = len(splits)
        self._record(path, space)
        if self.refit:
            began = time.perf_counter()
            self.best_estimator_ = self._best(space, features, targets, weight)
            self.refit_time_ = time.perf_counter() - began
        return self

    @available_if(_refitted("predict"))
    def predict(self, X: ArrayLike) -> NDArray[Any]:
        """Predictions of the best estimator."""
        return self._call("predict", X)

    @available_if(_refitted("predict_proba"))
    def predict_proba(self, X: ArrayLike) -> NDArray[Any]:
        """Probabilities of the classes, by the best estimator."""
        return self._call("predict_proba", X)

    @available_if(_refitted("predict_log_proba"))
    def predict_log_proba(self, X: ArrayLike) -> NDArray[Any]:
        """Their logarithms."""
        return self._call("predict_log_proba", X)

    @available_if(_refitted("decision_function"))
    def decision_function(self, X: ArrayLike) -> NDArray[Any]:
        """Scores of the classes, by the best estimator."""
        return self._call("decision_function", X)

    def score(self, X: ArrayLike, y: ArrayLike) -> float:
        """The score of the best estimator, by the scorer of the search."""
        model, features = self._ready(X)
        return float(self.scorer_(model, features, y))

    def __sklearn_tags__(self) -> Tags:
        """What kind of estimator it is: the kind that it searches; dense data only."""
        tags = super().__sklearn_tags__()
        inner = get_tags(self.estimator)
        tags.estimator_type = inner.estimator_type
        tags.classifier_tags = inner.classifier_tags
        tags.regressor_tags = inner.regressor_tags
        tags.target_tags.required = True
        tags.input_tags.sparse = False
        return tags

    def _require_settings(self) -> None:
        for name, least in (("scan", 0), ("max_iter", 0), ("polish", 0)):
            value = getattr(self, name)
            if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < least:
                msg = f"BilevelSearch: {name} must be a whole number >= {least}, got {value!r}."
                raise ValueError(msg)
        if not isinstance(self.tol, numbers.Real) or not 0 < float(self.tol) < 1:
            msg = f"BilevelSearch: tol must be between 0 and 1, got {self.tol!r}."
            raise ValueError(msg)
        if not (self.scoring is None or isinstance(self.scoring, str) or callable(self.scoring)):
            msg = (
                "BilevelSearch: scoring must be one scorer, by name or a callable, got "
                f"{self.scoring!r}. Several cannot decide which step is best."
            )
            raise ValueError(msg)
        parts = ("init", "update", "fidelity")
        if self.controller is not None:
            check_parts("BilevelSearch", "controller", self.controller, parts, "a controller")
        if self.engine not in {"auto", "jax", "numpy"}:
            msg = f"BilevelSearch: engine must be 'auto', 'jax' or 'numpy', got {self.engine!r}."
            raise ValueError(msg)
        if self.per_feature and type(self.estimator) is ElasticNet:
            msg = (
                "BilevelSearch: per_feature=True is not for ElasticNet, whose fit with one penalty "
                "a feature scikit-learn cannot express. Use Lasso or Ridge."
            )
            raise ValueError(msg)

    def _validated(
        self, X: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None
    ) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any] | None, NDArray[Any] | None]:
        """Features, targets, numbers of the classes, and weights."""
        classifier = is_classifier(self.estimator)
        features, targets = _VALIDATE(
            self, X, y, dtype=[np.float64, np.float32], y_numeric=not classifier
        )
        weight = None
        if sample_weight is not None:
            weight = _check_sample_weight(
                sample_weight, features, dtype=np.float64, ensure_non_negative=True
            )
        if not classifier:
            return features, targets, None, weight
        check_classification_targets(targets)
        encoder = LabelEncoder().fit(targets)
        self.classes_: Any = encoder.classes_
        if len(self.classes_) < 2:
            msg = (
                "BilevelSearch: a classifier needs samples of at least two classes, got one class, "
                f"{self.classes_[0]}."
            )
            raise ValueError(msg)
        return features, targets, encoder.transform(targets), weight

    def _engine(self, prepared: Prepared) -> str:
        if self.engine == "auto":
            return "numpy" if self.controller is None and suits(prepared) else "jax"
        if self.engine == "numpy" and (self.controller is not None or not known(prepared)):
            msg = (
                "BilevelSearch: engine='numpy' has no budgets, hence no controller, and neither "
                "the multinomial model nor many features. Use engine='jax' or 'auto'."
            )
            raise ValueError(msg)
        return self.engine

    def _tolerance(self, dtype: np.dtype[Any]) -> float:
        reached = np.dtype(np.float64)
        if self.engine_ == "jax":
            reached = jax.dtypes.canonicalize_dtype(dtype)
        return max(float(self.tol), 50 * float(np.finfo(reached).eps))

    def _models(self, prepared: Prepared, x: NDArray[Any]) -> list[Any]:
        """A fitted estimator for each fold."""
        classes = getattr(self, "classes_", None)
        return [
            fitted(self.estimator, coef, intercept, classes)
            for coef, intercept in prepared.data.coefficients(x, prepared.model)
        ]

    def _record(self, path: SearchPath, space: SearchSpace) -> None:
        steps = path.steps
        self.best_index_ = path.best()
        self.cv_results_ = _results(steps, space)
        self.best_params_ = self.cv_results_["params"][self.best_index_]
        self.best_score_ = float(self.cv_results_["mean_test_score"][self.best_index_])
        self.bounds_ = {name: space.bounds[name] for name in space.names}
        self.n_iter_ = len(steps)
        self.message_ = path.message

    def _best(
        self,
        space: SearchSpace,
        features: NDArray[Any],
        targets: NDArray[Any],
        weight: NDArray[Any] | None,
    ) -> Any:
        """The estimator with the best hyperparameters, fitted on all samples."""
        if space.size > 1:
            values = np.asarray(self.best_params_[space.strength])
            return refit_scaled(self.estimator, space.strength, values, features, targets, weight)
        keywords = {} if weight is None else {"sample_weight": weight}
        chosen = copy_of(self.estimator).set_params(**self.best_params_)
        return chosen.fit(features, targets, **keywords)

    def _ready(self, X: ArrayLike) -> tuple[Any, NDArray[Any]]:
        check_is_fitted(self, "cv_results_")
        if not hasattr(self, "best_estimator_"):
            msg = "BilevelSearch: nothing was fitted on all samples. Use refit=True."
            raise AttributeError(msg)
        return self.best_estimator_, _VALIDATE(self, X, reset=False, dtype=[np.float64, np.float32])

    def _call(self, name: str, X: ArrayLike) -> NDArray[Any]:
        model, features = self._ready(X)
        return getattr(model, name)(features)


def _results(steps: list[Step], space: SearchSpace) -> dict[str, Any]:
    """A column for everything that is known of each step."""
    results: dict[str, Any] = {
        "params": [{name: step.values[name] for name in space.names} for step in steps]
    }
    for name in space.names:
        results[f"param_{name}"] = np.array([step.values[name] for step in steps])
    scores = np.array([step.scores for step in steps])
    for split in range(scores.shape[1]):
        results[f"split{split}_test_score"] = scores[:, split]
    means = scores.mean(axis=1)
    results["mean_test_score"] = means
    results["std_test_score"] = scores.std(axis=1)
    usable = np.where(np.isnan(means), -np.inf, means)
    results["rank_test_score"] = 1 + (usable[None, :] > usable[:, None]).sum(axis=1)
    results["loss"] = np.array([step.loss for step in steps])
    results["gradient_norm"] = np.array([step.gradient_norm for step in steps])
    results["gradient_error"] = np.array([step.error for step in steps])
    results["inner_iterations"] = np.array([step.iterations for step in steps])
    results["seconds"] = np.array([step.seconds for step in steps])
    results["stage"] = np.array([step.stage for step in steps])
    return results


def _numbers(part: Any) -> np.ndarray:
    """Numbers of samples, of a mask too."""
    part = np.asarray(part)
    return np.flatnonzero(part) if part.dtype == bool else part
