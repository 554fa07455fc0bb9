"""Conformance kit: what to run on an inner problem, a solver or an estimator of your own."""

from bilevel.testing.conformance import ConformanceError
from bilevel.testing.estimator import check_estimator
from bilevel.testing.inner_problem import check_inner_problem
from bilevel.testing.inner_solver import check_inner_solver
from bilevel.testing.taylor import TaylorResult, taylor_test

__all__ = [
    "ConformanceError",
    "TaylorResult",
    "check_estimator",
    "check_inner_problem",
    "check_inner_solver",
    "taylor_test",
]
