"""SearchPath: the outer steps of a search, and what was found at each."""

import dataclasses
import time
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree
from numpy.typing import NDArray
from scipy.optimize import minimize
from sklearn.exceptions import ConvergenceWarning

import bilevel as bl
from bilevel_solvers.scipy_bridge import NonFiniteEvaluationError, ScipyObjective
from bilevel_solvers.search_estimators import Prepared
from bilevel_solvers.search_host import host_evaluation
from bilevel_solvers.search_space import SearchSpace
from bilevel_solvers.search_step import evaluate

TOLERANCE = 1e-8
"""Relative tolerance of the inner solves."""
KRYLOV_TOLERANCE = 1e-6
"""And where every digit takes iterations."""
FLAT = 1e-3
"""Part of its first norm below which the gradient ends the descent."""
RISES = 2
"""So many scanned losses in a row above the lowest end the scan."""
POLISH_STRIDE = 0.7
"""First stride in the logarithm of the strength, where the score is followed."""
MOST_ITERATIONS = 10_000


@dataclasses.dataclass(frozen=True)
class Step:
    """One evaluation of the cross-validation loss.

    - `values`: the hyperparameters, as scikit-learn has them.
    - `loss`: the smooth loss whose derivative is followed.
    - `gradient_norm`: Euclidean, in the logarithm of the strength; NaN in the scan, which
        solves no adjoint.
    - `error`: estimated truncation error of the gradient; NaN where none was estimated.
    - `scores`: of each fold, by the scorer.
    - `iterations`: of the inner solves, summed over the folds.
    - `seconds`: evaluation and scores.
    - `stage`: "scan", "descent" or "polish".
    """

    values: dict[str, Any]
    loss: float
    gradient_norm: float
    error: float
    scores: NDArray[np.float64]
    iterations: int
    seconds: float
    stage: str


class SearchPath:
    """Scan the strength of the penalty, then descend from the best of it by L-BFGS-B.

    The loss of a cross-validation has flat ends and may have more than one minimum, so a
    derivative alone could go the wrong way.  In the scan no adjoint is solved; each fit
    starts at the solution of the one before.  Where the score
    is something else than the loss, it has the last word: a few steps more go up and down
    with the strength from where it is best.

    **Arguments:**

    - `prepared`, `space`: what is solved, and where.
    - `score`: a stack of inner solutions -> the score of each fold.
    - `controller`: of progressive refinement during the descent, or `None`.
    - `host`: whether to evaluate in NumPy.
    """

    def __init__(
        self,
        prepared: Prepared,
        space: SearchSpace,
        score: Callable[[NDArray[Any]], NDArray[np.float64]],
        controller: bl.Controller[Any] | None,
        *,
        host: bool,
    ):
        self.space = space
        self.steps: list[Step] = []
        self.failures = 0
        self.message = ""
        self._score = score
        self._controller = controller
        data = prepared.data
        dtype = np.dtype(np.float64)
        if not host:
            dtype = jax.dtypes.canonicalize_dtype(data.shared.features.dtype)
        # Single precision does not reach further.
        reach = 4 * float(np.finfo(dtype).eps) ** (2 / 3)
        wanted = KRYLOV_TOLERANCE if prepared.model.iterative else TOLERANCE
        self._fine = _budget(max(wanted, reach))
        # Without any adjoint iteration the gradient would be unknown, hence NaN.
        self._value_only = self._fine, bl.Budget(iterations=1)
        start = space.theta(space.own)
        folds = host_evaluation(prepared) if host else None

        def evaluated(
            theta: PyTree, x0: PyTree, adjoint_guess: PyTree | None, fidelity: bl.Fidelity | None
        ) -> bl.Hypergradient:
            if folds is not None:
                return folds(theta, x0, fidelity)
            return evaluate(
                prepared.model,
                data.shared,
                data.folds,
                theta,
                x0,
                adjoint_guess,
                _plain(fidelity or bl.Fidelity(self._fine), self._fine),
                error=controller is not None,
            )

        self._objective = ScipyObjective(
            evaluated,
            {name: part.astype(dtype) for name, part in start.items()},
            prepared.start,
            budget=self._value_only[0],
            adjoint_budget=self._value_only[1],
        )

    def run(self, scan: int, most_steps: int, tolerance: float, polish: int) -> None:
        """Do all of it.

        **Arguments:**

        - `scan`: strengths to try; `most_steps`, `tolerance`: of the descent.
        - `polish`: steps that are spent on the score itself, where it is not the loss.

        **Raises:** `NonFiniteEvaluationError` where no step at all succeeded.
        """
        self._scan(scan)
        if most_steps > 0:
            self._descend(most_steps, tolerance)
        if polish > 0:
            self._polish(polish)

    def _scan(self, count: int) -> None:
        failed: NonFiniteEvaluationError | None = None
        rises = 0
        for values in self.space.scan(count):
            lowest = min((step.loss for step in self.steps), default=np.inf)
            try:
                loss, _ = self._step(self._objective.flat(self.space.theta(values)), "scan")
            except NonFiniteEvaluationError as error:
                self.failures, failed = self.failures + 1, error
                continue
            rises = rises + 1 if loss > lowest else 0
            # The less penalty, the more iterations: past the minimum they are spared.
            if rises == RISES:
                break
        if not self.steps and failed is not None:
            raise failed

    def _polish(self, most: int) -> None:
        """Go to where the scorer, which has no derivative, finds the penalty's strength better."""
        objective = self._objective
        objective.controller = None
        objective.budget, objective.adjoint_budget = self._value_only
        stride, spent = POLISH_STRIDE, 0
        low, high = self.space.box
        name = self.space.strength
        while spent < most and stride > POLISH_STRIDE / 32:
            before = self.best()
            centre = self.space.theta(self.steps[before].values)
            for direction in (-stride, stride):
                moved = np.clip(centre[name] + direction, low[name], high[name])
                if spent == most or self._seen({**centre, name: moved}):
                    continue
                spent += 1
                try:
                    self._step(objective.flat({**centre, name: moved}), "polish")
                except NonFiniteEvaluationError:
                    self.failures += 1
            if self.best() == before:
                stride /= 2

    def _seen(self, theta: dict[str, NDArray[Any]]) -> bool:
        """Whether there was a step there, but for rounding."""
        flat = self._objective.flat(theta)
        return any(
            np.allclose(flat, self._objective.flat(self.space.theta(step.values)), atol=1e-3)
            for step in self.steps
        )

    def best(self) -> int:
        """The step with the highest mean score; of several, that with the lowest loss."""
        means = np.array([float(np.mean(step.scores)) for step in self.steps])
        losses = np.array([step.loss for step in self.steps])
        usable = np.where(np.isnan(means), -np.inf, means)
        tied = usable >= usable.max() - 1e-12 * abs(usable.max())
        return int(np.argmin(np.where(tied, losses, np.inf)))

    def _descend(self, most_steps: int, tolerance: float) -> None:
        objective = self._objective
        first = min(self.steps, key=lambda step: step.loss)
        if self._controller is None:
            objective.budget = objective.adjoint_budget = self._fine
        else:
            objective.controller = self._controller
            objective.state = self._controller.init()
        low, high = (objective.flat(side) for side in self.space.box)
        start = objective.flat(self.space.theta(first.values))
        unit = 0.0

        def scaled(flat: NDArray[Any]) -> tuple[float, NDArray[np.float64]]:
            # In a box L-BFGS-B begins with a step as long as the gradient: so it is made one.
            nonlocal unit
            value, gradient = self._step(flat, "descent")
            unit = unit or float(np.linalg.norm(gradient)) or 1.0
            return value / unit, gradient / unit

        try:
            found = minimize(
                scaled,
                start,
                jac=True,
                method="L-BFGS-B",
                bounds=list(zip(low, high, strict=True)),
                options={
                    "maxiter": most_steps,
                    "maxfun": most_steps,
                    "ftol": tolerance,
                    "gtol": FLAT,
                },
            )
            self.message = str(found.message)
        except NonFiniteEvaluationError as error:
            self.failures += 1
            self.message = f"An inner solve failed: {error}"
            warnings.warn(
                f"BilevelSearch: the descent ended early, the best step so far is kept. {error}",
                ConvergenceWarning,
                stacklevel=4,
            )

    def _step(self, flat: NDArray[Any], stage: str) -> tuple[float, NDArray[np.float64]]:
        began = time.perf_counter()
        value, gradient = self._objective(flat)
        last = self._objective.history[-1]
        scores = self._score(np.asarray(self._objective.x))
        self.steps.append(
            Step(
                self.space.values(self._objective.theta(flat)),
                value,
                last.gradient_norm if stage == "descent" else np.nan,
                last.error if stage == "descent" else np.nan,
                scores,
                last.primal_iterations + last.adjoint_iterations,
                time.perf_counter() - began,
                stage,
            )
        )
        return value, gradient


def _budget(rtol: float) -> bl.Budget:
    return bl.Budget(iterations=MOST_ITERATIONS, rtol=rtol)


def _plain(fidelity: bl.Fidelity, default: bl.Budget) -> bl.Fidelity:
    """Both budgets as arrays and nothing else, so that one program serves all of them."""

    def arrays(budget: bl.Budget) -> bl.Budget:
        return bl.Budget(
            jnp.asarray(budget.iterations, jnp.int32),
            jnp.asarray(budget.rtol, float),
            jnp.asarray(budget.atol, float),
        )

    adjoint = fidelity.adjoint_budget
    return bl.Fidelity(arrays(fidelity.budget), arrays(default if adjoint is None else adjoint))
