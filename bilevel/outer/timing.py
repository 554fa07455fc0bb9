"""Timing: how much of a run's wall time its solves took."""

import time
from collections.abc import Callable

import equinox as eqx
import numpy as np
from jaxtyping import Array, Float
from scipy.optimize import nnls

from bilevel.outer.history import History
from bilevel.outer.processes.shared import shared
from bilevel.outer.update import REPORT
from bilevel.refinement.fidelity import Fidelity

_COUNTS = [REPORT.index("primal_iterations"), REPORT.index("adjoint_iterations")]
_LEAST_ROUNDS, _MOST_ROUNDS = 2, 10
_LEVER = 8
_LEVERS = 4
_CLEAR = 3.0
"""A difference that is so many times what rounds differ by was measured."""


def solver_seconds(
    update: Callable[[Fidelity], Float[Array, " report"]],
    fidelity: Fidelity,
    history: History,
    limit: float,
) -> float | None:
    """Wall time of all primal and adjoint iterations of a run.

    The update is one compiled program, whose parts no clock sees. But its budgets are
    arguments: the same program, run with few and with many iterations, tells what one
    iteration takes, and the history how many there were. What a solve does once (a
    factorisation, the set-up of a preconditioner) is not in it.

    **Arguments:**

    - `update`: at the parameters that the run ended with; its report.
    - `fidelity`: of the last epoch.
    - `history`: of the run.
    - `limit`: seconds that this may take.

    **Returns:** seconds, at most those of the updates; `None` where no solve reports its
    iterations, or what they take cannot be told from what else the update does in the time
    allowed.
    """
    done = np.array([history.total(name) or 0 for name in (REPORT[k] for k in _COUNTS)], float)
    updates = (history.total("updates") or 0) + (history.total("nonfinite") or 0)
    updating = float(history.total("seconds") or 0.0)
    lever, before = _LEVER, None
    # Processes that time together have to come to the same end: that of the first one's clock.
    limit, updating = shared([limit, updating])
    ends = time.perf_counter() + limit
    for _ in range(_LEVERS):
        settings = _settings(fidelity, lever)
        left = shared(ends - time.perf_counter())
        if not done.any() or _LEAST_ROUNDS * len(settings) * updating / max(updates, 1) > left:
            return None
        counts = np.array([np.asarray(update(setting), float)[_COUNTS] for setting in settings])
        if before is not None and np.array_equal(counts, before):
            return None  # a tolerance ends them: more iterations are not to be had
        cost = _cost(counts, _timed(update, settings, left / 2))
        if cost is not None:
            return float(min(cost @ done, updating))
        # Too few to stand out of an update that mostly does something else.
        lever, before = 8 * lever, counts
    return None


def _cost(
    counts: Float[np.ndarray, "settings 2"], rounds: Float[np.ndarray, "rounds settings"]
) -> Float[np.ndarray, " 2"] | None:
    """Seconds of a primal and of an adjoint iteration; `None` where they are not told."""
    seconds = np.min(rounds, axis=0)
    more, longer = counts[1:] - counts[0], seconds[1:] - seconds[0]
    if not np.isfinite(more).all() or not more.any():
        return None
    # How far the fastest of half of the rounds are from those of the other half.
    halves = np.min(rounds[::2], axis=0), np.min(rounds[1::2], axis=0)
    doubt = np.max(np.abs(halves[0] - halves[1]))
    if np.max(longer) <= _CLEAR * doubt:
        return None
    # A solve whose iterations no budget moves is taken to be as fast as the other.
    fixed = ~more.any(axis=0)
    cost, _ = nnls(more, longer)
    cost[fixed] = cost[~fixed].mean()
    return cost


def _settings(fidelity: Fidelity, lever: int) -> list[Fidelity]:
    """As little as there is, more primal iterations, and more of both."""
    budgets = [fidelity.budget]
    if fidelity.adjoint_budget is not None:
        budgets.append(fidelity.adjoint_budget)
    many = [max(int(budget.iterations), lever) for budget in budgets]
    return [
        _with_iterations(
            fidelity, [many[place] if place < count else 1 for place in range(len(many))]
        )
        for count in range(len(many) + 1)
    ]


def _with_iterations(fidelity: Fidelity, iterations: list[int]) -> Fidelity:
    def caps(tree: Fidelity) -> list[object]:
        both = [tree.budget, tree.adjoint_budget]
        return [budget.iterations for budget in both if budget is not None]

    # In the dtype that the update was compiled for.
    written = [
        np.asarray(number, np.asarray(old).dtype)
        for number, old in zip(iterations, caps(fidelity), strict=True)
    ]
    return eqx.tree_at(caps, fidelity, written)


def _timed(
    update: Callable[[Fidelity], Float[Array, " report"]], settings: list[Fidelity], limit: float
) -> Float[np.ndarray, "rounds settings"]:
    """Wall times of some rounds, in turn."""
    rounds: list[list[float]] = []
    began = time.perf_counter()
    while len(rounds) < _MOST_ROUNDS:
        spent = shared(time.perf_counter() - began)
        if len(rounds) >= _LEAST_ROUNDS and spent * (1 + 1 / len(rounds)) > limit:
            break
        row: list[float] = []
        for setting in settings:
            start = time.perf_counter()
            update(setting).block_until_ready()
            row.append(time.perf_counter() - start)
        rounds.append(row)
    return np.array(shared(rounds))
