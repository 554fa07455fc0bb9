"""Both engines of BilevelSearch: the same loss, the same hypergradient."""

import jax.flatten_util
import numpy as np
import pytest
from scipy.optimize import check_grad
from sklearn.datasets import load_diabetes, load_wine
from sklearn.linear_model import ElasticNet, Lasso, LogisticRegression, Ridge
from sklearn.model_selection import GridSearchCV, KFold, StratifiedKFold
from sklearn.svm import LinearSVC, LinearSVR

import bilevel as bl
from bilevel_solvers import BilevelSearch
from bilevel_solvers.search_estimators import NAMES, prepare
from bilevel_solvers.search_host import host_evaluation
from bilevel_solvers.search_space import search_space
from bilevel_solvers.search_step import evaluate

CASES = {
    "ridge": (Ridge(0.5), False),
    "ridge, per feature": (Ridge(0.5), True),
    "lasso": (Lasso(0.05), False),
    "lasso, per feature": (Lasso(0.05), True),
    "elastic net": (ElasticNet(0.05, l1_ratio=0.7), False),
    "logistic": (LogisticRegression(C=0.3, class_weight="balanced"), False),
    "logistic, per feature": (LogisticRegression(C=0.3, fit_intercept=False), True),
    "hinge": (LinearSVC(C=0.2), False),
    "hinge, per feature": (LinearSVC(C=0.2, intercept_scaling=2.0), True),
    "insensitive": (LinearSVR(C=0.2, epsilon=0.1, loss="squared_epsilon_insensitive"), False),
    "multinomial": (LogisticRegression(C=0.3), False),
    "multinomial, per feature": (LogisticRegression(C=0.3), True),
}


def prepared(name):
    """A case on three folds of 60 samples with weights, and a point to look at."""
    estimator, per_feature = CASES[name]
    X, y = load_wine(return_X_y=True)
    X, y = X[::3, :5], y[::3]
    X = (X / X.std(0)) + 0.2
    classifier = hasattr(estimator, "class_weight")
    if isinstance(estimator, LogisticRegression) and not name.startswith("multinomial"):
        y = (y > 0).astype(int)
    target = y if classifier else X @ [1.0, 0.5, 0.0, 0.0, -1.0] + 0.3 * np.sin(np.arange(len(X)))
    folds = (StratifiedKFold if classifier else KFold)(3)
    weight = np.random.default_rng(0).uniform(0.5, 2.0, len(X))
    problem = prepare(
        estimator, X, target, np.unique(y) if classifier else None,
        list(folds.split(X, target)), weight, relative=True,
    )  # fmt: skip
    names = NAMES[type(estimator)]
    space = search_space(
        estimator, names, None, problem.model, problem.data, per_feature=per_feature
    )
    theta = space.theta(space.own)
    theta[space.strength] = theta[space.strength] + 0.3 * np.sin(np.arange(space.size))
    return problem, theta


def compiled(problem, theta, tolerance=1e-13):
    budget = bl.Budget(100_000, rtol=tolerance)
    return evaluate(
        problem.model, problem.data.shared, problem.data.folds, theta, problem.start, None,
        bl.Fidelity(budget, budget), error=True,
    )  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_gradient_in_numpy_agrees_with_differences(name):
    problem, theta = prepared(name)
    folds = host_evaluation(problem)
    flat, unravel = jax.flatten_util.ravel_pytree(theta)

    def value(flat):
        return float(folds(unravel(flat), problem.start).value)

    def gradient(flat):
        found = folds(unravel(flat), problem.start).gradient
        return np.asarray(jax.flatten_util.ravel_pytree(found)[0])

    flat = np.asarray(flat)
    assert np.linalg.norm(gradient(flat)) > 1e-4
    assert check_grad(value, gradient, flat, epsilon=1e-6) < 1e-5 * (
        1 + np.linalg.norm(gradient(flat))
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "ridge, per feature",
        "elastic net",
        "multinomial",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in CASES
            if name not in {"ridge, per feature", "elastic net", "multinomial"}
        ),
    ],
)
def test_engines_agree(name):
    problem, theta = prepared(name)
    host, device = host_evaluation(problem)(theta, problem.start), compiled(problem, theta)
    np.testing.assert_allclose(host.value, device.value, rtol=1e-9)
    for part, gradient in host.gradient.items():
        np.testing.assert_allclose(gradient, device.gradient[part], rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(host.primal.value, device.primal.value, rtol=1e-6, atol=1e-7)
    assert (np.asarray(host.primal.status) == bl.Status.CONVERGED).all()
    assert (np.asarray(device.primal.status) == bl.Status.CONVERGED).all()
    assert device.error.total < 1e-8


def test_the_compiled_search_finds_the_same_and_compiles_once():
    X, y = load_wine(return_X_y=True)
    X, y = X[:, :4], X[:, 4]
    found = {
        engine: BilevelSearch(Ridge(), cv=3, engine=engine).fit(X, y) for engine in ("jax", "numpy")
    }
    np.testing.assert_allclose(found["jax"].best_score_, found["numpy"].best_score_, rtol=1e-8)
    before = evaluate._cache_size()
    BilevelSearch(Ridge(alpha=3.0), cv=3, engine="jax").fit(X + 1.0, 2 * y)
    assert evaluate._cache_size() == before


@pytest.mark.slow
def test_under_a_controller_every_gradient_is_as_accurate_as_asked():
    X, y = load_diabetes(return_X_y=True)
    controller = bl.ErrorControlled(bl.Ladder.tolerances(1e-1, 0.1, 1e-10, 20_000), eta=0.9)
    full = BilevelSearch(Lasso(), cv=3, engine="jax").fit(X, y)
    refined = BilevelSearch(Lasso(), cv=3, controller=controller).fit(X, y)
    assert refined.engine_ == "jax"
    assert refined.best_score_ == pytest.approx(full.best_score_, rel=1e-4)
    descent = refined.cv_results_["stage"] == "descent"
    error = refined.cv_results_["gradient_error"][descent]
    norm = refined.cv_results_["gradient_norm"][descent]
    # But for steps at the top of the ladder, the error is a tenth of the gradient at most.
    assert (error[:2] <= 0.1 * norm[:2]).all()


@pytest.mark.slow
def test_many_features_are_solved_by_conjugate_gradients():
    random = np.random.default_rng(0)
    X = random.normal(size=(120, 300))
    y = (X[:, 0] + 0.5 * random.normal(size=120) > 0).astype(int)
    estimator = LogisticRegression(tol=1e-8, max_iter=1000)
    search = BilevelSearch(estimator, cv=3, scoring="neg_log_loss", engine="jax").fit(X, y)
    low, high = search.bounds_["C"]
    grid = GridSearchCV(
        estimator, {"C": np.geomspace(low, high, 15)}, cv=3, scoring="neg_log_loss"
    ).fit(X, y)
    assert search.best_score_ >= grid.best_score_ - 1e-6
