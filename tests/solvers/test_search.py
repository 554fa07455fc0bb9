"""BilevelSearch: hyperparameters of linear models by hypergradients."""

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.datasets import load_breast_cancer, load_diabetes, load_iris
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import (
    ElasticNet,
    HuberRegressor,
    Lasso,
    LinearRegression,
    LogisticRegression,
    Ridge,
)
from sklearn.model_selection import (
    GridSearchCV,
    KFold,
    PredefinedSplit,
    cross_val_score,
)
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC, LinearSVR
from sklearn.utils.estimator_checks import check_estimator

import bilevel as bl
from bilevel_solvers import BilevelSearch

SVR = LinearSVR(loss="squared_epsilon_insensitive", epsilon=5.0, tol=1e-8, max_iter=100_000)
TIGHT = {
    "ridge": Ridge(),
    "lasso": Lasso(tol=1e-10, max_iter=100_000),
    "elastic net": ElasticNet(tol=1e-10, max_iter=100_000),
    "logistic": LogisticRegression(tol=1e-10, max_iter=10_000),
    "hinge": LinearSVC(tol=1e-10, max_iter=100_000),
    "insensitive": SVR,
}


def data(name):
    """Small, with features of different scales and centres."""
    if name in {"logistic", "hinge"}:
        X, y = load_breast_cancer(return_X_y=True)
        X = (X - X.mean(0)) / X.std(0)
        return X[:150, :6] * [1, 2, 1, 0.5, 1, 1] + 0.3, np.array(["no", "yes"])[y[:150]]
    X, y = load_diabetes(return_X_y=True)
    return X[:120, :6] * 20 * [1, 2, 1, 0.5, 1, 1] + 0.3, y[:120]


@pytest.mark.parametrize("name", TIGHT)
def test_scores_are_those_of_the_estimator_fitted_by_scikit_learn(name):
    X, y = data(name)
    search = BilevelSearch(TIGHT[name], cv=3, scan=4, max_iter=4, polish=2).fit(X, y)
    assert search.engine_ == "numpy"
    for row in (1, search.best_index_):
        estimator = clone(TIGHT[name]).set_params(**search.cv_results_["params"][row])
        expected = cross_val_score(estimator, X, y, cv=3)
        found = [search.cv_results_[f"split{k}_test_score"][row] for k in range(3)]
        np.testing.assert_allclose(found, expected, rtol=2e-4)
    expected = clone(TIGHT[name]).set_params(**search.best_params_).fit(X, y)
    np.testing.assert_array_equal(search.predict(X), expected.predict(X))
    assert search.best_score_ == search.cv_results_["mean_test_score"].max()
    assert search.cv_results_["rank_test_score"][search.best_index_] == 1


@pytest.mark.parametrize(
    ("name", "scoring"),
    [("ridge", None), ("lasso", "neg_mean_squared_error"), ("logistic", "neg_log_loss")],
)
def test_no_grid_of_thirty_points_is_better_where_the_loss_is_the_score(name, scoring):
    X, y = data(name)
    # Without a penalty to speak of, scikit-learn's logistic regression takes seconds.
    within = {"C": (1e-3, 10.0)} if name == "logistic" else None
    search = BilevelSearch(TIGHT[name], cv=3, scoring=scoring, hyperparameters=within).fit(X, y)
    strength = next(iter(search.best_params_))
    low, high = search.bounds_[strength]
    grid = GridSearchCV(
        TIGHT[name], {strength: np.geomspace(low, high, 30)}, cv=3, scoring=scoring
    ).fit(X, y)
    assert search.best_score_ >= grid.best_score_
    assert low < search.best_params_[strength] < high
    last = search.cv_results_["gradient_norm"][search.cv_results_["stage"] == "descent"]
    assert last[-1] < 0.1 * last[0]


def test_the_score_has_the_last_word_where_it_is_not_the_loss():
    X, y = data("logistic")
    search = BilevelSearch(LogisticRegression(), cv=3, scoring="accuracy").fit(X, y)
    results = search.cv_results_
    assert "polish" in results["stage"]
    assert results["mean_test_score"][search.best_index_] == results["mean_test_score"].max()
    tied = results["mean_test_score"] >= results["mean_test_score"].max() - 1e-12
    assert results["loss"][search.best_index_] == results["loss"][tied].min()


def test_estimator_s_own_setting_is_one_of_the_steps():
    X, y = data("ridge")
    search = BilevelSearch(Ridge(alpha=0.123), cv=3, scan=0, max_iter=0).fit(X, y)
    assert search.cv_results_["params"] == [{"alpha": pytest.approx(0.123)}]
    assert search.message_ == ""


@pytest.mark.parametrize("name", ["ridge", "lasso", "logistic", "hinge"])
def test_per_feature_penalties_fit_better_and_are_refitted_as_such(name):
    X, y = data(name)
    scoring = "neg_log_loss" if name == "logistic" else None
    one = BilevelSearch(TIGHT[name], cv=3, scoring=scoring).fit(X, y)
    each = BilevelSearch(TIGHT[name], cv=3, scoring=scoring, per_feature=True).fit(X, y)
    assert each.cv_results_["loss"].min() < one.cv_results_["loss"].min()
    strength = next(iter(each.best_params_))
    assert each.best_params_[strength].shape == (6,)
    # Fitted on all samples: the gradient of the penalised objective vanishes.
    model, values = each.best_estimator_, each.best_params_[strength]
    coef = np.ravel(model.coef_)
    scores = X @ coef + np.ravel(model.intercept_)
    if name in {"ridge", "lasso"}:
        slope = X.T @ (scores - y)
        if name == "ridge":
            left = slope + values * coef
        else:
            left = np.maximum(0, np.abs(slope / len(X)) - values)
            left[coef != 0] += (slope / len(X) + values * np.sign(coef))[coef != 0]
            slope = slope / len(X)
    elif name == "logistic":
        slope = X.T @ (1 / (1 + np.exp(-scores)) - (y == "yes"))
        left = slope + coef / values
    else:
        sign = np.where(y == "yes", 1.0, -1.0)
        slope = X.T @ (-2 * sign * np.maximum(0, 1 - sign * scores))
        left = slope + coef / values
    np.testing.assert_allclose(left, 0, atol=1e-3 * np.abs(slope).max() + 1e-9)


def test_elastic_net_finds_both():
    X, y = data("elastic net")
    search = BilevelSearch(ElasticNet(), cv=3).fit(X, y)
    assert sorted(search.best_params_) == ["alpha", "l1_ratio"]
    fixed = BilevelSearch(ElasticNet(), cv=3, hyperparameters="alpha").fit(X, y)
    assert sorted(fixed.best_params_) == ["alpha"]
    assert fixed.best_estimator_.l1_ratio == 0.5
    assert search.best_score_ >= fixed.best_score_


def test_bounds_are_kept():
    X, y = data("ridge")
    search = BilevelSearch(Ridge(), cv=3, hyperparameters={"alpha": (20.0, 30.0)}).fit(X, y)
    assert search.best_params_["alpha"] == 20.0
    assert search.bounds_ == {"alpha": (20.0, 30.0)}
    every = search.cv_results_["param_alpha"]
    assert (every >= 20).all()
    assert (every <= 30).all()


def test_features_are_weighed_in_their_own_units():
    """What is standardised inside does not change the problem: constant and collinear columns."""
    X, y = data("ridge")
    wide = np.hstack([X, np.full((len(X), 1), 7.0), X[:, :1], 1e4 * X[:, 1:2]])
    for estimator in (Ridge(), TIGHT["lasso"]):
        search = BilevelSearch(estimator, cv=3).fit(wide, y)
        expected = cross_val_score(
            clone(estimator).set_params(**search.best_params_), wide, y, cv=3
        )
        np.testing.assert_allclose(search.best_score_, expected.mean(), rtol=1e-5)


@pytest.mark.parametrize("estimator", [Ridge(), Lasso(max_iter=100_000)])
def test_more_features_than_samples(estimator):
    random = np.random.default_rng(0)
    X = random.normal(size=(30, 60))
    y = X[:, 0] - X[:, 1] + 0.1 * random.normal(size=30)
    search = BilevelSearch(estimator, cv=3).fit(X, y)
    expected = cross_val_score(clone(estimator).set_params(**search.best_params_), X, y, cv=3)
    np.testing.assert_allclose(search.best_score_, expected.mean(), rtol=1e-2)
    assert np.isfinite(search.cv_results_["loss"]).all()


def test_sample_weights_are_those_of_the_fits():
    X, y = data("ridge")
    weight = np.random.default_rng(0).uniform(0.1, 2.0, len(y))
    folds = KFold(3)
    search = BilevelSearch(Ridge(), cv=folds).fit(X, y, sample_weight=weight)
    scores = []
    for train, test in folds.split(X):
        model = Ridge(**search.best_params_).fit(X[train], y[train], sample_weight=weight[train])
        scores.append(model.score(X[test], y[test]))
    np.testing.assert_allclose(search.best_score_, np.mean(scores), rtol=1e-10)


def test_class_weights():
    X, y = data("logistic")
    estimator = LogisticRegression(class_weight="balanced", tol=1e-10, max_iter=1000)
    search = BilevelSearch(estimator, cv=3, scoring="neg_log_loss").fit(X, y)
    chosen = clone(estimator).set_params(**search.best_params_)
    expected = cross_val_score(chosen, X, y, cv=3, scoring="neg_log_loss")
    np.testing.assert_allclose(search.best_score_, expected.mean(), rtol=1e-5)


def test_without_an_intercept():
    X, y = data("ridge")
    for estimator in (Ridge(fit_intercept=False), Lasso(fit_intercept=False, tol=1e-10)):
        search = BilevelSearch(estimator, cv=3).fit(X, y)
        chosen = clone(estimator).set_params(**search.best_params_)
        expected = cross_val_score(chosen, X, y, cv=3)
        np.testing.assert_allclose(search.best_score_, expected.mean(), rtol=1e-6)


def test_any_folds():
    X, y = data("ridge")
    split = PredefinedSplit(np.where(np.arange(len(y)) < 40, 0, -1))
    search = BilevelSearch(Ridge(), cv=split).fit(X, y)
    assert search.n_splits_ == 1
    model = Ridge(**search.best_params_).fit(X[40:], y[40:])
    assert search.best_score_ == pytest.approx(model.score(X[:40], y[:40]))
    # Masks mean what they mean to scikit-learn.
    mask = np.arange(len(y)) < 40
    masked = BilevelSearch(Ridge(), cv=[(~mask, mask)]).fit(X, y)
    assert masked.best_score_ == pytest.approx(search.best_score_)


def test_one_class_in_a_fold_is_named():
    X = np.random.default_rng(0).normal(size=(9, 2))
    y = np.repeat([0, 1, 2], 3)
    with pytest.raises(ValueError, match="fold 0 have no sample of class 0"):
        BilevelSearch(LogisticRegression(), cv=KFold(3)).fit(X, y)


@pytest.mark.parametrize(
    ("estimator", "settings", "error", "words"),
    [
        (HuberRegressor(), {}, TypeError, "must be one of"),
        (LinearRegression(), {}, TypeError, "must be one of"),
        (make_pipeline(StandardScaler(), Ridge()), {}, TypeError, "into the pipeline"),
        (LinearSVR(), {}, ValueError, "squared_epsilon_insensitive"),
        (LogisticRegression(l1_ratio=0.5, solver="saga"), {}, ValueError, "l1_ratio=0"),
        (LogisticRegression(solver="liblinear"), {}, ValueError, "liblinear"),
        (LinearSVC(loss="hinge"), {}, ValueError, "squared_hinge"),
        (Ridge(positive=True), {}, ValueError, "positive=False"),
        (Ridge(alpha=[1.0, 2.0]), {}, TypeError, "one number"),
        (Ridge(), {"hyperparameters": "C"}, ValueError, "can be alpha"),
        (Ridge(), {"hyperparameters": {"alpha": (2.0, 1.0)}}, ValueError, "in order"),
        (Ridge(), {"hyperparameters": {"alpha": (0.0, 1.0)}}, ValueError, "above 0"),
        (Ridge(), {"hyperparameters": {"alpha": 3.0}}, TypeError, "two numbers"),
        (Ridge(), {"hyperparameters": 3}, TypeError, "must be None, names"),
        (ElasticNet(), {"hyperparameters": {"l1_ratio": (0.1, 2.0)}}, ValueError, "at most 1"),
        (ElasticNet(), {"per_feature": True}, ValueError, "not for ElasticNet"),
        (Ridge(), {"scan": -1}, ValueError, "scan must be"),
        (Ridge(), {"tol": 0.0}, ValueError, "tol must be"),
        (Ridge(), {"scoring": ["r2"]}, ValueError, "one scorer"),
        (Ridge(), {"engine": "torch"}, ValueError, "engine must be"),
        (Ridge(), {"controller": 3}, TypeError, "controller should be"),
        (
            Ridge(),
            {"engine": "numpy", "controller": bl.FixedFidelity(bl.Budget(5))},
            ValueError,
            "engine='jax'",
        ),
    ],
)
def test_what_cannot_be_searched_is_refused(estimator, settings, error, words):
    X, y = data("ridge")
    with pytest.raises(error, match=words):
        BilevelSearch(estimator, **settings).fit(
            X, (y > 100) if hasattr(estimator, "classes") else y
        )


def test_sparse_features_are_refused():
    from scipy.sparse import csr_array

    with pytest.raises(TypeError, match="dense data is required"):
        BilevelSearch(Ridge()).fit(csr_array(np.eye(10)), np.arange(10.0))


def test_before_fit_and_without_refit():
    X, y = data("ridge")
    with pytest.raises(NotFittedError):
        BilevelSearch(Ridge()).predict(X)
    search = BilevelSearch(Ridge(), cv=3, refit=False).fit(X, y)
    with pytest.raises(AttributeError, match="refit=True"):
        search.predict(X)
    assert not hasattr(BilevelSearch(Ridge()), "predict_proba")


def test_single_precision_data():
    X, y = data("ridge")
    double = BilevelSearch(Ridge(), cv=3).fit(X, y)
    single = BilevelSearch(Ridge(), cv=3).fit(X.astype(np.float32), y.astype(np.float32))
    assert single.best_score_ == pytest.approx(double.best_score_, rel=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "estimator",
    [
        Ridge(),
        Lasso(),
        ElasticNet(),
        LogisticRegression(),
        LinearSVC(),
        LinearSVR(loss="squared_epsilon_insensitive"),
    ],
)
def test_estimator_checks_of_scikit_learn(estimator):
    expected = {
        "check_sample_weight_equivalence_on_dense_data": (
            "a sample of weight 2 is one sample to the folds and the scorer, two copies are two"
        )
    }
    results = check_estimator(
        BilevelSearch(estimator, cv=2, scan=3, max_iter=3),
        expected_failed_checks=expected,
        on_skip=None,
        on_fail=None,
    )
    assert not [result for result in results if result["status"] == "failed"]
    assert sum(result["status"] == "passed" for result in results) > 50


def test_iris_multinomial_scores_are_those_of_scikit_learn():
    X, y = load_iris(return_X_y=True)
    estimator = LogisticRegression(tol=1e-10, max_iter=10_000)
    search = BilevelSearch(estimator, cv=3, scoring="neg_log_loss").fit(X, y)
    chosen = clone(estimator).set_params(**search.best_params_)
    expected = cross_val_score(chosen, X, y, cv=3, scoring="neg_log_loss")
    np.testing.assert_allclose(search.best_score_, expected.mean(), rtol=1e-4)
    assert search.predict_proba(X).shape == (150, 3)
