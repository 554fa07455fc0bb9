"""Precision: what is single precision stays it, through a solve and its derivative."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from bilevel.budget import Budget
from bilevel.solver.base import default_tolerance
from bilevel.testing.conformance import Checklist, flat_norm
from bilevel.testing.sample import inexact, single_precision, stays_single
from bilevel.testing.subject import Subject


def check_single_precision(checklist: Checklist, subject: Subject) -> None:
    """Require a finite gradient in float32 of a subject in float32.

    **Raises:** `ConformanceError`.
    """
    parts = (subject.solver, subject.estimator, subject.problem, subject.theta, subject.x0)
    solver, estimator, problem, theta, x0 = single_precision(parts)
    name = "float32 stays float32"
    if not stays_single(problem, theta, x0):
        return
    adjoint_budget = subject.adjoint_budget
    narrow = dataclasses.replace(
        subject,
        solver=solver,
        estimator=estimator,
        problem=problem,
        theta=theta,
        x0=x0,
        budget=_loosened(subject.budget, x0),
        adjoint_budget=None if adjoint_budget is None else _loosened(adjoint_budget, x0),
    )
    moving = inexact(theta)
    gradient = jax.jit(narrow.gradient)(moving, x0, narrow.budget, narrow.adjoint_budget)[1]
    advice = "Make constants of the dtype of x; jnp.zeros(n) alone may be double precision."
    checklist.require_like(name, moving, gradient, advice)
    checklist.require(
        name, np.isfinite(flat_norm(gradient)), "a finite gradient", flat_norm(gradient), advice
    )
    checklist.hold(name)


def _loosened(budget: Budget, x: PyTree) -> Budget:
    rtol: Any = budget.rtol
    return eqx.tree_at(lambda b: b.rtol, budget, jnp.maximum(rtol, default_tolerance(x)))
