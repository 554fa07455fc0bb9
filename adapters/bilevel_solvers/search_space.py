"""SearchSpace: hyperparameters, their bounds, and where to look first."""

import dataclasses
import numbers
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bilevel_solvers.search_folds import FoldData
from bilevel_solvers.search_models import ElasticNetModel, LinearModel

SQUARED = (1e-6, 1e2)
"""Bounds of a squared penalty a sample, over the features' mean squares: the lower one over
their median, the upper one over their mean."""
SPARSE = 1e-4
"""Least l1 penalty, over the least one that leaves no coefficient."""
RATIOS = (0.05, 1.0)
"""Bounds of the part of an elastic net that is l1."""

Bounds = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class SearchSpace:
    """A box in the hyperparameters, the strength of the penalty by its logarithm.

    - `strength`: the name of the one that scales the penalty.
    - `names`: those that are searched.
    - `bounds`: of each hyperparameter, as scikit-learn has them; of one that is not searched
        its value, twice.
    - `own`: what the estimator itself is set to, inside of them.
    - `size`: how many strengths there are: one, or one a feature.
    """

    strength: str
    names: tuple[str, ...]
    bounds: dict[str, Bounds]
    own: dict[str, float]
    size: int

    def theta(self, values: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
        """The outer variables of values as scikit-learn has them."""
        theta = {name: np.asarray(values[name], np.float64) for name in self.bounds}
        logarithm = np.log(theta[self.strength])
        theta[self.strength] = np.broadcast_to(logarithm, (self.size,)).copy()
        return theta

    def values(self, theta: Mapping[str, Any]) -> dict[str, Any]:
        """The way back: floats, and an array where each feature has its own."""
        found: dict[str, Any] = {}
        for name, bounds in self.bounds.items():
            part = np.asarray(theta[name], np.float64)
            # The logarithm of a bound is rounded.
            part = np.clip(np.exp(part) if name == self.strength else part, *bounds)
            found[name] = part if part.size > 1 else float(part.ravel()[0])
        return found

    @property
    def box(self) -> tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]:
        """Lower and upper bounds, like theta."""
        low, high = (
            self.theta({name: bounds[side] for name, bounds in self.bounds.items()})
            for side in (0, 1)
        )
        return low, high

    def scan(self, count: int) -> list[dict[str, float]]:
        """The estimator's own values, and a number of strengths, from much penalty to little."""
        low, high = self.bounds[self.strength]
        strengths = {self.own[self.strength]}
        if low < high:
            # Half a step inside: a minimum next to a bound is found from there.
            places = (np.arange(count) + 0.5) / max(count, 1)
            strengths |= set(np.exp(np.log(low) + places * np.log(high / low)).tolist())
        ordered = sorted(strengths, reverse=self.strength == "alpha")
        return [{**self.own, self.strength: value} for value in ordered]


def search_space(
    estimator: Any,
    names: tuple[str, ...],
    given: object,
    model: LinearModel,
    data: FoldData,
    *,
    per_feature: bool,
) -> SearchSpace:
    """The space that the user asked for.

    **Arguments:**

    - `names`: the estimator's hyperparameters, that of the strength first.
    - `given`: `None` for all of them, one name or several, or a mapping from names to
        bounds or `None`.
    - `model`, `data`: what default bounds are found from.

    **Raises:** `ValueError` for unknown names and bounds out of order or range, `TypeError`
    for anything else.
    """
    chosen = _chosen(given, names, type(estimator).__name__)
    bounds: dict[str, Bounds] = {}
    own: dict[str, float] = {}
    for name in names:
        value = _number(estimator, name)
        asked = chosen.get(name, (value, value))
        if asked is None:
            asked = RATIOS if name == "l1_ratio" else _strengths(model, data, estimator)
        bounds[name] = _ordered(name, asked, positive=name == names[0])
        own[name] = float(np.clip(value, *bounds[name]))
    size = len(data.centre) if per_feature else 1
    return SearchSpace(names[0], tuple(name for name in names if name in chosen), bounds, own, size)


def _number(estimator: Any, name: str) -> float:
    value = getattr(estimator, name)
    if not isinstance(value, numbers.Real):
        msg = (
            f"BilevelSearch: {name} of the estimator must be one number to start from, got "
            f"{value!r}. Use for example {name}=1.0."
        )
        raise TypeError(msg)
    return float(value)


def _chosen(given: object, names: tuple[str, ...], owner: str) -> dict[str, Any]:
    if given is None:
        return dict.fromkeys(names)
    chosen: dict[Any, Any]
    if isinstance(given, str):
        chosen = {given: None}
    elif isinstance(given, Mapping):
        chosen = dict(given)
    elif isinstance(given, list | tuple | set | frozenset):
        chosen = dict.fromkeys(given)
    else:
        msg = (
            "BilevelSearch: hyperparameters must be None, names, or a mapping from names to "
            f"(low, high), got {given!r}."
        )
        raise TypeError(msg)
    unknown = [name for name in chosen if name not in names]
    if unknown or not chosen:
        msg = (
            f"BilevelSearch: hyperparameters of {owner} can be {', '.join(names)}, got "
            f"{', '.join(map(repr, unknown)) or 'none'}."
        )
        raise ValueError(msg)
    return chosen


def _ordered(name: str, bounds: Any, *, positive: bool) -> Bounds:
    try:
        low, high = (float(bound) for bound in bounds)
    except (TypeError, ValueError):
        msg = f"BilevelSearch: bounds of {name} must be two numbers (low, high), got {bounds!r}."
        raise TypeError(msg) from None
    least = "above 0" if positive else "at least 0"
    inside = (low > 0 if positive else low >= 0) and low <= high < np.inf
    if not inside or (name == "l1_ratio" and high > 1):
        most = " and at most 1" if name == "l1_ratio" else ""
        msg = (
            f"BilevelSearch: {name} must be finite, {least}{most}, and its bounds in order, got "
            f"({low}, {high})."
        )
        raise ValueError(msg)
    return low, high


def _strengths(model: LinearModel, data: FoldData, estimator: Any) -> Bounds:
    """Bounds of alpha or C, from the scale of the data."""
    scale = data.shared.scale[: len(data.centre)].astype(np.float64)
    if isinstance(model, ElasticNetModel):
        # The least alpha that leaves nothing, in the fold that needs least.
        slopes = np.abs(data.folds.moment.astype(np.float64)) * scale
        most = float(slopes.max(axis=1).min()) / max(getattr(estimator, "l1_ratio", 1.0), RATIOS[0])
        most = most if most > 0 else 1.0
        return SPARSE * most, most
    total = float(np.mean(data.folds.total))
    low = SQUARED[0] * float(np.median(scale**2)) * total
    high = SQUARED[1] * float(np.mean(scale**2)) * total
    return (1 / high, 1 / low) if model.inverse else (low, high)
