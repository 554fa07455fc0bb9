"""The diagnosis of a hypergradient: which of its two budgets is short."""

from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jaxtyping import PyTree

from bilevel.error.base import TruncationError
from bilevel.solution import Solution
from bilevel.status import Status

ENOUGH = 0.01
"""A part of the error below this share of the gradient's norm is no shortage."""

ALIKE = 3.0
"""Two parts of the error within this factor of one another are both named."""


def diagnosis(
    gradient: PyTree, primal: Solution, adjoint: Solution, error: TruncationError | None
) -> str:
    """A sentence that says which solve is short, and how both of them ended."""
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((gradient, primal, adjoint))):
        return "The numbers are traced: look at them outside jit, grad and vmap."
    solves = f"Primal: {primal.diagnosis} Adjoint: {adjoint.diagnosis}"
    failed = [
        name
        for name, solve in (("primal", primal), ("adjoint", adjoint))
        if np.any(np.asarray(solve.status) >= Status.DIVERGED)
    ]
    if failed:
        which = "both solves" if len(failed) == 2 else f"the {failed[0]} solve"
        where = "" if primal.status.ndim == 0 else " for some samples"
        return f"The gradient must not be used{where}: {which} failed. {solves}"
    if error is None:
        return f"What stopping early cost was not estimated (error=False). {solves}"
    return f"{_shortage(_norms(gradient, primal.status), error, adjoint)} {solves}"


def _shortage(norms: np.ndarray, error: TruncationError, adjoint: Solution) -> str:
    """The sentence for one gradient, or the worst of a batch."""
    parts = np.stack([np.ravel(part) for part in (error.primal, error.adjoint, error.total)])
    worst = int(np.argmax(parts[2] / np.where(norms > 0, norms, 1.0)))
    prefix = f"Of {norms.size} samples number {worst} is off the most. " if norms.size > 1 else ""
    norm, parts = float(norms[worst]), parts[:, worst]
    if not np.all(np.isfinite(parts)):
        return f"{prefix}The error could not be estimated, and may be of any size."
    if norm == 0:
        return f"{prefix}The gradient is zero, with an error of about {parts[2]:.1e}."
    ran = np.any(np.asarray(adjoint.status) != Status.NOT_RUN)
    other = "adjoint" if ran else "derivative"
    shares = {"primal": parts[0] / norm, other: parts[1] / norm}
    said = f"{_percent(shares['primal'])} of the gradient's norm, the {other}'s"
    said = f"{said} {_percent(shares[other])}"
    largest = max(shares.values())
    short = [name for name, share in shares.items() if share > max(ENOUGH, largest / ALIKE)]
    if not short:
        return f"{prefix}Neither solve is short: the primal's part of the error is {said}."
    advice = {"primal": "budget=", "adjoint": "adjoint_budget=", "derivative": "budget="}
    raised = " and ".join(dict.fromkeys(advice[name] for name in short))
    subject = "Both solves are" if len(short) == 2 else f"The {short[0]} solve is"
    if short == ["derivative"]:
        subject = "The derivative of the iteration is"
    return f"{prefix}{subject} short: the primal's part of the error is {said}. Raise {raised}."


def _norms(gradient: PyTree, like: Any) -> np.ndarray:
    """Euclidean norm over all leaves, one for each sample of a batch."""
    leaves = [np.asarray(leaf).reshape(like.size, -1) for leaf in jax.tree.leaves(gradient)]
    return np.sqrt(sum((np.abs(leaf) ** 2).sum(axis=1) for leaf in leaves) + np.zeros(like.size))


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 1 else f"{100 * share:.0f} %"
