"""BilevelSearch against a grid search of scikit-learn: score and time, compilation included."""

import statistics
import time
import warnings
from typing import Any, NamedTuple

import numpy as np

from benchmarks.harness import Report, apart

POINTS = 30
"""Of the grid, over eight decades."""


class Case(NamedTuple):
    """What is searched.

    - `name`: of the data set in scikit-learn.
    - `estimator`: "Ridge", "Lasso" or "LogisticRegression".
    - `scoring`: the scorer.
    - `settings`: of the estimator.
    """

    name: str
    estimator: str
    scoring: str
    settings: tuple[tuple[str, float], ...] = ()

    @property
    def title(self) -> str:
        """For the tables."""
        settings = "".join(f", {name}={value:g}" for name, value in self.settings)
        return f"{self.name}, {self.estimator}{settings}, {self.scoring}"


CONVERGED = (("tol", 1e-6), ("max_iter", 1000))
"""scikit-learn's default ends fits of digits so early that their scores are others."""

CASES = (
    Case("breast_cancer", "LogisticRegression", "accuracy"),
    Case("breast_cancer", "LogisticRegression", "neg_log_loss"),
    Case("diabetes", "Ridge", "r2"),
    Case("diabetes", "Lasso", "r2"),
    Case("digits", "LogisticRegression", "accuracy"),
    Case("digits", "LogisticRegression", "neg_log_loss"),
    Case("digits", "LogisticRegression", "accuracy", CONVERGED),
    Case("digits", "LogisticRegression", "neg_log_loss", CONVERGED),
)


class Measured(NamedTuple):
    """One process's figures: seconds, scores, and what the search took.

    - `score`: as the search says.
    - `judged`: of what it found, by scikit-learn's own fits, as the grid's.
    """

    first: float
    again: float
    grid: float
    score: float
    judged: float
    grid_score: float
    steps: int
    engine: str


def measure(case: Case, engine: str) -> Measured:
    """Both searches of one case, the first fit of the process first.

    Imports are not counted for either, nor is loading the data.  Columns of breast_cancer
    are standardised and pixels divided by 16, before the folds are made, for both alike.
    """
    from sklearn.model_selection import GridSearchCV, cross_val_score  # noqa: PLC0415

    from bilevel_solvers import BilevelSearch  # noqa: PLC0415

    X, y, estimator, name = _problem(case)
    estimator.fit(X, y)  # what scikit-learn imports late is not the search's
    grid = {name: np.logspace(-4, 4, POINTS)}
    with warnings.catch_warnings():
        # scikit-learn's solvers run into their caps at the weak end of the grid.
        warnings.simplefilter("ignore")
        searches: list[Any] = []
        seconds: list[float] = []
        for search in (
            BilevelSearch(estimator, scoring=case.scoring, engine=engine),
            BilevelSearch(estimator, scoring=case.scoring, engine=engine),
            GridSearchCV(estimator, grid, scoring=case.scoring),
        ):
            began = time.perf_counter()
            searches.append(search.fit(X, y))
            seconds.append(time.perf_counter() - began)
        ours, theirs = searches[0], searches[2]
        chosen = estimator.set_params(**ours.best_params_)
        judged = cross_val_score(chosen, X, y, scoring=case.scoring).mean()
    return Measured(
        seconds[0],
        seconds[1],
        seconds[2],
        float(ours.best_score_),
        float(judged),
        float(theirs.best_score_),
        int(ours.n_iter_),
        str(ours.engine_),
    )


def benchmark(quick: bool) -> Report:
    """Score at least the grid's, in less time, first fit included."""
    report = Report("search")
    table = report.table(
        f"the same five folds, {POINTS} points of a grid; seconds are medians of fresh processes",
        "data, estimator, scoring", "engine", "steps", "score", "judged", "grid's", "first fit s",
        "again s", "grid s", "first/grid", "again/grid",
    )  # fmt: skip
    rounds = 1 if quick else 3
    cases = [case for case in CASES if not (quick and case.name == "digits")]
    for case in cases:
        engines = ("auto",) if quick else ("auto", "jax")
        shown: set[str] = set()
        for engine in engines:
            report.say(f"{case.title}, engine {engine}")
            runs: list[Measured] = [apart(measure, case, engine) for _ in range(rounds)]
            one = runs[0]
            if one.engine in shown:
                continue
            shown.add(one.engine)
            first, again, grid = (
                statistics.median(getattr(run, part) for run in runs)
                for part in ("first", "again", "grid")
            )
            ratio, warm = (
                statistics.median(getattr(run, part) / run.grid for run in runs)
                for part in ("first", "again")
            )
            what = case.title
            table.add(
                what, one.engine, one.steps, f"{one.score:.6f}", f"{one.judged:.6f}",
                f"{one.grid_score:.6f}",
                first, again, grid, ratio, warm,
            )  # fmt: skip
            if engine == "auto":
                margin = one.judged - one.grid_score
                report.check(f"{what}: judged score over the grid's", margin, 0.0, at_least=True)
                if not quick:
                    report.check(f"{what}: time of the first fit over the grid's", ratio, 1.0)
    report.remarks.append(
        "score: of exact fits, as the search says; judged: what it found, by scikit-learn's own "
        "fits (cross_val_score), which is how the grid's score came about, too."
    )
    report.remarks.append(
        "engine numpy: small searches, evaluated without a compilation; engine jax: one compiled "
        "program for all folds and steps. The default takes the former where it is less work."
    )
    return report


def _problem(case: Case) -> tuple[np.ndarray, np.ndarray, Any, str]:
    from sklearn import datasets, linear_model  # noqa: PLC0415

    features, y = getattr(datasets, f"load_{case.name}")(return_X_y=True)
    if case.name == "breast_cancer":
        features = (features - features.mean(0)) / features.std(0)
    if case.name == "digits":
        features = features / 16.0
    estimator = getattr(linear_model, case.estimator)(**dict(case.settings))
    return features, y, estimator, "C" if hasattr(estimator, "C") else "alpha"
